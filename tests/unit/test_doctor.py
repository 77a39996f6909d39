"""What ``pythia doctor`` makes of facts: each trouble is found, and nothing else is."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cluster import doctor_checks, doctor_paths
from cluster.cli import app
from cluster.config import parse
from cluster.doctor import Report
from cluster.doctor_checks import Clock, Finding, Port, allowed
from cluster.doctor_cli import exit_code
from cluster.doctor_hosts import planned
from cluster.doctor_paths import HERE, Measure, Worker
from cluster.process import free_port
from coordinator.protocol import HostFacts, Reach, Transport

VERSIONS = {"pythia": "0.1 (aa)", "vllm": "0.32.0", "nixl": "1.5.1", "ucx": "1.23.0"}
ETHERNET = [Transport("self", "memory"), Transport("tcp", "eth0"), Transport("tcp", "lo")]
SHARED = [Transport("posix", "memory"), Transport("sysv", "memory"), Transport("cma", "memory")]
INFINIBAND = [Transport("rc_mlx5", "mlx5_0:1"), Transport("dc_mlx5", "mlx5_0:1")]
CUDA = [Transport("cuda_copy", "cuda"), Transport("cuda_ipc", "cuda")]
TWO_HOSTS = {"a": "10.0.0.1", "b": "10.0.0.2"}


def facts(transports: list[Transport], tls: str = "", devices: str = "", **other: Any) -> HostFacts:
    return HostFacts(VERSIONS, ucx_tls=tls, ucx_net_devices=devices, transports=transports, **other)


def wrong(findings: list[Finding]) -> dict[str, str]:
    """Message by whom it is about. Nothing may be both fine and wrong."""
    found = {each.about: each.message for each in findings if each.severity != "fine"}
    assert all(each.advice for each in findings if each.severity != "fine")
    assert not found or len(found) == len(findings)
    return found


# --- versions, clocks, ports ---------------------------------------------------------------


def test_equal_versions_are_said_and_others_named_with_the_most_frequent() -> None:
    same = {name: facts([]) for name in "abc"}
    assert wrong(doctor_checks.versions(same)) == {}
    older = HostFacts({**VERSIONS, "vllm": "0.31.1"})
    found = wrong(doctor_checks.versions({**same, "d": older}))
    assert found == {"d": "vllm is 0.31.1 there, 0.32.0 on a, b, c"}


@pytest.mark.parametrize("package", ["pythia", "vllm", "nixl", "ucx"])
def test_every_package_counts(package: str) -> None:
    other = HostFacts({**VERSIONS, package: "9"})
    found = doctor_checks.versions({"a": facts([]), "b": other})
    assert [each.severity for each in found] == ["problem"]


@pytest.mark.parametrize(
    ("offset_s", "error_s", "severity"),
    [
        (0.05, 0.0, "fine"),
        (0.3, 0.0, "warning"),
        (-0.3, 0.25, "fine"),
        (2.0, 0.5, "problem"),
        (-40.0, 0.1, "problem"),
        (1.2, 0.4, "warning"),
    ],
)
def test_a_clock_is_wrong_by_what_is_certain(
    offset_s: float, error_s: float, severity: str
) -> None:
    clocks = {"a": Clock(0.0, 0.001), "b": Clock(offset_s, error_s)}
    found = doctor_checks.clocks(clocks, "the core")
    assert [each.severity for each in found] == [severity]
    if severity != "fine":
        assert found[0].about == "b"
        assert ("ahead of" if offset_s > 0 else "behind") in found[0].message


def test_ports_in_use_or_wanted_twice_are_named() -> None:
    free = Port("api.port", "10.0.0.1", 8000)
    assert wrong(doctor_checks.ports({"h": [free]})) == {}
    used = Port("coordinator.port", "10.0.0.1", 5570, "port 5570 is in use by another program")
    found = doctor_checks.ports({"h": [free, used]})
    assert wrong(found) == {"h": "coordinator.port: port 5570 is in use by another program"}
    assert "sport = :5570" in found[0].advice
    twice = doctor_checks.ports({"h": [free, msgspec.structs.replace(free, key="x.data_port")]})
    assert wrong(twice) == {"h": "port 8000 of 10.0.0.1 is wanted 2 times"}
    any_port = Port("workers[0].data_port", "10.0.0.1", 0)
    assert wrong(doctor_checks.ports({"h": [any_port, any_port]})) == {}


# --- transports ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tls", "devices", "names"),
    [
        ("", "", {"self", "tcp", "posix", "sysv", "cma", "rc_mlx5", "dc_mlx5"}),
        ("all", "all", {"self", "tcp", "posix", "sysv", "cma", "rc_mlx5", "dc_mlx5"}),
        ("tcp,shm", "", {"tcp", "posix", "sysv", "cma"}),
        ("rc", "", {"rc_mlx5"}),
        ("^ib,sm", "", {"self", "tcp"}),
        ("", "mlx5_0:1", {"self", "posix", "sysv", "cma", "rc_mlx5", "dc_mlx5"}),
        ("", "mlx5_0", {"self", "posix", "sysv", "cma", "rc_mlx5", "dc_mlx5"}),
        ("ib,tcp", "eth0", {"tcp"}),
    ],
)
def test_what_ucx_may_use_is_read_as_ucx_reads_it(tls: str, devices: str, names: set[str]) -> None:
    there = ETHERNET + SHARED + INFINIBAND
    assert {each.name for each in allowed(facts(there, tls, devices), there)} == names


@pytest.mark.parametrize(
    ("transports", "tls", "devices", "gpus", "says"),
    [
        (ETHERNET + SHARED, "", "", False, None),
        (ETHERNET + INFINIBAND, "", "", False, None),
        (ETHERNET + SHARED, "rc,tcp", "", False, "asks for rc, which is not to be had"),
        (ETHERNET, "tcp", "eth7", False, "names eth7, which is not there; there are eth0, lo"),
        (ETHERNET + SHARED, "shm,self", "", False, "reaches another host"),
        (ETHERNET, "tcp", "lo", False, "reaches another host"),
        (ETHERNET + CUDA, "tcp", "", True, "leaves out cuda, so no GPU's memory can be moved"),
        (ETHERNET + CUDA, "tcp,cuda", "", True, None),
        (ETHERNET + INFINIBAND, "tcp", "", False, "there is RDMA (mlx5_0:1) and UCX may use TCP"),
        ([], "", "", False, "reaches another host"),
    ],
)
def test_transports_that_do_not_fit_are_named(
    transports: list[Transport], tls: str, devices: str, gpus: bool, says: str | None
) -> None:
    given = {"a": facts(ETHERNET + SHARED + INFINIBAND), "b": facts(transports, tls, devices)}
    found = [
        each.message
        for each in doctor_checks.transports(given, TWO_HOSTS, ["b"] if gpus else [])
        if each.severity != "fine"
    ]
    assert (says is None) == (found == []), found
    assert says is None or any(says in message for message in found)


def test_one_host_needs_no_network() -> None:
    given = {"a": facts(SHARED, "shm"), "b": facts(SHARED, "shm")}
    assert wrong(doctor_checks.transports(given, dict.fromkeys("ab", "10.0.0.1"))) == {}


def test_a_host_whose_ucx_can_not_be_asked_is_named() -> None:
    found = doctor_checks.transports({"a": facts([], transports_error="no NIXL")}, {"a": "h"})
    assert wrong(found) == {"a": "UCX can't be asked: no NIXL"}


# --- addresses -----------------------------------------------------------------------------


def workers(*errors: tuple[str, str, str, str], **side: str) -> list[Worker]:
    """Three hosts' workers; ``errors``: who, whom, and what went wrong with its addresses."""
    said = {(asker, about): (data, channel) for asker, about, data, channel in errors}
    names = ("p", "d", "e")
    return [
        Worker(
            name=name,
            host=f"10.0.0.{number}",
            data_address=f"tcp://10.0.0.{number}:7000",
            side_channel=side.get(name, f"10.0.0.{number}:5600"),
            reaches=[
                Reach(other, *said.get((name, other), ("", ""))) for other in names if other != name
            ],
        )
        for number, name in enumerate(names, 1)
    ]


def fine_here() -> list[Reach]:
    return [Reach(name) for name in ("p", "d", "e")]


def test_addresses_that_all_reach_are_fine() -> None:
    assert wrong(doctor_paths.addresses(workers(), fine_here())) == {}


def test_a_side_channel_on_loopback_is_named_even_where_somebody_answers() -> None:
    """On a host with the same port open, the wrong engine would."""
    found = doctor_paths.addresses(workers(e="127.0.0.1:5600"), fine_here())
    message = wrong(found)["e"]
    assert "side-channel address 127.0.0.1:5600 means another machine on every host" in message
    assert "its own is 10.0.0.3" in message
    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" in found[0].advice


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::1]", "[::]", "127.0.1.1"])
def test_other_hosts_that_mean_no_other_machine(host: str) -> None:
    assert set(wrong(doctor_paths.addresses(workers(e=f"{host}:1"), fine_here()))) == {"e"}


def test_a_side_channel_on_loopback_is_named_before_anything_runs() -> None:
    text = (
        "model: m\nworkers:\n"
        "  - {name: p, role: prefill, host: 10.0.0.1}\n"
        "  - {name: d, role: decode, host: 10.0.0.2, environment:"
        " {VLLM_NIXL_SIDE_CHANNEL_HOST: 127.0.0.1}}\n"
        "network: {side_channel_port_base: 5600}\n"
    )
    found = wrong(doctor_paths.addresses(planned(parse(text, "c.yaml")), []))
    assert set(found) == {"d"}
    assert "127.0.0.1:5601 means another machine on every host" in found["d"]


def test_workers_of_one_host_may_use_loopback() -> None:
    one = [
        msgspec.structs.replace(each, host="127.0.0.1", side_channel="127.0.0.1:5600")
        for each in workers()
    ]
    assert wrong(doctor_paths.addresses(one, fine_here())) == {}


def test_a_side_channel_that_leads_elsewhere_is_named_with_who_asked() -> None:
    errors = [(asker, "e", "", "No route to host") for asker in ("p", "d")]
    found = doctor_paths.addresses(workers(*errors, e="192.168.9.9:5600"), fine_here())
    assert wrong(found) == {
        "e": "its side-channel address 192.168.9.9:5600 can't be used from any other"
        " (No route to host)"
    }
    assert "remove VLLM_NIXL_SIDE_CHANNEL_HOST" in found[0].advice


def test_a_firewall_between_two_hosts_is_not_taken_for_a_wrong_address() -> None:
    found = doctor_paths.addresses(workers(("p", "e", "", "no answer within 3 s")), fine_here())
    assert wrong(found) == {
        "e": "its side-channel address 10.0.0.3:5600 can't be used from p (no answer within 3 s)"
    }
    assert "firewall" in found[0].advice


def test_a_data_address_that_only_api_processes_miss_is_named() -> None:
    here = [Reach("p"), Reach("d", "Connection refused"), Reach("e")]
    found = wrong(doctor_paths.addresses(workers(), here))
    assert found == {
        "d": f"its data address tcp://10.0.0.2:7000 can't be reached from {HERE}"
        " (Connection refused)"
    }


# --- links ---------------------------------------------------------------------------------


def measures(rates: dict[tuple[str, str], float], usual: float = 1e9) -> list[Measure]:
    return [
        Measure(source=s, target=t, bytes_per_s=rates.get((s, t), usual), size_bytes=1)
        for s, t in itertools.permutations(("p", "d", "e"), 2)
    ]


def test_equal_links_are_fine() -> None:
    assert wrong(doctor_paths.links(workers(), measures({("p", "d"): 0.7e9}))) == {}


def test_one_slow_link_stands_out() -> None:
    found = wrong(doctor_paths.links(workers(), measures({("p", "d"): 0.1e9})))
    assert found == {"p -> d": "100 MB/s, where 1 GB/s is usual (between hosts, CPU)"}


def test_a_host_whose_link_is_slow_both_ways_is_blamed_although_most_pairs_are() -> None:
    slow = {pair: 2e6 for pair in itertools.permutations("pde", 2) if "e" in pair}
    found = doctor_paths.links(workers(), measures(slow))
    assert set(wrong(found)) == {"p -> e", "d -> e", "e -> p", "e -> d"}
    assert {each.advice.partition(":")[0] for each in found} == {
        "all that e reads is slow",
        "all that e sends is slow",
    }


def test_a_link_is_doubted_unless_it_is_fast_or_hopeless() -> None:
    some = measures({("p", "d"): 0.4e9, ("p", "e"): 0.05e9, ("d", "e"): 0.6e9})
    found = doctor_paths.doubtful(workers(), some)
    assert [(each.source, each.target) for each in found] == [("p", "d")]


def test_links_of_another_tier_are_not_compared() -> None:
    near = workers()
    near[1] = msgspec.structs.replace(near[1], host=near[0].host)
    rates = {("p", "d"): 9e9, ("d", "p"): 9e9}
    assert wrong(doctor_paths.links(near, measures(rates, usual=1e8))) == {}


def test_what_could_not_be_moved_is_said_and_the_rest_judged() -> None:
    some = measures({("p", "d"): 1e6})
    some[-1] = Measure(source="e", target="d", error="it failed")
    assert wrong(doctor_paths.links(workers(), some)) == {
        "e -> d": "no KV could be moved: it failed",
        "p -> d": "1 MB/s, where 1 GB/s is usual (between hosts, CPU)",
    }


# --- the command -----------------------------------------------------------------------------


def test_only_problems_make_the_exit_code() -> None:
    def of(severity: Any) -> Report:
        return Report([Finding(check="c", severity=severity, about="", message="m")])

    assert [exit_code(of(each)) for each in ("fine", "warning", "problem")] == [0, 0, 1]


def test_a_file_of_this_machine_is_examined_before_it_runs(tmp_path: Any) -> None:
    port = free_port("127.0.0.1")
    file = tmp_path / "here.yaml"
    text = (
        "model: tiny-llama\nworkers:\n  - {name: w, role: mixed}\n"
        f"coordinator: {{port: {port}}}\napi: {{port: 0}}\n"
    )
    file.write_text(text)
    done = CliRunner().invoke(app, ["doctor", str(file), "--json"])
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.output, type=Report)
    checks = {each.check for each in report.findings}
    assert {"hosts", "versions", "clocks", "ports", "transports", "links"} <= checks
    file.write_text(text + "network: {ucx_tls: rc}\n")
    done = CliRunner().invoke(app, ["doctor", str(file)])
    assert done.exit_code == 1
    assert "w: UCX_TLS=rc asks for rc, which is not to be had" in done.output


def test_a_core_that_does_not_answer_is_said() -> None:
    done = CliRunner().invoke(app, ["doctor", "--coordinator", "tcp://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "no coordinator answers at tcp://127.0.0.1:9" in done.output
