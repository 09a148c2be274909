"""Builds tiny archives that look like what torch writes, without torch."""

from __future__ import annotations

import io
import zipfile

TORCHSCRIPT = {
    "data.pkl": b"\x80\x02.",
    "constants.pkl": b"\x80\x02).",
    "code/__torch__.py": b"class M(Module):\n  pass\n",
    "version": b"3\n",
    "data/0": bytes(64),
}


def archive(
    entries: dict[str, bytes], root: str = "model", compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip of these entries, all below one folder unless `root` is empty."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, data in entries.items():
            target.writestr(f"{root}/{name}" if root else name, data)
    return buffer.getvalue()


def torchscript(weights: bytes = bytes(64)) -> bytes:
    """What passes for a TorchScript file; differs with its weights."""
    return archive({**TORCHSCRIPT, "data/0": weights})
