"""Every "no" of the placer, with its reason and numbers."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.fit import Refusal
from shared.names import ModelId

Kind = Literal[
    "no_room", "too_large", "failed_to_load", "no_worker", "leaving", "has_all", "no_match",
    "spread", "loading", "overtaken", "quota", "suspected",
]  # fmt: skip
"""Why not, in a word: for metrics, where a text with numbers or a model's own error would make
series without end. `no_match`: no worker has the labels; `spread`: all that do share one with a
copy that is there; `loading`: who could take it has loaded enough lately; `overtaken`: the fleet
changed while it was planned; `quota`: its tenant may have no more; `suspected`: an
engine ended as it was loaded, and what comes of that is waited for."""


class Refused(msgspec.Struct, frozen=True):
    """A copy that could not be placed."""

    model: ModelId
    refusal: Refusal
    kind: Kind
    permanent: bool = False
    """No worker that is there can ever take it; waiting is in vain."""
    code: str = "unavailable"
