"""A read that an engine gives up: computed there instead, and not counted as moved.

Workers are spoken to as API processes do, with a handle whose blocks its source does not have: what
an API process would send for a peer that lost them after it had named them.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from coordinator import protocol
from tests.e2e.harness import BLOCK_TOKENS, MODEL, Control, Server
from tests.e2e.test_pulls import fresh_tokens
from tests.unit.recording_wire import engine_request
from transfer import handle as handles

ANSWER_S = 60.0
PREFIX_TOKENS = 8 * BLOCK_TOKENS
PROMPT_TOKENS = 30 * BLOCK_TOKENS + 5
ANSWER_TOKENS = 8
NOWHERE = 1 << 30


class Stranger:
    """Speaks to one worker."""

    def __init__(self, address: str, incarnation: str) -> None:
        self.incarnation = incarnation
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)

    def close(self) -> None:
        self._socket.close()

    def prefill(self, request: str, prompt: list[int]) -> protocol.PrefillDone:
        """Have a prompt computed and held."""
        header = protocol.Prefill(request, 1, self.incarnation)
        self._send(header, prompt, 1)
        done, _ = self._receive()
        assert isinstance(done, protocol.PrefillDone), done
        return done

    def decode(
        self, request: str, prompt: list[int], output_tokens: int, handle: bytes = b""
    ) -> tuple[list[int], PrefillStats]:
        """The answer, and what the engine says of the prompt."""
        header = protocol.Decode(request, 1, self.incarnation, handle)
        self._send(header, prompt, output_tokens)
        tokens: list[int] = []
        stats = None
        while True:
            message, frames = self._receive()
            assert isinstance(message, protocol.Deltas), message
            for output in self._decoder.decode(frames).outputs:
                tokens += output.new_token_ids
                stats = output.prefill_stats or stats
                if output.finish_reason is not None:
                    assert stats is not None
                    return tokens, stats

    def _send(
        self, header: protocol.Prefill | protocol.Decode, prompt: list[int], output_tokens: int
    ) -> None:
        request = engine_request(
            header.request,
            prompt,
            max_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        self._socket.send_multipart([protocol.encode(header), *self._encoder.encode(request)])

    def _receive(self) -> tuple[object, list[bytes]]:
        assert self._socket.poll(int(ANSWER_S * 1000)), "no answer"
        header, *frames = self._socket.recv_multipart()
        return protocol.decode_worker_to_api(header), frames


@pytest.fixture
def strangers(control: Control, cluster: Server) -> Iterator[dict[str, Stranger]]:
    """One for each worker."""
    with contextlib.closing(Control(cluster.control_address)) as peer:
        addresses = peer.data_addresses()
    with contextlib.ExitStack() as stack:
        yield {
            worker.worker: stack.enter_context(
                contextlib.closing(Stranger(addresses[worker.worker], worker.incarnation))
            )
            for worker in control.snapshot().workers
        }


@pytest.mark.parametrize("prefix_tokens", [0, PREFIX_TOKENS])
def test_what_could_not_be_read_is_computed_and_has_not_moved(
    strangers: dict[str, Stranger], cluster: Server, oracle: Server, prefix_tokens: int
) -> None:
    prompt, name = fresh_tokens(PROMPT_TOKENS), f"stranger-{uuid.uuid4().hex}"
    held = strangers["prefill-0"].prefill(name, prompt)
    decoder, other = strangers["decode-0"], strangers["decode-1"]
    if prefix_tokens:
        decoder.decode(f"{name}-before", prompt[: prefix_tokens + 1], 1)
    wrong = msgspec.structs.replace(
        handles.decode(held.handle),
        remote_block_ids=[[NOWHERE + at for at in range(PROMPT_TOKENS // BLOCK_TOKENS + 1)]],
    )
    failed, of_failed = decoder.decode(name, prompt, ANSWER_TOKENS, handles.encode(wrong))
    assert of_failed.num_external_cached_tokens == 0
    assert of_failed.num_local_cached_tokens == prefix_tokens
    if cluster.log_dir is not None:
        log = (cluster.log_dir / "decode-0.log").read_text()
        assert f"{protocol.engine_request_id(name, 1)}: read declined" in log
    # The same with the right handle, so that this is no other way of not reading.
    moved, of_moved = other.decode(name, prompt, ANSWER_TOKENS, held.handle)
    assert of_moved.num_external_cached_tokens >= PROMPT_TOKENS - BLOCK_TOKENS
    with oracle.http() as http:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert failed == moved == answer.json()["choices"][0]["token_ids"]
