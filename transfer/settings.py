"""How an engine's KV transfer is set up: the one place that knows the option names.

Pure: it builds dictionaries for vLLM's ``KVTransferConfig`` and for the environment of an
engine process. It does not import vLLM, read the environment or count cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEASE_S = 30
"""Default time a prefill engine holds blocks for a reader that has not spoken up."""
LEASE_S_MIN = 6
"""Engines renew leases every sixth of them, in whole seconds."""
GPU_NIXL_THREADS = 4
"""Threads of NIXL that post reads between GPUs: a read of many small pieces is three times as
fast as with one (``pythia bench links``), and GPU machines have cores to spare."""
PROGRESS_DELAY_US = 500
"""Sleep between two looks of NIXL's progress thread where cores are short."""
CACHED_ONLY = "cached_only"
"""In a request's ``kv_transfer_params``: of its prompt is held what is cached, and a token more."""
FREE_CORES_TO_POLL = 2
"""Cores to spare per engine from which its NIXL progress thread may poll without sleep."""


def progress_delay_us(free_cores: int) -> int:
    """Microseconds that NIXL's progress thread sleeps between two looks; 0 is busy polling.

    ``free_cores``: cores per engine of this machine that nothing else needs. Polling takes
    one of them whole, so it is done only when there is another one left.
    """
    return 0 if free_cores >= FREE_CORES_TO_POLL else PROGRESS_DELAY_US


def dispatch_margin_s(lease_s: float) -> float:
    """What must be left of a lease when its handle is sent to a decode worker.

    The reader's engine may wait for a sixth of a lease before it renews for the first time,
    and takes a lease for ended a sixth before it is. With less left than both together, the
    read could be declined and the prompt computed a second time where it is decoded.
    """
    return lease_s / 3


PINS = "pythia_pins"
"""Names the setting in the connector's configuration."""
CONNECTOR = "PythiaConnector"
CONNECTOR_MODULE = "transfer.connector"
SEVERAL_CONNECTORS = "MultiConnector"
HOST_CONNECTOR = "OffloadingConnector"
"""vLLM's own, which keeps what an engine computes in its host's memory."""


def kv_transfer_config(
    engine_id: str,
    *,
    lease_s: int = LEASE_S,
    nixl_progress_delay_us: int = PROGRESS_DELAY_US,
    nixl_threads: int = 0,
    pins: bool = False,
    backends: Sequence[str] = ("UCX",),
    extra: dict[str, Any] | None = None,
    host_bytes: int = 0,
) -> dict[str, Any]:
    """Arguments of vLLM's ``KVTransferConfig`` for one engine of the cluster.

    ``engine_id`` must differ between any two starts of any two engines. Every engine may
    hold and read KV, so a worker changes its role without a restart. A failed read is
    recomputed locally. ``pins``: the core may order what ended requests leave to be kept, so it
    has to be remembered which blocks that was. ``extra`` is for settings of other NIXL
    backends. ``host_bytes``: of host memory, for KV that the engine has computed; 0 for none.
    ValueError for a lease that is too short to be renewed or a negative delay.
    """
    if lease_s < LEASE_S_MIN:
        raise ValueError(f"lease_s is {lease_s}, must be at least {LEASE_S_MIN}")
    if nixl_progress_delay_us < 0:
        raise ValueError(f"nixl_progress_delay_us is {nixl_progress_delay_us}, can't be negative")
    both: dict[str, Any] = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    ours = both | {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_connector_extra_config": {
            **(extra or {}),
            "backends": list(backends),
            "bidirectional_kv_xfer": True,
            "kv_lease_duration": lease_s,
            "nixl_progress_delay_us": nixl_progress_delay_us,
            "num_threads": nixl_threads,
            PINS: pins,
        },
    }
    if not host_bytes:
        return ours | {"engine_id": engine_id}
    # What another engine holds for a request is read before what this host has of it: the first
    # connector that has anything is asked for it. Answers are part of the prompts to come.
    host = both | {
        "kv_connector": HOST_CONNECTOR,
        "kv_connector_extra_config": {"cpu_bytes_to_use": host_bytes, "offload_prompt_only": False},
    }
    return both | {
        "kv_connector": SEVERAL_CONNECTORS,
        "kv_connector_extra_config": {"connectors": [ours, host]},
        "engine_id": engine_id,
    }


def own_statistics(stats: Mapping[str, Any]) -> Mapping[str, Any]:
    """What our connector has measured, of the statistics of all of an engine's connectors.

    Where there are several, vLLM has those of each under its name.
    """
    if CONNECTOR in stats or HOST_CONNECTOR in stats:
        own: Mapping[str, Any] = stats.get(CONNECTOR, {})
        return own
    return stats


def transfer_environment(
    host: str, port: int, *, loopback: bool = False, beside_gpus: bool = False
) -> dict[str, str]:
    """Environment an engine process needs for KV transfer.

    ``host`` and ``port`` are where peers ask for its NIXL metadata; ``host`` must be
    routable for all of them. ``loopback``: all peers are on this machine and without a
    GPU, so UCX needs to look at nothing but memory and the loopback device. ``beside_gpus``:
    the machine has some all the same.
    """
    environment = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
        "UCX_RCACHE_MAX_UNRELEASED": "1024",
        # Where GPUs have no NVLink UCX would not let one read another's memory, and send all
        # through TCP: a thousandth of the speed.
        "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    }
    if loopback:
        # NIXL refuses to start without cuda_copy where a GPU is to be seen.
        environment["UCX_TLS"] = "tcp,shm,self,cma" + (",cuda_copy" if beside_gpus else "")
    return environment
