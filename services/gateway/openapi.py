"""The OpenAPI document of the whole HTTP surface, and a page to try it.

Written by hand, since what matters (raw tensors behind the JSON, which errors mean what) is in
no signature; the descriptions of models come from the structs themselves. Tests hold it against
the routes and, with schemathesis, against what the gateway answers.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Final

import msgspec

from services.gateway.admin import KeyWish
from services.gateway.aliases import MAX_WAIT_S
from services.gateway.operations import (
    Json,
    get,
    json_body,
    nothing,
    octets,
    ok,
    operation,
    parameter,
    ref,
)
from services.gateway.registry import Registration
from services.gateway.schemas import RESPONSES, SCHEMAS
from shared.models import Manifest, ModelSpec
from shared.names import (
    HEADER_DEADLINE,
    HEADER_IDEMPOTENCY_KEY,
    HEADER_LENGTH,
    HEADER_SPLIT_KEY,
)
from shared.tenants import Quota

_PAGE: Final = "api.html"
_NAME: Final = r"^[A-Za-z0-9](?:[._-]?[A-Za-z0-9]|[_-])*$"
"""As `names.check_name` has it, a little narrower: patterns here cannot say "no '..'"."""
_VERSION: Final = r"^([1-9][0-9]{0,8}|[a-z][a-z0-9_-]{0,62})$"
_ALIAS: Final = r"^[a-z][a-z0-9_-]{0,62}$"
OPEN: Final = ("/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs")
"""Paths that need no key, wherever keys are asked for."""
_KEY: Final = r'^("[!#-\[\]-~]{1,255}"|[!#-~][!-~]{0,254})$'
"""In quotes without escapes, or without quotes."""
_REVISION: Final = r'^"[0-9]{1,18}"$'


@functools.cache
def document(version: str) -> bytes:
    """The document, as JSON."""
    return msgspec.json.encode(_document(version))


@functools.cache
def page() -> bytes:
    """The page: one file that needs no other, from anywhere."""
    return resources.files("services.gateway").joinpath(_PAGE).read_bytes()


def _document(version: str) -> Json:
    (_, components) = msgspec.json.schema_components(
        [ModelSpec, Manifest, Registration, KeyWish, Quota],
        ref_template="#/components/schemas/{name}",
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Roost gateway",
            "version": version,
            "description": "The Open Inference Protocol v2 with Triton's extensions, and the "
            "registry of models. Whatever goes wrong is answered as `Error`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _guarded(_paths()),
        "security": [{"key": []}],
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, where the gateway asks for one "
                    "(`roost key create`; docs/security.md).",
                }
            },
            "schemas": {**components, **SCHEMAS},
            "responses": RESPONSES,
            "parameters": {
                "model": parameter("model", "path", {"type": "string", "pattern": _NAME,
                                                      "maxLength": 128}, example="bert"),
                "version": parameter("version", "path", {"type": "integer", "minimum": 1,
                                                          "maximum": 2**31 - 1}, example=1),
                "address": parameter(
                    "version", "path", {"type": "string", "pattern": _VERSION},
                    "A version, `latest`, or an alias.", example="1"),
                "alias": parameter("alias", "path", {"type": "string", "pattern": _ALIAS},
                                    example="prod"),
                "match": parameter("If-Match", "header", {"type": "string", "pattern": _REVISION},
                                    "The `ETag` that the aliases must still have."),
                "wait": parameter("wait", "query", {"type": "number", "minimum": 0,
                                                     "maximum": MAX_WAIT_S},
                                   "Seconds that the answer may wait until nothing is pending."),
                "split": parameter(
                    HEADER_SPLIT_KEY, "header", {"type": "string", "pattern": "^[!-~]{1,256}$"},
                    "Requests with the same key get the same version of a split."),
                "idempotency": parameter(
                    HEADER_IDEMPOTENCY_KEY, "header", {"type": "string", "pattern": _KEY},
                    "Of this one job: sent again with the same request, it leads to the same job. "
                    "A UUID, say."),
                "key": parameter("key", "path", {"type": "string",
                                                  "pattern": "^[0-9a-f]{12}$"}),
                "tenant": parameter(
                    "tenant", "path",
                    {"type": "string", "pattern": "^[A-Za-z0-9]([._-]?[A-Za-z0-9]){0,31}$"}),
                "job": parameter("job", "path", {"type": "string",
                                                  "pattern": "^[0-7][0-9a-f]{31}$"}),
                "digest": parameter("digest", "path", {"type": "string",
                                                        "pattern": "^sha256:[0-9a-f]{64}$"}),
                "length": parameter(
                    HEADER_LENGTH, "header", {"type": "integer", "minimum": 0},
                    "Bytes of JSON before the raw tensors. Left out when all is JSON; 0 when the "
                    "body is the one input of the model and nothing else."),
                "deadline": parameter(
                    HEADER_DEADLINE, "header", {"type": "integer", "minimum": 0,
                                                "maximum": 10**15 - 1},
                    "Unix time in milliseconds after which no answer is wanted."),
                "encoding": parameter(
                    "Content-Encoding", "header",
                    {"type": "string", "enum": ["gzip", "deflate", "identity"]}),
            },
        },
    }  # fmt: skip


def _paths() -> Json:
    server, models = "/v2", "/v2/models"
    model, stored = f"{models}/{{model}}", "/v2/repository/models/{model}"
    paths: Json = {
        server: {"get": get("Server metadata", "ServerMetadata", tag="server")},
        "/v2/health/live": {"get": get("Whether the gateway runs", "Live", tag="server")},
        "/v2/health/ready": {
            "get": get("Whether it can take requests now", "Ready", 503, tag="server")
        },
        f"{models}/stats": {"get": get("Statistics of all models", "Statistics", 503)},
        "/v2/repository/index": {
            "get": get("Every version of every model", "Index", 503, tag="repository"),
            "post": operation(
                "Every version of every model, or those that are ready", "repository",
                ok("Index"), 400, 408, 413, 503, body=json_body("IndexFilter", required=False),
            ),
        },
        f"{stored}/load": {
            "post": operation(
                "Make a model available, with a configuration and files if need be", "repository",
                ok("Empty"), 400, 404, 408, 409, 413, 429, 503,
                body=json_body("Load", required=False), parameters=["model"],
            )
        },
        f"{stored}/unload": {
            "post": operation(
                "Make a model unavailable until it is loaded again", "repository",
                ok("Empty"), 400, 404, 408, 413, 503,
                body=json_body("Unload", required=False), parameters=["model"],
            )
        },
        "/v2/repository/quarantine": {
            "get": get("The versions that are kept from all workers as they ended engines",
                        "Quarantine", 503, tag="repository"),
        },
        f"{stored}/quarantine": {
            "delete": operation("Let a model, all its versions, be loaded again", "repository",
                                 ok("Released"), 400, 404, 503, parameters=["model"]),
        },
        f"{stored}/versions/{{version}}/quarantine": {
            "delete": operation("Let a version be loaded again", "repository", ok("Released"),
                                 400, 404, 503, parameters=["model", "version"]),
        },
        stored: {
            "get": get("All that is known of a model", "Detail", 400, 404, 503,
                        tag="repository", parameters=["model"]),
            "delete": operation("Remove a model with all its versions", "repository",
                                 nothing(), 400, 404, 503, parameters=["model"]),
        },
        f"{stored}/versions": {
            "post": operation(
                "Register an uploaded file as the next version", "repository",
                ok("Manifest", 201), 400, 408, 409, 413, 503,
                body=json_body("Registration"), parameters=["model"],
            )
        },
        f"{stored}/versions/{{version}}": {
            "put": operation(
                "Register an uploaded file as this version", "repository",
                ok("Manifest", 201), 400, 408, 409, 413, 503,
                body=json_body("Registration"), parameters=["model", "version"],
            ),
            "delete": operation("Remove a version", "repository", nothing(), 400, 404, 409, 503,
                                 parameters=["model", "version"]),
        },
        f"{stored}/aliases": {
            "get": get("A model's aliases", "Aliases", 400, 404, 503, tag="repository",
                        parameters=["model"]),
        },
        f"{stored}/aliases/{{alias}}": {
            "get": get("Where an alias leads", "Alias", 400, 404, 503, tag="repository",
                        parameters=["model", "alias"]),
            "put": operation(
                "Let an alias lead to a version or a split, once that is bound as often as what it "
                "leads to now: 202 while it is not", "repository",
                {**ok("Alias"), **ok("Alias", 202)}, 400, 404, 408, 409, 413, 503,
                body=json_body("AliasWish"), parameters=["model", "alias", "match", "wait"],
            ),
            "delete": operation("Remove an alias", "repository", nothing(), 400, 404, 409, 503,
                                 parameters=["model", "alias", "match"]),
        },
        "/v2/repository/blobs/{digest}": {
            "head": operation(
                "Whether a file is there", "repository",
                {"200": {"description": "It is there."}, "404": {"description": "It is not."},
                 "400": {"description": "That is no digest."},
                 "503": {"description": "The repository is away."}},
                parameters=["digest"],
            ),
            "put": operation(
                "Upload a file", "repository", {**ok("Blob"), **ok("Blob", 201)},
                400, 408, 413, 429, 503, body=octets(), parameters=["digest"],
            ),
        },
        "/v2/repository/keys": {
            "get": get("All API keys, but for their secrets", "Keys", 503, tag="admin"),
            "post": operation("Make an API key", "admin", ok("NewKey", 201), 400, 408, 413, 503,
                               body=json_body("KeyWish")),
        },
        "/v2/repository/keys/{key}": {
            "delete": operation("Revoke an API key", "admin", nothing(), 400, 404, 503,
                                 parameters=["key"]),
        },
        "/v2/repository/tenants": {
            "get": get("What tenants may take", "Tenants", 503, tag="admin"),
        },
        "/v2/repository/tenants/{tenant}": {
            "put": operation("Say what a tenant may take", "admin", ok("Tenant"),
                              400, 408, 413, 503, body=json_body("Quota"), parameters=["tenant"]),
            "delete": operation("Take back what is said of a tenant", "admin", nothing(),
                                 400, 404, 503, parameters=["tenant"]),
        },
        "/metrics": {"get": operation("Prometheus' metrics", "server", {"200": {
            "description": "Prometheus' or OpenMetrics' text.",
            "content": {kind: {"schema": {"type": "string"}}
                        for kind in ("text/plain", "application/openmetrics-text")},
        }})},
        "/openapi.json": {"get": operation("This document", "server", {"200": {
            "description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {}}},
        }})},
        "/docs": {"get": operation("A page to try it", "server", {"200": {
            "description": "HTML.", "content": {"text/html": {"schema": {"type": "string"}}},
        }})},
    }  # fmt: skip
    for path, parameters in ((model, ["model"]), (f"{model}/versions/{{version}}",
                                                  ["model", "address"])):  # fmt: skip
        paths[path] = {"get": _of_model("Model metadata", "ModelMetadata", parameters)}
        paths[f"{path}/config"] = {
            "get": _of_model("Triton's model configuration", "ModelConfig", parameters)
        }
        paths[f"{path}/ready"] = {
            "get": get("Whether a model can be asked", "ModelReady", 400, 404,
                        parameters=parameters)
        }  # fmt: skip
        paths[f"{path}/ready"]["get"]["responses"]["503"] = {
            "description": "It cannot, and why; or the repository is away.",
            "content": {"application/json": {"schema": ref("ModelNotReady")}},
        }
        paths[f"{path}/stats"] = {"get": _of_model("Statistics", "Statistics", parameters)}
        paths[f"{path}/infer"] = {"post": _infer(parameters)}
        paths[f"{path}/jobs"] = {"post": _submit(parameters)}
    return paths | _jobs()


def _guarded(paths: Json) -> Json:
    """With what is answered to callers who show no key, or not the right one."""
    denied = {str(status): {"$ref": f"#/components/responses/{status}"} for status in (401, 403)}
    for path, operations in paths.items():
        for each in operations.values():
            if path in OPEN:
                each["security"] = []
                continue
            # While keys cannot be read, nobody is let in.
            away = {"503": {"$ref": "#/components/responses/503"}}
            each["responses"] = {**away, **each["responses"], **denied}
    return paths


def _jobs() -> Json:
    """Of jobs that are there already."""
    job, whose = "/v2/jobs/{job}", ["job"]
    errors = (400, 404, 500, 503)
    return {
        job: {
            "get": get("How a job stands", "Job", *errors, tag="jobs", parameters=whose),
            "delete": operation(
                "Cancel a job, or remove one that has ended with its result", "jobs", nothing(),
                *errors, parameters=whose,
            ),
        },
        f"{job}/result": {
            "get": operation(
                "What `infer` would have answered; 409 while the job has not ended", "jobs",
                {"200": _outputs()}, 400, 404, 409, 413, 429, 500, 503, 504, parameters=whose,
            )
        },
    }  # fmt: skip


def _submit(parameters: list[str]) -> Json:
    accepted = {
        "description": "Accepted: it will have its turn, whatever is restarted meanwhile. Under an "
        "`Idempotency-Key` that was used before: the job that there is, as it stands now.",
        "headers": {"Location": {"schema": {"type": "string"}, "description": "Of the job."}},
        "content": {"application/json": {"schema": ref("Job")}},
    }
    return operation(
        "Submit a request, and come back for the answer", "jobs", {"202": accepted},
        400, 404, 408, 413, 422, 429, 500, 503, 504, body=_inputs(),
        parameters=[*parameters, "length", "deadline", "encoding", "split", "idempotency"],
    )  # fmt: skip


def _outputs() -> Json:
    return {
        "description": "The outputs. Raw ones stand behind the JSON.",
        "headers": {
            HEADER_LENGTH: {"schema": {"type": "integer"}, "description": "Bytes of JSON."}
        },
        "content": {
            "application/json": {"schema": ref("InferResponse")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def _inputs() -> Json:
    return {
        "required": True,
        "description": "JSON, then raw tensors if any. The Content-Type is not looked at.",
        "content": {
            "application/json": {"schema": ref("InferRequest")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def _infer(parameters: list[str]) -> Json:
    return operation(
        "Ask a model", "inference", {"200": _outputs()}, 400, 404, 408, 413, 429, 500, 503, 504,
        body=_inputs(), parameters=[*parameters, "length", "deadline", "encoding", "split"],
    )  # fmt: skip


def _of_model(summary: str, schema: str, parameters: list[str]) -> Json:
    return get(summary, schema, 400, 404, 503, parameters=parameters)
