"""What goes over the wire, as JSON Schema, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Final, get_args

from services.gateway.core.jobs import State
from services.gateway.core.tally import Tally, statistics
from shared.aliases import MAX_VERSIONS, MAX_WEIGHT
from shared.keys import SCOPES
from shared.models import Datatype
from shared.names import HEADER_CODE

Json = dict[str, Any]


def _object(properties: Json, *optional: str, closed: bool = False) -> Json:
    schema: Json = {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }
    if closed:
        schema["additionalProperties"] = False
    return schema


def _array(items: Json, **more: Any) -> Json:
    return {"type": "array", "items": items, **more}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _like(example: Any) -> Json:
    """A schema that has every key of the example."""
    if isinstance(example, dict):
        return _object({key: _like(value) for key, value in example.items()})
    if isinstance(example, list):
        return _array(_like(example[0]) if example else {"type": "object"})
    return {"type": {str: "string", int: "integer", bool: "boolean"}[type(example)]}


_STRING: Final[Json] = {"type": "string"}
_TIME: Final[Json] = {"type": "string", "format": "date-time"}
_COUNT: Final[Json] = {"type": "integer", "minimum": 0}
_BOOL: Final[Json] = {"type": "boolean"}
_DATATYPE: Final[Json] = {"type": "string", "enum": list(get_args(Datatype))}
_DIMENSION: Final[Json] = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_SHAPE: Final = _array({"type": "integer", "minimum": -1})
_PARAMETERS: Final[Json] = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_TENSOR: Final = _object({"name": _STRING, "datatype": _DATATYPE, "shape": _SHAPE})
_CONFIG_TENSOR: Final = _object({"name": _STRING, "data_type": _STRING, "dims": _SHAPE})
_NAME: Final[Json] = {"type": "string", "minLength": 1, "maxLength": 256}

_MOMENT: Final[Json] = {"type": ["number", "null"], "description": "Unix time."}
_KEY: Final[Json] = {
    "id": _STRING,
    "tenant": _STRING,
    "scopes": _array({"type": "string", "enum": list(SCOPES)}),
    "created": {"type": "number"},
    "expires": _MOMENT,
    "revoked": _MOMENT,
    "note": _STRING,
}

_INDEX_ITEM: Final = _object(
    {
        "name": _STRING,
        "version": _STRING,
        "state": {"type": "string", "enum": ["READY", "UNAVAILABLE"]},
        "reason": {**_STRING, "description": "Where the model is, or why it cannot be asked."},
        "tiers": {
            "type": "object",
            "additionalProperties": {"type": "string", "enum": ["host", "device"]},
            "description": "By worker; on the others it is on disk.",
        },
        "size_bytes": _COUNT,
        "own_bytes": _COUNT,
        "shared_bytes": _COUNT,
    }
)

_SPLIT: Final[Json] = {
    "type": "object",
    "patternProperties": {"^[1-9][0-9]{0,8}$": {"type": "integer", "minimum": 1}},
    "additionalProperties": False,
    "minProperties": 1,
    "description": "Weights by version.",
}
_WAITS: Final[Json] = {
    **_array(_STRING),
    "description": "What it waits for, in words.",
}

SCHEMAS: Final[Json] = {
    "Error": _object({"error": {**_STRING, "minLength": 1}}),
    "Empty": {"type": "object", "maxProperties": 0},
    "ServerMetadata": _object({"name": _STRING, "version": _STRING, "extensions": _array(_STRING)}),
    "Live": _object({"live": {"const": True}}),
    "Ready": _object({"ready": {"const": True}}),
    "ModelReady": _object({"name": _STRING, "ready": {"const": True}}),
    "ModelNotReady": _object(
        {"name": _STRING, "ready": {"const": False}, "error": _STRING}, "name", "ready"
    ),
    "ModelMetadata": _object(
        {
            "name": _STRING,
            "versions": _array(_STRING, minItems=1),
            "platform": _STRING,
            "inputs": _array(_TENSOR),
            "outputs": _array(_TENSOR),
        }
    ),
    "ModelConfig": _object(
        {
            "name": _STRING,
            "platform": _STRING,
            "backend": _STRING,
            "version_policy": {"type": "object"},
            "max_batch_size": _COUNT,
            "input": _array(_CONFIG_TENSOR),
            "output": _array(_CONFIG_TENSOR),
            "parameters": {"type": "object"},
            "dynamic_batching": {"type": "object"},
        },
        "dynamic_batching",
    ),
    "Statistics": _object({"model_stats": _array(_like(statistics("", "", Tally(), [])))}),
    "IndexItem": _INDEX_ITEM,
    "Index": _array(_ref("IndexItem")),
    "IndexFilter": _object({"ready": _BOOL}, "ready"),
    "Detail": _object(
        {
            "name": _STRING,
            "versions": _array(
                {
                    "allOf": [
                        _ref("IndexItem"),
                        _object(
                            {
                                "manifest": _ref("Manifest"),
                                "device": _array(_STRING),
                                "host": _array(_STRING),
                                "bound": _array(_STRING),
                                "device_bytes": _COUNT,
                                "failed": {"type": "object", "additionalProperties": _STRING},
                            }
                        ),
                    ]
                }
            ),
            "aliases": _array(_ref("Alias")),
        }
    ),
    "Alias": _object(
        {
            "model": _STRING,
            "alias": _STRING,
            "version": {**_STRING, "description": "Of a split the heaviest."},
            "split": _SPLIT,
            "pending": {
                "anyOf": [
                    {"type": "null"},
                    _object(
                        {
                            "split": _SPLIT,
                            "for_s": {"type": "number", "minimum": 0},
                            "waits_for": _WAITS,
                        }
                    ),
                ]
            },
            "given_up": {
                "description": "The last wish, if it cannot happen: a version is quarantined.",
                "anyOf": [
                    {"type": "null"},
                    _object({"split": _SPLIT, "why": _STRING, "at": {"type": "number"}}),
                ],
            },
        }
    ),
    "Aliases": _object({"model": _STRING, "aliases": _array(_ref("Alias"))}),
    "AliasWish": {
        **_object(
            {
                "version": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
                "split": {
                    **_SPLIT,
                    "patternProperties": {
                        "^[1-9][0-9]{0,8}$": {
                            "type": "integer",
                            "minimum": 0,
                            "maximum": MAX_WEIGHT,
                        }
                    },
                    "maxProperties": MAX_VERSIONS,
                },
                "now": {**_BOOL, "description": "Without waiting for bindings."},
            },
            "version",
            "split",
            "now",
            closed=True,
        ),
        "description": "Either `version` or `split`.",
        "examples": [{"version": 2}, {"split": {"1": 90, "2": 10}}],
    },
    "Load": _object(
        {
            "parameters": {
                "type": "object",
                "properties": {
                    "config": {**_STRING, "description": "A ModelConfig, as JSON in a string."}
                },
                "patternProperties": {
                    "^file:[1-9][0-9]{0,8}/[^/]+$": {**_STRING, "contentEncoding": "base64"}
                },
                "additionalProperties": False,
            }
        },
        "parameters",
    ),
    "Unload": _object(
        {"parameters": _object({"unload_dependents": _BOOL}, "unload_dependents", closed=True)},
        "parameters",
    ),
    "Blob": _object({"digest": _STRING, "size_bytes": _COUNT}),
    "Quarantine": _object(
        {
            "quarantined": _array(
                _object(
                    {
                        "model": {**_STRING, "description": "`<name>/<version>`"},
                        "reason": _STRING,
                        "since": {"type": "number", "description": "Unix time."},
                        "worker": {**_STRING, "description": "That saw it."},
                        "deaths": _array(
                            _object(
                                {
                                    "kind": {"enum": ["load", "request"]},
                                    "worker": _STRING,
                                    "at": {"type": "number"},
                                    "reason": _STRING,
                                }
                            )
                        ),
                    }
                )
            )
        }
    ),
    "Released": _object({"released": _array(_STRING)}),
    "Keys": _object({"keys": _array(_ref("KeyInfo"))}),
    "KeyInfo": _object(_KEY, "expires", "revoked"),
    "NewKey": _object({**_KEY, "key": {**_STRING, "description": "Told this once."}}),
    "Tenants": _object({"tenants": _array(_ref("Tenant"))}),
    "Tenant": _object({"tenant": _STRING, "quota": _ref("Quota")}),
    "Job": _object(
        {
            "id": _STRING,
            "state": {"type": "string", "enum": list(get_args(State))},
            "model_name": _STRING,
            "model_version": _STRING,
            "request_id": {**_STRING, "description": "The request's own `id`."},
            "created": _TIME,
            "deadline": _TIME,
            "ended": _TIME,
            "kept_until": {**_TIME, "description": "Until then the result is there."},
            "result": {**_STRING, "description": "Where the result is, or will be."},
            "error": _STRING,
            "code": {**_STRING, "description": "The error's."},
        },
        "model_version",
        "request_id",
        "ended",
        "kept_until",
        "error",
        "code",
    ),
    "InferRequest": {
        **_object(
            {
                "id": {"type": "string", "maxLength": 256},
                "parameters": {
                    **_PARAMETERS,
                    "properties": {
                        "timeout": {**_COUNT, "description": "Microseconds."},
                        "priority": {**_COUNT, "description": "1 is the most urgent, 0 none."},
                        "binary_data_output": _BOOL,
                    },
                },
                "inputs": _array(
                    _object(
                        {
                            "name": _NAME,
                            "datatype": _DATATYPE,
                            "shape": _array(_DIMENSION, maxItems=8),
                            "parameters": {
                                "type": "object",
                                "properties": {"binary_data_size": _COUNT},
                            },
                            "data": {"type": "array", "description": "Nested or flat."},
                        },
                        "parameters",
                        "data",
                    ),
                    maxItems=256,
                ),
                "outputs": _array(
                    _object(
                        {
                            "name": _NAME,
                            "parameters": {
                                "type": "object",
                                "properties": {"binary_data": _BOOL},
                            },
                        },
                        "parameters",
                    ),
                    maxItems=256,
                ),
            },
            "id",
            "parameters",
            "outputs",
        ),
        "examples": [
            {
                "inputs": [
                    {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, 2.0, 3.0]}
                ]
            }
        ],
    },
    "InferResponse": _object(
        {
            "id": _STRING,
            "model_name": _STRING,
            "model_version": _STRING,
            "parameters": _PARAMETERS,
            "outputs": _array(
                _object(
                    {
                        "name": _STRING,
                        "datatype": _DATATYPE,
                        "shape": _SHAPE,
                        "parameters": {"type": "object"},
                        "data": {"type": "array"},
                    },
                    "parameters",
                    "data",
                )
            ),
        },
        "id",
        "parameters",
    ),
}

_ERRORS: Final = {
    400: "What was sent is wrong, and would be wrong again.",
    401: "An API key is needed, or this one is not known, has expired or was revoked.",
    403: "The API key does not allow this.",
    404: "There is no such model or version, or it is unloaded.",
    408: "The body did not arrive in time.",
    409: "Something else is there already, or has changed meanwhile, or is still used.",
    413: "Beyond a limit, counted after decompression.",
    422: "Another request was sent under this `Idempotency-Key`.",
    429: "Too much is under way. `Retry-After` says when there should be room.",
    500: "The model failed, or the gateway.",
    503: "A part that is needed is away.",
    504: "No answer before the deadline.",
}
_RETRY_AFTER: Final[Json] = {
    "description": "Seconds. With 429 it is computed from how fast the model's requests are "
    "answered now.",
    "schema": {"type": "integer", "minimum": 1},
}

_CHALLENGE: Final[Json] = {"description": "By RFC 6750.", "schema": _STRING}

RESPONSES: Final[Json] = {
    str(status): {
        "description": description,
        "headers": {
            HEADER_CODE: {"description": "The error's code.", "schema": _STRING},
            **({"Retry-After": _RETRY_AFTER} if status in {429, 503} else {}),
            **({"WWW-Authenticate": _CHALLENGE} if status in {401, 403} else {}),
        },
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    for status, description in _ERRORS.items()
}
