"""A team on the OpenAI Agents SDK. Pythia's part is the import and ``Team``.

::

    planner --hands over--> engineer --hands over--> writer

Agents and handoffs are declared as the SDK knows them, with their instructions, before the first
run; every call says which run and agent it belongs to. The handoffs are forced, so that the
smallest model does its part. They are calls of tools, for which the server needs a parser: in the
cluster file ``api: {arguments: {enable_auto_tool_choice: true, tool_call_parser: hermes}}``, or the
model's own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from typing import Any

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, set_tracing_disabled
from openai import AsyncOpenAI

from cluster.adapters.openai_agents import Team

WORKFLOW = "agents-sdk-team"
RULES = (
    "You help an engineer who runs many computers on which language models answer questions. "
    "You read carefully, you write plain English, and you answer in one short sentence."
)


def build(client: AsyncOpenAI, model: str, max_tokens: int) -> Agent[Any]:
    """The team; its first agent."""

    def settings(tool_choice: str | None = None) -> ModelSettings:
        return ModelSettings(max_tokens=max_tokens, temperature=0.0, tool_choice=tool_choice)

    shared = OpenAIChatCompletionsModel(model=model, openai_client=client)
    writer = Agent[Any](
        name="writer",
        instructions=f"{RULES} You write down what the others have found.",
        model=shared,
        model_settings=settings(),
    )
    engineer = Agent[Any](
        name="engineer",
        instructions=f"{RULES} You give advice, and hand over to the writer.",
        model=shared,
        model_settings=settings("transfer_to_writer"),
        handoffs=[writer],
    )
    return Agent[Any](
        name="planner",
        instructions=f"{RULES} You make a plan, and hand over to the engineer.",
        model=shared,
        model_settings=settings("transfer_to_engineer"),
        handoffs=[engineer],
    )


async def main(options: argparse.Namespace) -> None:
    """Run the workflow as often as asked, one run after the other."""
    set_tracing_disabled(True)  # the SDK sends traces to OpenAI otherwise
    async with AsyncOpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        model = options.model or (await client.models.list()).data[0].id
        team = Team(build(client, model, options.max_tokens), client, workflow=WORKFLOW)
        for number in range(1, options.runs + 1):
            result = await team.run(options.question)
            print(f"run {number}: {result.final_output}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A team on the OpenAI Agents SDK.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="with its /v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default="", help="default: the first of /v1/models")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer or handoff")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--question", default="How should a cluster spend its memory?")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(_options()))
