"""Who has the most room and the least to do, known without looking at every worker.

Placement compares all workers of a small cluster. In a large one it compares those that can
be the answer: the least loaded, those with the most room and those that hold the most of
the prompt. The first two are kept in order here, so that what a decision costs hardly
grows with the cluster.

The order is renewed when it is asked for: whoever changes a worker only has to ``touch`` it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from itertools import islice

from coordinator.limits import Limits, Placement
from coordinator.state import Worker

Key = tuple[float, str]


class Order:
    """Workers by a number, the smallest first, equal ones by name.

    Removal and insertion move up to all pointers of a list: at a thousand workers that is
    still far less than a microsecond.
    """

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._of: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def put(self, name: str, number: float) -> None:
        """``name`` has this number from now on."""
        key = number, name
        former = self._of.get(name)
        if former == key:
            return
        if former is not None:
            del self._keys[bisect_left(self._keys, former)]
        self._of[name] = key
        insort(self._keys, key)

    def remove(self, name: str) -> None:
        """``name`` is in no order any more; nothing happens if it is in none."""
        former = self._of.pop(name, None)
        if former is not None:
            del self._keys[bisect_left(self._keys, former)]

    def first(self, count: int) -> Iterator[str]:
        """The ``count`` smallest."""
        return (name for _, name in islice(self._keys, count))

    @property
    def least(self) -> float:
        """The smallest number; infinite if there is nobody."""
        return self._keys[0][0] if self._keys else float("inf")

    def as_dict(self) -> dict[str, float]:
        """The number of each."""
        return {name: number for number, name in self._keys}


class Side:
    """Workers that are up and do one kind of work."""

    def __init__(self) -> None:
        self.by_load = Order()
        self.by_taken = Order()
        """Blocks taken, less those that there are: minus the free ones; minus infinity for who
        takes a call in any case, infinity for who takes none."""

    def __len__(self) -> int:
        return len(self.by_load)

    def __contains__(self, name: str) -> bool:
        return name in self.by_load

    def remove(self, name: str) -> None:
        """A worker is gone or does something else."""
        self.by_load.remove(name)
        self.by_taken.remove(name)

    def full(self, blocks: int) -> bool:
        """Nobody has so many blocks free."""
        return -self.by_taken.least < blocks

    def first(self, count: int) -> Iterator[str]:
        """The least loaded, then those with the most room; some twice."""
        yield from self.by_load.first(count)
        yield from self.by_taken.first(count)


class Standing:
    """All registered workers, in the orders that placement asks about."""

    def __init__(self, limits: Limits, placement: Placement) -> None:
        self._limits = limits
        self._placement = placement
        self._reserve = placement.reserve
        self._roles_shared = placement.roles_shared
        self.decoders, self.prefillers = Side(), Side()
        self._workers: dict[str, Worker] = {}
        self._touched: set[str] = set()
        self._largest: int | None = None

    def add(self, worker: Worker) -> None:
        """A worker registered, or its role changed."""
        self._workers[worker.name] = worker
        self._touched.add(worker.name)
        self._largest = None

    def remove(self, worker: Worker) -> None:
        """A worker is not registered any more."""
        del self._workers[worker.name]
        self._touched.discard(worker.name)
        self.decoders.remove(worker.name)
        self.prefillers.remove(worker.name)
        self._largest = None

    def touch(self, worker: Worker) -> None:
        """Something of a worker changed: what it has to do, its room, whether it is up."""
        self._touched.add(worker.name)

    def renew(self) -> None:
        """Put whoever was touched where it belongs."""
        for name in self._touched:
            worker = self._workers.get(name)
            if worker is not None:
                self._put(worker)
        self._touched.clear()

    @property
    def largest_tokens(self) -> int:
        """Tokens that the largest engine can hold for one call, of all that may decode, up or
        not. Prefill workers count only where there are no others."""
        if self._largest is None:
            workers = self._workers.values()
            sizes = [worker.tokens_max for worker in workers if self._decodes(worker)]
            self._largest = max(sizes or (worker.tokens_max for worker in workers), default=0)
        return self._largest

    def check(self, workers: Collection[Worker]) -> None:
        """Assert that the orders are what they would be if they were made now."""
        assert list(self._workers.values()) == list(workers)
        self.renew()
        fresh = Standing(self._limits, self._placement)
        for worker in workers:
            fresh.add(worker)
        fresh.renew()
        for ours, theirs in (
            (self.decoders, fresh.decoders),
            (self.prefillers, fresh.prefillers),
        ):
            assert ours.by_load.as_dict() == theirs.by_load.as_dict()
            assert ours.by_taken.as_dict() == theirs.by_taken.as_dict()

    def _decodes(self, worker: Worker) -> bool:
        return self._roles_shared or worker.role != "prefill"

    def _put(self, worker: Worker) -> None:
        limits = self._limits
        if worker.up and self._decodes(worker):
            taken = max(worker.kv_blocks_reserved, worker.kv_blocks_used)
            load = taken / worker.usable_blocks + worker.waiting / worker.batch_slots
            free = len(worker.decodes) < limits.calls_per_worker
            self._rank(self.decoders, worker, load, free)
        else:
            self.decoders.remove(worker.name)
        if worker.up and worker.role != "decode":
            free = worker.prefilling < limits.prefills_per_worker
            self._rank(self.prefillers, worker, worker.prefill_tokens, free)
        else:
            self.prefillers.remove(worker.name)

    def _rank(self, side: Side, worker: Worker, load: float, free: bool) -> None:
        if not free:
            # It takes no call: behind all that may.
            load = taken = float("inf")
        elif not self._reserve or worker.kv_blocks_reserved == 0:
            taken = float("-inf")
        else:
            taken = max(worker.kv_blocks_reserved, worker.kv_blocks_used) - worker.usable_blocks
        side.by_load.put(worker.name, load)
        side.by_taken.put(worker.name, taken)
