"""The forecast and the scores of predictions, as people and Prometheus get them from a core."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from coordinator.api import metrics
from coordinator.api.metrics import include_metrics, page
from coordinator.protocol import ShowFigures, ShowForecast, ShowWorkflow
from coordinator.workflow.foresight import HORIZONS_S, OTHERS, WORKFLOWS_IN_METRICS, Figures
from tests.unit.test_core_workflows import Bed
from tests.unit.test_workflow_routes import Cluster

QUANTITIES = ("prefill_tokens_per_s", "decode_tokens_per_s", "resident_kv_tokens")


def busy(seconds: int = 60) -> Bed:
    """A core that every second began a run of a planner and a writer; of two tenants."""
    bed = Bed()
    for number in range(seconds):
        tenant = "guest" if number % 4 == 0 else ""
        run, context = f"r{number}", {"tenant": tenant}
        bed.begin(f"p{number}", run, "planner", context=context)
        if number:
            bed.finish(f"p{number - 1}", tokens=40)
            before = "guest" if (number - 1) % 4 == 0 else ""
            last = {"tenant": before, "final": True}
            bed.begin(f"w{number - 1}", f"r{number - 1}", "writer", context=last)
        if number > 1:
            bed.finish(f"w{number - 2}", tokens=200)
        bed.wait(1.0)
        bed.core.foresee(bed.now_s)
    return bed


@pytest.fixture(scope="module")
def bed() -> Bed:
    return busy()


def samples(text: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by name of the metric and labels, those in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_all_demand_is_forecast_with_intervals_and_split_by_workflow_and_agent(bed: Bed) -> None:
    shown = bed.body(ShowForecast(1))
    assert [one["horizon_s"] for one in shown["forecasts"]] == list(HORIZONS_S)
    for one in shown["forecasts"]:
        for quantity in QUANTITIES:
            interval = one[quantity]
            assert 0 <= interval["low"] <= interval["likely"] <= interval["high"]
            total = sum(share[quantity] for share in one["shares"])
            assert total == pytest.approx(interval["expected"], rel=1e-6)
    soon = shown["forecasts"][2]
    agents = {(share["workflow"], share["agent"]) for share in soon["shares"]}
    assert agents >= {("team", "planner"), ("team", "writer")}
    # A planner's 40 and a writer's 200 tokens a second.
    assert soon["decode_tokens_per_s"]["likely"] == pytest.approx(240, rel=0.25)
    judged = {(one["quantity"], one["horizon_s"]) for one in shown["scores"]}
    assert ("decode_tokens_per_s", 30.0) in judged


def test_a_tenant_sees_what_others_ask_for_as_one_sum(bed: Bed) -> None:
    for tenant, others in (("", "guest"), ("guest", "")):
        mine, theirs = (
            bed.body(ShowForecast(1, one))["forecasts"][2]["shares"] for one in (tenant, others)
        )
        assert {share["tenant"] for share in mine[:-1]} == {tenant}
        assert (mine[-1]["workflow"], mine[-1]["agent"]) == (OTHERS, "")
        own = sum(share["decode_tokens_per_s"] for share in theirs[:-1])
        assert mine[-1]["decode_tokens_per_s"] == pytest.approx(own)


def test_a_workflow_is_shown_with_its_scores_and_what_is_expected_of_it(bed: Bed) -> None:
    shown = bed.body(ShowWorkflow(1, "team"))
    assert [one["horizon_s"] for one in shown["forecast"]] == list(HORIZONS_S)
    whole = bed.body(ShowForecast(1))["forecasts"]
    for one, all_of_it in zip(shown["forecast"], whole, strict=True):
        for quantity in QUANTITIES:
            assert one[quantity] == pytest.approx(sum(each[quantity] for each in one["agents"]))
            mine = [each[quantity] for each in all_of_it["shares"] if each["workflow"] == "team"]
            assert one[quantity] == pytest.approx(sum(mine))
    # Only the first writer was a surprise.
    assert 0.9 < shown["learned"]["scores"]["next_agent_top1"] < 1.0


def test_a_workflow_that_is_only_declared_expects_nothing() -> None:
    bed = Bed()
    bed.declare("team")
    forecast = bed.body(ShowWorkflow(1, "team"))["forecast"]
    assert [one["decode_tokens_per_s"] for one in forecast] == [0.0] * len(HORIZONS_S)


def test_metrics_say_what_the_core_knows(bed: Bed) -> None:
    figures = msgspec.json.decode(bed.ask(ShowFigures(1)).body, type=Figures)
    found = samples(page(figures))
    assert found["pythia_core_up"] == {(): 1.0}
    assert found["pythia_workflow_trusted"] == {("", "team"): 1.0, ("guest", "team"): 1.0}
    learned = bed.body(ShowWorkflow(1, "team"))["learned"]["scores"]
    for name in (
        "next_agent_top1",
        "next_agent_log_loss",
        "length95_coverage",
        "length95_width_ratio",
        "gap_calibration_error",
    ):
        assert learned[name] > 0, name
        assert found[f"pythia_workflow_{name}"]["", "team"] == pytest.approx(learned[name])
    forecast = bed.body(ShowForecast(1))["forecasts"][2]["decode_tokens_per_s"]
    for bound in ("low", "likely", "high"):
        value = found["pythia_forecast_decode_tokens_per_second"][bound, "30"]
        assert value == pytest.approx(forecast[bound])
    share = found["pythia_workflow_forecast_decode_tokens_per_second"]
    assert sum(share.values()) == pytest.approx(forecast["expected"])
    assert ("30", "decode_tokens_per_s") in found["pythia_forecast_error_ratio"]
    assert ("5", "prefill_tokens_per_s") in found["pythia_forecast_mean_error"]
    for name in ("pulls", "pulls_missing", "pulls_unread", "pulled_tokens", "moved_tokens"):
        assert found[f"pythia_{name}_total"] == {(): 0.0}


def test_metrics_name_no_more_workflows_than_allowed_the_busiest_ones() -> None:
    bed = busy(8)
    for number in range(2 * WORKFLOWS_IN_METRICS):
        bed.begin(f"c{number}", f"run-{number}", workflow=f"flow-{number}")
        bed.finish(f"c{number}")
    bed.core.learn()
    found = samples(page(msgspec.json.decode(bed.ask(ShowFigures(1)).body, type=Figures)))
    names = found["pythia_workflow_next_agent_top1"]
    assert len(names) == WORKFLOWS_IN_METRICS
    assert ("", "team") in names


# --- over HTTP -----------------------------------------------------------------------------------


def client_of(cluster: Cluster) -> httpx.AsyncClient:
    """An application that has metrics already, as vLLM's has."""
    app = FastAPI()

    @app.get("/metrics")
    async def first() -> str:
        return "vLLM's own"

    app.state.engine_client = SimpleNamespace(cluster=cluster)
    include_metrics(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://cluster")


async def test_the_page_of_metrics_is_vllms_and_ours() -> None:
    async with client_of(Cluster()) as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.content)
    assert found["pythia_core_up"] == {(): 1.0}
    assert "python_info" in found
    assert ("likely", "1") in found["pythia_forecast_resident_kv_tokens"]


async def test_without_a_core_there_are_still_vllms_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "ANSWER_S", 0.05)
    cluster = Cluster()
    cluster.deaf = 1 << 30
    async with client_of(cluster) as client:
        response = await client.get("/metrics")
    found = samples(response.content)
    assert response.status_code == 200
    assert found["pythia_core_up"] == {(): 0.0}
    assert "python_info" in found
    assert not any(name.startswith(("pythia_workflow", "pythia_forecast")) for name in found)


async def test_the_forecast_is_served() -> None:
    response = await Cluster().client.get("/v1/forecast")
    shown: dict[str, Any] = response.json()
    assert response.status_code == 200
    assert [one["horizon_s"] for one in shown["forecasts"]] == list(HORIZONS_S)
