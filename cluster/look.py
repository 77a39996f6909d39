"""A host's answers to ``pythia doctor`` before anything runs there (``cluster.remote``).

It says what it is and keeps a listener open on each of its addresses in the file; then it
is told, line by line, to say what time it is or to try the other hosts' listeners::

    doctor: request (look)      host: Seen
    doctor: "time"              host: Clocked         as often as it likes
    doctor: [["10.0.0.2", 7]]   host: Met
    doctor: end of input        host: goes
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from cluster.host_facts import host_facts
from cluster.hosts import Answer, Clocked, Met, Request, Seen

TIME = "time"
LINE_BYTES_MAX = 1024 * 1024
REACH_S = 3.0
BACKLOG = 128


def look(
    request: Request,
    troubles: dict[str, str],
    problems: Sequence[str],
    answer: Callable[[Answer], None],
) -> None:
    """Answers until there is no more input."""
    with contextlib.ExitStack() as open_:
        meeting = []
        for host in sorted({port.host for port in request.ports if port.host == request.host}):
            # Nobody accepts: a connection is made all the same, and that is all it is for.
            with contextlib.suppress(OSError):
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listener = open_.enter_context(
                    socket.create_server((host, 0), family=family, backlog=BACKLOG)
                )
                meeting.append((host, int(listener.getsockname()[1])))
        answer(Seen(host_facts(os.environ), troubles, list(problems), meeting))
        while line := sys.stdin.buffer.readline(LINE_BYTES_MAX).decode().strip():
            if line == TIME:
                answer(Clocked(time.time()))
            else:
                answer(Met(_tried(msgspec.json.decode(line, type=list[tuple[str, int]]))))


def _tried(places: Sequence[tuple[str, int]]) -> dict[str, str]:
    errors = {}
    for host, port in places:
        try:
            socket.create_connection((host, port), timeout=REACH_S).close()
        except TimeoutError:
            errors[f"{host}:{port}"] = f"no answer within {REACH_S:.0f} s"
        except OSError as error:
            errors[f"{host}:{port}"] = error.strerror or str(error)
    return errors
