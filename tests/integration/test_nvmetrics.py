"""Triton's metrics over the whole fleet: what a dashboard adds up."""

from __future__ import annotations

import asyncio
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from tests.gateway_rig import until
from tests.traced_rig import BODY, Traced, traced


async def fleet(rig: Traced) -> Counter[tuple[str, str, str]]:
    """Requests by name without prefix, model and reason, summed over all services."""
    found: Counter[tuple[str, str, str]] = Counter()
    for text in await rig.scraped():
        for family in text_string_to_metric_families(text):
            if not family.name.startswith("nv_inference_request_"):
                continue
            for sample in family.samples:
                what = family.name.removeprefix("nv_inference_request_")
                if what in {"success", "failure"} and sample.value:
                    labels = sample.labels
                    found[what, labels["model"], labels.get("reason", "")] += int(sample.value)
    return found


async def test_each_request_counts_once_wherever_it_ends(tmp_path):
    """At a worker, at the gateway that refuses it, or at the placer that has no place for it;
    requests for what is not registered are nobody's."""
    async with traced(tmp_path) as rig:
        rig.register("echo")
        rig.register("fail")
        rig.register("giant", size=2 << 20)
        for _ in range(3):
            assert (await rig.infer("echo")).status_code == 200
        bad = BODY.replace(b"2.0", b"-2.0")
        assert (await rig.http.post("/v2/models/fail/infer", content=bad)).status_code == 500
        assert (await rig.http.post("/v2/models/echo/infer", content=b"{}")).status_code == 400
        assert (await rig.infer("giant")).status_code >= 400
        assert (await rig.infer("nobody")).status_code == 404
        assert await fleet(rig) == {
            ("success", "echo", ""): 3,
            ("failure", "fail", "BACKEND"): 1,
            ("failure", "echo", "OTHER"): 1,
            ("failure", "giant", "OTHER"): 1,
        }


async def test_a_removed_model_leaves_no_series_at_the_placer(tmp_path):
    """Where it had failed to find a place."""
    async with traced(tmp_path) as rig:
        rig.register("giant", size=2 << 20)
        assert (await rig.infer("giant")).status_code >= 400
        (_, placer, _) = await rig.scraped()
        assert 'model="giant",reason="OTHER",version="1"} 1.0' in placer
        assert (await rig.http.delete("/v2/repository/models/giant")).status_code < 300

        async def gone() -> bool:
            return all('model="giant"' not in text for text in await rig.scraped())

        await until(gone)


async def test_a_time_out_is_the_worker_s_when_it_has_the_request(tmp_path):
    """The gateway does not await it any more; the late reply says that it was counted."""
    async with traced(tmp_path) as rig:
        rig.register("slow")
        assert (await rig.infer("slow")).status_code == 200
        rig.engine.gate.clear()
        hurried = BODY[:-1] + b',"parameters":{"timeout":300000}}'
        asked = asyncio.create_task(rig.http.post("/v2/models/slow/infer", content=hurried))
        assert (await asked).status_code == 504
        assert await fleet(rig) == {("success", "slow", ""): 1}
        rig.engine.gate.set()

        async def told() -> bool:
            return await fleet(rig) == {("success", "slow", ""): 2}

        await until(told)  # it ran, late
        (gateway, _, _) = await rig.scraped()
        assert 'roost_gateway_stray_replies_total{kind="late"} 1.0' in gateway


async def test_stock_panels_find_what_they_ask_for(tmp_path):
    """A worker's scrape has every default name of Triton's for a model that was asked."""
    async with traced(tmp_path) as rig:
        rig.register("echo")
        await rig.infer("echo")
        (_, _, worker) = await rig.scraped()
        for line in (
            'nv_inference_request_success{model="echo",version="1"} 1.0',
            'nv_inference_request_failure{model="echo",reason="REJECTED",version="1"} 0.0',
            'nv_inference_count{model="echo",version="1"} 1.0',
            'nv_inference_exec_count{model="echo",version="1"} 1.0',
            'nv_inference_compute_infer_duration_us{model="echo",version="1"} 1000.0',
            'nv_inference_pending_request_count{model="echo",version="1"} 0.0',
            'nv_model_load_duration_secs{model="echo",version="1"} 0.01',
        ):
            assert line in worker
        assert "nv_cpu_memory_total_bytes" in worker
