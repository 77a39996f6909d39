"""A benchmark's child process: one question and one answer per line of JSON.

The child keeps its standard output to itself for answers (``serve``); whatever libraries
print goes to its log. It is killed when its parent dies, and its own children with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

LINE_BYTES_MAX = 64 * 1024 * 1024
LOG_TAIL_BYTES = 2000
_ROOT = str(Path(__file__).resolve().parents[2])

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ChildError(RuntimeError):
    """A child process failed, fell silent or went away."""


class Child:
    """One running child, asked from the parent's event loop."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(
        cls,
        module: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
    ) -> Child:
        """Run ``python -m module`` with ``settings`` as its first question."""
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment, "PYTHONPATH": _python_path()},
                limit=LINE_BYTES_MAX,
            )
        child = cls(process, log)
        await child._send(dict(settings))
        return child

    async def ask(self, question: Mapping[str, Any], limit_s: float = 120.0) -> dict[str, Any]:
        """The child's answer. ChildError if there is none within ``limit_s``."""
        await self._send(question)
        return await self.answer(limit_s)

    async def answer(self, limit_s: float) -> dict[str, Any]:
        """The next line the child says."""
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_s)
        except TimeoutError:
            raise ChildError(f"no answer in {limit_s} s; {self._last_words()}") from None
        if not line:
            raise ChildError(f"the process is gone; {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(f"{answer['error']}; {self._last_words()}")
        return answer

    def pause(self) -> None:
        """Stop the process from using any core until ``resume``."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        self._process.send_signal(signal.SIGCONT)

    async def stop(self, limit_s: float = 20.0) -> None:
        """End the child: politely, then by force."""
        if self._process.returncode is not None:
            return
        self.resume()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), limit_s)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _send(self, question: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # the missing answer says it better
            await self._process.stdin.drain()

    def _last_words(self) -> str:
        tail = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")
        return f"its log ends with:\n{tail}"


def _python_path() -> str:
    """Where a child finds this package, wherever it was started from."""
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([_ROOT, inherited] if inherited else [_ROOT])


class Parent:
    """The child's side: questions come in on standard input."""

    def __init__(self) -> None:
        # Libraries print on standard output: keep it for answers and send theirs to the log.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self.settings: dict[str, Any] = json.loads(sys.stdin.buffer.readline())

    def say(self, answer: Mapping[str, Any]) -> None:
        """One answer."""
        self._answers.write(json.dumps(answer) + "\n")

    async def serve(self, answer: Answer) -> None:
        """Answer questions, one after the other, until there are no more."""
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            self.say(await answer(json.loads(line)))
