"""Every bound that knowledge about workflows stays within, in one frozen struct."""

from __future__ import annotations

import msgspec

from coordinator.limits import Positive, Seconds


class WorkflowLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of declared graphs and of what is learned. What is over a limit is refused in a
    declaration, and forgotten (the least recently used first) or lumped together in learning."""

    graph_agents: Positive = 256
    """Agents of a declared graph."""
    graph_edges: Positive = 2048
    """Edges of a declared graph."""
    fan_out: Positive = 1024
    """Calls that one edge of a declared graph may set off at once."""
    loop_rounds: Positive = 10_000
    """Rounds that a declared loop may be bounded by."""
    name_bytes: Positive = 256
    """Longest name of a workflow or an agent. Longer ones are refused, or learned as ``OTHER``."""
    static_bytes: Positive = 1 << 20
    """Longest static prompt of a declared agent, as text or as JSON."""
    static_hashes_bytes: Positive = 64 << 20
    """Block hashes of the static prompts of all declared agents; of more only lengths are kept."""

    tenants: Positive = 1024
    """Tenants of whom anything is remembered."""
    workflows_per_tenant: Positive = 256
    """Workflows remembered of one tenant."""
    agents_per_workflow: Positive = 256
    """Agents of a workflow that are told apart; all others are one."""
    runs_per_tenant: Positive = 20_000
    """Live runs of one tenant."""
    runs: Positive = 100_000
    """Live runs of all tenants."""
    calls_per_run: Positive = 64
    """Calls of one run that are going on or may still be followed."""
    contexts_per_workflow: Positive = 4096
    """Paths of agents whose followers are counted."""
    edges_per_workflow: Positive = 1024
    """Pairs of agents whose gaps and lengths are counted."""
    edges: Positive = 50_000
    """The same of all workflows; beyond it workflows nobody uses are forgotten."""

    ended_runs: Positive = 4096
    """Ended runs that are remembered, of all tenants."""
    declared: Positive = 1024
    """Workflows that may be declared."""
    graph_bytes: Positive = 4 << 20
    """Longest declared graph, as JSON."""
    record_bytes: Positive = 16 << 20
    """Longest workflow that may be imported, as JSON."""
    journal_events: Positive = 20_000
    """Events that may be kept before the profiles that contain them are."""

    idle_least_s: Seconds = 60.0
    """A run that is silent for less has not ended, whatever was learned."""
    idle_most_s: Seconds = 3600.0
    """A run that is silent for longer has ended; so long it takes while nothing is learned."""
