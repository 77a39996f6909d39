"""Makes sure that nothing a process started outlives it, even if it is killed.

A tiny helper process holds the reading end of a pipe; the kernel closes the writing end
when the protected process is gone, however it went, and the helper then kills what is
left of its process group. Needed because engine processes do not notice that their
parent died: they go on, spinning.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends the processes of a group, but not the helper."""


def protect_group() -> int:
    """Become leader of a process group that dies with this process. Returns the group id.

    Call before starting children. Whoever shares the group is killed as well.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    group = os.getpgrp()
    reading, writing = os.pipe()
    # The helper inherits what is held up here: it is deaf to these from its first moment on.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, str(group), str(reading)],
            pass_fds=[reading],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    os.close(reading)
    # A forked child would keep the pipe open, and with it the helper waiting, for ever. Its
    # own children inherit the emptied list: there the number may be another file's.
    inherited = [writing]
    os.register_at_fork(after_in_child=lambda: os.close(inherited.pop()) if inherited else None)
    return group


def _wait_and_kill(group: int, reading: int) -> None:
    while os.read(reading, 1):
        pass
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left behind


if __name__ == "__main__":
    _wait_and_kill(int(sys.argv[1]), int(sys.argv[2]))
