"""What is simulated: engines on nodes in racks, what lies between them, and what can go wrong.

Plain frozen structs; files are read by ``scenario``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from cluster.simulator.host_memory import HostMemory
from coordinator.cost import Efficiency, Hardware, Link, ModelShape, StepCost, Tier
from coordinator.limits import Limits, NotNegative, Placement, Positive, Seconds
from coordinator.protocol import Role

Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Amount = Annotated[float, msgspec.Meta(ge=0.0)]


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's arguments of the same names, and what a process around an engine takes."""

    block_size: Positive = 16
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 8192
    max_model_len: Positive = 131072
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.9
    kv_blocks: NotNegative = 0
    """vLLM's ``num_gpu_blocks_override``; 0: what the memory holds."""
    kv_lease_s: Seconds = 30.0
    startup_s: Amount = 60.0
    """From a crash to ``Ready`` again."""
    step_overhead_s: Amount = 0.0
    """Per step, beside what ``StepCost`` says: scheduling and messages of a live engine."""


class WorkerSetup(msgspec.Struct, frozen=True):
    """One worker: ``tp`` devices on ``node`` of ``rack``."""

    name: str
    role: Role
    node: str = "node-0"
    rack: str = "rack-0"


class NetworkSetup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between processes: messages, and KV by tiers.

    Workers of a node are joined by ``same_node``, of a rack by ``same_rack``, others by
    ``across``. Rates are the hardware's links of that tier unless ``links`` says otherwise;
    ``transfer_fixed_s`` is what any KV read takes besides (posting, polling, notification).
    ``rack_bytes_per_s``: what leaves or enters a rack together, 0 for no bound.
    """

    message_s: Amount = 200e-6
    message_jitter_s: Amount = 0.0
    api_s: Amount = 1e-3
    """What an API process takes to render a request before it submits it."""
    api_token_s: Amount = 0.0
    """And what it takes for each token of the prompt: tokenizing, hashing, copying."""
    same_node: Tier = "nvlink"
    same_rack: Tier = "rdma"
    across: Tier = "rdma"
    links: dict[Tier, Link] = {}
    transfer_fixed_s: Amount = 2e-3
    rack_bytes_per_s: Amount = 0.0


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong. Shares of messages (0 to 1) between core and others, and between API
    processes and workers connections that break; mean seconds between events of a kind in the
    whole cluster, 0 for never. ``until_s``: after that nothing goes wrong any more, so that
    everything can come to its end.
    """

    loss: Share = 0.0
    duplication: Share = 0.0
    delay: Share = 0.0
    delay_s: Amount = 0.5
    """Longest extra delay of a delayed message; what overtakes it arrives in another order.
    Data between API processes and workers is delayed too, and stays in order."""
    crash_every_s: Amount = 0.0
    hang_every_s: Amount = 0.0
    hang_s: Amount = 8.0
    slow_every_s: Amount = 0.0
    slow_s: Amount = 10.0
    slow_factor: Annotated[float, msgspec.Meta(ge=1.0)] = 4.0
    core_restart_every_s: Amount = 0.0
    api_crash_every_s: Amount = 0.0
    partition_every_s: Amount = 0.0
    partition_s: Amount = 8.0
    move_every_s: Amount = 0.0
    """Running calls of a worker are to go on elsewhere."""
    abort: Share = 0.0
    """Share of calls that their clients give up at a random moment."""
    until_s: Seconds = 60.0


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call is good if it is served within both."""

    ttft_s: Seconds = 2.0
    itl_s: Seconds = 0.05


class ClusterSetup(msgspec.Struct, frozen=True):
    """A cluster of equal engines."""

    shape: ModelShape
    hardware: Hardware
    workers: tuple[WorkerSetup, ...]
    efficiency: Efficiency = Efficiency()
    tp: Positive = 1
    options: EngineOptions = EngineOptions()
    network: NetworkSetup = NetworkSetup()
    limits: Limits = Limits()
    placement: Placement = Placement()
    api_servers: Positive = 1
    contention: tuple[float, ...] = ()
    """Factors on the step times of a node's engines while 1, 2, ... of them are in a step, the
    last for more; empty: they share nothing. See ``cores``."""
    kv_host_gib: Amount = 0.0
    """Of its host's memory, for KV that an engine's own has no room for; 0 for none."""
    host_bytes_per_s: Annotated[float, msgspec.Meta(gt=0.0)] = 20e9
    """How fast it comes back from there."""

    def cost(self) -> StepCost:
        """What steps of each engine take."""
        return StepCost(self.shape, self.hardware, self.efficiency, self.tp)

    def kv_blocks(self) -> int:
        """Of each engine. DoesNotFit if the model leaves no room for KV."""
        options = self.options
        tokens = self.cost().kv_capacity_tokens(
            options.gpu_memory_utilization, options.max_num_batched_tokens
        )
        return options.kv_blocks or tokens // options.block_size

    def host_blocks(self) -> int:
        """Of each engine on its host."""
        return int(self.kv_host_gib * 2**30 / self.block_bytes())

    def host_memory(self) -> HostMemory | None:
        """Of one engine; None if it keeps nothing there."""
        blocks = self.host_blocks()
        block_s = self.block_bytes() / self.host_bytes_per_s
        return HostMemory(blocks, block_s) if blocks else None

    def block_bytes(self) -> float:
        """What a block of KV weighs."""
        return self.cost().kv_bytes_per_token * self.options.block_size
