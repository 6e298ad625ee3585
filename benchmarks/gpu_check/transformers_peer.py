"""Decode rate of ``generate`` of transformers with the same model on the device."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.gpu_check.device import synchronize
from benchmarks.gpu_check.section import Place
from benchmarks.harness.prompts import random_prompts

_FEW_TOKENS = 2
_MORE_TOKENS = 18


class TransformersPeer:
    """A model of transformers with random weights on the device."""

    def __init__(self, place: Place, model: RandomModel, *, is_compiled: bool = False) -> None:
        """Create the model. Raises ``ImportError`` if transformers is not installed.

        ``is_compiled``: decode with a static cache, for which ``generate`` compiles the model to
        CUDA graphs (``torch.compile(mode="reduce-overhead")``).
        """
        from transformers import AutoConfig, AutoModelForCausalLM  # late: the others do without

        self._place = place
        config = AutoConfig.for_model(**model.config())
        with torch.device(place.device):
            made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model = made.eval()
        self._options: dict[str, Any] = {"cache_implementation": "static"} if is_compiled else {}

    def decode_rate(self, batch: int, context: int) -> float:
        """Tokens a second of a batch after its first tokens."""
        prompts = random_prompts("transformers", batch, context)
        tokens = torch.tensor(prompts, device=self._place.device)
        for number in (_FEW_TOKENS, _MORE_TOKENS):  # the size of a static cache depends on it
            self._seconds(tokens, number)
        few, more = (self._seconds(tokens, number) for number in (_FEW_TOKENS, _MORE_TOKENS))
        return batch * (_MORE_TOKENS - _FEW_TOKENS) / (more - few)

    @torch.inference_mode()
    def _seconds(self, tokens: torch.Tensor, number: int) -> float:
        synchronize(self._place.device)
        start = time.perf_counter()
        self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=number,
            min_new_tokens=number,
            do_sample=False,
            **self._options,
        )
        synchronize(self._place.device)
        return time.perf_counter() - start
