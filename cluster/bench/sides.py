"""The two sides that ``pythia bench overhead`` compares, and what they cost.

``Plain`` is vLLM's own OpenAI server around an engine; ``pythia_side`` a cluster of ours.
Both get the same engine arguments, the same environment and the same options of the HTTP
server. Both are real processes, watched from outside: processor time is the kernel's.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from cluster.bench.child import Child as BenchChild
from cluster.bench.load import Load, Outcome
from cluster.child import Child, stop_all
from cluster.config import default_cluster, worker_config
from cluster.devices import gpu_count
from cluster.launch import LaunchError
from cluster.process import free_port, session_members
from cluster.schema import ApiEntry, ClusterConfig, CoordinatorEntry, WorkerEntry

HOST = "127.0.0.1"
HEALTH_POLL_S = 0.5
LOAD_START_S = 60.0
ROUND_S = 900.0
CALIBRATION_WORDS = 32
ENGINE_THREADS = 1
"""Of a CPU engine, as in a cluster of several workers on few cores. More would spin while they
wait for each other, at the expense of what is measured."""
SERVER_OPTIONS = {
    "enable_prompt_tokens_details": True,
    "enable_request_id_headers": True,
    "disable_uvicorn_access_log": True,
}
"""What Pythia's API processes set for vLLM's server; the plain one gets it, too."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cluster_config(
    name: str,
    model: str,
    roles: Iterable[str],
    engine: Mapping[str, Any] | None = None,
    metrics: bool = False,
    **sections: Any,
) -> ClusterConfig:
    """A cluster on this machine: one worker per role, with free ports.

    ``engine`` adds arguments, ``metrics`` makes the workers serve theirs, ``sections``
    replaces other parts of the file. With GPUs each worker gets one of its own; LaunchError
    if there are too few.
    """
    gpus = gpu_count()
    config = default_cluster(model, gpus)
    workers = []
    for index, role in enumerate(roles):
        if 0 < gpus <= index:
            raise LaunchError(f"{name} needs {index + 1} GPUs, there are {gpus}")
        workers.append(
            msgspec.convert(
                {
                    "name": f"{role}-{index}",
                    "role": role,
                    "devices": [index] if gpus else [],
                    "metrics_port": free_port(HOST) if metrics else 0,
                },
                WorkerEntry,
            )
        )
    return msgspec.structs.replace(
        config,
        name=name,
        served_model_name=model,
        workers=workers,
        engine=config.engine | dict(engine or {}),
        environment=config.environment | ({} if gpus else {"OMP_NUM_THREADS": ENGINE_THREADS}),
        coordinator=CoordinatorEntry(port=0),
        **{"api": ApiEntry(port=0)} | sections,
    )


class Client:
    """The load generator, in a process of its own; an asynchronous context manager."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._words = CALIBRATION_WORDS
        self._seed = 0
        self._child: BenchChild | None = None

    async def __aenter__(self) -> Client:
        self._child = await BenchChild.start(
            "cluster.bench.load", {}, {}, self._folder / "load.log"
        )
        await self._child.answer(LOAD_START_S)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._child is not None:
            await self._child.stop()

    def next_prompts(self) -> None:
        """From now on other prompts, which no cache has seen."""
        self._seed += 1

    async def fit_prompts(self, base_url: str, tokens: int) -> None:
        """Make prompts of about ``tokens`` tokens, template included, as the server counts."""
        counts = []
        for words in (CALIBRATION_WORDS, 2 * CALIBRATION_WORDS):
            self._words = words
            counts.append((await self.send(base_url, 4, 1, 1)).prompt_tokens / 4)
        per_word = (counts[1] - counts[0]) / CALIBRATION_WORDS
        template = counts[0] - per_word * CALIBRATION_WORDS
        self._words = max(1, round((tokens - template) / per_word))

    async def send(
        self,
        base_url: str,
        calls: int,
        concurrency: int,
        output_tokens: int,
        extra: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Send calls and wait for all answers. ChildError if one fails."""
        assert self._child is not None
        load = Load(
            base_url=base_url,
            model=self._model,
            calls=calls,
            concurrency=concurrency,
            prompt_words=self._words,
            output_tokens=output_tokens,
            seed=self._seed,
            extra=dict(extra or {}),
        )
        answer = await self._child.ask(msgspec.to_builtins(load), ROUND_S)
        return msgspec.convert(answer, Outcome)


class Plain:
    """vLLM's own server around one engine; a context manager that is ready inside its block.

    ``config``: the cluster whose first worker it is to be like.
    """

    def __init__(self, config: ClusterConfig, log_dir: Path) -> None:
        self._config = config
        self._log = log_dir / "plain.log"
        self._child: Child | None = None
        self.base_url = f"http://{HOST}:{free_port(HOST)}"

    def __enter__(self) -> Plain:
        from cluster.model import resolve

        model = resolve(self._config.model)
        worker = worker_config(self._config, self._config.workers[0].name, model)
        port = self.base_url.rpartition(":")[2]
        options = {
            "model": model,
            "served_model_name": worker.served_model_name,
            "host": HOST,
            "port": int(port),
            **SERVER_OPTIONS,
            **worker.engine,
        }
        environment = worker.process_environment()
        command = ["env", *(f"{name}={value}" for name, value in environment.items())]
        command += [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._child = Child("plain vLLM", [*command, *command_line(options)], self._log)
        try:
            self._wait_healthy(self._config.start.timeout_s)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._child is not None:
            stop_all([self._child])

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by name: of the server; the engine is its child."""
        assert self._child is not None
        return {"plain": self._child.pid}

    def _wait_healthy(self, timeout_s: float) -> None:
        assert self._child is not None
        deadline_s = time.monotonic() + timeout_s
        while not _answers(f"{self.base_url}/health"):
            if self._child.exit_code() is not None:
                raise LaunchError(self._child.obituary())
            if time.monotonic() > deadline_s:
                raise LaunchError(f"vLLM's server is not up; its log is {self._log}")
            time.sleep(HEALTH_POLL_S)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for logs, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pythia-bench-") as folder:
        yield Path(folder)


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Progress]:
    """A bar of ``total`` steps that is taken away at the end."""
    with Progress(console=console, transient=True) as progress:
        progress.add_task("warming up", total=total)
        yield progress


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options of vLLM's server as words."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            words += [f"--{flag}", text]
    return words


def cpu_s(process: int) -> float:
    """Seconds of processor time that a process and all of its session have used by now."""
    return sum(process_cpu_s(member) for member in session_members(process))


def process_cpu_s(process: int) -> float:
    """Seconds of processor time, user and system; 0 for a process that is gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def command_of(process: int) -> str:
    """The command line of a process; empty if it is gone."""
    try:
        raw = Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()


def metric(port: int, name: str) -> float:
    """The sum over all labels of one metric that a worker serves on ``port``."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    total = 0.0
    for line in page.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            total += float(line.rpartition(" ")[2])
    return total


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False
