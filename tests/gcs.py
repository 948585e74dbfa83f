"""Google Cloud Storage on loopback, for tests: as much as TensorFlow's file layer and tensorstore ask for.

`Bucket.serve()` starts it in a process of its own (`python gcs.py CERTIFICATE`). Nothing is patched: the
libraries' own clients send their own requests. tensorstore and Google's client are told the address.
TensorFlow has none to set: it reaches www.googleapis.com through an HTTPS proxy, which this server is, too,
with a certificate of its own.

Objects are kept in memory. GET /objects/BUCKET?prefix=… lists {name: size}; POST /hold?end=… leaves uploads
of names that end so unanswered, so that a client can be killed there, and GET /held tells how many wait. The
buckets `missing` and `forbidden` are what they are called; any other is there.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

HOSTS = ("www.googleapis.com", "storage.googleapis.com")
PAGE = 20  # names in a listing: few, so that clients must ask for more


class Store:
    """Objects by (bucket, name): (contents, generation, when it was written)."""

    def __init__(self):
        self.objects: dict[tuple[str, str], tuple[bytes, int, str]] = {}
        self.sessions: dict[str, tuple[str, str, bytearray]] = {}  # of resumable uploads
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.held_end: str | None = None
        self.held = 0

    def put(self, bucket: str, name: str, data: bytes) -> dict:
        if self.held_end and name.endswith(self.held_end):
            self.held += 1
            time.sleep(3600)
        with self.lock:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            self.objects[bucket, name] = (data, next(self.numbers), now)
        return self.about(bucket, name)

    def about(self, bucket: str, name: str) -> dict:
        data, generation, updated = self.objects[bucket, name]
        return {
            "name": name,
            "bucket": bucket,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": updated,
        }

    def listing(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found: dict[str, bool] = {}  # name or prefix -> whether it is a prefix
        for of, name in sorted(self.objects):
            if of == bucket and name.startswith(prefix):
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                found[prefix + head + cut if cut else name] = bool(cut)
        after, size = query.get("pageToken", ""), int(query.get("maxResults", PAGE))
        after = max(after, query.get("startOffset", ""))
        names = [name for name in sorted(found) if name > after or name == query.get("startOffset")]
        page = names[: min(size, PAGE)]
        told = {
            "items": [self.about(bucket, name) for name in page if not found[name]],
            "prefixes": [name for name in page if found[name]],
        }
        return told | ({"nextPageToken": page[-1]} if len(names) > len(page) else {})


class Handler(BaseHTTPRequestHandler):
    """The JSON API, the XML API's GET, and CONNECT."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each answer would wait for 40 ms
    store: Store
    certificate: str

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        self.connection = context.wrap_socket(self.connection, server_side=True)
        self.setup_streams()
        self.close_connection = False

    def setup_streams(self):
        self.rfile = self.connection.makefile("rb", -1)
        self.wfile = self.connection.makefile("wb", 0)

    def respond(self, status: int, body: bytes | dict = b"", **headers: str):
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        store, body = self.store, self.body()
        url = urlsplit(self.path)
        if found := re.search(r"/b/(missing|forbidden)\b", url.path):
            code = {"missing": 404, "forbidden": 403}[found[1]]
            return self.respond(code, {"error": {"code": code, "message": f"this bucket is {found[1]}"}})
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        path = url.path
        if path == "/hold":
            store.held_end, store.held = query.get("end"), 0
            return self.respond(200, {})
        if path == "/held":
            return self.respond(200, {"held": store.held})
        if found := re.fullmatch("/objects/([^/]+)", path):
            there = {name: len(data) for (of, name), (data, *_) in store.objects.items() if of == found[1]}
            return self.respond(
                200, {n: s for n, s in there.items() if n.startswith(query.get("prefix", ""))}
            )
        if found := re.fullmatch("/upload/storage/v1/b/([^/]+)/o", path):
            return self.upload(found[1], query, body)
        if found := re.fullmatch(
            "/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path
        ):
            bucket, name, to_bucket, to_name = map(unquote, found.groups())
            if (bucket, name) not in store.objects:
                return self.respond(404, {"error": {"code": 404}})
            about = store.put(to_bucket, to_name, store.objects[bucket, name][0])
            return self.respond(200, {"done": True, "resource": about})
        if found := re.fullmatch("/storage/v1/b/([^/]+)/o/([^/]+)", path):
            return self.object(unquote(found[1]), unquote(found[2]), query.get("alt") == "media")
        if found := re.fullmatch("/storage/v1/b/([^/]+)/o", path):
            return self.respond(200, store.listing(found[1], query))
        if found := re.fullmatch("/storage/v1/b/([^/]+)", path):
            return self.respond(200, {"name": found[1], "location": "NOWHERE"})
        if found := re.fullmatch("/([^/]+)/(.+)", path):
            return self.object(unquote(found[1]), unquote(found[2]), True)
        return self.respond(404, {"error": {"code": 404}})

    def object(self, bucket: str, name: str, contents: bool):
        with self.store.lock:
            there = self.store.objects.get((bucket, name))
            wanted = self.query_generation()
            if there and wanted is not None and wanted != there[1]:
                return self.respond(412, {"error": {"code": 412}})
            if there and self.command == "DELETE":
                del self.store.objects[bucket, name]
        if not there:
            return self.respond(404, {"error": {"code": 404, "message": "no such object"}})
        if self.command == "DELETE":
            return self.respond(204)
        if not contents:
            return self.respond(200, self.store.about(bucket, name))
        data, generation, _ = there
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = (int(n) if n else None for n in found.groups())
            if first is None:
                first, last = max(len(data) - last, 0), len(data) - 1
            last = len(data) - 1 if last is None else min(last, len(data) - 1)
            if first >= len(data):
                return self.respond(416, **headers)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.respond(206, data[first : last + 1], **headers)
        return self.respond(200, data, **headers)

    def query_generation(self) -> int | None:
        found = re.search(r"[?&]ifGenerationMatch=(\d+)", self.path)
        return int(found[1]) if found else None

    def upload(self, bucket: str, query: dict[str, str], body: bytes):
        store, kind = self.store, query.get("uploadType")
        wanted = self.query_generation()
        if wanted is not None and "upload_id" not in query:
            there = store.objects.get((bucket, query.get("name", "")))
            if wanted != (there[1] if there else 0):
                return self.respond(412, {"error": {"code": 412}})
        if kind == "resumable" and "upload_id" not in query:
            session = str(next(store.numbers))
            name = query.get("name") or json.loads(body)["name"]
            store.sessions[session] = (bucket, name, bytearray())
            base = f"https://{HOSTS[0]}/upload/storage/v1/b/{bucket}/o"
            return self.respond(200, Location=f"{base}?uploadType=resumable&upload_id={session}")
        if kind == "resumable":
            bucket, name, data = store.sessions[query["upload_id"]]
            _, span, total = re.fullmatch(
                r"bytes (\*|(\d+-\d+))/(\*|\d+)", self.headers.get("Content-Range", "bytes */*")
            ).groups()
            if span:
                first = int(span.split("-")[0])
                data[first:] = body
            elif body:
                data[:] = body
            if (total == "*" and not span) or (total != "*" and len(data) >= int(total)):
                return self.respond(200, store.put(bucket, name, bytes(data)))
            return self.respond(308, **({"Range": f"bytes=0-{len(data) - 1}"} if data else {}))
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, data, _ = body.split(b"--" + boundary)
            name = json.loads(about.split(b"\r\n\r\n", 1)[1])["name"]
            return self.respond(200, store.put(bucket, name, data.split(b"\r\n\r\n", 1)[1][:-2]))
        return self.respond(200, store.put(bucket, query["name"], body))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def log_message(self, *args):
        if log := os.environ.get("GCS_LOG"):
            with open(log, "a") as file:
                file.write(f"{self.command} {self.path} {self.headers.get('Range', '')}{args[1:]}\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that was killed, or does not trust the certificate, is no news."""


def certify(path: Path) -> None:
    """Writes a key and a certificate for Google's hosts, signed by itself and valid for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now - day, now + day
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket of the server, as tests look at it."""

    address: str
    certificate: Path
    name: str = "bucket"

    @classmethod
    @contextlib.contextmanager
    def serve(cls, folder: Path) -> Iterator["Bucket"]:
        """Starts the server; the certificate goes to a folder."""
        certificate = folder / "certificate.pem"
        certify(certificate)
        server = subprocess.Popen([sys.executable, __file__, certificate], stdout=subprocess.PIPE, text=True)
        try:
            yield cls(server.stdout.readline().strip(), certificate)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes the libraries ask this server, without credentials."""
        return {
            "https_proxy": self.address,
            "no_proxy": "127.0.0.1,localhost",  # gRPC between processes
            "CURL_CA_BUNDLE": str(self.certificate),
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "STORAGE_EMULATOR_HOST": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
            "NO_GCE_CHECK": "true",
            "GCE_METADATA_HOST": urlsplit(self.address).netloc,
            "GCE_METADATA_ROOT": urlsplit(self.address).netloc,
        }

    def objects(self, prefix: str = "") -> dict[str, int]:
        """{name: size}."""
        return json.loads(self._ask(f"/objects/{self.name}?prefix={quote(prefix)}"))

    def read(self, name: str) -> bytes:
        return self._ask(f"/{self.name}/{quote(name)}")

    def kill_at(self, end: str, command: list[str], **kwargs: object) -> None:
        """Runs a command and kills it as it uploads an object whose name ends so, which is then not there."""
        self._ask(f"/hold?end={quote(end)}", "POST")
        with subprocess.Popen(command, **kwargs) as process:
            while not json.loads(self._ask("/held"))["held"]:
                assert process.poll() is None, f"the command ended, and uploaded no {end}"
                time.sleep(0.05)
            process.kill()
        self._ask("/hold", "POST")

    def _ask(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(self.address + path, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            return answer.read()


def main() -> None:
    Handler.store, Handler.certificate = Store(), sys.argv[1]
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
