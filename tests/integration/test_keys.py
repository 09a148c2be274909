"""API keys over real HTTP and gRPC: who gets in where, whose models are there for whom, quotas."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import re

import grpc.aio
import httpx
import numpy as np
import pytest
import structlog
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from prometheus_client import CollectorRegistry

from roost.__main__ import main
from roost.client import AsyncRoostClient, RoostClient
from roost.stack.port import own_key
from roost.stack.waiting import fleet
from services.gateway.grpc.service import InferenceService
from services.gateway.http import Gateway
from services.placer.app import run as run_placer
from services.placer.config import PlacerConfig
from services.placer.http import PlacerHttp
from services.worker.http import Door, Readiness, serving
from shared import logs
from shared.auth import GuardedConfig, gate_of
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.config import ConfigError
from shared.errors import (
    AlreadyExists,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
)
from shared.keys import new_key
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from shared.tenants import Quota
from tests.archives import torchscript
from tests.gateway_rig import JSON_BODY, SPEC, another_gateway, digest_of, running, until

MODEL = {
    "model": "adder", "version": "1", "alias": "prod", "job": "0" * 32, "tenant": "t",
    "digest": digest_of(b"x"), "key": "0123456789ab", "worker": "w", "name": "adder",
}  # fmt: skip
_VERSION, _STORED = "/v2/models/{model}/versions/{version}", "/v2/repository/models/{model}"
NEEDS = {
    "open": "GET /v2/health/live, GET /v2/health/ready, GET /openapi.json, GET /docs",
    "read": f"GET /v2, GET /v2/models/stats, GET /v2/models/{{model}}, GET {_VERSION}, "
    f"GET /v2/models/{{model}}/config, GET {_VERSION}/config, GET /v2/models/{{model}}/ready, "
    f"GET {_VERSION}/ready, GET /v2/models/{{model}}/stats, GET {_VERSION}/stats, "
    f"GET /v2/repository/index, POST /v2/repository/index, GET {_STORED}, GET {_STORED}/aliases, "
    f"GET {_STORED}/aliases/{{alias}}",
    "infer": f"POST /v2/models/{{model}}/infer, POST {_VERSION}/infer, "
    f"POST /v2/models/{{model}}/jobs, POST {_VERSION}/jobs, GET /v2/jobs/{{job}}, "
    "DELETE /v2/jobs/{job}, GET /v2/jobs/{job}/result",
    "push": f"POST {_STORED}/load, POST {_STORED}/unload, HEAD /v2/repository/blobs/{{digest}}, "
    f"PUT /v2/repository/blobs/{{digest}}, DELETE {_STORED}, POST {_STORED}/versions, "
    f"PUT {_STORED}/versions/{{version}}, DELETE {_STORED}/versions/{{version}}, "
    f"PUT {_STORED}/aliases/{{alias}}, DELETE {_STORED}/aliases/{{alias}}",
    "metrics": "GET /metrics",
    "admin": f"GET /v2/repository/quarantine, DELETE {_STORED}/quarantine, "
    f"DELETE {_STORED}/versions/{{version}}/quarantine, GET /v2/repository/keys, "
    "POST /v2/repository/keys, DELETE /v2/repository/keys/{key}, GET /v2/repository/tenants, "
    "PUT /v2/repository/tenants/{tenant}, DELETE /v2/repository/tenants/{tenant}",
}
"""What each route of the gateway asks for: whoever adds one has to say so here too."""
PLACER_NEEDS = {
    "open": "GET /healthz, GET /readyz",
    "metrics": "GET /metrics",
    "admin": "GET /fleet, GET /fleet/workers-wanted, POST /fleet/shrink, "
    "POST /fleet/workers/{worker}/drain, DELETE /fleet/workers/{worker}/drain, "
    "GET /explain/{name}, GET /explain/{name}/{version}",
}
GRPC_OPEN = {"ServerLive", "ServerReady"}
GRPC_PUSH = {"RepositoryModelLoad", "RepositoryModelUnload"}
HAVE = {
    "infer": {"open", "read", "infer"},
    "push": {"open", "read", "push"},
    "metrics": {"open", "metrics"},
    "admin": {"open", "read", "infer", "push", "metrics", "admin"},
}


def needs(told: dict[str, str]) -> dict[tuple[str, str], str]:
    return {
        (each.split()[0], each.split()[1]): need
        for need, routes in told.items()
        for each in routes.split(", ")
    }


def key_of(repository, *arguments, **options) -> str:
    key, token = new_key(*arguments, **options)
    repository.keys.add(key)
    return token


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def id_of(token: str) -> str:
    return token.split("_")[1]


@pytest.fixture
def tokens(tmp_path):
    """A key of each kind."""
    repository = Repository(str(tmp_path / "repository"))
    made = {scope: key_of(repository, "", (scope,)) for scope in HAVE}
    return made | {name: key_of(repository, name, ("infer", "push")) for name in ("acme", "other")}


@pytest.fixture
def logged():
    """Where the logs of the test go."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure("gateway", "json", "debug", stream=stream)
    yield stream
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def running_routes(kind, router):
    """Of the objects of this kind that serve: what they really have, not what is written."""
    for found in [each for each in gc.get_objects() if type(each) is kind]:
        for route in router(found).routes:
            for method in route.methods - ({"HEAD"} if "GET" in route.methods else set()):
                yield method, route.path


async def check_every_route(url, expected, tokens):
    """Without a key 401, with each scope 403 unless it is enough."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
        for (method, path), need in expected.items():
            where = (method, re.sub(r"\{(\w+)\}", lambda found: MODEL[found[1]], path))
            answer = await http.request(*where)
            assert (answer.status_code == 401) is (need != "open"), (where, answer.status_code)
            if need != "open":
                assert answer.headers["www-authenticate"].startswith("Bearer"), where
            wrong = await http.request(*where, headers=bearer(new_key()[1]))
            assert (wrong.status_code == 401) is (need != "open"), (where, wrong.status_code)
            for scope, have in HAVE.items():
                if need in have and method == "DELETE":
                    continue  # it would go, for those that come after
                answer = await http.request(*where, headers=bearer(tokens[scope]))
                assert answer.status_code != 401, where
                assert (answer.status_code == 403) is (need not in have), (where, scope)


async def test_every_route_of_the_gateway_asks_for_a_key_but_the_stated_ones(tmp_path, tokens):
    """A route that is added without being stated above fails here."""
    expected = needs(NEEDS)
    async with running(tmp_path, default_timeout_s=1.0) as rig:
        served = set(running_routes(Gateway, lambda gateway: gateway._router))
        inference = {route for route in expected if route[1].endswith("/infer")}
        assert served == expected.keys() - inference
        await check_every_route(rig.url, expected, tokens)
        told = (await rig.http.get("/openapi.json")).json()["paths"]
        for (method, path), need in expected.items():
            operation = told[path][method.lower()]
            assert (operation.get("security") == []) is (need == "open"), path
            assert ("401" in operation["responses"]) is (need != "open"), path


@contextlib.asynccontextmanager
async def placer(tmp_path, **settings):
    """A placer without workers; gives its URL."""
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    config = PlacerConfig(repository_url=str(tmp_path / "repository"), port=0, **settings)
    broker, store = MemoryBroker(MemoryExchange(), "placer"), MemoryStore(MemoryState())
    service = asyncio.create_task(
        run_placer(config, stop, broker=broker, store=store, on_ready=listening.set_result)
    )
    try:
        async with asyncio.timeout(20):
            url = f"http://127.0.0.1:{await listening}"
        yield url
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await service


async def test_a_stack_asks_its_own_placer_whatever_keys_there_are(tmp_path, tokens):
    """By a key of its own, which the registry does not have."""
    token, setting = own_key()
    further = setting["ROOST_PLACER_FURTHER_KEY"]
    async with placer(tmp_path, further_key=further) as url, httpx.AsyncClient() as http:

        async def led():
            return (await http.get(f"{url}/fleet", headers=bearer(token))).status_code == 200

        await until(led)
        assert await fleet(url, token) != await fleet(url)
        assert (await http.get(f"{url}/fleet")).status_code == 401
        assert (await http.get(f"{url}/fleet", headers=bearer(tokens["admin"]))).status_code == 200
    with pytest.raises(ConfigError, match="FURTHER_KEY"):
        PlacerConfig(further_key="nonsense")


async def test_every_route_of_the_placer_asks_for_a_key_but_the_stated_ones(tmp_path, tokens):
    """It names everybody's models, and its callers change the fleet."""
    async with placer(tmp_path) as url:
        expected = needs(PLACER_NEEDS)
        assert set(running_routes(PlacerHttp, lambda http: http.app)) == expected.keys()
        await check_every_route(url, expected, tokens)


async def test_every_method_of_grpc_asks_for_a_key_but_the_stated_ones(tmp_path, tokens):
    """The health checks of gRPC, which load balancers ask, are open."""
    async with running(tmp_path, grpc_port=0) as rig:
        service = next(each for each in gc.get_objects() if type(each) is InferenceService)
        methods = list(service.handler()._method_handlers)
        assert len(methods) > 15
        async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as channel:

            async def status(method, metadata=()):
                call = channel.unary_unary(method)(b"", metadata=metadata, timeout=20)
                return await call.code()

            for method in methods:
                name = method.rpartition("/")[2]
                for metadata in ((), tuple(bearer(new_key()[1]).items())):
                    denied = await status(method, metadata) is grpc.StatusCode.UNAUTHENTICATED
                    assert denied is (name not in GRPC_OPEN), name
                need = "push" if name in GRPC_PUSH else "infer" if name == "ModelInfer" else "read"
                need = "open" if name in GRPC_OPEN else need
                for scope, have in HAVE.items():
                    found = await status(method, tuple(bearer(tokens[scope]).items()))
                    assert found is not grpc.StatusCode.UNAUTHENTICATED, name
                    denied = found is grpc.StatusCode.PERMISSION_DENIED
                    assert denied is (need not in have), (name, scope)
            health = "/grpc.health.v1.Health/Check"
            assert await status(health) is grpc.StatusCode.OK


async def test_the_worker_tells_its_metrics_to_keys_only(tmp_path, tokens):
    """Whether it is ready, is told to everybody."""
    repository = Repository(str(tmp_path / "repository"))
    gate = gate_of(repository.keys, GuardedConfig(), "WORKER", "127.0.0.1")
    registry = CollectorRegistry()
    readiness = Readiness(MemoryBroker(MemoryExchange(), "worker"), 3.0)

    def ask(port):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            assert http.get("/readyz").status_code == 503
            statuses = [
                http.get("/metrics", headers=bearer(tokens[scope])).status_code
                for scope in ("metrics", "admin", "infer", "acme")
            ]
            return [http.get("/metrics").status_code, *statuses]

    with serving("127.0.0.1", 0, registry, readiness, None, Door(gate)) as port:
        assert await asyncio.to_thread(ask, port) == [401, 200, 200, 403, 403]
    with serving("127.0.0.1", 0, registry, readiness) as port:
        assert await asyncio.to_thread(ask, port) == [200] * 5


async def test_metrics_may_be_left_open(tmp_path, tokens):
    """For a Prometheus in a network of its own."""
    async with running(tmp_path, metrics_open=True) as rig:
        assert (await rig.http.get("/metrics")).status_code == 200
        assert (await rig.http.get("/v2")).status_code == 401
        assert await rig.metric('roost_gateway_denied_total{code="unauthenticated"}') == 1


async def test_unmodified_triton_clients_ask_with_a_key(tmp_path, tokens):
    """By the headers that they let their callers give."""
    headers = bearer(tokens["acme"])

    def ask(url, grpc_url):
        tensor = triton_http.InferInput("x", [1, 3], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
        client = triton_http.InferenceServerClient(url)
        assert client.is_server_ready()
        assert client.is_model_ready("adder", headers=headers)
        answer = client.infer("adder", [tensor], headers=dict(headers))  # it adds to them
        assert answer.as_numpy("y").tolist() == [[2, 2, 2]]
        with pytest.raises(triton_http.InferenceServerException) as caught:
            client.infer("adder", [tensor])
        assert caught.value.status() == "401"
        client.close()
        tensor = triton_grpc.InferInput("x", [1, 3], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
        client = triton_grpc.InferenceServerClient(grpc_url)
        assert client.is_server_live()
        answer = client.infer("adder", [tensor], headers=headers)
        assert answer.as_numpy("y").tolist() == [[2, 2, 2]]
        with pytest.raises(triton_grpc.InferenceServerException) as caught:
            client.infer("adder", [tensor])
        assert "UNAUTHENTICATED" in caught.value.status()
        client.close()

    async with running(tmp_path, grpc_port=0) as rig:
        await asyncio.to_thread(ask, f"127.0.0.1:{rig.port}", f"127.0.0.1:{rig.grpc_port}")


async def test_keys_come_and_go_while_a_gateway_runs(tmp_path):
    """The first one closes it, a new one works at once, and a revoked one, or all, never open it
    again."""
    async with running(tmp_path) as rig:
        assert (await rig.infer()).status_code == 200

        async def status(token=None):
            headers = bearer(token) if token else {}
            return (await rig.http.get("/v2", headers=headers)).status_code

        first = key_of(rig.repository)

        async def closed():
            return await status() == 401

        await until(closed)
        assert await status(first) == 200
        second = key_of(rig.repository)

        async def lets_in():
            return await status(second) == 200

        await until(lets_in)
        for token in (first, second):
            rig.repository.keys.revoke(id_of(token))

        async def refused():
            return [await status(token) for token in (first, second)] == [401, 401]

        await until(refused)
        assert await status() == 401
        answer = await rig.http.get("/v2", headers=bearer(first))
        assert "revoked" in answer.json()["error"]
        async with another_gateway(rig) as second_gateway:
            assert (await second_gateway.get("/v2")).status_code == 401


async def test_a_gateway_beyond_loopback_does_not_start_without_a_key(tmp_path):
    """Unless it is told that it may."""
    with pytest.raises(ConfigError, match="ROOST_GATEWAY_AUTH=off"):
        async with running(tmp_path, host="0.0.0.0"):
            pytest.fail("it listens")
    async with running(tmp_path / "2", host="0.0.0.0", auth="off") as rig:
        assert (await rig.infer()).status_code == 200
    key_of(Repository(str(tmp_path / "3" / "repository")))
    async with running(tmp_path / "3", host="0.0.0.0") as rig:
        assert (await rig.infer()).status_code == 401


WITHOUT_ORACLE = [
    ("POST", "/v2/models/{0}/infer", JSON_BODY),
    ("POST", "/v2/models/{0}/infer", {"nonsense": 1}),
    ("POST", "/v2/models/{0}/versions/1/infer", JSON_BODY),
    ("POST", "/v2/models/{0}/versions/7/infer", JSON_BODY),
    ("POST", "/v2/models/{0}/versions/0/infer", JSON_BODY),
    ("POST", "/v2/models/{0}/versions/prod/infer", JSON_BODY),
    ("POST", "/v2/models/{0}/versions/latest/infer", JSON_BODY),
    ("POST", "/v2/models/{0}/jobs", JSON_BODY),
    ("GET", "/v2/models/{0}", None),
    ("GET", "/v2/models/{0}/versions/1", None),
    ("GET", "/v2/models/{0}/versions/7", None),
    ("GET", "/v2/models/{0}/versions/prod", None),
    ("GET", "/v2/models/{0}/config", None),
    ("GET", "/v2/models/{0}/ready", None),
    ("GET", "/v2/models/{0}/versions/1/ready", None),
    ("GET", "/v2/models/{0}/stats", None),
    ("GET", "/v2/models/{0}/versions/prod/stats", None),
    ("GET", "/v2/repository/models/{0}", None),
    ("GET", "/v2/repository/models/{0}/aliases", None),
    ("GET", "/v2/repository/models/{0}/aliases/prod", None),
    ("POST", "/v2/repository/models/{0}/load", {}),
    ("POST", "/v2/repository/models/{0}/load", {"parameters": {"config": "{}"}}),
    ("POST", "/v2/repository/models/{0}/load", {"parameters": {"config": '{"max_batch": 0}'}}),
    ("POST", "/v2/repository/models/{0}/unload", {}),
    ("PUT", "/v2/repository/models/{0}/aliases/prod", {"version": 1}),
    ("PUT", "/v2/repository/models/{0}/aliases/LOUD", {"version": 1}),
    ("PUT", "/v2/repository/models/{0}/aliases/latest", {"version": 1}),
    ("DELETE", "/v2/repository/models/{0}/aliases/prod", None),
    ("DELETE", "/v2/repository/models/{0}/aliases/LOUD", None),
    ("DELETE", "/v2/repository/models/{0}/versions/1", None),
    ("DELETE", "/v2/repository/models/{0}/versions/7", None),
    ("DELETE", "/v2/repository/models/{0}", None),
]  # fmt: skip


async def test_another_tenants_model_is_answered_as_one_that_is_not_there(tmp_path, tokens):
    """Status, code and words, whatever is asked, and over gRPC; and in no list does it stand."""
    async with running(tmp_path, grpc_port=0) as rig:
        async with AsyncRoostClient(rig.url, api_key=tokens["acme"]) as owner:
            file = tmp_path / "model.pt"
            file.write_bytes(torchscript(b"theirs" * 16))
            manifest = await owner.push("theirs", file, spec=SPEC)
            assert manifest.tenant == "acme"
            await owner.set_alias("theirs", "prod", 1, now=True)
            await rig.worker.bind(manifest.id)
            await owner.infer("theirs", {"x": np.ones((1, 3), np.float32)})
            assert {item["name"] for item in await owner.list()} == {"adder", "theirs"}
        headers = bearer(tokens["other"])
        for method, path, body in WITHOUT_ORACLE:
            told = []
            for name in ("theirs", "nosuch"):
                answer = await rig.http.request(
                    method, path.format(name), json=body, headers=headers
                )
                code = answer.headers.get("roost-code")
                told.append((answer.status_code, code, answer.text.replace(name, "?")))
            assert told[0] == told[1], (method, path, body)
            assert told[0][0] in {400, 404}, (method, path, told[0])
        for path in ("/v2/repository/index", "/v2/models/stats"):
            told_all = await rig.http.get(path, headers=headers)
            assert "adder" in told_all.text
            assert "theirs" not in told_all.text
        async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as channel:
            for method, field in (
                ("ModelInfer", b"\x0a"), ("ModelMetadata", b"\x0a"), ("ModelReady", b"\x0a"),
                ("ModelConfig", b"\x0a"), ("ModelStatistics", b"\x0a"),
                ("RepositoryModelLoad", b"\x12"), ("RepositoryModelUnload", b"\x12"),
            ):  # fmt: skip
                answers = []
                for name in (b"theirs", b"nosuch"):
                    call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(
                        field + bytes([len(name)]) + name, metadata=tuple(headers.items())
                    )
                    said = (await call.details()).replace(name.decode(), "?")
                    answers.append((await call.code(), said))
                assert answers[0] == answers[1], method
            call = channel.unary_unary("/inference.GRPCInferenceService/RepositoryIndex")
            assert b"theirs" not in await call(b"", metadata=tuple(headers.items()))
        # Nothing of that has changed anything; and whoever may see all, sees it.
        assert rig.repository.versions.numbers("theirs") == [1]
        for token in (tokens["infer"], tokens["admin"]):
            answer = await rig.http.get("/v2/models/theirs", headers=bearer(token))
            assert answer.status_code == 200


async def test_a_name_belongs_to_who_registered_it(tmp_path, tokens):
    """Nobody else's key pushes under it or changes it, but an admin's, by which it stays theirs."""
    async with running(tmp_path) as rig, contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(AsyncRoostClient(rig.url, api_key=token))
            for name, token in tokens.items()
        }
        first, second = tmp_path / "1.pt", tmp_path / "2.pt"
        first.write_bytes(torchscript(b"first" * 16))
        second.write_bytes(torchscript(b"second" * 16))
        await clients["acme"].push("mine", first)
        with pytest.raises(AlreadyExists, match="'mine' is taken"):
            await clients["other"].push("mine", second)
        with pytest.raises(PermissionDenied, match="tenant 'acme'"):
            await clients["push"].push("mine", second)
        for name in ("other", "acme"):
            with pytest.raises(PermissionDenied, match="nobody's in particular"):
                await clients[name].push("adder", second)
            for forbidden in (
                clients[name].remove("adder"),
                clients[name].unload("adder"),
                clients[name].load("adder"),
                clients[name].set_alias("adder", "prod", 1),
                clients[name].remove_alias("adder", "prod"),
            ):
                with pytest.raises(PermissionDenied, match="nobody's in particular"):
                    await forbidden
        await clients["push"].push("adder", second)
        pushed = await clients["admin"].push("mine", second)
        assert (pushed.version, pushed.tenant) == (2, "acme")
        with pytest.raises(PermissionDenied):
            await clients["push"].remove("mine")
        await clients["acme"].remove("mine", 1)
        await clients["admin"].remove("mine")
        assert rig.repository.versions.owner("mine") is None
        # Numbers are never used again, and do not come back as somebody else's.
        assert (await clients["other"].push("mine", first)).version == 3


async def test_two_tenants_cannot_get_one_name_between_them(tmp_path):
    """Who loses a race withdraws; afterwards the name is one tenant's, or nobody has it."""
    repository = Repository(str(tmp_path / "repository"))
    digest, _ = repository.files.put([torchscript(b"same" * 16)])

    def register(tenant, version):
        try:
            repository.register("both", version, SPEC, digest, tenant)
        except AlreadyExists:
            return False
        return True

    for _ in range(20):
        results = await asyncio.gather(
            *(
                asyncio.to_thread(register, tenant, version)
                for tenant, version in (("a", None), ("b", None))
            )
        )
        owners = {
            repository.versions.manifest("both", v).tenant
            for v in repository.versions.numbers("both")
        }
        assert len(owners) <= 1
        assert sum(results) == len(owners)
        if owners:
            repository.remove("both")


async def test_jobs_are_their_tenants(tmp_path, tokens):
    """And an admin's to see and end."""
    async with running(tmp_path, job_prefetch=0) as rig:
        mine = bearer(tokens["acme"])
        accepted = await rig.http.post("/v2/models/adder/jobs", json=JSON_BODY, headers=mine)
        assert accepted.status_code == 202
        where = accepted.headers["location"]
        for name, status in (("acme", 200), ("admin", 200), ("other", 404), ("infer", 404)):
            answer = await rig.http.get(where, headers=bearer(tokens[name]))
            assert answer.status_code == status, name
        removed = await rig.http.delete(where, headers=bearer(tokens["other"]))
        assert removed.status_code == 404
        removed = await rig.http.delete(where, headers=bearer(tokens["admin"]))
        assert removed.status_code == 204


async def test_a_job_runs_as_its_tenant(tmp_path, tokens):
    """A model that became another tenant's meanwhile is not there for it."""
    async with running(tmp_path, job_prefetch=0) as rig:
        mine = bearer(tokens["acme"])
        rig.register("once")
        jobs = {}
        for name in ("adder", "once"):
            path = f"/v2/models/{name}/jobs"
            accepted = await rig.http.post(path, json=JSON_BODY, headers=mine)
            jobs[name] = accepted.headers["location"]
        rig.repository.remove("once")
        digest, _ = rig.repository.files.put([torchscript(b"theirs" * 16)])
        rig.repository.register("once", None, SPEC, digest, "other")
        async with another_gateway(rig) as http:  # which runs jobs

            async def done():
                told = [(await http.get(where, headers=mine)).json() for where in jobs.values()]
                if any(job["state"] in {"queued", "running"} for job in told):
                    return None
                return told

            await until(done)
            ran, lost = await done()
            assert (ran["state"], lost["state"]) == ("succeeded", "failed")
            assert lost["error"] == "model 'once' is not registered"


async def test_the_header_of_a_proxy_counts_only_with_a_key_of_nobody(tmp_path, tokens):
    """With it the caller is that tenant, and confined as one; a tenant's key is its own."""
    async with running(tmp_path, tenant_header="x-tenant") as rig:
        digest, _ = rig.repository.files.put([torchscript(b"acmes" * 16)])
        rig.repository.register("acmes", None, SPEC, digest, "acme")

        async def status(token, tenant=None):
            headers = bearer(token) | ({"x-tenant": tenant} if tenant else {})
            return (await rig.http.get("/v2/models/acmes", headers=headers)).status_code

        assert await status(tokens["infer"]) == 200
        assert await status(tokens["infer"], "acme") == 200
        assert await status(tokens["infer"], "other") == 404
        assert await status(tokens["infer"], "no/name") == 400
        assert await status(tokens["acme"], "other") == 200
        assert await status(tokens["other"], "acme") == 404


async def test_quotas_hold_while_a_gateway_runs(tmp_path, tokens):
    """Changed through any gateway; told in 429, and counted by tenant."""
    async with running(tmp_path) as rig:
        mine, admin = bearer(tokens["acme"]), bearer(tokens["admin"])
        assert (await rig.infer(headers=mine)).status_code == 200
        for wrong in ({"requests_per_s": 0}, {"reqests_per_s": 1}, []):
            answer = await rig.http.put("/v2/repository/tenants/acme", json=wrong, headers=admin)
            assert answer.status_code == 400
        quota = {"requests_per_s": 0.01, "request_bytes": 10_000}
        told = await rig.http.put("/v2/repository/tenants/acme", json=quota, headers=admin)
        assert told.json()["quota"] == {**quota, "concurrency": None, "device_bytes": None,
                                        "share": 1.0}  # fmt: skip
        assert (await rig.infer(headers=mine)).status_code == 200
        limited = await rig.infer(headers=mine)
        assert limited.status_code == 429
        assert "0.01 times a second" in limited.json()["error"]
        assert 1 <= int(limited.headers["retry-after"]) <= 100
        assert (await rig.infer(headers=bearer(tokens["other"]))).status_code == 200
        limited = await rig.http.post("/v2/models/adder/jobs", json=JSON_BODY, headers=mine)
        assert limited.status_code == 429
        # Behind this gateway's back, as another one, or the command, does it.
        rig.repository.tenants.put("acme", Quota(request_bytes=200))
        body = JSON_BODY | {"parameters": {"padding": "x" * 500}}

        async def too_large():
            answer = await rig.infer(body, headers=mine)
            return answer.status_code == 429 and "hold" in answer.json()["error"]

        await until(too_large)
        await rig.http.delete("/v2/repository/tenants/acme", headers=admin)
        assert (await rig.infer(body, headers=mine)).status_code == 200
        text = (await rig.http.get("/metrics", headers=bearer(tokens["metrics"]))).text
        assert 'roost_gateway_tenant_requests_total{code="ok",tenant="acme"} 3.0' in text
        limited = re.search(r'roost_gateway_rejected_total\{reason="tenant_rate"\} (\d+)', text)
        assert int(limited[1]) >= 2
        assert 'roost_gateway_rejected_total{reason="tenant_bytes"} 1.0' in text


async def test_tenants_without_a_name_of_their_own_are_counted_together(tmp_path):
    """A header that anybody can vary makes no series."""
    async with running(tmp_path, tenant_header="x-tenant") as rig:
        for number in range(5):
            await rig.infer(headers={"x-tenant": f"t{number}"})
        sample = 'roost_gateway_tenant_requests_total{code="ok",tenant="other"}'
        assert await rig.metric(sample) == 5


async def test_the_secret_of_a_key_is_told_once_and_nowhere_else(tmp_path, logged):
    """Not in logs, errors, metrics or lists, whatever is done with it."""
    seen = []
    async with running(tmp_path) as rig:
        answer = await rig.http.post("/v2/repository/keys", json={})
        assert answer.status_code == 403, "while no key is asked for, nobody makes one here"
        admin = bearer(key_of(rig.repository, "", ("admin",)))

        async def closed():
            return (await rig.http.get("/v2")).status_code == 401

        await until(closed)
        made = await rig.http.post(
            "/v2/repository/keys",
            json={"tenant": "acme", "scopes": ["infer", "push"], "note": "n"},
            headers=admin,
        )
        assert made.status_code == 201
        assert made.headers["cache-control"] == "no-store"
        token = made.json()["key"]
        secret = token.rpartition("_")[2]
        headers = bearer(token)
        for method, path in (
            ("GET", "/v2/repository/keys"), ("GET", "/metrics"), ("GET", "/v2/repository/tenants"),
            ("GET", "/v2/repository/models/adder"), ("PUT", "/v2/repository/tenants/acme"),
            ("POST", "/v2/models/adder/infer"), ("DELETE", "/v2/repository/models/adder"),
        ):  # fmt: skip
            shown = (headers, admin, bearer(token[:-1]), bearer(token + "0"))
            answers = [await rig.http.request(method, path, headers=each) for each in shown]
            seen += [answer.text for answer in answers]
        answer = await rig.infer(headers=headers)
        seen.append(answer.text)
        rig.repository.keys.revoke(id_of(token))

        async def refused():
            answer = await rig.infer(headers=headers)
            seen.append(answer.text)
            return answer.status_code == 401

        await until(refused)
    assert "key_created" in logged.getvalue()
    for text in (*seen, logged.getvalue(), *map(str, (tmp_path / "repository").rglob("*"))):
        assert secret[:-1] not in text
    for file in (tmp_path / "repository").rglob("*.json"):
        assert secret not in file.read_text()


async def test_the_commands_make_the_first_key_and_then_work_through_a_gateway(
    tmp_path, capsys, monkeypatch, logged
):
    """On the repository itself while there is none, else with an admin key."""
    repository = str(tmp_path / "repository")
    monkeypatch.setenv("ROOST_REPOSITORY_URL", repository)
    monkeypatch.delenv("ROOST_API_KEY", raising=False)

    def roost(*arguments) -> str:
        capsys.readouterr()
        assert main(arguments) == 0
        return capsys.readouterr().out.strip()

    first = await asyncio.to_thread(roost, "key", "create", "--scope", "admin", "--note", "root")
    assert re.fullmatch(r"rk_[0-9a-f]{12}_[0-9a-f]{64}", first)
    async with running(tmp_path) as rig:
        at = ("--url", rig.url)
        with RoostClient(rig.url) as client, pytest.raises(Unauthenticated):
            await asyncio.to_thread(client.list)
        monkeypatch.setenv("ROOST_API_KEY", first)
        second = await asyncio.to_thread(
            roost, "key", "create", "--tenant", "acme", "--expires", "90d", *at
        )
        listed = await asyncio.to_thread(roost, "key", "ls", *at)
        assert re.search(rf"{id_of(second)}\s+acme\s+infer\s+valid", listed)
        assert await asyncio.to_thread(roost, "key", "ls") == listed
        await asyncio.to_thread(roost, "key", "revoke", id_of(second), *at)
        assert "revoked" in await asyncio.to_thread(roost, "key", "ls")
        told = await asyncio.to_thread(
            roost, "tenant", "set", "acme", "--requests-per-s", "5", "--share", "2", *at
        )
        assert "acme" in told
        await asyncio.to_thread(roost, "tenant", "set", "acme", "--concurrency", "7")
        expected = {"acme": Quota(requests_per_s=5.0, concurrency=7, share=2.0)}
        assert rig.repository.tenants.quotas() == expected
        assert await asyncio.to_thread(roost, "tenant", "ls", *at) == await asyncio.to_thread(
            roost, "tenant", "ls"
        )
        await asyncio.to_thread(roost, "tenant", "rm", "acme", *at)
        assert rig.repository.tenants.quotas() == {}
        assert main(["tenant", "rm", "acme"]) == 1
        assert "adder" in await asyncio.to_thread(roost, "ls", *at)


async def test_the_client_shows_its_key(tmp_path, tokens, monkeypatch):
    """The given one, or that of the environment; what cannot be one is refused before it is
    sent, and not repeated."""
    async with running(tmp_path) as rig:
        monkeypatch.setenv("ROOST_API_KEY", tokens["acme"])
        async with AsyncRoostClient(rig.url) as client:
            assert await client.list()
            with pytest.raises(PermissionDenied):
                await client.list_keys()
            with pytest.raises(ModelNotFound):
                await client.infer("nosuch", {"x": np.ones((1, 3), np.float32)})
        async with AsyncRoostClient(rig.url, api_key=tokens["admin"]) as client:
            assert len(await client.list_keys()) == len(tokens)
            await client.set_tenant("acme", Quota(requests_per_s=0.001))
            assert await client.tenants()
        async with AsyncRoostClient(rig.url) as client:
            array = {"x": np.ones((1, 3), np.float32)}
            await client.infer("adder", array)
            with pytest.raises(Overloaded) as caught:
                await client.infer("adder", array)
            assert 900 < caught.value.retry_after_s <= 1000
        with pytest.raises(InvalidRequest) as wrong:
            AsyncRoostClient(rig.url, api_key="hunter2\r\nx: y")
        assert "hunter2" not in str(wrong.value)
