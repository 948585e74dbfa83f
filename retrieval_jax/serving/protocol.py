"""One connection: uvicorn's HTTP protocol, with bounds for clients that send or read too slowly or too much.

uvicorn itself waits forever for the rest of a request and for a reader, and keeps a head of any length.
"""

import asyncio
import collections
import json

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD = 1 << 16  # bytes of a request line with its headers, beyond what one read brings
MAX_CONNECTIONS = 2048
MAX_UNSENT = 64 << 20  # bytes that slow readers have not read, of all connections
READ_SECONDS = 20  # for a whole request
WRITE_SECONDS = 20  # without any progress of a reader
LINGER_SECONDS = 1  # a refused client may go on sending so long, or it would not see why


class Protocol(HttpToolsProtocol):
    """A connection; see the module."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        state = self.server_state
        if not hasattr(state, "slow"):
            state.slow = collections.OrderedDict()  # connection -> the bytes that it has not read
            state.draining = False
        self._head: int | None = 0  # bytes of a head so far; None in bodies and between requests
        self._refused = False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins a connection, if there are not too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections: ask again later")
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends a connection."""
        self._cancel()
        self.server_state.slow.pop(self, None)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on, unless the head gets too long."""
        if self._refused:
            return
        super().data_received(data)
        if self._head is not None and not self._refused:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(431, f"the address and headers are longer than {MAX_HEAD:,} bytes: send a POST")

    def on_message_begin(self) -> None:
        """Begins a request."""
        super().on_message_begin()
        self._head = 0
        self._await_request()

    def on_headers_complete(self) -> None:
        """Begins to answer. At the server's end, the connection ends with this response."""
        self._head = None
        super().on_headers_complete()
        if self.server_state.draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """Has read a request."""
        if self._reading:
            self._reading.cancel()
            self._reading = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Waits for a slow reader, some time; with too many, the one that is slow for longest must go."""
        super().pause_writing()
        slow = self.server_state.slow
        slow[self] = self.transport.get_write_buffer_size()
        self._await_reader(slow[self])
        while sum(slow.values()) > MAX_UNSENT:
            oldest, _ = slow.popitem(last=False)
            oldest.transport.abort()

    def resume_writing(self) -> None:
        """Goes on with a reader."""
        super().resume_writing()
        self.server_state.slow.pop(self, None)
        if self._writing:
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        """Ends an idle connection, also one whose client has not read the last response."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is not HTTP."""
        self._refuse(400, msg)

    def _await_request(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def _await_reader(self, unread: int) -> None:
        """Ends the connection if the client reads nothing for WRITE_SECONDS."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left >= unread:
                self.transport.abort()
            else:
                self._await_reader(left)

        self._writing = self.loop.call_later(WRITE_SECONDS, check)

    def _cancel(self) -> None:
        for timer in (self._reading, self._writing):
            if timer:
                timer.cancel()

    def _refuse(self, status: int, error: str) -> None:
        """Sends an error, and ignores what the client still sends for LINGER_SECONDS."""
        self._refused = True
        body = json.dumps({"error": error}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(
            body
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)
