"""What real agent tools send, and what is understood of it. Each case names its source."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
from starlette.datastructures import Headers

from coordinator.api.identity import call_context, who_speaks
from coordinator.protocol import CallContext

CLAUDE_SESSION = "0f0a2cc3-d5f1-4200-b9c8-f56a081194ce"
CLAUDE_AGENT = "a7a11c2e22e29e67a"
CODEX_ROOT = "019ee74f-22b5-7043-b5fc-697ca0fbd5a6"
CODEX_CHILD = "019ee74f-9d02-7a51-8f0e-1c1a0d7a9b11"


class Case(NamedTuple):
    name: str
    headers: dict[str, str]
    body: dict[str, Any]
    context: CallContext


# Claude Code 2.1.276 as recorded on the wire behind a gateway (pleaseai/shunt, ADR-0005 "the three
# live captures", 2026-09-18). The request class and agent type come only with
# CLAUDE_CODE_GATEWAY_HINT_HEADERS=1 (Claude Code's changelog, 2.1.273).
CLAUDE_MAIN = {
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": "claude-cli/2.1.276 (external, sdk-cli)",
    "x-claude-code-session-id": CLAUDE_SESSION,
    "x-stainless-lang": "js",
    "x-stainless-package-version": "0.112.1",
    "anthropic-beta": "interleaved-thinking-2025-05-14,claude-code-20250219",
    "anthropic-version": "2023-06-01",
    "traceparent": "00-c2fb5f125ec74a4712d9ec13d0a341b8-085c71cc2fb063ae-01",
    "x-app": "cli",
}
CLAUDE_BODY = {
    "model": "m",
    "max_tokens": 32000,
    "system": [{"type": "text", "text": "You are Claude Code, ...", "cache_control": {}}],
    "messages": [{"role": "user", "content": "hi"}],
}

# Codex: codex-rs/core/src/responses_metadata.rs (`compatibility_headers`, `client_metadata`) and
# openai/codex PR 24161 for the lineage; header values as captured by Lingtai-AI/lingtai-kernel
# PR 435 (0.130.0, underscores) and qxcnm/Codex-Manager PR 343 (0.144, hyphens).
CODEX_HEADERS = {
    "user-agent": "codex_cli_rs/0.149.0 (Mac OS 15.5.0; arm64) iTerm.app",
    "originator": "codex_cli_rs",
    "version": "0.149.0",
    "session-id": CODEX_ROOT,
    "thread-id": CODEX_ROOT,
    "x-client-request-id": CODEX_ROOT,
    "x-codex-window-id": f"{CODEX_ROOT}:0",
}
CODEX_SPAWNED = {
    "session_id": CODEX_ROOT,
    "thread_id": CODEX_CHILD,
    "parent_thread_id": CODEX_ROOT,
    "subagent_kind": "thread_spawn",
    "thread_source": "subagent",
    "request_kind": "turn",
}

# OpenCode: packages/opencode/src/session/llm/request.ts (`headers` at its end).
OPENCODE = {
    "user-agent": "opencode/1.4.0",
    "x-session-affinity": "ses_4c1d",
    "X-Session-Id": "ses_4c1d",
}

CASES = [
    Case(
        "the paper's three ids (arXiv 2604.25899, section 4)",
        {},
        {
            "workflow_type_id": "coding_assistant",
            "workflow_id": "session_123",
            "agent_id": "engineer",
        },
        CallContext("coding_assistant", "session_123", "engineer"),
    ),
    Case(
        "Dynamo 1.2's nvext.agent_context (docs.nvidia.com/dynamo, Agent Context)",
        {},
        {
            "nvext": {
                "agent_context": {
                    "session_type_id": "deep_research",
                    "session_id": "research-run-42",
                    "trajectory_id": "research-run-42:researcher",
                    "parent_trajectory_id": "research-run-42:planner",
                }
            }
        },
        CallContext(
            "deep_research",
            "research-run-42",
            "researcher",
            "planner",
            thread="research-run-42:researcher",
        ),
    ),
    Case(
        "Dynamo 1.3+'s headers (docs.nvidia.com/dynamo, Session IDs)",
        {"x-dynamo-session-id": "research-run-42:researcher"},
        {"nvext": {"agent_hints": {"priority": 5, "osl": 1024}}},
        CallContext("", "research-run-42", "researcher", thread="research-run-42:researcher"),
    ),
    Case(
        "Dynamo's headers of a child session, ended",
        {
            "X-Dynamo-Session-ID": "child-1",
            "X-Dynamo-Parent-Session-ID": "root-1",
            "X-Dynamo-Session-Final": "true",
        },
        {},
        CallContext("", "root-1", "", "root-1", thread="child-1"),
    ),
    Case(
        "Dynamo's headers at the end of the root session",
        {"X-Dynamo-Session-ID": "root-1", "X-Dynamo-Session-Final": "true"},
        {},
        CallContext("", "root-1", "", thread="root-1", final=True),
    ),
    Case(
        "vLLM Router's agentic_context (vllm-project/router, program_scheduling/identity.rs)",
        {},
        {
            "vllm_xargs": {
                "agentic_context": {
                    "program_id": "workflow:child",
                    "task_id": "workflow",
                    "session_id": "session-a",
                    "agent_id": "child",
                    "parent_agent_id": "lead",
                    "root_program_id": "workflow:root",
                    "blocks_parent": False,
                    "expected_resume": True,
                    "agent_role": "subagent",
                    "spawn_reason": "research",
                    "step_id": 3,
                }
            }
        },
        CallContext("", "workflow", "child", "lead", thread="workflow:child"),
    ),
    Case(
        "vLLM Router's agentic_context as text, a program of its own that ends",
        {},
        {
            "vllm_xargs": {
                "agentic_context": json.dumps(
                    {"program_id": "task-a:researcher", "task_id": None, "expected_resume": False}
                )
            }
        },
        CallContext("", "task-a", "researcher", thread="task-a:researcher", final=True),
    ),
    Case(
        "vLLM Router's agentic_context of a task",
        {},
        {"vllm_xargs": {"agentic_context": {"task_id": "task-b", "agent_id": "researcher"}}},
        CallContext("", "task-b", "researcher", thread="task-b:researcher"),
    ),
    Case(
        "vLLM Router's agent_hint",
        {},
        {
            "agent_hint": {
                "session_id": "child-session",
                "parent_session_id": "parent-session",
                "blocks_parent": True,
            }
        },
        CallContext("", "parent-session", "", "parent-session", thread="child-session"),
    ),
    Case(
        "Claude Code, the main agent",
        CLAUDE_MAIN,
        CLAUDE_BODY,
        CallContext("claude-code", CLAUDE_SESSION, "main"),
    ),
    Case(
        "Claude Code, a sub-agent, with hints",
        CLAUDE_MAIN
        | {
            "x-claude-code-agent-id": CLAUDE_AGENT,
            "x-claude-code-agent-type": "Explore",
            "x-claude-code-request-class": "subagent",
        },
        CLAUDE_BODY,
        CallContext("claude-code", CLAUDE_SESSION, "Explore", "main", thread=CLAUDE_AGENT),
    ),
    Case(
        "Claude Code, a sub-agent, without hints",
        CLAUDE_MAIN | {"x-claude-code-agent-id": CLAUDE_AGENT},
        CLAUDE_BODY,
        CallContext("claude-code", CLAUDE_SESSION, "subagent", "main", thread=CLAUDE_AGENT),
    ),
    Case(
        "Claude Code, a sub-agent's sub-agent",
        CLAUDE_MAIN
        | {
            "x-claude-code-agent-id": "acf659811cf929e90",
            "x-claude-code-parent-agent-id": CLAUDE_AGENT,
        },
        CLAUDE_BODY,
        CallContext(
            "claude-code", CLAUDE_SESSION, "subagent", CLAUDE_AGENT, thread="acf659811cf929e90"
        ),
    ),
    Case(
        "Claude Code naming the session for its user",
        CLAUDE_MAIN | {"x-claude-code-request-class": "auxiliary"},
        CLAUDE_BODY,
        CallContext("claude-code", CLAUDE_SESSION, "auxiliary"),
    ),
    Case(
        "Claude Code 2.1.78 to 2.1.85: JSON in metadata.user_id (coder/aibridge PR 241)",
        {"user-agent": "claude-cli/2.1.80 (external, cli)"},
        CLAUDE_BODY
        | {
            "metadata": {
                "user_id": json.dumps(
                    {
                        "device_id": "d3adbeef",
                        "account_uuid": "",
                        "session_id": "54c1eb09-bc4c-4d2f-98eb-6d2ab2d5e2fe",
                    }
                )
            }
        },
        CallContext("claude-code", "54c1eb09-bc4c-4d2f-98eb-6d2ab2d5e2fe", "main"),
    ),
    Case(
        "Claude Code before 2.1.78: the session at the end of metadata.user_id (the same PR)",
        {"user-agent": "claude-cli/2.0.10 (external, cli)"},
        CLAUDE_BODY
        | {
            "metadata": {
                "user_id": "user_abc123_account__session_57a121ec-f78c-48c3-a745-e3036a3ecc33"
            }
        },
        CallContext("claude-code", "57a121ec-f78c-48c3-a745-e3036a3ecc33", "main"),
    ),
    Case(
        "anyone's metadata.user_id",
        {},
        CLAUDE_BODY | {"metadata": {"user_id": "13803d75-b4b5-4c3e-b2a2-6f21399b021b"}},
        CallContext(),
    ),
    Case(
        "Codex, the root thread",
        CODEX_HEADERS,
        {
            "model": "m",
            "input": [],
            "prompt_cache_key": CODEX_ROOT,
            "client_metadata": {"session_id": CODEX_ROOT, "thread_id": CODEX_ROOT},
        },
        CallContext("codex", CODEX_ROOT, "main", thread=CODEX_ROOT),
    ),
    Case(
        "Codex, a thread that the root spawned; it shares session and cache key",
        CODEX_HEADERS
        | {
            "thread-id": CODEX_CHILD,
            "x-codex-window-id": f"{CODEX_CHILD}:0",
            "x-codex-parent-thread-id": CODEX_ROOT,
            "x-openai-subagent": "collab_spawn",
            "x-codex-turn-metadata": json.dumps(CODEX_SPAWNED),
        },
        {"model": "m", "input": [], "prompt_cache_key": CODEX_ROOT},
        CallContext("codex", CODEX_ROOT, "collab_spawn", CODEX_ROOT, thread=CODEX_CHILD),
    ),
    Case(
        "Codex, the same where a proxy drops its headers",
        {"user-agent": "proxy/1"},
        {
            "model": "m",
            "input": [],
            "prompt_cache_key": CODEX_ROOT,
            "client_metadata": {
                "session_id": CODEX_ROOT,
                "thread_id": CODEX_CHILD,
                "x-codex-window-id": f"{CODEX_CHILD}:0",
                "x-openai-subagent": "review",
                "x-codex-parent-thread-id": CODEX_ROOT,
                "x-codex-turn-metadata": json.dumps(CODEX_SPAWNED),
            },
        },
        CallContext("codex", CODEX_ROOT, "review", CODEX_ROOT, thread=CODEX_CHILD),
    ),
    Case(
        "Codex, compaction of a thread (openai/codex PR 24368)",
        CODEX_HEADERS
        | {"x-codex-turn-metadata": json.dumps(CODEX_SPAWNED | {"request_kind": "compaction"})},
        {"model": "m", "input": []},
        CallContext("codex", CODEX_ROOT, "compaction", CODEX_ROOT, thread=CODEX_ROOT),
    ),
    Case(
        "Codex 0.130, underscores",
        {"originator": "codex_cli_rs", "session_id": CODEX_ROOT, "thread_id": CODEX_ROOT},
        {},
        CallContext("codex", CODEX_ROOT, "main", thread=CODEX_ROOT),
    ),
    Case(
        "Codex of 2025: conversation_id (codex-rs/core/src/client.rs of 0.40)",
        {"originator": "codex_cli_rs", "conversation_id": CODEX_ROOT, "session_id": CODEX_ROOT},
        {"prompt_cache_key": CODEX_ROOT},
        CallContext("codex", CODEX_ROOT, "main", thread=CODEX_ROOT),
    ),
    Case(
        "a cache key alone names no run: many runs may share it",
        {"user-agent": "OpenAI/Python 2.0"},
        {"prompt_cache_key": "my-application-v3"},
        CallContext(),
    ),
    Case(
        "OpenCode, the session of its user",
        OPENCODE,
        {},
        CallContext("opencode", "ses_4c1d", "main", thread="ses_4c1d"),
    ),
    Case(
        "OpenCode, a task of that session",
        OPENCODE
        | {
            "x-session-affinity": "ses_9b07",
            "X-Session-Id": "ses_9b07",
            "x-parent-session-id": "ses_4c1d",
        },
        {},
        CallContext("opencode", "ses_4c1d", "subagent", "ses_4c1d", thread="ses_9b07"),
    ),
    Case(
        "OpenCode with its own provider",
        {
            "user-agent": "opencode/1.4.0",
            "x-opencode-project": "p1",
            "x-opencode-session": "ses_4c1d",
            "x-opencode-request": "msg_01",
            "x-opencode-client": "cli",
        },
        {},
        CallContext("opencode", "ses_4c1d", "main", thread="ses_4c1d"),
    ),
    Case(
        "vLLM's own session header (vllm/entrypoints/generate/base/serving.py)",
        {"X-Session-ID": "s-1"},
        {},
        CallContext("", "s-1", thread="s-1"),
    ),
    Case("vLLM's own session field", {}, {"session_id": "s-2"}, CallContext("", "s-2")),
    Case(
        "OpenTelemetry's names in baggage (semantic conventions for generative AI)",
        {"baggage": "gen_ai.conversation.id=c-1,gen_ai.agent.name=Math%20Tutor"},
        {},
        CallContext("", "c-1", "Math Tutor"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_what_a_client_sends_is_understood(case: Case) -> None:
    assert call_context(Headers(case.headers), json.dumps(case.body).encode()) == case.context


def test_what_a_platform_adds_goes_before_what_the_tool_sends() -> None:
    headers = CLAUDE_MAIN | {
        "x-claude-code-agent-id": CLAUDE_AGENT,
        "X-Workflow": "nightly-review",
        "X-Workflow-Agent": "searcher",
    }
    context = call_context(Headers(headers), json.dumps(CLAUDE_BODY).encode())
    expected = CallContext("nightly-review", CLAUDE_SESSION, "searcher", "main")
    assert context == CallContext(
        expected.workflow, expected.run, expected.agent, expected.parent, thread=CLAUDE_AGENT
    )


def test_dynamos_session_goes_before_the_tools_own() -> None:
    headers = CLAUDE_MAIN | {"x-dynamo-session-id": "nightly:planner"}
    context = call_context(Headers(headers), b"{}")
    assert (context.workflow, context.run, context.agent) == ("claude-code", "nightly", "planner")


@pytest.mark.parametrize("form", [lambda fields: fields, json.dumps])
def test_vllm_is_not_given_the_arguments_of_other_routers(form: Any) -> None:
    body = {
        "model": "m",
        "vllm_xargs": {"agentic_context": form({"task_id": "t", "agent_id": "a"}), "top_n": 4},
        "messages": [{"role": "user", "content": "é\u2028 1e400 "}],
    }
    sent = json.dumps(body, ensure_ascii=False).encode()
    context, served = who_speaks(Headers({}), sent)
    assert (context.run, context.agent) == ("t", "a")
    assert json.loads(served) == body | {"vllm_xargs": {"top_n": 4}}


@pytest.mark.parametrize(
    "sent",
    [
        b'{"vllm_xargs": {"top_n": 4}, "messages": [ ]}',
        b'{"vllm_xargs": "agentic_context"}',
        b'{"vllm_xargs": {"agentic_context"',
        b'{"messages": [{"content": "say \\"agentic_context\\""}]}',
    ],
)
def test_every_other_body_is_served_as_it_came(sent: bytes) -> None:
    assert who_speaks(Headers({}), sent)[1] is sent
