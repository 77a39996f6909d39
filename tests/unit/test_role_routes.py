"""The endpoints for roles: over HTTP on one side, a real core on the other; and its metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from coordinator import protocol
from coordinator.api.metrics import page
from coordinator.api.questions import Questions
from coordinator.api.roles import router
from coordinator.core import Core
from coordinator.limits import Limits, Placement
from coordinator.protocol import EngineFacts, Message, Ready, Role, WorkflowAnswer
from coordinator.rebalancer import Shown

FACTS = EngineFacts("0.32", "model", "same", 4, 1000, 2000, 8, 64)
WORKERS: dict[str, Role] = {"p": "prefill", "d": "decode", "e": "decode"}


class Cluster:
    """The application, its questions on the wire's own encoding, and the core behind."""

    def __init__(self) -> None:
        self.core = Core(Limits(), Placement(), "core")
        for name, role in WORKERS.items():
            self.core.handle(name.encode(), Ready(name, "1", role, f"tcp://{name}", FACTS), 0.0)
        self.questions = Questions(self.send)
        app = FastAPI()
        app.include_router(router)
        app.state.engine_client = SimpleNamespace(cluster=self)
        app.state.admin_keys = ()
        self.state = app.state
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://cluster"
        )

    def send(self, message: Message) -> bool:
        heard = protocol.decode_to_core(memoryview(protocol.encode(message)))
        for send in self.core.handle(b"api", heard, 1.0):
            if send.peer == b"api":
                answer = protocol.decode_core_to_api(memoryview(protocol.encode(send.message)))
                assert isinstance(answer, WorkflowAnswer)
                self.questions.on_answer(answer)
        return True

    async def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/v1/cluster/rebalance")).json()
        return found


@pytest.fixture
async def cluster() -> Cluster:
    return Cluster()


async def test_roles_are_shown_changed_and_remembered(cluster: Cluster) -> None:
    before = await cluster.shown()
    assert before["settings"]["mode"] == "off"
    assert {one["worker"]: one["role"] for one in before["workers"]} == WORKERS
    response = await cluster.client.put("/v1/cluster/rebalance", json={"mode": "advisory"})
    assert response.status_code == 200
    assert (await cluster.shown())["settings"]["mode"] == "advisory"
    turned = await cluster.client.post("/v1/workers/d/role", json={"role": "prefill"})
    assert (turned.status_code, turned.json()["turning"]) == (200, "switching")
    again = await cluster.client.post("/v1/workers/d/role", json={"role": "prefill"})
    assert again.status_code == 200


async def test_a_worker_is_drained_and_used_again(cluster: Cluster) -> None:
    drained = await cluster.client.post("/v1/workers/d/drain")
    assert (drained.status_code, drained.json()["turning"]) == (200, "drained")
    last = await cluster.client.post("/v1/workers/e/drain")
    assert last.status_code == 409
    assert last.json()["error"]["code"] == 409
    undone = await cluster.client.delete("/v1/workers/d/drain")
    assert (undone.status_code, undone.json()["turning"]) == (200, "")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("post", "/v1/workers/nobody/role", b'{"role":"decode"}', 404),
        ("post", "/v1/workers/" + "x" * 5000 + "/drain", b"", 404),
        ("post", "/v1/workers/p/role", b'{"role":"decode"}', 409),
        ("post", "/v1/workers/d/role", b'{"role":7}', 422),
        ("post", "/v1/workers/d/role", b"", 422),
        ("post", "/v1/workers/d/role", b"[" * 50_000, 422),
        ("put", "/v1/cluster/rebalance", b"\xff\xfe", 422),
        ("put", "/v1/cluster/rebalance", b'{"horizon_s":1e999}', 422),
        ("put", "/v1/cluster/rebalance", b" " * 70_000, 422),
        ("put", "/v1/cluster/rebalance", b'{"mode":"auto","itl_s":0}', 422),
    ],
)
async def test_bad_input_is_refused_and_changes_nothing(
    cluster: Cluster, method: str, path: str, body: bytes, status: int
) -> None:
    before = await cluster.shown()
    response = await cluster.client.request(method, path, content=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert await cluster.shown() == before


async def test_metrics_tell_an_autoscaler_what_is_needed(cluster: Cluster) -> None:
    response = await cluster.client.get("/v1/cluster/rebalance")
    text = page(None, msgspec.json.decode(response.content, type=Shown)).decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["pythia_desired_workers", "prefill"] == 1
    assert found["pythia_workers", "decode"] == 2
    assert found["pythia_role_flips_total",] == 0


CHANGES = [
    ("PUT", "/v1/cluster/rebalance", {"mode": "off"}),
    ("POST", "/v1/workers/e/role", {"role": "prefill"}),
    ("POST", "/v1/workers/e/drain", None),
    ("DELETE", "/v1/workers/e/drain", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_with_admin_keys_only_their_owners_change_anything(
    cluster: Cluster, method: str, path: str, body: dict[str, str] | None
) -> None:
    cluster.state.admin_keys = ("first", "schlüssel")
    before = await cluster.shown()
    for given in ("", "Bearer ", "Bearer user", "Basic first", "first", "Bearer first2"):
        headers = {"authorization": given} if given else {}
        answer = await cluster.client.request(method, path, json=body, headers=headers)
        assert answer.status_code == 403, given
        assert "api.admin_keys" in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "Forbidden"
    assert (await cluster.shown())["workers"] == before["workers"]
    headers = {"authorization": "Bearer first"}
    answer = await cluster.client.request(method, path, json=body, headers=headers)
    assert answer.status_code == 200
