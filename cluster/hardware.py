"""Accelerators that Pythia knows, at their published peaks.

FLOP/s are dense (NVIDIA's data sheets print twice as much, "with sparsity"), links are per
GPU in one direction. The data sheets' gigabytes of memory are of 2^30 bytes, as AIConfigurator
0.12.0's system files have them, too.

Sources, by entry:

* A100-80GB SXM: NVIDIA A100 data sheet: 312 TFLOP/s BF16, no FP8, 19.5 TFLOP/s FP32,
  80 GB at 2,039 GB/s, NVLink 600 GB/s (300 each way), PCIe Gen4 64 GB/s (32 each way).
* H100 SXM: NVIDIA H100 data sheet: 989 TFLOP/s BF16, 1,979 FP8 dense, 67 TFLOP/s FP32,
  80 GB at 3.35 TB/s, NVLink 900 GB/s (450 each way), PCIe Gen5 128 GB/s (64 each way).
* H200 SXM: NVIDIA H200 data sheet: arithmetic and links as H100, 141 GB at 4.8 TB/s.
* B200: NVIDIA Blackwell data sheet, HGX B200: 2.25 PFLOP/s BF16, 4.5 FP8, 9 FP4 dense,
  80 TFLOP/s FP32, 180 GB at 7.7 TB/s (early texts: 192 GB, 8 TB/s), NVLink 1.8 TB/s
  (900 GB/s each way), PCIe Gen6 256 GB/s (128 each way).
* RDMA: one NIC per GPU as in DGX systems: DGX A100 data sheet ConnectX-6 HDR 200 Gb/s,
  DGX H100/H200 ConnectX-7 NDR 400 Gb/s, DGX B200 ConnectX-7 400 Gb/s.
* TCP: 100 Gb/s Ethernet's rate, an upper bound; what a path gives is to be measured.
* Latencies: 10 us, ``p2p_latency`` of AIConfigurator 0.12.0's system files ("non-official
  correction based on observations"), for NVLink and PCIe. For RDMA and TCP the same value
  stands for the link alone: what a transfer costs in software comes on top.

``cpu`` has no published peak that would mean something for an engine, so its entry is a unit
of measure and not a claim: rates that no processor reaches. Only a calibration's shares of
them mean anything.
"""

from __future__ import annotations

from coordinator.cost import Hardware, Link, Tier

LINK_LATENCY_S = 10e-6
GIB = 2**30
CPU_UNIT_FLOPS_PER_S = 1e13
CPU_UNIT_BYTES_PER_S = 1e12


def _links(nvlink: float, pcie: float, rdma_gbits: float) -> dict[Tier, Link]:
    """``nvlink`` and ``pcie`` in GB/s one way, ``rdma_gbits`` in Gb/s."""
    return {
        "nvlink": Link(LINK_LATENCY_S, nvlink * 1e9),
        "pcie": Link(LINK_LATENCY_S, pcie * 1e9),
        "rdma": Link(LINK_LATENCY_S, rdma_gbits * 1e9 / 8),
        "tcp": Link(LINK_LATENCY_S, 100e9 / 8),
    }


HARDWARE = {
    "a100-80gb": Hardware(
        name="a100-80gb",
        flops_per_s={"bf16": 312e12, "fp32": 19.5e12},
        memory_bytes_per_s=2.039e12,
        memory_bytes=80 * GIB,
        links=_links(300, 32, 200),
    ),
    "h100": Hardware(
        name="h100",
        flops_per_s={"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
        memory_bytes_per_s=3.35e12,
        memory_bytes=80 * GIB,
        links=_links(450, 64, 400),
    ),
    "h200": Hardware(
        name="h200",
        flops_per_s={"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
        memory_bytes_per_s=4.8e12,
        memory_bytes=141 * GIB,
        links=_links(450, 64, 400),
    ),
    "b200": Hardware(
        name="b200",
        flops_per_s={"bf16": 2250e12, "fp8": 4500e12, "fp4": 9000e12, "fp32": 80e12},
        memory_bytes_per_s=7.7e12,
        memory_bytes=180 * GIB,
        links=_links(900, 128, 400),
    ),
}


def hardware(name: str) -> Hardware:
    """The table's entry. ValueError with the names that there are; ``cpu`` is not one."""
    if name not in HARDWARE:
        raise ValueError(f"no hardware {name!r}; there are: {', '.join(sorted(HARDWARE))}")
    return HARDWARE[name]


def cpu(memory_bytes: float) -> Hardware:
    """A unit to express a CPU engine's calibration in; see the module's docstring."""
    return Hardware(
        name="cpu",
        flops_per_s=dict.fromkeys(("bf16", "fp32"), CPU_UNIT_FLOPS_PER_S),
        memory_bytes_per_s=CPU_UNIT_BYTES_PER_S,
        memory_bytes=memory_bytes,
        links={"tcp": Link(0.0, CPU_UNIT_BYTES_PER_S)},
    )
