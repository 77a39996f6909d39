"""A small research team: six kinds of call, one program, any OpenAI-compatible server.

::

    planner --> explorer 1 --+
            +-> explorer 2 --+--> engineer <--> reviewer --> summariser
            +-> explorer 3 --+        (three rounds at most)

The explorers run in parallel, each over a document of its own from ``documents/``;
their prompts share a prefix of several hundred tokens. The engineer's conversation
grows with every round. All of it is written with the plain ``openai`` client. Every
call says which workflow, run and agent it belongs to, in its body and in its headers;
a server that knows nothing of this ignores it, and one that refuses unknown fields in
the body gets the headers only.

What is printed per call comes from the server: the workers from the headers
``X-Pythia-Prefill`` and ``X-Pythia-Decode``, the rest from the usage of the stream. A
server that does not say gets a dash. Nothing here judges the answers: a tiny model may
write nonsense, and the program still ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import re
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openai
from openai import AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WORKFLOW = "research-team"
DOCUMENTS = Path(__file__).parent / "documents"
EXPLORERS = 3
ROUNDS_MAX = 3
ABSTRACT_WORDS = 70
LINE_CHARACTERS = 110
QUESTION = (
    "How should a cluster that serves language model agents spend its machines and its memory?"
)

RULES = """\
You help an engineer who runs many computers on which language models answer questions. You \
read carefully and write plain English. You answer in one short sentence. You say only what you \
have read, in your own words. You do not greet, you do not apologise, you do not repeat the \
question, and you do not write lists."""

Messages = list[ChatCompletionMessageParam]


@dataclass(frozen=True)
class Document:
    """A text to read: ``title`` is its first line, ``words`` the rest without its headings."""

    title: str
    words: tuple[str, ...]

    def excerpt(self, words: int) -> str:
        """The first ``words`` words."""
        return " ".join(self.words[:words])


@dataclass(frozen=True)
class Identity:
    """Who speaks: the agent, and the agent whose answer it follows."""

    run: str
    agent: str
    parent: str = ""
    final: bool = False

    def headers(self) -> dict[str, str]:
        """The identity as HTTP headers."""
        return {
            "X-Workflow": WORKFLOW,
            "X-Workflow-Run": self.run,
            "X-Workflow-Agent": self.agent,
            "X-Workflow-Parent": self.parent,
            "X-Workflow-Final": "true" if self.final else "false",
        }

    def body(self) -> dict[str, Any]:
        """The identity as additional fields of the request's body."""
        who = {"name": WORKFLOW, "run": self.run, "agent": self.agent, "parent": self.parent}
        return {"workflow": {**who, "final": self.final}}


@dataclass(frozen=True)
class CallReport:
    """What happened to one call. None and "" stand for what the server did not say."""

    label: str
    agent: str
    prefill_worker: str
    decode_worker: str
    prompt_tokens: int | None
    cached_tokens: int | None
    moved_tokens: int | None
    output_tokens: int | None
    ttft_s: float
    elapsed_s: float
    finish_reason: str
    answer: str


@dataclass
class RunReport:
    """What happened to one run of the workflow, calls in the order in which they ended."""

    run: str
    model: str
    rounds: int = 0
    approved: bool = False
    completion_s: float = 0.0
    calls: list[CallReport] = field(default_factory=list)


class Team:
    """One run of the workflow against one server.

    ``on_call`` is told about every call as it ends. Errors are those of the ``openai``
    client.
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        model: str,
        max_tokens: int,
        on_call: Callable[[CallReport], None],
    ) -> None:
        self.report = RunReport(run=uuid.uuid4().hex, model=model)
        self._client = client
        self._max_tokens = max_tokens
        self._on_call = on_call
        self._identity_in_body = True

    async def ask(
        self, agent: str, messages: Messages, *, parent: str, label: str = "", final: bool = False
    ) -> str:
        """One call: its answer, stripped; "(no answer)" if the model wrote nothing."""
        identity = Identity(self.report.run, agent, parent, final)
        try:
            call = await self._stream(identity, messages, label or agent)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if not self._identity_in_body or "workflow" not in str(error):
                raise
            self._identity_in_body = False
            call = await self._stream(identity, messages, label or agent)
        self.report.calls.append(call)
        self._on_call(call)
        return call.answer or "(no answer)"

    async def _stream(self, identity: Identity, messages: Messages, label: str) -> CallReport:
        started_s = time.monotonic()
        ttft_s = 0.0
        pieces: list[str] = []
        finish_reason = ""
        usage: CompletionUsage | None = None
        response = await self._client.chat.completions.with_raw_response.create(
            model=self.report.model,
            messages=messages,
            max_tokens=self._max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=identity.headers(),
            extra_body=identity.body() if self._identity_in_body else None,
        )
        async for chunk in response.parse():
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text = choice.delta.content or ""
                finish_reason = choice.finish_reason or finish_reason
                if not ttft_s and (text or finish_reason):
                    ttft_s = time.monotonic() - started_s
                pieces.append(text)
        return CallReport(
            label=label,
            agent=identity.agent,
            prefill_worker=response.headers.get("X-Pythia-Prefill", ""),
            decode_worker=response.headers.get("X-Pythia-Decode", ""),
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=_cached_tokens(usage, response.headers),
            moved_tokens=_moved_tokens(usage, response.headers),
            output_tokens=usage.completion_tokens if usage else None,
            ttft_s=ttft_s,
            elapsed_s=time.monotonic() - started_s,
            finish_reason=finish_reason,
            answer="".join(pieces).strip(),
        )


def _number(headers: Mapping[str, str], name: str) -> int | None:
    value = headers.get(name, "")
    return int(value) if value.isdigit() else None


def _cached_tokens(usage: CompletionUsage | None, headers: Mapping[str, str]) -> int | None:
    details = usage.prompt_tokens_details if usage else None
    if details is not None and details.cached_tokens is not None:
        return int(details.cached_tokens)
    return _number(headers, "X-Pythia-Cached-Tokens")


def _moved_tokens(usage: CompletionUsage | None, headers: Mapping[str, str]) -> int | None:
    """A stream's head leaves before its KV has moved; then the usage says it."""
    details = usage.prompt_tokens_details if usage else None
    moved = (details.model_extra or {}).get("moved_tokens") if details else None
    return moved if isinstance(moved, int) else _number(headers, "X-Pythia-Moved-Tokens")


def read_documents(folder: Path) -> list[Document]:
    """The first three ``*.md`` files of ``folder`` by name; ValueError if there are fewer."""
    paths = sorted(folder.glob("*.md"))[:EXPLORERS]
    if len(paths) < EXPLORERS:
        raise ValueError(f"{folder} holds {len(paths)} documents (*.md), {EXPLORERS} are needed")
    documents = []
    for path in paths:
        title, *lines = path.read_text(encoding="utf-8").splitlines()
        prose = " ".join(line for line in lines if not line.startswith("#"))
        documents.append(Document(title.lstrip("# "), tuple(prose.split())))
    return documents


def briefing(question: str, documents: list[Document]) -> str:
    """What every agent is told first: the prefix that all prompts of a run share."""
    listed = "\n\n".join(
        f"{document.title}: {document.excerpt(ABSTRACT_WORDS)} ..." for document in documents
    )
    return (
        f"{RULES}\n\nThe engineer wants to know: {question}\n\n"
        f"The library has these texts, and they begin like this.\n\n{listed}"
    )


def _user(text: str) -> ChatCompletionMessageParam:
    return {"role": "user", "content": text}


async def _explore(
    team: Team, briefed: Messages, plan: str, number: int, document: Document, words: int
) -> str:
    task = (
        f"We look for this: {plan}\n\n"
        f"Here is a text with the title {document.title}.\n\n{document.excerpt(words)}\n\n"
        "What is the most important thing that this text says?"
    )
    messages = [*briefed, _user(task)]
    return await team.ask("explorer", messages, parent="planner", label=f"explorer {number}")


async def _build(team: Team, briefed: Messages, reports: str) -> str:
    """Engineer and reviewer in turn until the reviewer approves or the rounds are used up."""
    conversation = [
        *briefed,
        _user(
            f"These are notes from the library:\n\n{reports}\n\n"
            "What should the engineer do? Write one sentence that begins with: The engineer should"
        ),
    ]
    proposal = ""
    parent = "explorer"
    while team.report.rounds < ROUNDS_MAX and not team.report.approved:
        team.report.rounds += 1
        proposal = await team.ask("engineer", conversation, parent=parent)
        task = (
            f"Somebody wrote this advice:\n\n{proposal}\n\nIs it good advice? "
            "Answer APPROVE if it is. Otherwise say in one sentence what is missing."
        )
        review = await team.ask("reviewer", [*briefed, _user(task)], parent="engineer")
        team.report.approved = re.search(r"\bAPPROVED?\b", review.upper()) is not None
        parent = "reviewer"
        conversation += [
            {"role": "assistant", "content": proposal},
            _user(f"A reader says: {review}\n\nWrite the advice again and make it better."),
        ]
    return proposal


async def run_workflow(
    client: AsyncOpenAI,
    model: str,
    *,
    question: str = QUESTION,
    documents: list[Document] | None = None,
    document_words: int = 450,
    max_tokens: int = 28,
    on_call: Callable[[CallReport], None] = lambda call: None,
) -> RunReport:
    """Run the workflow once.

    ``document_words`` words of each document go to its explorer; every answer has at most
    ``max_tokens`` tokens. Raises the ``openai`` client's errors; the run ends with the
    first of them.
    """
    team = Team(client, model, max_tokens, on_call)
    library = documents or read_documents(DOCUMENTS)
    briefed: Messages = [{"role": "system", "content": briefing(question, library)}]
    started_s = time.monotonic()
    planning = "What do we want to learn from these texts? Answer in one sentence."
    plan = await team.ask("planner", [*briefed, _user(planning)], parent="")
    async with asyncio.TaskGroup() as group:
        exploring = [
            group.create_task(_explore(team, briefed, plan, number, document, document_words))
            for number, document in enumerate(library, 1)
        ]
    reports = "\n".join(f"- {task.result()}" for task in exploring)
    proposal = await _build(team, briefed, reports)
    closing = (
        f"These are notes from the library:\n\n{reports}\n\n"
        f"This is the advice:\n\n{proposal}\n\nSay it all in one short sentence."
    )
    await team.ask("summariser", [*briefed, _user(closing)], parent="reviewer", final=True)
    team.report.completion_s = time.monotonic() - started_s
    return team.report


def _shown(value: int | str | None) -> str:
    return "-" if value is None or value == "" else str(value)


def _first_words(answer: str) -> str:
    return " ".join(answer.split()[:16])


def table_of(report: RunReport) -> Table:
    """The run as a table, one row per call."""
    title = f"{WORKFLOW}, run {report.run[:8]}, model {report.model}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("agent", "prefill", "decode"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "cached", "moved", "TTFT s", "output"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("answer")
    for call in report.calls:
        table.add_row(
            call.label,
            _shown(call.prefill_worker),
            _shown(call.decode_worker),
            _shown(call.prompt_tokens),
            _shown(call.cached_tokens),
            _shown(call.moved_tokens),
            f"{call.ttft_s:.2f}",
            _shown(call.output_tokens),
            Text(_first_words(call.answer), no_wrap=True, overflow="ellipsis"),
        )
    return table


def json_of(report: RunReport) -> dict[str, Any]:
    """The run as the object that ``--json`` writes. Times in seconds, sizes in tokens."""
    calls = report.calls
    return {
        "command": "examples/research_team.py",
        "versions": {"openai": version("openai"), "python": platform.python_version()},
        "machine": platform.platform(),
        "figures": {
            "completion_s": report.completion_s,
            "calls": len(calls),
            "rounds": report.rounds,
            "approved": int(report.approved),
            "prompt_tokens": sum(call.prompt_tokens or 0 for call in calls),
            "cached_tokens": sum(call.cached_tokens or 0 for call in calls),
            "moved_tokens": sum(call.moved_tokens or 0 for call in calls),
            "output_tokens": sum(call.output_tokens or 0 for call in calls),
            "ttft_s_p50": statistics.median(call.ttft_s for call in calls),
        },
        "model": report.model,
        "run": report.run,
        "rows": [asdict(call) for call in calls],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run the research team against an OpenAI-compatible server."
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="with its /v1")
    parser.add_argument("--model", default="", help="default: the first of /v1/models")
    parser.add_argument("--api-key", default="none", help="if the server wants one")
    parser.add_argument("--max-tokens", type=int, default=28, help="longest answer, in tokens")
    parser.add_argument(
        "--document-words", type=int, default=450, help="words of a document that are read"
    )
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--documents", type=Path, default=DOCUMENTS, help="folder of *.md files")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds per call")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser


async def _run(options: argparse.Namespace, console: Console) -> RunReport:
    def on_call(call: CallReport) -> None:
        line = f"{call.elapsed_s:6.1f} s  {call.label:<11} {_first_words(call.answer)}"
        console.print(line, no_wrap=True, overflow="ellipsis")

    async with AsyncOpenAI(
        base_url=options.base_url, api_key=options.api_key, timeout=options.timeout
    ) as client:
        model = options.model or (await client.models.list()).data[0].id
        console.print(f"{WORKFLOW}: model {model} at {options.base_url}")
        return await run_workflow(
            client,
            model,
            question=options.question,
            documents=read_documents(options.documents),
            document_words=options.document_words,
            max_tokens=options.max_tokens,
            on_call=on_call,
        )


def _cause(error: BaseException) -> BaseException:
    """The first real error in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(argv: list[str] | None = None) -> int:
    """Run the workflow once, print it, and return the exit status: 1 if a call failed."""
    options = _parser().parse_args(argv)
    width = None if sys.stdout.isatty() else LINE_CHARACTERS
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    report: RunReport | None = None
    try:
        report = asyncio.run(_run(options, console))
    except* (openai.OpenAIError, ValueError, OSError) as errors:
        print(f"research_team: {_cause(errors)}", file=sys.stderr)
    if report is None:
        return 1
    console.print(table_of(report))
    ended = "approved" if report.approved else "not approved"
    console.print(f"{report.rounds} rounds, {ended}; completed in {report.completion_s:.1f} s")
    if options.json:
        options.json.write_text(json.dumps(json_of(report), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
