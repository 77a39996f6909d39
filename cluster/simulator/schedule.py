"""Which tokens a simulated engine computes in a step: vLLM's scheduler, without a model.

The rules of ``vllm/v1/core/sched/scheduler.py`` (0.32, no speculation, no asynchronous
scheduling, prefix cache on) in ``Scheduler.schedule`` and ``KVCacheManager.allocate_slots``:

* Sequences that run come first, in the order of their admission: one token, or as much of a
  prefill as the token budget has left. Whoever finds no block takes those of the sequence that
  was admitted last (by priority: of the least important that came last), which then waits in
  front of all others and is computed anew.
* If nobody was preempted, those that wait are admitted while there are tokens and seats, and
  while the whole sequence finds room; the first that does not stops the rest. Sequences that
  hold blocks because they waited for KV from elsewhere come before all others.
* What is in the cache is looked up at admission, never all of the prompt. If more can be read
  from elsewhere, blocks are taken for that and the sequence waits for it, in no seat; enough
  must stay free for prefills under way.
* So is what the cache lacks and the host has, if nothing is to be read from elsewhere.
* A block is in the cache as soon as the step that fills it is scheduled.

What differs from vLLM 0.32: a held block is free at the moment it is released, not a step
later; so are those of an aborted pull, though a read into them may go on; a request that may
not be cached (``EngineRequest.cached``) leaves no hashes behind.

A prefill that does not end in a step has used up its tokens, so at most one is under way, and
it is the last that was admitted.
"""

from __future__ import annotations

from cluster.simulator.decodes import Decodes
from cluster.simulator.host_memory import HostMemory
from cluster.simulator.kv_cache import BlockPool, Hits
from cluster.simulator.pins import Pins
from cluster.simulator.sequence import Sequence
from cluster.simulator.setup import EngineOptions
from cluster.simulator.waiting import Waiting
from coordinator.cost import Chunk


class Batch:
    """What a step computes: ``chunks`` of prefills, with their new tokens, and a token for each
    of ``Schedule.decodes`` but the ``stalled`` ones. ``pulls``: who waits for how many tokens
    of KV from now on; ``loads``: for how many blocks from the host."""

    __slots__ = ("chunks", "costs", "loads", "preempted", "pulls", "stalled")

    def __init__(self) -> None:
        self.chunks: list[tuple[Sequence, int]] = []
        self.costs: list[Chunk] = []
        self.pulls: list[tuple[Sequence, int]] = []
        self.loads: list[tuple[Sequence, int]] = []
        self.stalled: list[Sequence] = []
        self.preempted = 0


class Schedule:
    """The sequences of an engine and their blocks. ``host``: what it keeps in its host's memory."""

    def __init__(
        self, options: EngineOptions, kv_blocks: int, host: HostMemory | None = None
    ) -> None:
        if options.max_num_batched_tokens < options.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({options.max_num_batched_tokens}) is less than "
                f"max_num_seqs ({options.max_num_seqs})"
            )
        self._block_size = options.block_size
        self._tokens_max = options.max_num_batched_tokens
        self._seats = options.max_num_seqs
        self.chunk_tokens = 0
        """Of prompts at most so many are computed in a step with decodes; 0: what there is room
        for. vLLM's ``long_prefill_token_threshold``, which counts for each prompt alone."""
        # As in vLLM, one block stands for no block and is never used.
        self.pool = BlockPool(kv_blocks - 1)
        self.pins = Pins(self.pool)
        self._host = host
        self.decodes = Decodes(options.block_size)
        self.prefill: Sequence | None = None
        """The prefill under way between two steps."""
        self.waiting = Waiting()
        self.parked: dict[str, Sequence] = {}
        """Those that wait for KV from elsewhere, or have just got it."""
        self.by_priority = False
        """From the first request on whose priority differs from the one before it."""
        self.preemptions = 0
        self.missing: tuple[int, bytes] | None = None
        """If the first that waits found no room: the first block that the cache lacks of it."""
        self._now_s = 0.0
        self._places = 0
        self._priority: int | None = None

    @property
    def running(self) -> int:
        """Sequences in seats."""
        return len(self.decodes) + (self.prefill is not None)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self._block_size)

    def add(self, sequence: Sequence) -> None:
        """A request that has just come."""
        if self._priority is None:
            self._priority = sequence.priority
        self.waiting.add(sequence)
        if sequence.priority != self._priority and not self.by_priority:
            self.by_priority = True
            self.waiting.sort()

    def may_admit(self, sequence: Sequence) -> bool:
        """Whether the next step could admit who has just come, if nothing else changes."""
        if self.running >= self._seats:
            return False
        return self.missing is None or self.waiting.first is sequence

    def schedule(self, now_s: float) -> Batch:
        """Decide on the step that begins now: take blocks, preempt, admit."""
        batch = Batch()
        self._now_s = now_s
        self.missing = None
        prefill = self.prefill
        budget = self._tokens_max - len(self.decodes)
        if self.chunk_tokens and len(self.decodes):
            budget = min(budget, self.chunk_tokens)
        blocks = self.decodes.blocks_needed(0, 1)
        new_tokens = 0
        if prefill is not None:
            new_tokens = min(prefill.known_tokens - prefill.computed_tokens, budget)
            blocks += self._blocks_missing(prefill, new_tokens)
        while blocks > self.pool.free and self.pins.give_up_one(self._now_s):
            pass
        if blocks > self.pool.free:
            self._schedule_short_of_blocks(batch, now_s)
            return batch
        self.pool.take(self.decodes.blocks_needed(0, 1))
        if prefill is not None:
            self._settle()
            self._compute(batch, prefill, new_tokens)
        self._admit(batch, budget - new_tokens)
        return batch

    def take_for(self, first: int, count: int) -> None:
        """Take the decodes' blocks for ``count`` more steps from the ``first`` one on."""
        self.pool.take(self.decodes.blocks_needed(first, count))

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self.decodes:
            self.leave(sequence)
        elif sequence is self.prefill:
            self.prefill = None
        elif self.parked.pop(sequence.id, None) is None and sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence.holding)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the decodes; what it has filled is cached."""
        self.decodes.remove(sequence)
        self.pool.fill(sequence.holding, sequence.computed_tokens // self._block_size)

    def idle_steps(self, most: int) -> int:
        """For how many steps after one of decodes only nothing but them has to be looked at.

        At most ``most``, and as long as there are blocks. Those that wait stay where they are
        meanwhile: seats stay taken, and free blocks only get fewer. Unless a sequence is about
        to generate the very text that the first of them needs.
        """
        if self.missing is not None:
            block, wanted = self.missing
            if wanted and any(s.holding.hash_at(block) == wanted for s in self.decodes):
                return 0
        return self.decodes.steps_within(self.pool.free, most)

    def _blocks_missing(self, sequence: Sequence, new_tokens: int) -> int:
        return self.blocks_for(sequence.computed_tokens + new_tokens) - sequence.holding.blocks

    def _compute(self, batch: Batch, sequence: Sequence, new_tokens: int) -> None:
        """Schedule a part of a prefill; there are blocks for it."""
        holding, context = sequence.holding, sequence.computed_tokens
        missing = self._blocks_missing(sequence, new_tokens)
        self.pool.take(missing)
        holding.plain += missing
        self.pool.fill(holding, (context + new_tokens) // self._block_size)
        batch.chunks.append((sequence, new_tokens))
        batch.costs.append((new_tokens, context))
        sequence.computed_tokens = context + new_tokens
        sequence.computed_in_all += new_tokens

    def _settle(self) -> None:
        """Cache what decodes have filled, the step included that is being scheduled.

        Nobody can tell when that is done before somebody looks for it or caches the same.
        """
        size, decodes = self._block_size, self.decodes
        for sequence in decodes:
            tokens = decodes.computed_tokens(sequence) + 1
            full = tokens // size
            holding = sequence.holding
            if full > holding.cached:
                holding.plain = self.blocks_for(tokens) - holding.cached
                self.pool.fill(holding, full)

    # --- when blocks run out ---------------------------------------------------

    def _schedule_short_of_blocks(self, batch: Batch, now_s: float) -> None:
        """Sequences that run, one by one; whoever finds no block preempts."""
        running = list(self.decodes)
        prefill = self.prefill
        if prefill is not None:
            running.append(prefill)
        granted: dict[Sequence, int] = {}
        budget, index = self._tokens_max, 0
        while index < len(running):
            sequence = running[index]
            tokens = 1
            if sequence is prefill:
                tokens = min(sequence.known_tokens - sequence.computed_tokens, budget)
                missing = self._blocks_missing(sequence, tokens)
            else:
                missing = int(self.decodes.computed_tokens(sequence) % self._block_size == 0)
            while missing > self.pool.free:
                victim = self._victim(running)
                position = running.index(victim)
                del running[position]
                index -= position < index
                budget += granted.get(victim, 0)
                self._preempt(batch, victim, victim in granted, now_s)
                granted.pop(victim, None)
                if victim is sequence:
                    batch.stalled = [s for s in running[index:] if s is not prefill]
                    return
            if sequence is prefill:
                self._settle()
                self._compute(batch, sequence, tokens)
            else:
                self.pool.take(missing)
            granted[sequence] = tokens
            budget -= tokens
            index += 1

    def _victim(self, running: list[Sequence]) -> Sequence:
        if self.by_priority:
            return max(running, key=lambda sequence: sequence.key)
        return running[-1]

    def _preempt(self, batch: Batch, sequence: Sequence, granted: bool, now_s: float) -> None:
        """Free a sequence's blocks and let it wait; it has already been ``granted`` a token."""
        holding = sequence.holding
        if sequence is self.prefill:
            self.prefill = None
        else:
            self.decodes.remove(sequence)
            computed = sequence.computed_tokens + granted
            holding.plain = self.blocks_for(computed) - holding.cached
            self.pool.fill(holding, computed // self._block_size)
        if self._host is not None:
            self._host.store(holding.cached_chain)
        self.pool.release(holding)
        sequence.computed_tokens = 0
        sequence.preemptions += 1
        if sequence.generated and sequence.last_token_s is None:
            sequence.last_token_s = now_s
        self.preemptions += 1
        batch.preempted += 1
        self.waiting.put_back(sequence, in_front=not self.by_priority)

    # --- admission ---------------------------------------------------------------

    def _admit(self, batch: Batch, budget: int) -> None:
        """Admit from those that hold blocks already, then from those that wait."""
        seats = self._seats - self.running
        arrived = self._arrived()
        if budget <= 0 or seats <= 0 or not (arrived or self.waiting):
            return
        self._settle()
        for sequence in arrived:
            if budget <= 0 or seats <= 0:
                return
            self._promote(sequence)
            new_tokens = self._start(batch, sequence, budget)
            if new_tokens < 0:
                return
            del self.parked[sequence.id]
            budget -= new_tokens
            seats -= 1
        while self.waiting and budget > 0 and seats > 0:
            sequence = self.waiting.first
            new_tokens = self._start(batch, sequence, budget)
            if new_tokens < 0:
                return
            self.waiting.remove(sequence)
            budget -= new_tokens
            if new_tokens:
                seats -= 1
            else:
                self.parked[sequence.id] = sequence

    def _arrived(self) -> list[Sequence]:
        arrived = [sequence for sequence in self.parked.values() if sequence.pull_ok is not None]
        if self.by_priority:
            arrived.sort(key=lambda sequence: sequence.key)
        return arrived

    def _promote(self, sequence: Sequence) -> None:
        """KV has come, or will not: then what was found here may be found again."""
        if sequence.loading:
            sequence.loading = False
            self.pool.fill(sequence.holding, sequence.computed_tokens // self._block_size)
            return
        if sequence.pull_tokens == 0:
            return
        sequence.pull_tokens = 0
        if sequence.pull_ok:
            self.pool.fill(sequence.holding, sequence.computed_tokens // self._block_size)
            # Without the last token of the prompt there is nothing to sample from.
            sequence.computed_tokens = min(sequence.computed_tokens, sequence.prompt_tokens - 1)
        else:
            self.pool.release(sequence.holding)
            sequence.computed_tokens = 0
            sequence.moved_tokens = 0

    def _start(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        """Let a sequence run, or wait for KV. The tokens it takes: -1 if there is no room."""
        size, pool, holding = self._block_size, self.pool, sequence.holding
        tokens = sequence.known_tokens
        short = True
        while short:
            hits = Hits()
            context = sequence.computed_tokens
            if context == 0:
                hits = pool.lookup(holding, (tokens - 1) // size)
                context = hits.blocks * size
                if sequence.cached_only:
                    tokens = sequence.prompt_tokens = min(tokens, context + 1)
            external = max(0, sequence.pull_tokens - context)
            loads = 0 if external else self._loadable(sequence, hits, tokens)
            external += loads * size
            held = holding.blocks + hits.blocks
            needed = self.blocks_for(tokens) - held + hits.idle
            needed += self._reserved() if external else 0
            short = needed > pool.free and self.pins.give_up_one(self._now_s)
        if self.blocks_for(tokens) - held + hits.idle > pool.free:
            taken = -1
        elif external:
            taken = self._park(batch, sequence, hits, external, loads)
        else:
            taken = self._run(batch, sequence, hits, min(tokens - context, budget))
        if taken < 0:
            self.missing = (held, holding.hash_at(held))
        return taken

    def _run(self, batch: Batch, sequence: Sequence, hits: Hits, new_tokens: int) -> int:
        """Give a sequence a seat; there is room for all of it."""
        holding = sequence.holding
        if not sequence.computed_tokens:
            self._note(sequence, hits.blocks, 0)
        if hits.blocks:
            self.pool.adopt(holding, hits)
            sequence.computed_tokens = hits.blocks * self._block_size
        sequence.pull_tokens = 0
        self._places += 1
        sequence.place = self._places
        self._compute(batch, sequence, new_tokens)
        return new_tokens

    def _loadable(self, sequence: Sequence, hits: Hits, tokens: int) -> int:
        """Blocks that only the host has, of one that is looked at for the first time."""
        if self._host is None or sequence.computed_tokens or sequence.cached_only:
            return 0
        held = self._host.held(sequence.holding, (tokens - 1) // self._block_size)
        return max(0, held - hits.blocks)

    def _park(self, batch: Batch, sequence: Sequence, hits: Hits, external: int, loads: int) -> int:
        """Take blocks for KV that is to come, if that leaves enough for prefills under way.
        ``loads``: blocks of it that come from the host."""
        context = hits.blocks * self._block_size + external
        missing = self.blocks_for(context) - hits.blocks
        if missing + hits.idle > self.pool.free - self._reserved():
            return -1
        self.pool.adopt(sequence.holding, hits)
        self.pool.take(missing)
        sequence.holding.plain += missing
        sequence.computed_tokens = context
        if loads:
            sequence.loading, sequence.pull_ok = True, None
            self._note(sequence, hits.blocks + loads, 0)
            batch.loads.append((sequence, loads))
        else:
            self._note(sequence, hits.blocks, external)
            batch.pulls.append((sequence, external))
        return 0

    def _reserved(self) -> int:
        """Blocks that prefills and pulls under way still lack."""
        under_way = [*self.parked.values()]
        if self.prefill is not None:
            under_way.append(self.prefill)
        return sum(self._blocks_missing(s, s.known_tokens - s.computed_tokens) for s in under_way)

    def _note(self, sequence: Sequence, cached: int, external: int) -> None:
        """Remember where the prompt's KV came from, at the first admission."""
        if sequence.preemptions == 0 and sequence.moved_tokens == 0:
            sequence.local_cached_tokens = cached * self._block_size
            sequence.moved_tokens = external

    def check(self, taken: int, chunks: list[Sequence], stalled: list[Sequence]) -> list[Sequence]:
        """Assert that each sequence is in one place, with its blocks; all of them.

        While a step is under way: ``chunks`` are the prefills in it, and decodes have blocks for
        ``taken`` steps, the ``stalled`` ones none.
        """
        for sequence in self.decodes:
            computed = self.decodes.computed_tokens(sequence)
            tokens = computed if sequence in stalled else computed + taken
            sequence.holding.plain = self.blocks_for(tokens) - sequence.holding.cached
            assert 1 <= self.decodes.generated(sequence) < sequence.output_tokens
        others = [*self.waiting, *self.parked.values(), *chunks]
        if self.prefill is not None and self.prefill not in chunks:
            others.append(self.prefill)
        for sequence in others:
            # One whose pull failed keeps its blocks until it is looked at.
            least = self.blocks_for(sequence.computed_tokens)
            assert sequence.holding.blocks == least or sequence.id in self.parked
        members = [*self.decodes, *others]
        assert len({sequence.id for sequence in members}) == len(members)
        assert len(self.decodes) + len(chunks) <= self._seats
        return members
