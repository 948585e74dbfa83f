"""A Hugging Face hub on loopback, for tests: as much of its protocol as huggingface_hub asks for.

Nothing is patched: the library sends its own requests to HF_ENDPOINT. A repository has branches; each state
of a branch is a commit, which stays when the branch moves on.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = re.compile(rf"/api/models/{_REPO}(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?/?")
_FILE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclasses.dataclass
class Hub:
    """The server: what it has, and what it was asked for.

    Attributes:
      address: its HF_ENDPOINT.
      commits: (repository, commit) -> {path: content}.
      branches: (repository, branch) -> commit.
      token: the bearer token that opens gated repositories.
      gated: repositories whose files only that token opens; everybody may list them, as at the real hub.
      cut: a path whose content ends in the middle, whenever it is asked for.
      fetched: paths of the files that were downloaded, in order.
    """

    address: str = ""
    commits: dict[tuple[str, str], dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    token: str = "hf_a_token"
    gated: set[str] = dataclasses.field(default_factory=set)
    cut: str | None = None
    fetched: list[str] = dataclasses.field(default_factory=list)

    def push(self, repo: str, files: Mapping[str, bytes] | Path, branch: str = "main") -> str:
        """Makes a commit of files (or of all those of a folder), to which a branch moves; gives its name."""
        if isinstance(files, Path):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        content = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[repo, commit] = dict(files)
        self.branches[repo, branch] = commit
        return commit

    @classmethod
    @contextlib.contextmanager
    def serve(cls) -> Iterator["Hub"]:
        """Runs a hub in a thread of this process."""
        hub = cls()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        server.daemon_threads = True
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        asked = _API.fullmatch(path) or _FILE.fullmatch(path)
        if asked is None:
            return self._refuse(404, "EntryNotFound")
        repo, revision = asked["repo"], unquote(asked["revision"] or "main")
        if not any(known == repo for known, _ in self.hub.commits):
            return self._refuse(401, "RepoNotFound")  # the real hub does not say which names are taken
        commit = self.hub.branches.get((repo, revision), revision)
        files = self.hub.commits.get((repo, commit))
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if "path" not in asked.groupdict():
            return self._describe(repo, commit, files, asked["what"])
        if repo in self.hub.gated and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._refuse(401 if self.headers["Authorization"] is None else 403, "GatedRepo")
        name = unquote(asked["path"])
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        return self._send_file(name, files[name], commit)

    def _describe(self, repo: str, commit: str, files: Mapping[str, bytes], what: str | None) -> None:
        if what == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
        else:
            siblings = [{"rfilename": path} for path in files]
            listed = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False}
        self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        headers |= {"Accept-Ranges": "bytes", "Content-Length": str(len(data))}
        status, start = 200, 0
        if part := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            status, start = 206, int(part[1])
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            headers |= {"Content-Length": str(len(data) - start)}
        if self.command == "GET":
            self.hub.fetched.append(name)
        if name == self.hub.cut and self.command == "GET":
            self._send(status, data[start : (start + len(data)) // 2], headers)
            self.close_connection = True
            return
        self._send(status, data[start:], headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "Content-Length": "0"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
