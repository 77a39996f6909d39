"""What is chosen next to a GPU, from what nvidia-smi prints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster import node_place
from cluster.config import WorkerConfig, parse, worker_config
from cluster.topology import Place, TopologyError, core_list, place
from cluster.topology import parse as parse_topology

SAMPLES = Path(__file__).parents[1] / "data/topology"
EIGHT = [f"mlx5_{number}:1" for number in range(8)]
FIRST_SOCKET = [*range(48), *range(96, 144)]
SECOND_SOCKET = [*range(48, 96), *range(144, 192)]


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


@pytest.mark.parametrize("gpu", range(8))
def test_a_gpu_gets_the_nic_beside_it_and_its_sockets_cores(gpu: int) -> None:
    gpus = parse_topology(sample("eight-gpus-a-nic-each"))
    assert len(gpus) == 8
    expected = FIRST_SOCKET if gpu < 4 else SECOND_SOCKET
    assert place(gpus, [gpu], EIGHT) == Place([f"mlx5_{gpu}:1"], expected)


def test_columns_set_apart_by_spaces_are_read_the_same() -> None:
    tabs = sample("eight-gpus-a-nic-each")
    spaces = "\n".join(
        "   ".join(cell.strip() for cell in line.split("\t")) if "\t" in line else line
        for line in tabs.splitlines()
    )
    assert "\t" not in spaces
    assert parse_topology(spaces) == parse_topology(tabs)


def test_an_engine_of_several_gpus_gets_the_nics_and_cores_of_all() -> None:
    gpus = parse_topology(sample("eight-gpus-four-nics"))
    active = [f"mlx5_{number}:1" for number in range(4)]
    assert place(gpus, [0, 1], active) == Place(["mlx5_0:1"], FIRST_SOCKET)
    both = place(gpus, [3, 4], active)
    assert both.net_devices == ["mlx5_1:1", "mlx5_2:1"]
    assert both.cores == sorted(FIRST_SOCKET + SECOND_SOCKET)


def test_a_nic_without_a_link_is_passed_over_for_the_next_nearest() -> None:
    gpus = parse_topology(sample("eight-gpus-a-nic-each"))
    active = [name for name in EIGHT if name != "mlx5_2:1"]
    assert place(gpus, [2], active).net_devices == ["mlx5_0:1", "mlx5_1:1", "mlx5_3:1"]


def test_a_nic_on_the_other_socket_is_not_chosen() -> None:
    gpus = parse_topology(sample("two-gpus-far-nic"))
    assert place(gpus, [0], ["mlx5_0:1"]) == Place([], list(range(16)))
    assert place(parse_topology(sample("one-gpu")), [0], []) == Place([], list(range(16)))


def test_a_gpu_that_is_not_there_gets_nothing() -> None:
    assert place(parse_topology(sample("one-gpu")), [0, 1], []) == Place()


@pytest.mark.parametrize("text", ["", "No devices were found\n", "GPU0\n", "x\ty\n"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(TopologyError, match="GPU0"):
        parse_topology(text)


@pytest.mark.parametrize("text", ["a", "3-1", "0-99999999999", "1,,2", "-1"])
def test_impossible_cores_are_refused(text: str) -> None:
    with pytest.raises(TopologyError, match="no list of cores"):
        core_list(text)


def test_cores_are_read_and_written() -> None:
    assert core_list("0-2,8,10-11") == [0, 1, 2, 8, 10, 11]
    assert core_list("N/A") == []
    assert node_place.spans([0, 1, 2, 8, 10, 11]) == "0-2,8,10-11"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight GPUs as nvidia-smi and the kernel show it; NIC 3 has no link, and NIC 6
    may not be opened."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {SAMPLES / 'eight-gpus-a-nic-each.txt'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for number in range(8):
        folder = tmp_path / f"infiniband/mlx5_{number}/ports/1"
        folder.mkdir(parents=True)
        (folder / "state").write_text("1: DOWN\n" if number == 3 else "4: ACTIVE\n")
        verbs = tmp_path / f"infiniband_verbs/uverbs{number}"
        verbs.mkdir(parents=True)
        (verbs / "ibdev").write_text(f"mlx5_{number}\n")
        if number != 6:
            (tmp_path / f"uverbs{number}").touch()
    monkeypatch.setattr(node_place, "SYSTEM", tmp_path)
    monkeypatch.setattr(node_place, "DEVICES", tmp_path)
    return tmp_path


def worker(devices: str, entry: str = "", rest: str = "") -> WorkerConfig:
    text = f"model: m\nworkers:\n  - {{name: w, role: mixed, devices: {devices}{entry}}}\n{rest}"
    return worker_config(parse(text, "c.yaml"), "w", "m")


def test_a_worker_is_placed_by_what_the_machine_says(machine: Path) -> None:
    assert node_place.active_ports(machine, machine) == [
        name for name in EIGHT if name not in ("mlx5_3:1", "mlx5_6:1")
    ]
    found = node_place.of_worker(worker("[4, 5]"))
    assert found == Place(["mlx5_4:1", "mlx5_5:1"], SECOND_SOCKET)


def test_what_may_be_seen_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert node_place.of_worker(worker("[1]")).net_devices == ["mlx5_7:1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2a,GPU-9c1b")
    assert node_place.of_worker(worker("[1]")) == Place()


@pytest.mark.parametrize(
    ("entry", "rest", "devices", "cores"),
    [
        (", environment: {UCX_NET_DEVICES: eth0}", "", [], SECOND_SOCKET),
        (", cores: 1-2", "", ["mlx5_4:1"], [1, 2]),
        ("", "network: {near: false}\n", [], []),
        ("", "network: {ucx_tls: 'tcp,cuda'}\n", [], SECOND_SOCKET),
        ("", "network: {ucx_tls: 'rc,cuda'}\n", ["mlx5_4:1"], SECOND_SOCKET),
        (", environment: {UCX_TLS: '^cma'}", "", ["mlx5_4:1"], SECOND_SOCKET),
    ],
    ids=["devices", "cores", "none", "tcp", "rc", "excluded"],
)
def test_what_the_file_says_stands(
    machine: Path, entry: str, rest: str, devices: list[str], cores: list[int]
) -> None:
    assert node_place.of_worker(worker("[4]", entry, rest)) == Place(devices, cores)


def test_a_machine_that_does_not_tell_gets_no_place(
    machine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (machine / "nvidia-smi").write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert node_place.of_worker(worker("[0]")) == Place()
    assert "does not tell" in caplog.text


def test_a_dry_run_shows_it(machine: Path) -> None:
    lines = node_place.describe(
        worker("[4]", ", data_port: 7001", "network: {nixl_host: 10.1.1.1}")
    )
    assert lines[0] == "data on 127.0.0.1:7001, side channel on 10.1.1.1:a free port"
    assert "UCX_NET_DEVICES=mlx5_4:1" in lines
    assert lines[-1] == "cores 48-95,144-191"


def test_a_worker_runs_on_its_cores(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    try:
        node_place.apply(worker("[]", f", cores: '{core}'"))
        assert os.sched_getaffinity(0) == {core}
        node_place.apply(worker("[]", ", cores: '65000'"))
        assert os.sched_getaffinity(0) == {core}, "cores that are not there change nothing"
    finally:
        os.sched_setaffinity(0, before)
