"""Stand-ins for a cluster's processes, so that launching is tested without engines.

``coordinator`` answers on the real sockets: ``Inspect`` with a snapshot in which every
worker of the file is up and warm but those that crash, and ``/ready`` with 200. A worker
only lives, in a way that its name chooses: ``crash-*`` dies while it starts, ``stubborn-*``
ignores SIGTERM, ``parent-*`` has a child in its session, anything else just waits.

``up`` is ``pythia up`` with these processes: what tests send signals to. ``up-forking`` forks
them from a template, which has imported something: every worker notes if it has that, too.
"""

from __future__ import annotations

import atexit
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import zmq
from rich.console import Console

from cluster import fork
from cluster.config import load
from cluster.launch import COORDINATOR, LaunchError
from cluster.process import announce
from cluster.schema import ClusterConfig
from cluster.supervise import run, stay
from cluster.template import READY, TEMPLATE
from coordinator.protocol import Load, Snapshot, WorkerStatus, decode_to_core, encode

LIFE_S = 120.0
HEAVY = "a_module_that_takes_long_to_import"


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()


def coordinator(config: ClusterConfig) -> None:
    peers = len(config.workers) - 1
    rows = [
        WorkerStatus(e.name, "1", e.role, "up", e.host, "", Load(), 64, 32, 0, 0, 0.1, peers, peers)
        for e in config.workers
        if not e.name.startswith("crash")
    ]
    server = http.server.HTTPServer((config.api.host, config.api.port), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(config.control_address)
    announce("serving")
    while True:
        peer, frame = socket.recv_multipart()
        token = decode_to_core(frame).token
        seen = Snapshot(token, "core", config.served_name, 1.0, rows, 1, 0, 1024, 0, [], {})
        socket.send_multipart([peer, encode(seen)])


def worker(name: str) -> None:
    announce("loading model")
    about = {
        "forked": HEAVY in sys.modules,
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
        "session": os.getsid(0),
        "parent": os.getppid(),
        "stdin": os.readlink("/proc/self/fd/0"),
        "files": len(os.listdir("/proc/self/fd")),
        "environment": dict(os.environ),
    }
    print(json.dumps(about), flush=True)
    if name.startswith("crash"):
        print("\n".join(f"line {number}" for number in range(100)))
        atexit.register(print, "that was all")
        raise SystemExit("no such model: tell the user")
    if name.startswith("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if name.startswith("parent"):
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LIFE_S})"])
    announce("waiting")
    time.sleep(LIFE_S)


def template() -> None:
    connection = fork.connection_on_stdin()
    announce("importing the heavy module")
    sys.modules[HEAVY] = types.ModuleType(HEAVY)
    connection.send(READY)
    fork.serve(connection)


def command_of(name: str, config_path: Path) -> list[str]:
    return [] if name == TEMPLATE else [sys.executable, __file__, name, str(config_path)]


def forking_command_of(name: str, config_path: Path) -> list[str]:
    return [sys.executable, "-m", "tests.unit.standin", name, str(config_path)]


def main(name: str, config_path: str) -> int:
    if name == COORDINATOR:
        coordinator(load(Path(config_path)))
    elif name == TEMPLATE:
        template()
    elif name in ("up", "up-forking"):
        console = Console()
        commands = command_of if name == "up" else forking_command_of
        try:
            config = load(Path(config_path))
            return run(config, console, lambda cluster: stay(cluster, console), commands)
        except LaunchError as error:
            print(error, file=sys.stderr)
            return 1
    else:
        worker(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
