"""Questions of an API process to the core, and the answers that come back.

The link loses messages while the core is away, so a question is asked again until it is answered
or too old; the core answers the same question the same way.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from coordinator.protocol import Message, Question, WorkflowAnswer

AGAIN_S = 1.0
ANSWER_S = 10.0


class Questions:
    """Open questions by token. ``send`` sends to the core, if it can."""

    def __init__(self, send: Callable[[Message], bool]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Future[WorkflowAnswer]] = {}

    async def ask(
        self, question: Callable[[int], Question], timeout_s: float = ANSWER_S
    ) -> WorkflowAnswer:
        """The core's answer. ``question`` makes the message with its token. TimeoutError if the
        core is away."""
        token = next(self._numbers)
        message = question(token)
        answer: asyncio.Future[WorkflowAnswer] = asyncio.get_running_loop().create_future()
        self._open[token] = answer
        try:
            async with asyncio.timeout(timeout_s):
                while not answer.done():
                    self._send(message)
                    await asyncio.wait({answer}, timeout=AGAIN_S)
            return answer.result()
        finally:
            del self._open[token]

    def on_answer(self, message: WorkflowAnswer) -> None:
        """An answer came; late ones and copies are nothing new."""
        answer = self._open.get(message.token)
        if answer is not None and not answer.done():
            answer.set_result(message)
