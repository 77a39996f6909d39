"""A team on LangGraph. Two lines are Pythia's: the import and ``with_pythia``.

::

    planner --> explorer x 3 --> engineer <--> reviewer --> writer

The graph is declared as LangGraph knows it, before the first run; every call says which run and
node it belongs to. The explorers are set off with ``Send`` and run at the same time.
"""

from __future__ import annotations

import argparse
import logging
import operator
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import openai
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from cluster.adapters.langgraph import with_pythia

WORKFLOW = "langgraph-team"
TOPICS = ("the machines", "the memory", "the network")
ROUNDS = 2


class State(TypedDict, total=False):
    """What the team knows: notes of the explorers are put together."""

    question: str
    topic: str
    plan: str
    notes: Annotated[list[str], operator.add]
    advice: str
    rounds: int


def build(model: ChatOpenAI) -> Any:
    """The team's graph, compiled."""

    def ask(text: str) -> str:
        messages = [("system", "You answer in one short sentence."), ("user", text)]
        return str(model.invoke(messages).content) or "(no answer)"

    def planner(state: State) -> State:
        return {"plan": ask(f"How would you find out: {state['question']}")}

    def explorers(state: State) -> list[Send]:
        return [Send("explorer", {**state, "topic": topic}) for topic in TOPICS]

    def explorer(state: State) -> State:
        asked = f"The plan: {state['plan']}\n\nWhat matters most about {state['topic']}?"
        return {"notes": [ask(asked)]}

    def engineer(state: State) -> State:
        known = state.get("advice") or "\n".join(state["notes"])
        advice = ask(f"Make one piece of advice of this:\n\n{known}")
        return {"advice": advice, "rounds": state.get("rounds", 0) + 1}

    def reviewer(state: State) -> State:
        review = ask(f"What is missing in this advice?\n\n{state['advice']}")
        return {"advice": f"{state['advice']}\n\nA reader says: {review}"}

    def verdict(state: State) -> str:
        return "engineer" if state["rounds"] < ROUNDS else "writer"

    def writer(state: State) -> State:
        return {"advice": ask(f"Say it in one sentence:\n\n{state['advice']}")}

    nodes: list[Callable[[State], State]] = [planner, explorer, engineer, reviewer, writer]
    graph = StateGraph(State)
    for node in nodes:
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "planner")
    graph.add_conditional_edges("planner", explorers, ["explorer"])
    graph.add_edge("explorer", "engineer")
    graph.add_edge("engineer", "reviewer")
    graph.add_conditional_edges("reviewer", verdict, ["engineer", "writer"])
    graph.add_edge("writer", END)
    return graph.compile()


def main(options: argparse.Namespace) -> None:
    """Run the workflow as often as asked, one run after the other."""
    with openai.OpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        name = options.model or client.models.list().data[0].id
    model = ChatOpenAI(
        base_url=options.base_url,
        api_key=options.api_key,
        model=name,
        max_completion_tokens=options.max_tokens,
        temperature=0.0,
    )
    graph = with_pythia(build(model), model, workflow=WORKFLOW)
    for number in range(1, options.runs + 1):
        end = graph.invoke({"question": options.question})
        print(f"run {number}: {end['advice']}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A team on LangGraph.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="with its /v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default="", help="default: the first of /v1/models")
    parser.add_argument("--max-tokens", type=int, default=28, help="of each answer")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--question", default="How should a cluster spend its memory?")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(_options())
