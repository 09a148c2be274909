"""The OpenAPI document against the routes, and against what the gateway really answers."""

from __future__ import annotations

import asyncio
import re

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from services.gateway.admin import Admin
from services.gateway.control import Control
from services.gateway.jobs.http import HttpJobs
from shared.names import HEADER_DEADLINE
from tests.archives import torchscript
from tests.gateway_rig import JSON_BODY, digest_of, running

DATA = torchscript(b"uploaded" * 8)
ADDER = {"model": "adder"}
STORED = "/v2/repository/models/{model}"
GOOD = [
    ("POST /v2/models/{model}/infer", ADDER, JSON_BODY, 200),
    ("POST /v2/models/{model}/jobs", ADDER, JSON_BODY, 202),
    (f"POST {STORED}/load", ADDER, {}, 200),
    (f"POST {STORED}/unload", ADDER, {"parameters": {"unload_dependents": False}}, 200),
    (f"POST {STORED}/versions", {"model": "new"}, {"digest": digest_of(DATA)}, 201),
    (f"PUT {STORED}/versions/{{version}}", {"model": "new", "version": 2},
     {"digest": digest_of(DATA), "spec": {"target_ms": 5}}, 201),
    (f"PUT {STORED}/versions/{{version}}", {"model": "new", "version": 2},
     {"digest": digest_of(DATA), "spec": {"target_ms": 6}}, 409),
    (f"GET {STORED}", {"model": "new"}, None, 200),
    (f"PUT {STORED}/aliases/{{alias}}", {"model": "new", "alias": "prod"}, {"version": 2}, 200),
    (f"PUT {STORED}/aliases/{{alias}}", {"model": "new", "alias": "prod"},
     {"split": {"1": 90, "2": 10}}, 202),
    (f"GET {STORED}/aliases", {"model": "new"}, None, 200),
    (f"GET {STORED}/aliases/{{alias}}", {"model": "new", "alias": "prod"}, None, 200),
    ("GET /v2/models/{model}/versions/{version}", {"model": "new", "version": "prod"}, None, 200),
    (f"GET {STORED}", {"model": "new"}, None, 200),
    (f"DELETE {STORED}/versions/{{version}}", {"model": "new", "version": 2}, None, 409),
    (f"DELETE {STORED}/aliases/{{alias}}", {"model": "new", "alias": "prod"}, None, 204),
    (f"DELETE {STORED}/versions/{{version}}", {"model": "new", "version": 2}, None, 204),
    (f"DELETE {STORED}", {"model": "new"}, None, 204),
]  # fmt: skip
"""What a schema cannot make up: requests that succeed, in this order."""


@pytest.fixture
async def rig(tmp_path):
    async with running(tmp_path) as made:
        yield made


def routes():
    found = {("/metrics", "GET")}
    tables = (Control(*[None] * 10), HttpJobs(None, None, None), Admin(None, None, None))
    for methods, path, _, _ in (row for part in tables for row in part.table()):
        found |= {(path, method) for method in methods.split()}
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found.add((f"{path}/infer", "POST"))
    return found


async def test_the_document_has_every_route_and_no_other(rig):
    """Nothing is served that it does not tell of."""
    answer = await rig.http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    told = {
        (path, method.upper())
        for path, methods in answer.json()["paths"].items()
        for method in methods
    }
    assert told == routes()


async def test_every_reference_leads_somewhere(rig):
    """Nor is anything defined that nothing refers to."""
    answer = await rig.http.get("/openapi.json")
    refs = set(re.findall(r'"#/components/(\w+)/([^"]+)"', answer.text))
    components = answer.json()["components"]
    assert answer.json()["security"] == [{key: [] for key in components.pop("securitySchemes")}]
    assert refs == {(kind, name) for kind, names in components.items() for name in names}


async def test_the_page_needs_nothing_from_elsewhere(rig):
    """Where the gateway can be reached, it works."""
    answer = await rig.http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(https?:)?//|import |@import", answer.text)


# The gateway in this very process draws at random (splits, pauses) while cases are made.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
async def test_what_is_answered_is_what_the_document_says(tmp_path):
    """Generated requests to every operation: no fault of ours, and only told statuses, types,
    headers and bodies. Which of them succeed is not judged: a schema cannot say which files
    and models there are, nor how a request's tensors belong together."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks

    checks.load_all_checks()
    judged = checks.CHECKS.get_by_names(
        [
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_headers_conformance",
            "response_schema_conformance",
        ]
    )
    async with running(tmp_path, default_timeout_s=1.0, body_timeout_s=5.0) as rig:
        await rig.http.put(f"/v2/repository/blobs/{digest_of(DATA)}", content=DATA)
        document = (await rig.http.get("/openapi.json")).json()
        schema = schemathesis.openapi.from_dict(document)
        seen: dict[str, set[int]] = {}

        def exercise(operation):
            removes = operation.method.upper() == "DELETE" or "load" in operation.path

            @settings(
                max_examples=12,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(), there=st.booleans())
            def ask(case, there):
                path = case.path_parameters or {}
                if there and not removes and "model" in path:
                    path["model"] = "adder"
                    if "version" in path:
                        path["version"] = 1
                if there and "digest" in path:
                    path["digest"] = digest_of(DATA)
                # In the past: 504, and rightly so.
                (case.headers or {}).pop(HEADER_DEADLINE, None)
                answer = case.call(base_url=rig.url, timeout=20)
                seen.setdefault(operation.label, set()).add(answer.status_code)
                case.validate_response(answer, checks=judged)

            ask()

        def succeed(operation, path, body, status):
            case = operation.Case(
                path_parameters=path, body=body, media_type="application/json", headers={}
            )
            answer = case.call(base_url=rig.url, timeout=20)
            assert answer.status_code == status, (operation.label, answer.text)
            case.validate_response(answer, checks=judged)

        operations = {op.label: op for op in (r.ok() for r in schema.get_all_operations())}
        for operation in operations.values():
            await asyncio.to_thread(exercise, operation)
        for label, path, body, status in GOOD:
            await asyncio.to_thread(succeed, operations[label], path, body, status)
        assert len(seen) == len(routes())
        infer = "POST /v2/models/{model}/infer"
        assert {400, 404} <= seen[infer] <= {200, 400, 404, 413}
        assert 200 in seen["GET /v2/models/{model}/config"]
        assert 200 in seen["POST /v2/repository/index"]
        assert await rig.metric("roost_gateway_in_flight_requests") == 0
