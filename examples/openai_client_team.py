"""A team on the plain ``openai`` client: two kinds of block say who asks, nothing is tagged.

::

    planner --> explorer x 3 --> engineer <--> reviewer --> writer

``run`` is one run of the workflow, ``team.agent`` whoever asks inside of it; tasks inherit both.
The server learns the rest: who follows whom, how often, and how long answers get.
"""

from __future__ import annotations

import argparse
import asyncio
import logging

from openai import AsyncOpenAI

from cluster.adapters import Run, run

WORKFLOW = "openai-client-team"
TOPICS = ("the machines", "the memory", "the network")
ROUNDS = 2


class Team:
    """One team, and the model that all of it uses."""

    def __init__(self, client: AsyncOpenAI, model: str, max_tokens: int) -> None:
        self.client = client
        self.model = model
        self.max_tokens = max_tokens

    async def ask(self, text: str) -> str:
        """An answer. Who asks is known from the blocks around."""
        answer = await self.client.chat.completions.create(
            model=self.model,
            messages=[
                {"role": "system", "content": "You answer in one short sentence."},
                {"role": "user", "content": text},
            ],
            max_tokens=self.max_tokens,
            temperature=0.0,
        )
        return answer.choices[0].message.content or "(no answer)"

    async def explore(self, team: Run, plan: str, topic: str) -> str:
        """What one explorer finds."""
        with team.agent("explorer"):
            return await self.ask(f"The plan: {plan}\n\nWhat matters most about {topic}?")

    async def work(self, question: str) -> str:
        """One run of the workflow."""
        async with run(self.client, WORKFLOW) as team:
            with team.agent("planner"):
                plan = await self.ask(f"How would you find out: {question}")
            found = await asyncio.gather(*(self.explore(team, plan, topic) for topic in TOPICS))
            advice = "\n".join(found)
            for _ in range(ROUNDS):
                with team.agent("engineer"):
                    advice = await self.ask(f"Make one piece of advice of this:\n\n{advice}")
                with team.agent("reviewer"):
                    review = await self.ask(f"What is missing in this advice?\n\n{advice}")
                advice = f"{advice}\n\nA reader says: {review}"
            with team.agent("writer", final=True):
                return await self.ask(f"Say it in one sentence:\n\n{advice}")


async def main(options: argparse.Namespace) -> None:
    """Run the workflow as often as asked, one run after the other."""
    async with AsyncOpenAI(base_url=options.base_url, api_key=options.api_key) as client:
        model = options.model or (await client.models.list()).data[0].id
        team = Team(client, model, options.max_tokens)
        for number in range(1, options.runs + 1):
            print(f"run {number}: {await team.work(options.question)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A team on the plain openai client.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="with its /v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", default="", help="default: the first of /v1/models")
    parser.add_argument("--max-tokens", type=int, default=28, help="of each answer")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--question", default="How should a cluster spend its memory?")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(_options()))
