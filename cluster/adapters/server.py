"""A server as an ``openai`` client reaches it: headers on its requests, and reports to it.

Reports (a workflow is declared, a run starts or ends) go through the application's own client, or
one made like it. Their failure is logged, once for each kind, and nothing else: the application
does not depend on them.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import openai

from cluster.adapters.speaker import path_text, speaker

logger = logging.getLogger("pythia.adapters")

REPORT_S = 5.0
"""Longest time that a report may take."""
WAITING_MAX = 1000
"""Reports that may wait to be sent in the background; more are lost."""
RUN_HEADER = "x-workflow-run"
ATTRIBUTE = "_pythia_server"

Client: TypeAlias = openai.OpenAI | openai.AsyncOpenAI
Graph = Mapping[str, Any]
"""A workflow as ``PUT /v1/workflows/{name}`` takes it."""


@dataclass(frozen=True)
class Report:
    """A request about workflows. ``what``: in words; ``missing_is_fine``: 404 is no failure."""

    what: str
    method: str
    path: str
    body: Mapping[str, Any]
    missing_is_fine: bool = False


def declaration(workflow: str, graph: Graph) -> Report:
    """A workflow is declared."""
    return Report(
        f"declare the workflow {workflow!r}", "PUT", f"/workflows/{path_text(workflow)}", graph
    )


def run_start(workflow: str, run: str, deadline_s: float | None, priority: int) -> Report:
    """A run starts on terms of its own."""
    body: dict[str, Any] = {"id": run, "priority": priority}
    if deadline_s is not None:
        body["deadline_s"] = deadline_s
    path = f"/workflows/{path_text(workflow)}/runs"
    return Report(f"start a run of {workflow!r}", "POST", path, body)


def run_end(workflow: str, run: str, completed: bool) -> Report:
    """A run is over. A server that knows nothing of it need not be told."""
    path = f"/workflows/{path_text(workflow)}/runs/{path_text(run)}/end"
    return Report(
        f"end a run of {workflow!r}", "POST", path, {"completed": completed}, missing_is_fine=True
    )


class Hook:
    """Puts the headers of who speaks on requests to some servers; one per HTTP client."""

    def __init__(self) -> None:
        self.base_urls: set[str] = set()

    def __call__(self, request: Any) -> None:
        """Before a request goes out."""
        url = str(request.url)
        if RUN_HEADER in request.headers or not any(map(url.startswith, self.base_urls)):
            return
        who = speaker()
        if who is not None:
            # As bytes: what is text would have to be ASCII.
            pairs = who.headers().items()
            request.headers.update([(name.encode(), value.encode()) for name, value in pairs])


class AsyncHook(Hook):
    """The same for asynchronous clients."""

    async def __call__(self, request: Any) -> None:  # type: ignore[override]
        """Before a request goes out."""
        super().__call__(request)


class Server:
    """What is behind an ``openai`` client. ``of`` finds the one of a client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._declared: dict[str, str] = {}
        self._failed: set[str] = set()
        self._twin: openai.OpenAI | None = None

    def declare(self, workflow: str, graph: Graph) -> None:
        """Declare a workflow, unless that was done. Waits for it."""
        if self._is_new(workflow, graph):
            self.send(declaration(workflow, graph))

    async def declare_async(self, workflow: str, graph: Graph) -> None:
        """The same, without keeping other tasks waiting."""
        if self._is_new(workflow, graph):
            await self.send_async(declaration(workflow, graph))

    def send(self, report: Report) -> None:
        """Send a report and wait for it."""
        try:
            client = self._synchronous()
            send = client.put if report.method == "PUT" else client.post
            send(report.path, cast_to=object, body=report.body)
        except (openai.OpenAIError, RuntimeError) as error:
            self._say(report, error)

    async def send_async(self, report: Report) -> None:
        """Send a report and wait for it, without keeping other tasks waiting."""
        if isinstance(self.client, openai.OpenAI):
            self.send(report)
            return
        client = self.client.with_options(max_retries=0, timeout=REPORT_S)
        try:
            send = client.put if report.method == "PUT" else client.post
            await send(report.path, cast_to=object, body=report.body)
        except (openai.OpenAIError, RuntimeError) as error:
            self._say(report, error)

    def send_later(self, report: Report) -> None:
        """Have a report sent in the background; at the latest when the program ends."""
        if not _background.submit(self, report):
            self._say(report, RuntimeError(f"{WAITING_MAX} reports wait already"))

    def _is_new(self, workflow: str, graph: Graph) -> bool:
        as_json = json.dumps(graph, sort_keys=True)
        if self._declared.get(workflow) == as_json:
            return False
        self._declared[workflow] = as_json
        return True

    def _synchronous(self) -> openai.OpenAI:
        if isinstance(self.client, openai.OpenAI):
            return self.client.with_options(max_retries=0, timeout=REPORT_S)
        if self._twin is None:
            self._twin = openai.OpenAI(
                api_key=self.client.api_key,
                base_url=self.client.base_url,
                default_headers=self.client._custom_headers,
                max_retries=0,
                timeout=REPORT_S,
            )
        return self._twin

    def _say(self, report: Report, error: Exception) -> None:
        missing = isinstance(error, openai.NotFoundError)
        if missing and report.missing_is_fine:
            logger.debug("could not %s: %s", report.what, error)
        elif report.what not in self._failed:
            self._failed.add(report.what)
            logger.warning("could not %s, calls go on without: %s", report.what, error)


def attach(client: Client) -> Server:
    """Have a client's requests say who speaks, from now on. May be called any number of times."""
    # On the client itself, so that it lives as long as that.
    if ATTRIBUTE not in client.__dict__:
        client.__dict__[ATTRIBUTE] = Server(client)
    inner: Any = client._client
    hooks = inner.event_hooks
    hook = next((each for each in hooks["request"] if isinstance(each, Hook)), None)
    if hook is None:
        hook = AsyncHook() if isinstance(client, openai.AsyncOpenAI) else Hook()
        inner.event_hooks = {**hooks, "request": [*hooks["request"], hook]}
    hook.base_urls.add(str(client.base_url))
    known: Server = client.__dict__[ATTRIBUTE]
    return known


def flush(timeout_s: float = REPORT_S) -> None:
    """Wait until what was to be sent in the background is. TimeoutError if it takes longer."""
    _background.flush(timeout_s)


class _Background:
    """One thread that sends reports in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._last: Future[None] | None = None

    def submit(self, server: Server, report: Report) -> bool:
        """False if too many wait already."""
        with self._lock:
            if self._waiting >= WAITING_MAX:
                return False
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="pythia-reports")
            self._waiting += 1
            try:
                self._last = self._executor.submit(self._send, server, report)
            except RuntimeError:  # the interpreter is going down
                self._waiting -= 1
                return False
        return True

    def _send(self, server: Server, report: Report) -> None:
        try:
            server.send(report)
        finally:
            with self._lock:
                self._waiting -= 1

    def flush(self, timeout_s: float) -> None:
        with self._lock:
            last = self._last
        if last is not None:
            last.result(timeout_s)


_background = _Background()
