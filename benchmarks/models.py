"""The models that are measured: BERTs of several sizes, as TorchScript files in a repository.

The sizes are the real ones; the weights are random, since no figure here depends on them. A
"fine-tune" differs from its siblings in every tensor, or, with a frozen backbone, in its head
alone. They are traced once and saved with other weights each time.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from shared.layout import Extent, Layout
from shared.models import Manifest, ModelSpec, TensorSpec
from shared.repository import Repository

_CHUNK: Final = 4 << 20


@dataclass(frozen=True)
class Family:
    """Fine-tunes of one base."""

    name: str
    layers: int
    width: int
    heads: int
    inner: int
    dtype: torch.dtype
    tokens: int = 16
    max_batch: int = 32

    def spec(self, target_ms: float = 100.0) -> ModelSpec:
        return ModelSpec(
            inputs=(
                TensorSpec("input_ids", "INT64", (-1,)),
                TensorSpec("attention_mask", "INT64", (-1,)),
            ),
            outputs=(TensorSpec("logits", "FP32", (2,)),),
            max_batch_size=self.max_batch,
            target_ms=target_ms,
        )

    def inputs(self, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, tokens] INT64 twice."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, 20000, (rows, self.tokens), generator=generator)
        return ids, torch.ones_like(ids)


BERT_BASE: Final = Family("bert-base", 12, 768, 12, 3072, torch.float16)
MINILM: Final = Family("minilm", 6, 384, 12, 1536, torch.bfloat16)
TINY: Final = Family("tiny", 2, 128, 2, 512, torch.float32)
FAMILIES: Final = {family.name: family for family in (BERT_BASE, MINILM, TINY)}


def family(name: str, device: str) -> Family:
    """Two bytes a weight on either device; a CPU computes in bfloat16, hardly in float16."""
    chosen = FAMILIES[name]
    if device == "cpu" and chosen.dtype is torch.float16:
        chosen = replace(chosen, dtype=torch.bfloat16)
    return chosen


class _Classifier(torch.nn.Module):
    """Token ids in, logits in FP32 out."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        return logits.to(torch.float32)


class Factory:
    """Makes the files of one family."""

    def __init__(self, family: Family) -> None:
        # Heavy, and only needed where models are made.
        from transformers import BertConfig, BertForSequenceClassification

        self.family = family
        torch.manual_seed(0)
        options: dict[str, Any] = {"torchscript": True, "attn_implementation": "eager"}
        config = BertConfig(
            num_hidden_layers=family.layers,
            hidden_size=family.width,
            num_attention_heads=family.heads,
            intermediate_size=family.inner,
            **options,
        )
        module = _Classifier(BertForSequenceClassification(config)).eval().to(family.dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, on tracing and its future
            self._traced: Any = torch.jit.trace(module, family.inputs(1), check_trace=False)
        self._base = {name: p.detach().clone() for name, p in self._traced.named_parameters()}

    def file(self, seed: int, *, frozen: bool) -> bytes:
        """One fine-tune: other weights everywhere, or in the head alone."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self._traced.named_parameters():
                base = self._base[name]
                parameter.copy_(base)
                if not frozen or "classifier" in name or "pooler" in name:
                    noise = torch.empty(base.shape).normal_(0, 0.02, generator=generator)
                    parameter.add_(noise.to(base.dtype))
        out = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(self._traced, out)
        return out.getvalue()


@dataclass(frozen=True)
class Registered:
    """A model as a worker finds it."""

    manifest: Manifest
    file: tuple[Extent, ...]
    layout: Layout | None
    path: str
    """The whole file, for the baselines."""


def register(
    folder: Path,
    factory: Factory,
    count: int,
    *,
    frozen: bool = False,
    whole: int = 1,
    target_ms: float = 100.0,
) -> list[Registered]:
    """Registers `count` fine-tunes; the files of the first `whole` are kept for baselines."""
    repository = Repository(str(folder / "repository"))
    cache = str(folder / "cache")
    made = []
    for number in range(count):
        content = factory.file(number + 1, frozen=frozen)
        name = f"{factory.family.name}{'-frozen' if frozen else ''}-{number:03d}"
        path = ""
        if number < whole:
            path = str(folder / f"{name}.pt")
            Path(path).write_bytes(content)
        digest, _ = repository.files.put(_chunks(content))
        manifest = repository.register(name, None, factory.family.spec(target_ms), digest)
        made.append(
            Registered(
                manifest,
                repository.files.extents(digest, cache),
                repository.files.layout(digest, cache),
                path,
            )
        )
    return made


def _chunks(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]
