"""The OpenAPI document of the whole HTTP surface, and a page to try it.

Written by hand, since what matters (raw tensors behind the JSON, which errors mean what) is in
no signature; the descriptions of models come from the structs themselves. Tests hold it against
the routes and, with schemathesis, against what the gateway answers.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, Final

import msgspec

from services.gateway.aliases import MAX_WAIT_S
from services.gateway.registry import Registration
from services.gateway.schemas import RESPONSES, SCHEMAS
from shared.models import Manifest, ModelSpec
from shared.names import HEADER_DEADLINE, HEADER_LENGTH, HEADER_SPLIT_KEY

Json = dict[str, Any]

_PAGE: Final = "api.html"
_NAME: Final = r"^[A-Za-z0-9](?:[._-]?[A-Za-z0-9]|[_-])*$"
"""As `names.check_name` has it, a little narrower: patterns here cannot say "no '..'"."""
_VERSION: Final = r"^([1-9][0-9]{0,8}|[a-z][a-z0-9_-]{0,62})$"
_ALIAS: Final = r"^[a-z][a-z0-9_-]{0,62}$"
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
        [ModelSpec, Manifest, Registration], ref_template="#/components/schemas/{name}"
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
        "paths": _paths(),
        "components": {
            "schemas": {**components, **SCHEMAS},
            "responses": RESPONSES,
            "parameters": {
                "model": _parameter("model", "path", {"type": "string", "pattern": _NAME,
                                                      "maxLength": 128}, example="bert"),
                "version": _parameter("version", "path", {"type": "integer", "minimum": 1,
                                                          "maximum": 2**31 - 1}, example=1),
                "address": _parameter(
                    "version", "path", {"type": "string", "pattern": _VERSION},
                    "A version, `latest`, or an alias.", example="1"),
                "alias": _parameter("alias", "path", {"type": "string", "pattern": _ALIAS},
                                    example="prod"),
                "match": _parameter("If-Match", "header", {"type": "string", "pattern": _REVISION},
                                    "The `ETag` that the aliases must still have."),
                "wait": _parameter("wait", "query", {"type": "number", "minimum": 0,
                                                     "maximum": MAX_WAIT_S},
                                   "Seconds that the answer may wait until nothing is pending."),
                "split": _parameter(
                    HEADER_SPLIT_KEY, "header", {"type": "string", "pattern": "^[!-~]{1,256}$"},
                    "Requests with the same key get the same version of a split."),
                "job": _parameter("job", "path", {"type": "string",
                                                  "pattern": "^[0-7][0-9a-f]{31}$"}),
                "digest": _parameter("digest", "path", {"type": "string",
                                                        "pattern": "^sha256:[0-9a-f]{64}$"}),
                "length": _parameter(
                    HEADER_LENGTH, "header", {"type": "integer", "minimum": 0},
                    "Bytes of JSON before the raw tensors. Left out when all is JSON; 0 when the "
                    "body is the one input of the model and nothing else."),
                "deadline": _parameter(
                    HEADER_DEADLINE, "header", {"type": "integer", "minimum": 0,
                                                "maximum": 10**15 - 1},
                    "Unix time in milliseconds after which no answer is wanted."),
                "encoding": _parameter(
                    "Content-Encoding", "header",
                    {"type": "string", "enum": ["gzip", "deflate", "identity"]}),
            },
        },
    }  # fmt: skip


def _paths() -> Json:
    server, models = "/v2", "/v2/models"
    model, stored = f"{models}/{{model}}", "/v2/repository/models/{model}"
    paths: Json = {
        server: {"get": _get("Server metadata", "ServerMetadata", tag="server")},
        "/v2/health/live": {"get": _get("Whether the gateway runs", "Live", tag="server")},
        "/v2/health/ready": {
            "get": _get("Whether it can take requests now", "Ready", 503, tag="server")
        },
        f"{models}/stats": {"get": _get("Statistics of all models", "Statistics", 503)},
        "/v2/repository/index": {
            "get": _get("Every version of every model", "Index", 503, tag="repository"),
            "post": _operation(
                "Every version of every model, or those that are ready", "repository",
                _ok("Index"), 400, 408, 413, 503, body=_json_body("IndexFilter", required=False),
            ),
        },
        f"{stored}/load": {
            "post": _operation(
                "Make a model available, with a configuration and files if need be", "repository",
                _ok("Empty"), 400, 404, 408, 409, 413, 429, 503,
                body=_json_body("Load", required=False), parameters=["model"],
            )
        },
        f"{stored}/unload": {
            "post": _operation(
                "Make a model unavailable until it is loaded again", "repository",
                _ok("Empty"), 400, 404, 408, 413, 503,
                body=_json_body("Unload", required=False), parameters=["model"],
            )
        },
        "/v2/repository/quarantine": {
            "get": _get("The versions that are kept from all workers as they ended engines",
                        "Quarantine", 503, tag="repository"),
        },
        f"{stored}/quarantine": {
            "delete": _operation("Let a model, all its versions, be loaded again", "repository",
                                 _ok("Released"), 400, 404, 503, parameters=["model"]),
        },
        f"{stored}/versions/{{version}}/quarantine": {
            "delete": _operation("Let a version be loaded again", "repository", _ok("Released"),
                                 400, 404, 503, parameters=["model", "version"]),
        },
        stored: {
            "get": _get("All that is known of a model", "Detail", 400, 404, 503,
                        tag="repository", parameters=["model"]),
            "delete": _operation("Remove a model with all its versions", "repository",
                                 _nothing(), 400, 404, 503, parameters=["model"]),
        },
        f"{stored}/versions": {
            "post": _operation(
                "Register an uploaded file as the next version", "repository",
                _ok("Manifest", 201), 400, 408, 409, 413, 503,
                body=_json_body("Registration"), parameters=["model"],
            )
        },
        f"{stored}/versions/{{version}}": {
            "put": _operation(
                "Register an uploaded file as this version", "repository",
                _ok("Manifest", 201), 400, 408, 409, 413, 503,
                body=_json_body("Registration"), parameters=["model", "version"],
            ),
            "delete": _operation("Remove a version", "repository", _nothing(), 400, 404, 409, 503,
                                 parameters=["model", "version"]),
        },
        f"{stored}/aliases": {
            "get": _get("A model's aliases", "Aliases", 400, 404, 503, tag="repository",
                        parameters=["model"]),
        },
        f"{stored}/aliases/{{alias}}": {
            "get": _get("Where an alias leads", "Alias", 400, 404, 503, tag="repository",
                        parameters=["model", "alias"]),
            "put": _operation(
                "Let an alias lead to a version or a split, once that is bound as often as what it "
                "leads to now: 202 while it is not", "repository",
                {**_ok("Alias"), **_ok("Alias", 202)}, 400, 404, 408, 409, 413, 503,
                body=_json_body("AliasWish"), parameters=["model", "alias", "match", "wait"],
            ),
            "delete": _operation("Remove an alias", "repository", _nothing(), 400, 404, 409, 503,
                                 parameters=["model", "alias", "match"]),
        },
        "/v2/repository/blobs/{digest}": {
            "head": _operation(
                "Whether a file is there", "repository",
                {"200": {"description": "It is there."}, "404": {"description": "It is not."},
                 "400": {"description": "That is no digest."},
                 "503": {"description": "The repository is away."}},
                parameters=["digest"],
            ),
            "put": _operation(
                "Upload a file", "repository", {**_ok("Blob"), **_ok("Blob", 201)},
                400, 408, 413, 429, 503, body=_octets(), parameters=["digest"],
            ),
        },
        "/metrics": {"get": _operation("Prometheus' metrics", "server", {"200": {
            "description": "Prometheus' or OpenMetrics' text.",
            "content": {kind: {"schema": {"type": "string"}}
                        for kind in ("text/plain", "application/openmetrics-text")},
        }})},
        "/openapi.json": {"get": _operation("This document", "server", {"200": {
            "description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {}}},
        }})},
        "/docs": {"get": _operation("A page to try it", "server", {"200": {
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
            "get": _get("Whether a model can be asked", "ModelReady", 400, 404,
                        parameters=parameters)
        }  # fmt: skip
        paths[f"{path}/ready"]["get"]["responses"]["503"] = {
            "description": "It cannot, and why; or the repository is away.",
            "content": {"application/json": {"schema": _ref("ModelNotReady")}},
        }
        paths[f"{path}/stats"] = {"get": _of_model("Statistics", "Statistics", parameters)}
        paths[f"{path}/infer"] = {"post": _infer(parameters)}
        paths[f"{path}/jobs"] = {"post": _submit(parameters)}
    return paths | _jobs()


def _jobs() -> Json:
    """Of jobs that are there already."""
    job, whose = "/v2/jobs/{job}", ["job"]
    errors = (400, 404, 500, 503)
    return {
        job: {
            "get": _get("How a job stands", "Job", *errors, tag="jobs", parameters=whose),
            "delete": _operation(
                "Cancel a job, or remove one that has ended with its result", "jobs", _nothing(),
                *errors, parameters=whose,
            ),
        },
        f"{job}/result": {
            "get": _operation(
                "What `infer` would have answered; 409 while the job has not ended", "jobs",
                {"200": _outputs()}, 400, 404, 409, 413, 429, 500, 503, 504, parameters=whose,
            )
        },
    }  # fmt: skip


def _submit(parameters: list[str]) -> Json:
    accepted = {
        "description": "Accepted: it will have its turn, whatever is restarted meanwhile.",
        "headers": {"Location": {"schema": {"type": "string"}, "description": "Of the job."}},
        "content": {"application/json": {"schema": _ref("Job")}},
    }
    return _operation(
        "Submit a request, and come back for the answer", "jobs", {"202": accepted},
        400, 404, 408, 413, 429, 500, 503, 504, body=_inputs(),
        parameters=[*parameters, "length", "deadline", "encoding", "split"],
    )  # fmt: skip


def _outputs() -> Json:
    return {
        "description": "The outputs. Raw ones stand behind the JSON.",
        "headers": {
            HEADER_LENGTH: {"schema": {"type": "integer"}, "description": "Bytes of JSON."}
        },
        "content": {
            "application/json": {"schema": _ref("InferResponse")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def _inputs() -> Json:
    return {
        "required": True,
        "description": "JSON, then raw tensors if any. The Content-Type is not looked at.",
        "content": {
            "application/json": {"schema": _ref("InferRequest")},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }


def _infer(parameters: list[str]) -> Json:
    return _operation(
        "Ask a model", "inference", {"200": _outputs()}, 400, 404, 408, 413, 429, 500, 503, 504,
        body=_inputs(), parameters=[*parameters, "length", "deadline", "encoding", "split"],
    )  # fmt: skip


def _of_model(summary: str, schema: str, parameters: list[str]) -> Json:
    return _get(summary, schema, 400, 404, 503, parameters=parameters)


def _get(
    summary: str,
    schema: str,
    *errors: int,
    tag: str = "models",
    parameters: list[str] | None = None,
) -> Json:
    return _operation(summary, tag, _ok(schema), *errors, parameters=parameters)


def _operation(
    summary: str,
    tag: str,
    responses: Json,
    *errors: int,
    body: Json | None = None,
    parameters: list[str] | None = None,
) -> Json:
    operation: Json = {
        "summary": summary,
        "tags": [tag],
        "responses": {
            **responses,
            **{str(error): {"$ref": f"#/components/responses/{error}"} for error in errors},
        },
    }
    if parameters:
        operation["parameters"] = [{"$ref": f"#/components/parameters/{p}"} for p in parameters]
    if body is not None:
        operation["requestBody"] = body
    return operation


def _parameter(
    name: str, where: str, schema: Json, description: str = "", example: object = None
) -> Json:
    parameter: Json = {"name": name, "in": where, "required": where == "path", "schema": schema}
    if description:
        parameter["description"] = description
    if example is not None:
        parameter["example"] = example
    return parameter


def _ok(schema: str, status: int = 200) -> Json:
    content = {"application/json": {"schema": _ref(schema)}}
    return {str(status): {"description": "As asked.", "content": content}}


def _nothing() -> Json:
    return {"204": {"description": "Done."}}


def _json_body(schema: str, *, required: bool = True) -> Json:
    return {"required": required, "content": {"application/json": {"schema": _ref(schema)}}}


def _octets() -> Json:
    schema = {"type": "string", "format": "binary"}
    return {"required": True, "content": {"application/octet-stream": {"schema": schema}}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
