"""Builds tiny archives that look like the `.pt2` files that torch writes, without torch."""

from __future__ import annotations

import json

from tests.archives import archive

NOTE = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
EXPORTED = {
    **NOTE,
    "data/weights/weight_0": bytes(48),
    "data/weights/model_weights_config.json": b'{"config": {}}',
    "data/constants/tensor_0": bytes(8),
    "data/constants/model_constants_config.json": b'{"config": {}}',
    "data/sample_inputs/model.pt": b"PK",
    "models/model.json": json.dumps({"torch_version": "2.13.0"}).encode(),
}
FOLDER = "data/aotinductor/model/"
TARGET = {"AOTI_DEVICE_KEY": "cpu", "AOTI_MACHINE": "x86_64", "AOTI_COMPUTE_CAPABILITY": ""}
COMPILED = {
    **NOTE,
    f"{FOLDER}abc.wrapper.cpp": b"// source",
    f"{FOLDER}abc.wrapper.so": b"\x7fELF" + bytes(96),
    f"{FOLDER}abc.wrapper_metadata.json": json.dumps(TARGET).encode(),
}


def exported(**changes: bytes | None) -> bytes:
    return archive(changed(EXPORTED, changes))


def compiled(**changes: bytes | None) -> bytes:
    return archive(changed(COMPILED, changes))


def changed(entries: dict[str, bytes], changes: dict[str, bytes | None]) -> dict[str, bytes]:
    """None takes an entry away."""
    merged = {**entries, **changes}
    return {name: data for name, data in merged.items() if data is not None}
