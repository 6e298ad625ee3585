"""The engine with its experts in one process, without Ray or network.

The reference that everything distributed is tested against, and the base line of the benchmarks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from cluster.core.errors import RequestFailedError
from workers.engine.embedded import EmbeddedEngine
from workers.model.config import ModelConfig
from workers.requests.inspection import InspectionParams, NamedArray
from workers.requests.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One finished choice."""

    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...]
    """One entry for each token if requested."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    """Log-probabilities of the prompt if requested."""
    class_logits: tuple[float, ...]
    """Logits by class of a sequence classifier."""
    finish_reason: FinishReason
    """Reason why the choice ended."""


class LocalEngine(EmbeddedEngine):
    """Runs prompts of token ids to their ends, as a reference and for comparisons."""

    _next_request = 0

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, V] of final hidden states [rows, H], as a recorder saw them."""
        return self._model.head(hidden.to(self._model.dtype))

    def classify(self, prompts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Logits by class of a sequence classifier, for prompts served together.

        Raises ``RequestError`` and ``RequestFailedError``.
        """
        results = self.generate(prompts, SamplingParams(max_tokens=0))
        return [result.class_logits for result in results]

    def inspect(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: InspectionParams | Sequence[InspectionParams],
    ) -> list[dict[str, Tensor]]:
        """Look at prompts together; for each, arrays by name (see ``workers.requests.inspection``).

        Raises ``RequestError``, ``QueueFullError`` and ``RequestFailedError``.
        """
        each = [wanted] * len(prompts) if isinstance(wanted, InspectionParams) else wanted
        requests = [
            replace(self._request(prompt, SamplingParams(max_tokens=0)), inspection=one)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        outputs = self.run(requests)
        found = []
        for request in requests:
            own = outputs[request.request_id, 0]
            generated(own)
            found.append({array.name: _tensor(array) for o in own for array in o.arrays})
        return found

    def run(self, requests: Sequence[Request]) -> dict[tuple[str, int], list[TokenOutput]]:
        """Run requests together to their ends; returns outputs by (request id, choice)."""
        for request in requests:
            self.add_request(request)
        outputs: dict[tuple[str, int], list[TokenOutput]] = {
            (r.request_id, choice): [] for r in requests for choice in range(r.n)
        }
        while self.engine.has_work:
            for output in self.step():
                outputs[output.request_id, output.choice].append(output)
        return outputs

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Generated]:
        """Run prompts together; returns a result for each. Raises ``RequestFailedError``."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self._request(p, own) for p, own in zip(prompts, each, strict=True)]
        outputs = self.run(requests)
        return [generated(outputs[r.request_id, 0]) for r in requests]

    def _request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Return a request with a new name."""
        self._next_request += 1
        name = f"local-{self._next_request}"
        return Request(request_id=name, prompt=tuple(prompt), params=params)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block over all layers."""
    return config.kv_vectors_per_token * config.head_dim * block_size * dtype.itemsize


def _tensor(array: NamedArray) -> Tensor:
    kind = torch.int32 if array.dtype == "int32" else torch.float32
    return torch.frombuffer(bytearray(array.data), dtype=kind).view(array.shape)


def generated(outputs: Sequence[TokenOutput]) -> Generated:
    """Join all outputs of a choice. Raises ``RequestFailedError``."""
    last = outputs[-1]
    assert last.finish_reason is not None, "the last output has a finish reason"
    if last.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(last.error or last.error_code)
    scores = outputs[0].prompt_logprobs
    return Generated(
        token_ids=tuple(t for o in outputs for t in o.token_ids),
        logprobs=tuple(p for o in outputs for p in o.logprobs),
        prompt_logprobs=None if scores is None else tuple(scores.entries()),
        class_logits=last.class_logits,
        finish_reason=last.finish_reason,
    )
