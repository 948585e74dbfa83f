"""The process: uvicorn with its signals, and its end without losing a request."""

import asyncio
import contextlib
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import uvicorn

from retrieval_jax.core.errors import UserError
from retrieval_jax.core.progress import log
from retrieval_jax.serving.app import create_app
from retrieval_jax.serving.catalogue import Catalogue
from retrieval_jax.serving.protocol import MAX_CONNECTIONS, WRITE_SECONDS, Protocol, unsent

GRACE = 0.5  # seconds in which open connections may still send a request, after SIGTERM
SWITCH_INTERVAL = 0.0005  # seconds that a searcher's thread may keep the event loop from Python


class Server(uvicorn.Server):
    """uvicorn's server, which ends with status 0 on SIGTERM, and opens changed searchers on SIGHUP.

    Args:
      config: uvicorn's.
      catalogue: the searchers.
    """

    def __init__(self, config: uvicorn.Config, catalogue: Catalogue):
        super().__init__(config)
        self.catalogue = catalogue
        catalogue.unsent = lambda: unsent(self.server_state)
        self._tasks: set[asyncio.Task] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals in the event loop; uvicorn would raise them again after the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begins the end: /ready says so at once, and each connection ends with its next response."""
        self.catalogue.closing = self.server_state.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends: takes no new connection, answers what open ones have sent, and then closes them."""
        for server in self.servers:
            server.close()
        until = time.monotonic() + GRACE
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Ends if a searcher could not be opened at the start."""
        return await super().on_tick(counter) or self.catalogue.failure is not None

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._open_changed())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open_changed(self) -> None:
        outcomes = await self.catalogue.open_changed()
        for name, failure in outcomes.items():
            log(f"{name}: not opened, the earlier one stays: {failure}" if failure else f"{name}: opened")
        log(f"looked for changes: {len(outcomes)} of {len(self.catalogue.folders)} searchers have changed")

    def _log_started_message(self, listeners: Sequence[socket.socket]) -> None:
        """Says where it listens, and, when all searchers are warm, that it is ready."""
        host, port = listeners[0].getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log(f"listening: {address} (opening {', '.join(self.catalogue.folders)})")
        self.catalogue.on_ready = lambda: log(f"ready: {address}")


def serve_forever(catalogue: Catalogue, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
      catalogue: the searchers.
      host: the address to listen on.
      port: the port; 0 for any that is free.

    Raises:
      UserError: the address cannot be used, or a searcher cannot be opened.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    _allow_files(MAX_CONNECTIONS + 1024)
    config = uvicorn.Config(
        create_app(catalogue),
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        access_log=False,
        proxy_headers=False,  # nothing here depends on the client's address
        log_level="error",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=round(catalogue.settings.batching.deadline) + WRITE_SECONDS,
    )
    try:
        Server(config, catalogue).run()
    except SystemExit:  # uvicorn has logged the reason
        raise UserError(
            f"serve.host, serve.port: {host}:{port} cannot be listened on: choose others"
        ) from None
    if catalogue.failure:
        raise UserError(catalogue.failure)


def _allow_files(count: int) -> None:
    """Raises the number of files that this process may have open, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
