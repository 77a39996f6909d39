"""An engine that behaves like vLLM's, in virtual time.

Driven from outside: ``submit`` and the like, then ``advance`` whenever ``next_s`` has come.
``Schedule`` decides what a step computes; here is when it ends, and what comes out.

Steps of decodes alone are taken many at a time, until one of them has its last token or finds
no block, a lease ends, or something comes from outside: that ends them with the step that is
under way then. So what comes is looked at between two steps, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from cluster.simulator.engine_types import (
    Ended,
    EngineRequest,
    FirstToken,
    HostLoad,
    Output,
    Pull,
)
from cluster.simulator.host_memory import HostMemory
from cluster.simulator.kv_cache import BlockPool, Holding
from cluster.simulator.records import Gaps
from cluster.simulator.schedule import Batch, Schedule
from cluster.simulator.sequence import Sequence
from cluster.simulator.setup import EngineOptions
from cluster.simulator.steps import Steps
from coordinator.cost import Chunk, StepCost
from coordinator.protocol import Load, Retain

STEPS_MAX_S = 1.0
"""Virtual seconds that are taken at a time at most: ``slow`` is read in between."""


class Engine:
    """One engine with ``kv_blocks`` blocks. ``slow``: factor on its step times, 1 is as it is;
    steps that are planned already (up to ``STEPS_MAX_S``, or until something comes) keep theirs.

    ``gaps`` gets every time between two tokens of a sequence. ``host``: what it keeps in its host's
    memory, if it keeps anything there.
    """

    def __init__(
        self,
        cost: StepCost,
        options: EngineOptions,
        kv_blocks: int,
        gaps: Gaps,
        host: HostMemory | None = None,
    ) -> None:
        self.slow = 1.0
        self._shared = 1.0
        self._cost = cost
        self._options = options
        self._gaps = gaps
        self.host = host
        self._schedule = Schedule(options, kv_blocks, host)
        self._sequences: dict[str, Sequence] = {}
        self._held: dict[str, tuple[Holding, float]] = {}
        """What is held under a lease, and until when; the first ends first."""
        self._aborted: list[Sequence] = []
        """They leave when the step under way is over."""
        self._late: list[Sequence] = []
        """Decodes that had no token in the latest step."""
        self._batch = Batch()
        self._steps: Steps | None = None
        self._steps_taken = 0
        """For how many of them the decodes have their blocks."""
        self._wake_s: float | None = None
        """When to schedule, while no step is under way."""
        self.cached_chains: list[bytes] = []
        """What ended sequences have left in the prefix cache; whoever looks takes it out."""
        self._arrivals = 0
        self._prefill_tokens = self._decode_tokens = self._external_tokens = 0

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its blocks to another one."""
        return self._schedule.preemptions

    @property
    def pool(self) -> BlockPool:
        """Its prefix cache, to be looked at."""
        return self._schedule.pool

    @property
    def next_s(self) -> float | None:
        """When ``advance`` has something to do; None until something is submitted or pulled."""
        return self._wake_s if self._steps is None else self._steps.end_s

    @property
    def stepping(self) -> bool:
        """Whether a step is under way."""
        return self._steps is not None

    def share(self, factor: float, now_s: float) -> None:
        """All takes ``factor`` times as long from now on, as others compute on the same cores.

        So does what is left of a step with prefills; one of decodes alone ends as planned.
        """
        ratio, self._shared = factor / self._shared, factor
        if ratio != 1.0 and self._steps is not None:
            self._interrupt(now_s)
            self._steps.stretch(ratio, now_s)

    def limit_chunks(self, tokens: int) -> None:
        """Compute at most so many tokens of a prompt in a step beside other requests; 0: as many
        as a step may have."""
        self._schedule.chunk_tokens = tokens

    # --- what comes in ---------------------------------------------------------

    def submit(self, request: EngineRequest, now_s: float) -> None:
        """Take a request in; it is looked at when the step under way is over.

        As in vLLM generation ends at ``max_model_len``. ValueError for a request that could
        never run: one that is empty, too long or larger than the whole KV cache.
        """
        schedule, options = self._schedule, self._options
        assert request.id not in self._sequences, f"{request.id} is here already"
        assert request.id not in self._held, f"{request.id} is held here"
        output_tokens = 1 if request.hold else request.output_tokens
        output_tokens = min(output_tokens, options.max_model_len - request.prompt_tokens)
        if request.prompt_tokens < 1 or output_tokens < 1:
            raise ValueError(
                f"{request.id}: {request.prompt_tokens} + {request.output_tokens} tokens for an "
                f"engine with max_model_len {options.max_model_len}"
            )
        blocks = schedule.blocks_for(request.prompt_tokens + output_tokens - 1)
        if blocks > schedule.pool.blocks:
            raise ValueError(
                f"{request.id} needs {blocks} blocks, the engine has {schedule.pool.blocks}"
            )
        self._arrivals += 1
        sequence = Sequence(request, output_tokens, self._arrivals)
        self._sequences[request.id] = sequence
        schedule.add(sequence)
        if schedule.may_admit(sequence):
            self._interrupt(now_s)

    def abort(self, request_id: str, now_s: float) -> None:
        """Forget a request, wherever it is; unknown ones are ignored.

        Its blocks are free when the step under way is over. Those of a pull are too, though
        vLLM keeps them until the read is over. What is held stays held.
        """
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        self._interrupt(now_s)
        if self._steps is not None and self._runs(sequence):
            self._aborted.append(sequence)
        else:
            self._schedule.drop(sequence)

    def pulled(self, request_id: str, ok: bool, now_s: float) -> None:
        """KV that was asked for has arrived, or could not be read: then it is computed here; so it
        is from the host.

        Ignored for unknown requests, which were aborted meanwhile.
        """
        sequence = self._schedule.parked.get(request_id)
        if sequence is not None:
            sequence.pull_ok = ok
            self._interrupt(now_s)

    def release(self, request_id: str, now_s: float) -> None:
        """Held blocks have been read, or nobody will read them; unknown ones are ignored."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self._interrupt(now_s)
            self._schedule.pool.release(held[0])

    def renew(self, request_id: str, now_s: float) -> None:
        """A reader still wants what is held: its lease begins anew, if it is not over."""
        if self.holds(request_id, now_s):
            holding, _ = self._held.pop(request_id)
            self._held[request_id] = (holding, now_s + self._options.kv_lease_s)

    def retain(self, message: Retain, now_s: float) -> None:
        """Pin what ended requests have left, or release it."""
        self._interrupt(now_s)
        for name in message.released:
            self._schedule.pins.release(name)
        for name in message.unneeded:
            self._schedule.pins.release(name, cold=True)
        for pin in message.pins:
            self._schedule.pins.pin(pin, now_s)

    def _runs(self, sequence: Sequence) -> bool:
        schedule = self._schedule
        return (
            sequence in schedule.decodes
            or sequence is schedule.prefill
            or any(sequence is member for member, _ in self._batch.chunks)
        )

    def _interrupt(self, now_s: float) -> None:
        """Something comes: look at it when the step is over that is under way."""
        steps = self._steps
        if steps is None:
            self._wake_s = now_s if self._wake_s is None else min(self._wake_s, now_s)
        elif steps.count > 1:
            steps.stop_after(now_s)
            # Those steps' blocks are taken before what comes changes which are free.
            self._take_blocks()

    def _take_blocks(self) -> None:
        """The decodes' blocks for all steps that are planned; those of the first are taken."""
        assert self._steps is not None
        count = self._steps.count
        self._schedule.take_for(self._steps_taken, count - self._steps_taken)
        self._steps_taken = count

    # --- what comes out --------------------------------------------------------

    def advance(self, now_s: float) -> list[Output]:
        """Everything that is due by ``now_s``, in order of time."""
        outputs: list[Output] = []
        while (at_s := self.next_s) is not None and at_s <= now_s:
            if self._steps is not None:
                self._finish(self._steps, at_s, outputs)
            self._begin(at_s, outputs)
        return outputs

    def _begin(self, at_s: float, outputs: list[Output]) -> None:
        """Plan the next step, or several, or wait for something to come."""
        self._expire(at_s)
        schedule = self._schedule
        batch = schedule.schedule(at_s)
        while batch.preempted and not self._tokens(batch):
            batch = schedule.schedule(at_s)
        self._batch = batch
        outputs.extend(Pull(sequence.id, at_s, tokens) for sequence, tokens in batch.pulls)
        if self.host is not None:
            for sequence, blocks in batch.loads:
                ready_s = self.host.loaded_s(blocks, at_s)
                outputs.append(HostLoad(sequence.id, at_s, ready_s))
        if self._tokens(batch):
            self._wake_s = None
            self._steps = self._plan(batch, at_s)
            self._steps_taken = 1
        else:
            # Only the end of a lease can help whom there is no room for.
            self._steps = None
            self._wake_s = self._lease_end_s if schedule.missing is not None else None

    def _tokens(self, batch: Batch) -> int:
        return len(batch.chunks) + len(self._schedule.decodes) - len(batch.stalled)

    @property
    def _lease_end_s(self) -> float | None:
        return next((expires_s for _, expires_s in self._held.values()), None)

    def _plan(self, batch: Batch, at_s: float) -> Steps:
        schedule, decodes = self._schedule, self._schedule.decodes
        count = len(decodes) - len(batch.stalled)
        context = decodes.context_tokens
        context -= sum(decodes.computed_tokens(sequence) for sequence in batch.stalled)
        first_s = self._step_s(batch.costs, count, context)
        if batch.chunks or batch.preempted or self._late:
            return Steps(at_s, first_s, 0.0, 1)
        steps = 1 + schedule.idle_steps(decodes.steps_to_end() - 1)
        if steps == 1:
            return Steps(at_s, first_s, 0.0, 1)
        last_s = self._step_s((), count, context + (steps - 1) * count)
        plan = Steps(at_s, first_s, max(0.0, last_s - first_s) / (steps - 1), steps)
        plan.stop_after(at_s + STEPS_MAX_S)
        if (lease_end_s := self._lease_end_s) is not None:
            plan.stop_after(lease_end_s)
        return plan

    def _step_s(self, chunks: Many[Chunk], count: int, context: int) -> float:
        step_s = self._cost.step_s(chunks, count, context)
        return (step_s * self.slow + self._options.step_overhead_s) * self._shared

    def _finish(self, steps: Steps, at_s: float, outputs: list[Output]) -> None:
        """The planned steps are over: tokens come out."""
        schedule, batch = self._schedule, self._batch
        self._take_blocks()
        schedule.decodes.steps += steps.count
        aborted, self._aborted = self._aborted, []
        # They had all tokens but the last.
        self._count_tokens(steps, steps.count - 1, sum(s in schedule.decodes for s in aborted))
        for sequence in aborted:
            schedule.drop(sequence)
        self._count_decodes(steps, at_s)
        for sequence in schedule.decodes.ended():
            schedule.leave(sequence)
            self._end(sequence, at_s, outputs)
        for sequence, _ in batch.chunks:
            if sequence not in aborted:
                self._finish_chunk(sequence, at_s, outputs)
        self._batch = Batch()
        self._steps = None

    def _count_decodes(self, steps: Steps, at_s: float) -> None:
        """Count the decodes' tokens and the times before them."""
        decodes, stalled = self._schedule.decodes, self._batch.stalled
        stalled = [sequence for sequence in stalled if sequence in decodes]
        late = [s for s in self._late if s in decodes and s not in stalled]
        self._decode_tokens += len(late)
        self._count_tokens(steps, steps.count, len(decodes) - len(stalled) - len(late))
        for sequence in late:
            self._count_late(sequence, at_s)
        for sequence in stalled:
            decodes.delay(sequence)
            if sequence.last_token_s is None:
                sequence.last_token_s = steps.start_s
        self._late = stalled

    def _count_tokens(self, steps: Steps, count: int, each: int) -> None:
        """Count ``each`` tokens for each of the first ``count`` steps."""
        self._decode_tokens += each * count
        self._gaps.add_growing(steps.first_s, steps.growth_s, count, each)

    def _count_late(self, sequence: Sequence, at_s: float) -> None:
        assert sequence.last_token_s is not None
        self._gaps.add(at_s - sequence.last_token_s)
        sequence.last_token_s = None

    def _finish_chunk(self, sequence: Sequence, at_s: float, outputs: list[Output]) -> None:
        schedule = self._schedule
        if sequence.computed_tokens < sequence.known_tokens:
            schedule.prefill = sequence
            return
        if sequence is schedule.prefill:
            schedule.prefill = None
        sequence.generated += 1
        self._decode_tokens += 1
        if sequence.generated == 1:
            outputs.append(self._first_token(sequence, at_s))
        else:
            self._count_late(sequence, at_s)
        if sequence.generated == sequence.output_tokens:
            self._end(sequence, at_s, outputs)
        else:
            schedule.decodes.add(sequence)

    def _first_token(self, sequence: Sequence, at_s: float) -> FirstToken:
        local, moved = sequence.local_cached_tokens, sequence.moved_tokens
        if self.host is not None:
            self.host.store(sequence.holding.cached_chain)
        missing = sequence.prompt_tokens - local - moved
        self._prefill_tokens += missing
        self._external_tokens += moved
        sequence.computed_before_first = sequence.computed_in_all
        # The last token of a prompt that was moved as a whole counts as moved, as in vLLM,
        # though it is computed once more.
        computed = sequence.computed_in_all - (missing == 0)
        return FirstToken(sequence.id, at_s, local, moved, computed)

    def _end(self, sequence: Sequence, at_s: float, outputs: list[Output]) -> None:
        del self._sequences[sequence.id]
        if sequence.holding.cached:
            chain = sequence.holding.cached_chain
            self.cached_chains.append(chain)
            self._schedule.pins.ended(sequence.id, chain)
            if self.host is not None:
                self.host.store(chain)
        recomputed = sequence.computed_in_all - sequence.computed_before_first
        if sequence.hold:
            expires_s = at_s + self._options.kv_lease_s
            self._held[sequence.id] = (sequence.holding, expires_s)
            outputs.append(Ended(sequence.id, at_s, True, expires_s, recomputed))
        else:
            self._schedule.pool.release(sequence.holding)
            outputs.append(Ended(sequence.id, at_s, recomputed_tokens=recomputed))

    def _expire(self, at_s: float) -> None:
        """Free what was held or pinned until now at the latest."""
        self._schedule.pins.expire(at_s)
        while self._held:
            request_id, (holding, expires_s) = next(iter(self._held.items()))
            if expires_s > at_s:
                return
            del self._held[request_id]
            self._schedule.pool.release(holding)

    # --- what can be asked ------------------------------------------------------

    def holds(self, request_id: str, now_s: float) -> bool:
        """Whether the blocks are still held under their lease."""
        held = self._held.get(request_id)
        return held is not None and now_s < held[1]

    def generated(self, request_id: str, now_s: float) -> int:
        """Tokens that a request has by now; 0 for unknown ones."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return 0
        decodes = self._schedule.decodes
        if sequence not in decodes:
            return sequence.generated
        ended = 0
        if self._steps is not None and sequence not in self._batch.stalled:
            ended = self._steps.ended_by(now_s)
        return decodes.generated(sequence) + ended

    def load(self, now_s: float) -> Load:
        """What its beat would say."""
        schedule, batch, steps = self._schedule, self._batch, self._steps
        decodes = schedule.decodes
        running = schedule.running + sum(s is not schedule.prefill for s, _ in batch.chunks)
        pinned = schedule.pins.blocks
        used = schedule.pool.blocks - schedule.pool.free
        decode_tokens = self._decode_tokens
        if steps is None:
            self._expire(now_s)
            pinned = schedule.pins.blocks
            used = schedule.pool.blocks - schedule.pool.free
        else:
            ended = steps.ended_by(now_s)
            started = min(ended + 1, steps.count)
            used += decodes.blocks_needed(self._steps_taken, max(0, started - self._steps_taken))
            decode_tokens += ended * (len(decodes) - len(batch.stalled))
        return Load(
            running=running,
            waiting=len(schedule.waiting) + len(schedule.parked),
            kv_blocks_used=used - pinned,
            prefill_tokens_total=self._prefill_tokens,
            decode_tokens_total=decode_tokens,
            external_tokens_total=self._external_tokens,
            preemptions_total=schedule.preemptions,
            kv_blocks_pinned=pinned,
        )

    def check(self) -> None:
        """Assert that every block is free, held or used by whom the tables say."""
        taken = 0 if self._steps is None else self._steps_taken
        chunks = [sequence for sequence, _ in self._batch.chunks]
        members = self._schedule.check(taken, chunks, self._batch.stalled)
        known = {**self._sequences, **{sequence.id: sequence for sequence in self._aborted}}
        assert known == {sequence.id: sequence for sequence in members}
        held = [holding for holding, _ in self._held.values()] + self._schedule.pins.holdings
        self._schedule.pool.check([*held, *(sequence.holding for sequence in members)])
        ends_s = [expires_s for _, expires_s in self._held.values()]
        assert ends_s == sorted(ends_s)
