"""What agent tools and other systems' clients say about themselves, in our terms.

One function per kind of client; ``ALIASES`` is their order. They send ids of their own, made
anew for every run, so a run, a thread (one agent's chain of calls) and a parent thread come out
of them, and an agent only where they name a kind of agent. The tests quote what each of them
really sends, with the sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from coordinator.api.claims import Claim, Said, fields_of, flag, text

MAIN = "main"
SUBAGENT = "subagent"

CLAUDE_CODE = "claude-code"
CODEX = "codex"
OPENCODE = "opencode"

HARNESS_CALLS = frozenset({"compaction", "auxiliary", "memory"})
"""Calls that a harness makes for itself, with prompts of their own."""
AGENT_NAME = re.compile(r"[^\W\d]+(?:[-_ ][^\W\d]+)*")
"""A kind of agent, not an id: it has letters only."""
LEGACY_USER_ID = "_session_"

ALIAS_HEADERS = frozenset(
    {
        "conversation_id",
        "originator",
        "session-id",
        "session_id",
        "thread-id",
        "thread_id",
        "user-agent",
        "x-claude-code-agent-id",
        "x-claude-code-agent-type",
        "x-claude-code-parent-agent-id",
        "x-claude-code-request-class",
        "x-claude-code-session-id",
        "x-codex-parent-thread-id",
        "x-codex-turn-metadata",
        "x-codex-window-id",
        "x-dynamo-parent-session-id",
        "x-dynamo-session-final",
        "x-dynamo-session-id",
        "x-openai-subagent",
        "x-opencode-session",
        "x-parent-session-id",
        "x-session-affinity",
        "x-session-id",
    }
)


def paper(said: Said) -> Claim | None:
    """The three ids of the paper (arXiv 2604.25899), fields of the body."""
    hints = said.hints
    if not (hints.workflow_type_id or hints.workflow_id or hints.agent_id):
        return None
    return Claim(text(hints.workflow_type_id), text(hints.workflow_id), text(hints.agent_id))


def dynamo(said: Said) -> Claim | None:
    """NVIDIA Dynamo: ``nvext.agent_context`` and its headers, older and newer names."""
    fields = fields_of(fields_of(said.hints.nvext).get("agent_context")) if said.hints.nvext else {}
    headers = said.headers
    session = text(fields.get("session_id")) or headers.get("x-dynamo-session-id", "")
    if not session:
        return None
    chain = text(fields.get("trajectory_id"))
    if chain:
        parent = text(fields.get("parent_trajectory_id"))
        final = flag(fields.get("trajectory_final"))
    else:
        parent = text(fields.get("parent_session_id"))
        parent = parent or headers.get("x-dynamo-parent-session-id", "")
        final = flag(fields.get("session_final")) or flag(headers.get("x-dynamo-session-final"))
    claim = _chain(chain or session, parent, session if chain else "", final)
    workflow = text(fields.get("session_type_id"))
    return Claim(workflow, claim.run, claim.agent, claim.parent, claim.thread, claim.final)


def vllm_router(said: Said) -> Claim | None:
    """vLLM Router's program scheduling: ``vllm_xargs.agentic_context``, an object or its text."""
    if not said.hints.vllm_xargs:
        return None
    fields = fields_of(fields_of(said.hints.vllm_xargs).get("agentic_context"))
    names = {name: text(value) for name, value in fields.items()}
    program = names.get("program_id", "")
    group = names.get("task_id") or names.get("session_id", "")
    if not (program or group):
        return None
    agent = names.get("agent_id", "").removeprefix(f"{group}:") or names.get("agent_role", "")
    parent = names.get("parent_agent_id", "").removeprefix(f"{group}:")
    parent = parent or names.get("parent_program_id") or names.get("parent_id", "")
    root = names.get("root_program_id") or names.get("root_id", "")
    final = fields.get("expected_resume") is False
    claim = _chain(program or f"{group}:{agent}", parent, group or root, final)
    return Claim("", claim.run, agent or claim.agent, claim.parent, claim.thread, claim.final)


def agent_hint(said: Said) -> Claim | None:
    """``agent_hint`` in the body, which vLLM Router takes as well."""
    if not said.hints.agent_hint:
        return None
    fields = fields_of(said.hints.agent_hint)
    session, parent = text(fields.get("session_id")), text(fields.get("parent_session_id"))
    final = fields.get("expected_resume") is False
    return _chain(session, parent, "", final) if session else None


def claude_code(said: Said) -> Claim | None:
    """Claude Code: headers; before 2.1.86 only the session, within ``metadata.user_id``."""
    headers = said.headers
    session = headers.get("x-claude-code-session-id", "") or _claude_code_session(said)
    if not session:
        return None
    thread = headers.get("x-claude-code-agent-id", "")
    agent = headers.get("x-claude-code-agent-type", "")
    kind = headers.get("x-claude-code-request-class", "")
    if kind in HARNESS_CALLS:
        agent = kind
    parent = headers.get("x-claude-code-parent-agent-id", "") or MAIN
    if not thread:
        return Claim(CLAUDE_CODE, session, agent or MAIN)
    return Claim(CLAUDE_CODE, session, agent or SUBAGENT, parent, thread)


def _claude_code_session(said: Said) -> str:
    if not said.hints.metadata:
        return ""
    user = text(fields_of(said.hints.metadata).get("user_id"))
    if user.startswith("{"):
        return text(fields_of(user).get("session_id"))
    return user.partition(LEGACY_USER_ID)[2] if user.startswith("user_") else ""


def codex(said: Said) -> Claim | None:
    """Codex: headers, and the same again in ``client_metadata`` of the body.

    Sub-agents share the session of their root and have threads of their own; versions before
    that sent one id, as ``session_id`` or ``conversation_id``.
    """
    headers = said.headers
    sent = fields_of(said.hints.client_metadata) if said.hints.client_metadata else {}
    if not _is_codex(headers, sent):
        return None
    metadata = headers.get("x-codex-turn-metadata") or sent.get("x-codex-turn-metadata")
    turn = fields_of(metadata) if metadata else {}

    def first(*names: str) -> str:
        for source in (headers, sent, turn):
            for name in names:
                if value := text(source.get(name)):
                    return value
        return ""

    thread = first("thread-id", "thread_id")
    session = first("session-id", "session_id", "conversation_id")
    session = session or text(said.hints.prompt_cache_key) or thread
    parent = first("x-codex-parent-thread-id", "parent_thread_id")
    kind = text(turn.get("request_kind"))
    agent = first("x-openai-subagent", "subagent_kind") or (SUBAGENT if parent else MAIN)
    if kind in HARNESS_CALLS:
        agent = kind
    return Claim(CODEX, session, agent, parent, thread)


def _is_codex(headers: Mapping[str, str], sent: Mapping[str, object]) -> bool:
    named = headers.get("originator", "") or headers.get("user-agent", "")
    return (
        named.lower().startswith("codex")
        or "x-codex-window-id" in headers
        or "x-codex-turn-metadata" in headers
        or "x-codex-window-id" in sent
    )


def opencode(said: Said) -> Claim | None:
    """OpenCode: a session per agent; those of sub-agents name their parent's."""
    headers = said.headers
    session = headers.get("x-opencode-session", "")
    if not session and headers.get("user-agent", "").startswith("opencode/"):
        session = headers.get("x-session-id", "") or headers.get("x-session-affinity", "")
    if not session:
        return None
    parent = headers.get("x-parent-session-id", "")
    return Claim(OPENCODE, parent or session, SUBAGENT if parent else MAIN, parent, session)


def session(said: Said) -> Claim | None:
    """Anyone's session id: ``X-Session-ID`` or ``session_id`` in the body, which are vLLM's own,
    and what others call it."""
    headers = said.headers
    for name in ("x-session-id", "x-session-affinity", "session-id", "session_id"):
        if headers.get(name):
            return _chain(headers[name], headers.get("x-parent-session-id", ""), "", False)
    if headers.get("conversation_id"):
        return Claim(run=headers["conversation_id"])
    if said.hints.session_id:
        return Claim(run=text(said.hints.session_id))
    return None


ALIASES: tuple[Callable[[Said], Claim | None], ...] = (
    paper,
    dynamo,
    vllm_router,
    agent_hint,
    claude_code,
    codex,
    opencode,
    session,
)
"""In order of precedence: what a client was told to send, before what tools send unasked."""


def _chain(thread: str, parent: str, run: str, final: bool) -> Claim:
    """A chain of calls that may have been started by another chain.

    Ids are often written ``run:agent``; without a ``run`` of its own, a chain with a parent is
    part of its parent's run. The end of a chain is that of its run if it has no parent.
    """
    prefix = run or thread.rpartition(":")[0]
    agent = _agent_of(thread, prefix)
    shared = bool(prefix) and parent.startswith(f"{prefix}:")
    run = run or (prefix if agent or shared else parent or thread)
    above = _agent_of(parent, prefix) or parent
    return Claim("", run, agent, above, thread, final and not parent)


def _agent_of(chain: str, prefix: str) -> str:
    """``agent`` of ``prefix:agent``, if it names a kind of agent."""
    name = chain.removeprefix(f"{prefix}:") if prefix else ""
    return name if name != chain and AGENT_NAME.fullmatch(name) else ""
