"""One connection: uvicorn's HTTP protocol, with bounds for clients that send or read too slowly or too much.

uvicorn itself waits forever for the rest of a request and for a reader, and keeps a head of any length.
"""

import asyncio
import json
import time

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

MAX_HEAD = 1 << 16  # bytes of a request line with its headers, beyond what one read brings
MAX_CONNECTIONS = 2048
MAX_UNSENT = 64 << 20  # bytes that readers have not read, of all connections: then patience ends
READ_SECONDS = 20  # for a whole request
WRITE_SECONDS = 20  # without any progress of a reader
STALL_SECONDS = 1  # the same, while there are more than MAX_UNSENT; progress is looked for so often
LINGER_SECONDS = 1  # a refused client may go on sending so long, or it would not see why


class Protocol(HttpToolsProtocol):
    """A connection; see the module."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        state = self.server_state
        if not hasattr(state, "slow"):
            state.slow = set()  # connections whose clients have not read all that was sent
            state.draining = False
        self._head: int | None = 0  # bytes of a head so far; None in bodies and between requests
        self._begun = False  # whether the last read began a head
        self._answered = False  # whether a response is complete that the client has not read yet
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
        self.server_state.slow.discard(self)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on, unless the head gets too long."""
        if self._refused:
            return
        if self.cycle is None or self.cycle.response_complete:
            self._await_request()
        self._begun = False
        super().data_received(data)
        if self._head is not None and not self._begun and not self._refused:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse(431, f"the address and headers are longer than {MAX_HEAD:,} bytes: send a POST")

    def on_message_begin(self) -> None:
        """Begins a request."""
        super().on_message_begin()
        self._head, self._begun = 0, True
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
        """Waits for a reader, some time, and meanwhile reads no further request of it."""
        super().pause_writing()
        self.flow.pause_reading()
        self.server_state.slow.add(self)
        self._await_reader()

    def resume_writing(self) -> None:
        """Goes on with a reader."""
        super().resume_writing()
        self.server_state.slow.discard(self)
        if self._answered:
            self._answered = False
            self.on_response_complete()

    def on_response_complete(self) -> None:
        """Goes on with the next request, once the client has read this response."""
        self._await_reader()
        if self.flow.write_paused:
            self._answered = True
        else:
            super().on_response_complete()

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

    def _await_reader(self) -> None:
        """While something is not sent yet, ends the connection if the client reads nothing for some time."""
        if self._writing is None and (unread := self.transport.get_write_buffer_size()):
            self._check_later(unread, time.monotonic())

    def _check_later(self, unread: int, since: float) -> None:
        """Looks for progress later, where a client has not read `unread` bytes, and none of them `since`."""
        self._writing = self.loop.call_later(STALL_SECONDS, self._check_reader, unread, since)

    def _check_reader(self, unread: int, since: float) -> None:
        left, now = self.transport.get_write_buffer_size(), time.monotonic()
        patience = STALL_SECONDS if unsent(self.server_state) > MAX_UNSENT else WRITE_SECONDS
        if left == 0:
            self._writing = None
        elif left < unread:
            self._check_later(left, now)
        elif now - since >= patience:
            self.transport.abort()
        else:
            self._check_later(unread, since)

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


def unsent(state: ServerState) -> int:
    """Returns the bytes of responses that clients have not read yet, of all connections."""
    slow = getattr(state, "slow", ())
    return sum(connection.transport.get_write_buffer_size() for connection in slow)
