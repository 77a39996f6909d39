"""A simulated engine written plainly: one step at a time, one block at a time.

Follows vLLM's ``Scheduler`` and ``BlockPool`` as literally as it can, with lists, and shares no
code with ``cluster.simulator.engine`` but the types that go in and come out.
"""

from __future__ import annotations

from cluster.simulator.engine_types import Ended, EngineRequest, FirstToken, Output, Pull
from cluster.simulator.setup import EngineOptions
from coordinator.cost import StepCost


class Block:
    def __init__(self) -> None:
        self.users = 0
        self.hash = b""


class Task:
    def __init__(self, request: EngineRequest, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.blocks: list[Block] = []
        self.hashed = 0
        self.computed = 0
        self.generated = 0
        self.pull = min(request.pull_tokens, request.prompt_tokens)
        self.pull_ok: bool | None = None
        self.preempted = 0
        self.local = 0
        self.moved = 0
        self.work = 0
        self.work_before_first = 0
        self.last_token_s = 0.0
        self.decodes = False
        """Has had a token since it was admitted: no part of a prefill, even if of one token."""

    @property
    def tokens(self) -> int:
        return self.request.prompt_tokens + self.generated

    @property
    def outputs(self) -> int:
        return 1 if self.request.hold else self.request.output_tokens

    @property
    def key(self) -> tuple[int, int]:
        return self.request.priority, self.arrival


class SlowEngine:
    def __init__(self, cost: StepCost, options: EngineOptions, kv_blocks: int) -> None:
        self.cost = cost
        self.options = options
        self.free = [Block() for _ in range(kv_blocks - 1)]
        self.cache: dict[bytes, list[Block]] = {}
        self.waiting: list[Task] = []
        self.parked: list[Task] = []
        self.running: list[Task] = []
        self.held: dict[str, tuple[Task, float]] = {}
        self.step: list[tuple[Task, int]] = []
        self.end_s: float | None = None
        self.aborts: list[Task] = []
        self.gaps_s: list[float] = []
        self.preemptions = 0
        self.arrivals = 0
        self.priority: int | None = None
        self.by_priority = False
        self.decoded = 0

    # --- blocks ------------------------------------------------------------------

    def size(self, tokens: int) -> int:
        return -(-tokens // self.options.block_size)

    def take(self, task: Task, count: int) -> None:
        for _ in range(count):
            block = self.free.pop(0)
            if block.hash:
                self.cache[block.hash].remove(block)
                if not self.cache[block.hash]:
                    del self.cache[block.hash]
                block.hash = b""
            block.users = 1
            task.blocks.append(block)

    def give_back(self, task: Task) -> None:
        plain: list[Block] = []
        for block in reversed(task.blocks):
            block.users -= 1
            if block.users == 0:
                (self.free if block.hash else plain).append(block)
        self.free[:0] = plain
        task.blocks = []
        task.hashed = 0

    def chain(self, task: Task) -> list[bytes]:
        chain = task.request.chain if task.request.cached else b""
        return [chain[at : at + 8] for at in range(0, len(chain), 8)]

    def put_in_cache(self, task: Task, tokens: int) -> None:
        chain = self.chain(task)
        while task.hashed < min(tokens // self.options.block_size, len(chain)):
            block = task.blocks[task.hashed]
            block.hash = chain[task.hashed]
            self.cache.setdefault(block.hash, []).append(block)
            task.hashed += 1

    def find(self, task: Task) -> list[Block]:
        found: list[Block] = []
        for name in self.chain(task)[: (task.tokens - 1) // self.options.block_size]:
            if name not in self.cache:
                break
            found.append(self.cache[name][0])
        return found

    def adopt(self, task: Task, found: list[Block]) -> None:
        for block in found:
            if block.users == 0:
                self.free.remove(block)
            block.users += 1
        task.blocks = list(found)
        task.hashed = len(found)
        task.computed = len(found) * self.options.block_size

    # --- a step ------------------------------------------------------------------

    def preempt(self, task: Task, now_s: float) -> None:
        self.give_back(task)
        task.computed = 0
        task.decodes = False
        task.preempted += 1
        self.preemptions += 1
        self.waiting.insert(0, task)
        if self.by_priority:
            self.waiting.sort(key=lambda waiting: waiting.key)

    def schedule(self, now_s: float, outputs: list[Output]) -> bool:
        """Whether somebody was preempted."""
        self.step = []
        budget, index, preempted = self.options.max_num_batched_tokens, 0, False
        while index < len(self.running) and budget > 0:
            task = self.running[index]
            new = min(task.tokens - task.computed, budget)
            missing = self.size(task.computed + new) - len(task.blocks)
            while missing > len(self.free):
                preempted = True
                victim = self.running[-1]
                if self.by_priority:
                    victim = max(self.running, key=lambda running: running.key)
                place = self.running.index(victim)
                del self.running[place]
                index -= place < index
                for scheduled in self.step:
                    if scheduled[0] is victim:
                        self.step.remove(scheduled)
                        budget += scheduled[1]
                        break
                self.preempt(victim, now_s)
                if victim is task:
                    return True
            self.take(task, missing)
            self.put_in_cache(task, task.computed + new)
            self.step.append((task, new))
            budget -= new
            index += 1
        if not preempted:
            self.admit(budget, now_s, outputs)
        return preempted

    def admit(self, budget: int, now_s: float, outputs: list[Output]) -> None:
        arrived = [task for task in self.parked if task.pull_ok is not None]
        if self.by_priority:
            arrived.sort(key=lambda task: task.key)
        for task in [*arrived, *self.waiting]:
            if budget <= 0 or len(self.running) >= self.options.max_num_seqs:
                return
            if task.pull and task.pull_ok is not None:
                task.pull = 0
                if task.pull_ok:
                    self.put_in_cache(task, task.computed)
                    task.computed = min(task.computed, task.tokens - 1)
                else:
                    self.give_back(task)
                    task.computed = task.moved = 0
            new = self.start(task, budget, now_s, outputs)
            if new < 0:
                return
            budget -= new
            (self.parked if task in self.parked else self.waiting).remove(task)
            (self.running if new else self.parked).append(task)

    def start(self, task: Task, budget: int, now_s: float, outputs: list[Output]) -> int:
        found = self.find(task) if task.computed == 0 else []
        idle = sum(block.users == 0 for block in found)
        held = len(task.blocks) + len(found)
        if self.size(task.tokens) - held + idle > len(self.free):
            return -1
        context = task.computed or len(found) * self.options.block_size
        pull = max(0, task.pull - context)
        if pull:
            under_way = [*self.parked, *self.running]
            reserved = sum(
                max(0, self.size(other.tokens) - len(other.blocks)) for other in under_way
            )
            if self.size(context + pull) - held + idle > len(self.free) - reserved:
                return -1
        if task.computed == 0 and not task.blocks:
            self.adopt(task, found)
        if task.preempted == 0 and not task.moved:
            task.local, task.moved = len(found) * self.options.block_size, pull
        if pull:
            self.take(task, self.size(context + pull) - len(task.blocks))
            task.computed = context + pull
            outputs.append(Pull(task.request.id, now_s, pull))
            return 0
        task.pull = 0
        new = min(task.tokens - context, budget)
        self.take(task, self.size(context + new) - len(task.blocks))
        self.put_in_cache(task, context + new)
        self.step.append((task, new))
        return new

    def begin(self, now_s: float, outputs: list[Output]) -> None:
        for name in [name for name, held in self.held.items() if held[1] <= now_s]:
            self.give_back(self.held.pop(name)[0])
        while self.schedule(now_s, outputs) and not self.step:
            pass
        self.end_s = None
        if not self.step:
            arrived = [task for task in self.parked if task.pull_ok is not None]
            if self.held and [*arrived, *self.waiting]:
                self.end_s = min(held[1] for held in self.held.values())
            return
        decodes = [task for task, _ in self.step if task.decodes]
        chunks = [(new, task.computed) for task, new in self.step if not task.decodes]
        context = sum(task.computed for task in decodes)
        step_s = self.cost.step_s(chunks, len(decodes), context)
        self.end_s = now_s + step_s + self.options.step_overhead_s

    def finish(self, now_s: float, outputs: list[Output]) -> None:
        for task in self.aborts:
            self.give_back(task)
            self.running.remove(task)
        for task, new in self.step:
            if task in self.aborts:
                continue
            if not task.decodes:
                task.work += new
            task.computed += new
            if task.computed < task.tokens:
                continue
            task.generated += 1
            task.decodes = True
            self.decoded += 1
            if task.generated == 1:
                outputs.append(self.first_token(task, now_s))
            else:
                self.gaps_s.append(now_s - task.last_token_s)
            task.last_token_s = now_s
            if task.generated == task.outputs:
                self.running.remove(task)
                self.end(task, now_s, outputs)
        self.aborts, self.step = [], []

    def first_token(self, task: Task, now_s: float) -> FirstToken:
        task.work_before_first = task.work
        whole = task.local + task.moved == task.request.prompt_tokens
        return FirstToken(task.request.id, now_s, task.local, task.moved, task.work - whole)

    def end(self, task: Task, now_s: float, outputs: list[Output]) -> None:
        again = task.work - task.work_before_first
        if task.request.hold:
            expires_s = now_s + self.options.kv_lease_s
            self.held[task.request.id] = (task, expires_s)
            outputs.append(Ended(task.request.id, now_s, True, expires_s, again))
        else:
            self.give_back(task)
            outputs.append(Ended(task.request.id, now_s, recomputed_tokens=again))

    # --- from outside ------------------------------------------------------------

    def advance(self, now_s: float) -> list[Output]:
        outputs: list[Output] = []
        while self.end_s is not None and self.end_s <= now_s:
            at_s = self.end_s
            self.finish(at_s, outputs)
            self.begin(at_s, outputs)
        return outputs

    def wake(self, now_s: float) -> None:
        if not self.step and (self.end_s is None or self.end_s > now_s):
            self.end_s = now_s

    def submit(self, request: EngineRequest, now_s: float) -> None:
        self.arrivals += 1
        if self.priority is None:
            self.priority = request.priority
        self.by_priority |= request.priority != self.priority
        self.waiting.append(Task(request, self.arrivals))
        if self.by_priority:
            self.waiting.sort(key=lambda task: task.key)
        self.wake(now_s)

    def abort(self, request_id: str, now_s: float) -> None:
        for tasks in (self.waiting, self.parked):
            for task in [task for task in tasks if task.request.id == request_id]:
                tasks.remove(task)
                self.give_back(task)
                self.wake(now_s)
        self.aborts += [t for t in self.running if t.request.id == request_id]

    def pulled(self, request_id: str, ok: bool, now_s: float) -> None:
        for task in self.parked:
            if task.request.id == request_id:
                task.pull_ok = ok
                self.wake(now_s)

    def release(self, request_id: str, now_s: float) -> None:
        if request_id in self.held:
            self.give_back(self.held.pop(request_id)[0])
            self.wake(now_s)

    def generated(self, request_id: str) -> int:
        tasks = [*self.waiting, *self.parked, *self.running]
        gone = [task.request.id for task in self.aborts]
        return sum(
            t.generated for t in tasks if t.request.id == request_id and t.request.id not in gone
        )
