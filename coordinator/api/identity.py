"""Who speaks for a request: one ``CallContext`` from what clients send.

The ``workflow`` object in the body comes first, then the ``X-Workflow*`` headers. A hint
only: whatever is missing or odd makes the call a workflow of one, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from coordinator.link import BAD_FRAME
from coordinator.protocol import CallContext

TEXT_MAX = 256
HEADERS = {
    "workflow": "x-workflow",
    "run": "x-workflow-run",
    "agent": "x-workflow-agent",
    "parent": "x-workflow-parent",
}
FINAL_HEADER = "x-workflow-final"
TRUE = frozenset({"1", "true", "yes"})


class WorkflowObject(msgspec.Struct, frozen=True):
    """The ``workflow`` object of a request body (OpenAI's ``extra_body``)."""

    name: str = ""
    run: str = ""
    agent: str = ""
    parent: str = ""
    final: bool = False


class BodyHints(msgspec.Struct, frozen=True):
    """The parts of a request body that concern the cluster."""

    workflow: WorkflowObject | None = None


_decode_hints = msgspec.json.Decoder(BodyHints).decode


def call_context(headers: Mapping[str, str], body: bytes) -> CallContext:
    """Who speaks. ``headers`` with lower-case names; ``body`` is JSON or anything else."""
    workflow = _workflow_of(body)
    if workflow is None:
        workflow = WorkflowObject()
    values = {
        "workflow": workflow.name,
        "run": workflow.run,
        "agent": workflow.agent,
        "parent": workflow.parent,
    }
    for name, header in HEADERS.items():
        values[name] = (values[name] or headers.get(header, ""))[:TEXT_MAX]
    final = workflow.final or headers.get(FINAL_HEADER, "").lower() in TRUE
    return CallContext(**values, final=final)


def _workflow_of(body: bytes) -> WorkflowObject | None:
    if b'"workflow"' not in body:
        return None
    try:
        return _decode_hints(body).workflow
    except BAD_FRAME:
        return None  # vLLM tells the client what is wrong with the body
