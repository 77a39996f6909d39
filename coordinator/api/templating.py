"""Prompts as vLLM's server would make them of requests."""

from __future__ import annotations

from pydantic import ValidationError
from vllm.entrypoints.serve.tokenize.protocol import (
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    TokenizeResponse,
)
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

from coordinator.api.static import Tokenize
from coordinator.workflow.graph import Agent


def prompt_tokens(serving: ServingTokenization) -> Tokenize:
    """Tokenizes as the server's own endpoints do."""

    async def tokenize(agent: Agent, more: str) -> list[int]:
        try:
            request = _request(agent, more)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"no chat request takes it: {place}: {first['msg']}") from error
        answer = await serving.create_tokenize(request, None)
        if not isinstance(answer, TokenizeResponse):
            raise ValueError(answer.error.message)
        tokens: list[int] = answer.tokens
        if len(tokens) > answer.max_model_len:
            raise ValueError(f"{len(tokens)} tokens, the model takes {answer.max_model_len}")
        return tokens

    return tokenize


def _request(agent: Agent, more: str) -> TokenizeChatRequest | TokenizeCompletionRequest:
    prompt = agent.static_prompt
    if isinstance(prompt, str):
        return TokenizeCompletionRequest(prompt=prompt + more)
    follows = [{"role": "user", "content": more}] if more else []
    return TokenizeChatRequest(
        messages=[*prompt, *follows],
        add_generation_prompt=bool(more),
        tools=agent.tools or None,
    )
