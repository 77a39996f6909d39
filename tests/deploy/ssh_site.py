"""A real sshd of the test's own on loopback, with keys made for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.process import free_port
from tests.deploy.packages import SYSTEM_PATH

START_S = 20.0


@contextlib.contextmanager
def running_sshd(folder: Path, addresses: Sequence[str]) -> Iterator[Path]:
    """Yields a configuration for ``ssh -F`` with which every one of ``addresses`` can be reached.

    sshd is a child in the foreground and is ended by its own process id.
    """
    for name in ("host", "user"):
        key = str(folder / name)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    port = free_port(addresses[0])
    listen = "".join(f"ListenAddress {address}:{port}\n" for address in addresses)
    (folder / "sshd_config").write_text(
        f"{listen}HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"PidFile {folder}/sshd.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    client = folder / "ssh_config"
    client.write_text(
        f"Host *\nPort {port}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {folder}/known_hosts\nStrictHostKeyChecking accept-new\n"
        "LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root locks its children up
    program = shutil.which("sshd", path=SYSTEM_PATH)
    assert program is not None
    with (folder / "sshd.log").open("wb") as log:
        command = [program, "-D", "-e", "-f", str(folder / "sshd_config")]
        sshd = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(addresses[-1], port, folder / "sshd.log")
        yield client
    finally:
        sshd.terminate()
        sshd.wait()


def _wait_for(address: str, port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection((address, port), timeout=1.0).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
