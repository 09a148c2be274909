"""Aliases over HTTP: what can be said of them, and what stands where a version can."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from msgspec.structs import replace

from services.gateway.aliases import MAX_WAIT_S
from shared.broker.port import Message
from shared.names import HEADER_CODE
from tests.gateway_rig import JSON_BODY, SPEC, running

STORED = "/v2/repository/models/adder"
PROD = f"{STORED}/aliases/prod"


@pytest.fixture
async def rig(tmp_path):
    """With three versions of `adder`, which answer with their routing key."""
    async with running(tmp_path) as made:
        for target_ms in (20.0, 30.0):
            await made.worker.bind(made.register("adder", replace(SPEC, target_ms=target_ms)))
        made.worker.script = told_by_key
        yield made


async def told_by_key(worker, delivery):
    told = Message(
        body=delivery.routing_key.encode(),
        headers={HEADER_CODE: "ok"},
        correlation_id=delivery.message.correlation_id,
    )
    await worker.reply(delivery, told)
    await delivery.ack()


async def put(rig, wish, path=PROD, **options):
    return await rig.http.put(path, json=wish, **options)


async def test_an_alias_stands_where_a_version_can(rig):
    """Infer, metadata, configuration, readiness and statistics; so does `latest`."""
    assert (await put(rig, {"version": 2})).status_code == 200
    for name, number in (("prod", "2"), ("latest", "3")):
        model = f"/v2/models/adder/versions/{name}"
        answer = await rig.http.post(f"{model}/infer", json=JSON_BODY)
        assert (answer.status_code, answer.text) == (200, f"adder/{number}")
        assert (await rig.http.get(model)).json()["versions"] == [number]
        assert (await rig.http.get(f"{model}/config")).json()["name"] == "adder"
        assert (await rig.http.get(f"{model}/ready")).json()["ready"] is True
        stats = (await rig.http.get(f"{model}/stats")).json()["model_stats"]
        assert [each["version"] for each in stats] == [number]
        assert stats[0]["inference_stats"]["success"]["count"] == 1


async def test_the_bare_name_means_default(rig):
    """Its metadata and configuration are that version's; all versions are told as before."""
    assert (await put(rig, {"version": 3}, f"{STORED}/aliases/default")).status_code == 200
    told = await put(rig, {"version": 1, "now": True}, f"{STORED}/aliases/default")
    assert told.json()["version"] == "1"
    answer = await rig.http.post("/v2/models/adder/infer", json=JSON_BODY)
    assert answer.text == "adder/1"
    assert (await rig.http.get("/v2/models/adder")).json()["versions"] == ["1", "2", "3"]


async def test_a_change_is_pending_until_somebody_says_so(rig):
    """Nobody does here: there is no placer. It is told everywhere, and taken back by asking for
    what is there."""
    await put(rig, {"version": 1})
    answer = await put(rig, {"version": 2}, f"{PROD}?wait=0.1")
    assert answer.status_code == 202
    told = answer.json()
    assert (told["version"], told["split"]) == ("1", {"1": 1})
    assert told["pending"]["split"] == {"2": 1}
    assert told["pending"]["waits_for"] == ["the placer"]
    listed = (await rig.http.get(f"{STORED}/aliases")).json()
    detail = (await rig.http.get(STORED)).json()
    assert listed["aliases"][0]["pending"]["split"] == {"2": 1}
    assert detail["aliases"][0]["alias"] == "prod"
    back = await put(rig, {"version": 1})
    assert (back.status_code, back.json()["pending"]) == (200, None)


async def test_of_two_who_have_seen_the_same_one_changes_it(rig):
    """Who sends the ETag along is refused when it is not right any more; who does not is not."""
    first = await put(rig, {"version": 1})
    etag = first.headers["etag"]
    assert (await rig.http.get(PROD)).headers["etag"] == etag
    results = await asyncio.gather(
        *(put(rig, {"version": v, "now": True}, headers={"If-Match": etag}) for v in (2, 3))
    )
    assert sorted(answer.status_code for answer in results) == [200, 409]
    lost = next(answer for answer in results if answer.status_code == 409)
    assert lost.headers["roost-code"] == "conflict"
    gone = await rig.http.delete(PROD, headers={"If-Match": etag})
    assert gone.status_code == 409
    assert (await put(rig, {"version": 1, "now": True}, headers={"If-Match": "*"})).is_success
    assert (await rig.http.delete(PROD)).status_code == 204
    assert (await rig.http.get(PROD)).status_code == 404
    assert (await rig.http.delete(PROD)).status_code == 404


async def test_what_an_alias_uses_is_not_removed(rig):
    """The model with all its versions is, and takes the aliases along."""
    await put(rig, {"split": {"1": 9, "2": 1}})
    for version in (1, 2):
        answer = await rig.http.delete(f"{STORED}/versions/{version}")
        assert answer.status_code == 409
        assert "'prod'" in answer.json()["error"]
    assert (await rig.http.delete(f"{STORED}/versions/3")).status_code == 204
    assert (await rig.http.delete(STORED)).status_code == 204
    assert (await rig.http.get(PROD)).status_code == 404


@pytest.mark.parametrize(
    ("path", "wish", "status", "word"),
    [
        (PROD, {}, 400, "either"),
        (PROD, {"version": 1, "split": {"1": 1}}, 400, "either"),
        (PROD, {"version": 0}, 400, "version"),
        (PROD, {"version": "x"}, 400, "version"),
        (PROD, {"version": True}, 400, "not valid"),
        (PROD, {"split": {}}, 400, "split"),
        (PROD, {"split": {"1": 0}}, 400, "split"),
        (PROD, {"split": {"one": 1}}, 400, "not valid"),
        (PROD, {"split": {"1": -1}}, 400, "weight"),
        (PROD, {"version": 1, "more": 1}, 400, "more"),
        (PROD, [1], 400, "not valid"),
        (PROD, {"version": 9}, 404, "version 9"),
        (f"{STORED}/aliases/latest", {"version": 1}, 400, "latest"),
        (f"{STORED}/aliases/Prod", {"version": 1}, 400, "alias"),
        (f"{STORED}/aliases/7", {"version": 1}, 400, "alias"),
        ("/v2/repository/models/none/aliases/prod", {"version": 1}, 404, "none"),
        (f"{PROD}?wait={MAX_WAIT_S + 1}", {"version": 1}, 400, "wait"),
        (f"{PROD}?wait=nan", {"version": 1}, 400, "wait"),
        (f"{PROD}?wait=x", {"version": 1}, 400, "wait"),
    ],
)
async def test_what_is_no_alias_is_refused(rig, path, wish, status, word):
    """With what is wrong, and nothing is changed."""
    answer = await put(rig, wish, path)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]
    assert rig.repository.aliases() == {}


async def test_a_revision_that_is_none_is_refused(rig):
    """Rather than taken for any."""
    answer = await put(rig, {"version": 1}, headers={"If-Match": "W/x"})
    assert answer.status_code == 400


async def test_tritons_client_names_an_alias_as_a_version(rig):
    """It sends the version as text, unmodified."""
    client = pytest.importorskip("tritonclient.http")
    await put(rig, {"version": 2})

    def use():
        with client.InferenceServerClient(f"127.0.0.1:{rig.port}") as triton:
            assert triton.is_model_ready("adder", "prod")
            return triton.get_model_metadata("adder", "prod")["versions"]

    assert await asyncio.to_thread(use) == ["2"]


async def test_over_grpc_it_is_the_same(tmp_path):
    """Triton's client for gRPC names an alias as a version too, and a key for the split."""
    client = pytest.importorskip("tritonclient.grpc")
    async with running(tmp_path, grpc_port=0) as rig:
        await rig.worker.bind(rig.register("adder", replace(SPEC, target_ms=20.0)))
        await put(rig, {"split": {"1": 50, "2": 50}})
        given = client.InferInput("x", [1, 3], "FP32")
        given.set_data_from_numpy(np.ones((1, 3), np.float32))

        def use():
            with client.InferenceServerClient(f"127.0.0.1:{rig.grpc_port}") as triton:
                assert triton.is_model_ready("adder", "prod")
                metadata = triton.get_model_metadata("adder", "prod", as_json=True)
                for _ in range(8):
                    headers = {"roost-split-key": "client-7"}
                    triton.infer("adder", [given], model_version="prod", headers=headers)
                return metadata["versions"]

        assert await asyncio.to_thread(use) == ["1"]
        keys = {delivery.routing_key for delivery in rig.worker.seen}
        assert len(rig.worker.seen) == 8
        assert len(keys) == 1
        assert keys <= {"adder/1", "adder/2"}


async def test_a_removed_version_takes_its_series_along(rig):
    """Only its own: the others' counters go on."""
    for version in ("1", "3"):
        await rig.http.post(f"/v2/models/adder/versions/{version}/infer", json=JSON_BODY)
    line = 'roost_gateway_requests_total{{code="ok",model="adder",version="{}"}}'
    timed = 'roost_gateway_request_seconds_count{{model="adder",version="{}"}}'
    assert await rig.metric(line.format(3)) == await rig.metric(timed.format(3)) == 1
    await rig.http.delete(f"{STORED}/versions/3")
    assert await rig.metric(line.format(3)) == await rig.metric(timed.format(3)) == 0
    assert await rig.metric(line.format(1)) == await rig.metric(timed.format(1)) == 1
