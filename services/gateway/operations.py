"""Pieces of an OpenAPI document: operations, their parameters, bodies and answers."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def get(
    summary: str,
    schema: str,
    *errors: int,
    tag: str = "models",
    parameters: list[str] | None = None,
) -> Json:
    return operation(summary, tag, ok(schema), *errors, parameters=parameters)


def operation(
    summary: str,
    tag: str,
    responses: Json,
    *errors: int,
    body: Json | None = None,
    parameters: list[str] | None = None,
) -> Json:
    told: Json = {
        "summary": summary,
        "tags": [tag],
        "responses": {
            **responses,
            **{str(error): {"$ref": f"#/components/responses/{error}"} for error in errors},
        },
    }
    if parameters:
        told["parameters"] = [{"$ref": f"#/components/parameters/{p}"} for p in parameters]
    if body is not None:
        told["requestBody"] = body
    return told


def parameter(
    name: str, where: str, schema: Json, description: str = "", example: object = None
) -> Json:
    told: Json = {"name": name, "in": where, "required": where == "path", "schema": schema}
    if description:
        told["description"] = description
    if example is not None:
        told["example"] = example
    return told


def ok(schema: str, status: int = 200) -> Json:
    content = {"application/json": {"schema": ref(schema)}}
    return {str(status): {"description": "As asked.", "content": content}}


def nothing() -> Json:
    return {"204": {"description": "Done."}}


def json_body(schema: str, *, required: bool = True) -> Json:
    return {"required": required, "content": {"application/json": {"schema": ref(schema)}}}


def octets() -> Json:
    schema = {"type": "string", "format": "binary"}
    return {"required": True, "content": {"application/octet-stream": {"schema": schema}}}


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
