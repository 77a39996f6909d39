"""One response's stream of server-sent events, as it passes the front.

vLLM makes the events; here they are only counted. Added is what vLLM can't know: that a
call goes on on another worker, as a comment, which clients do not see; how many tokens' KV
were moved, in the details of the usage; and the error that ends a stream into which
something raised.
"""

from __future__ import annotations

from coordinator.api.errors import error_events
from coordinator.api.exchange import Exchange, Failure

CONTENT_TYPE = "text/event-stream"
END_OF_EVENT = b"\n\n"
USAGE_DETAILS = (b'"prompt_tokens_details":{', b'"input_tokens_details":{')
"""Of chat completions and completions, and of responses. No text can contain them: its quotes
are escaped."""


class EventStream:
    """What has passed of the stream that answers ``exchange``."""

    def __init__(self, exchange: Exchange, path: str) -> None:
        self._exchange = exchange
        self._path = path
        self._events = 0
        self._marks = 0
        self._tail = b""
        """The last byte that passed, while an event is not over; it may be half of its end."""
        self._between_events = True

    def passing(self, body: bytes) -> bytes:
        """The next piece of the stream passes. What is to be sent for it, mostly itself."""
        marks = self._new_marks() if self._between_events else b""
        if body:
            # A line feed within an event's data is escaped.
            passed = self._tail + body
            self._events += passed.count(END_OF_EVENT)
            self._between_events = passed.endswith(END_OF_EVENT)
            self._tail = b"" if self._between_events else passed[-1:]
        return marks + self._with_moved(body)

    def _with_moved(self, body: bytes) -> bytes:
        """vLLM writes an event in one piece, so the details are in one piece, too."""
        for details in USAGE_DETAILS:
            if details in body:
                moved = b'%b"moved_tokens":%d,' % (details, self._exchange.moved_tokens)
                body = body.replace(details, moved)
        return body

    def error(self, failure: Failure) -> bytes:
        """What tells the client that the stream ends here, and why."""
        begun = b"" if self._between_events else END_OF_EVENT
        return begun + error_events(self._path, failure, self._events)

    def _new_marks(self) -> bytes:
        continuations = self._exchange.continuations
        if len(continuations) == self._marks:
            return b""
        new, self._marks = continuations[self._marks :], len(continuations)
        return b"".join(
            f": pythia continued on {continuation.text(', ')}\n\n".encode() for continuation in new
        )
