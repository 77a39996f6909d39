"""Hosts of the test's own: network namespaces with an address each, on one bridge.

The bridge is in a namespace, too, so that no firewall of this machine sees what goes over
it; this machine has a leg there, from which a test reaches every host. Root only.

    host eth0 ---- to-host  bridge  to-here ---- this machine
    (namespace)     (namespace "switch")
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.deploy.packages import SYSTEM_PATH, need

ASK_S = 20.0
SWITCH = "switch"


class Network:
    """Hosts by name, each with an ``address``."""

    def __init__(self, names: Sequence[str]) -> None:
        self._mark = f"pythia-{os.getpid()}-{secrets.token_hex(2)}"
        # Interfaces of this machine have names of at most 15 characters.
        self._leg = f"py{secrets.token_hex(3)}"
        self._subnet = f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(256)}"
        self.address = {name: f"{self._subnet}.{1 + n}" for n, name in enumerate(names)}

    def build(self) -> None:
        """Makes all of it. CalledProcessError if this machine does not let us."""
        self._make(SWITCH)
        self._in(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
        self._in(SWITCH, "ip", "link", "set", "bridge", "up")
        for name, address in self.address.items():
            self._make(name)
            self._plug(name, "eth0", self._namespace(name))
            self._in(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self._in(name, "ip", "link", "set", "eth0", "up")
        self._plug("here", self._leg, None)
        _do("ip", "address", "add", f"{self._subnet}.254/24", "dev", self._leg)
        _do("ip", "link", "set", self._leg, "up")

    def destroy(self) -> None:
        """Takes all of it away; links go with their namespaces."""
        namespaces = [("netns", "delete", self._namespace(n)) for n in (*self.address, SWITCH)]
        for rest in (("link", "delete", self._leg), *namespaces):
            subprocess.run(
                ["ip", *rest],
                env={**os.environ, "PATH": SYSTEM_PATH},
                capture_output=True,
                timeout=ASK_S,
                check=False,
            )

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *command]

    def slow(self, host: str, rate: str) -> None:
        """Lets no more than ``rate`` (``8mbit``) through a host's link, either way."""
        shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms")
        self._in(host, "tc", "qdisc", "replace", "dev", "eth0", *shape)
        self._in(SWITCH, "tc", "qdisc", "replace", "dev", f"to-{host}", *shape)

    def quicken(self, host: str) -> None:
        """Takes ``slow`` back."""
        self._in(host, "tc", "qdisc", "delete", "dev", "eth0", "root")
        self._in(SWITCH, "tc", "qdisc", "delete", "dev", f"to-{host}", "root")

    def cut(self, host: str) -> None:
        """Pulls a host's plug."""
        self._in(SWITCH, "ip", "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Takes ``cut`` back."""
        self._in(SWITCH, "ip", "link", "set", f"to-{host}", "up")

    def received_bytes(self, host: str) -> int:
        """What has come in over a host's link."""
        shown = self._in(host, "ip", "-json", "-statistics", "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def _namespace(self, name: str) -> str:
        return f"{self._mark}-{name}"

    def _make(self, name: str) -> None:
        _do("ip", "netns", "add", self._namespace(name))
        self._in(name, "ip", "link", "set", "lo", "up")

    def _plug(self, name: str, inner: str, namespace: str | None) -> None:
        """A cable from the switch to ``inner``, an interface in a namespace or of this machine."""
        switch = self._namespace(SWITCH)
        ends = ("ip", "link", "add", f"to-{name}", "netns", switch, "type", "veth", "peer")
        _do(*ends, "name", inner, *(("netns", namespace) if namespace else ()))
        self._in(SWITCH, "ip", "link", "set", f"to-{name}", "master", "bridge", "up")

    def _in(self, name: str, *command: str) -> str:
        return _do(*self.command(name, command))


def _do(*command: str) -> str:
    return subprocess.run(
        command,
        env={**os.environ, "PATH": SYSTEM_PATH},
        check=True,
        capture_output=True,
        text=True,
        timeout=ASK_S,
    ).stdout


@contextlib.contextmanager
def running_network(names: Sequence[str]) -> Iterator[Network]:
    """A network of these hosts. Skips the test, saying why, where there can't be one."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root: run these tests as root, as CI does")
    need(["ip", "tc"], ["iproute2"])
    network = Network(names)
    try:
        try:
            network.build()
        except subprocess.CalledProcessError as error:
            complaint = error.stderr.strip().splitlines()[-1:] or [""]
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {complaint[0]}")
        yield network
    finally:
        network.destroy()
