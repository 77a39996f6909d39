"""Adapters for agent frameworks: calls say what they belong to, and nobody tags them by hand.

::

    from cluster.adapters import run                      # the plain ``openai`` client
    from cluster.adapters.langgraph import with_pythia    # LangGraph
    from cluster.adapters.openai_agents import Team       # OpenAI Agents SDK

They need the framework in question and nothing of the cluster: neither vLLM nor the coordinator is
imported. They never break an application: a server that knows nothing of workflows gets headers
that it ignores, and what can't be declared or reported is logged once.
"""

from cluster.adapters.runs import Run, run
from cluster.adapters.server import attach, flush

__all__ = ["Run", "attach", "flush", "run"]
