"""A folder in, tokens out: the engine with its experts in one process, no Ray and no network.

The reference that everything distributed is tested against, and the base line of the benchmarks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cluster.config import EngineSection
from cluster.errors import RequestFailedError
from workers.checkpoint import Checkpoint, load_attention_model, resolve_dtype
from workers.dist.dispatcher import TokenDispatcher
from workers.dist.header import Grant, StepHeader, bucket_of
from workers.dist.local import LocalDispatcher
from workers.engine import Engine
from workers.experts.slots import ExpertSlots
from workers.request import FinishReason, Request, SamplingParams, TokenLogprob, TokenOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One finished choice."""

    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...]
    """One per token where asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    """Where asked for."""
    finish_reason: FinishReason
    """Why it ended."""


class LocalEngine:
    """``Engine`` over a ``LocalDispatcher`` (EP = 1), with a loop that grants what is wanted."""

    def __init__(
        self,
        path: Path | str,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        section: EngineSection | None = None,
        max_model_len: int | None = None,
        num_micro_batches: int = 1,
        wrap: Callable[[TokenDispatcher], TokenDispatcher] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load a checkpoint. Raises ``CheckpointError`` and ``ConfigError``.

        ``wrap`` puts something between engine and dispatcher.
        """
        checkpoint = Checkpoint(path)
        place = torch.device(device)
        kind = resolve_dtype(dtype, checkpoint.config)
        banks = checkpoint.family.banks
        model = load_attention_model(checkpoint, kind, place, max_model_len)
        self._model = model
        self.config = checkpoint.config
        """Numbers of the model."""
        self.slots = ExpertSlots(banks, max(b.num_experts for b in banks), kind, place)
        """All experts."""
        self.slots.load_all(checkpoint)
        local = LocalDispatcher(self.slots, banks)
        self.dispatcher: TokenDispatcher = local if wrap is None else wrap(local)
        """Leads to them."""
        self._num_micro_batches = num_micro_batches
        self._next_step = 1
        self._next_request = 0
        self.engine = Engine(
            model=model,
            config=checkpoint.config,
            banks=banks,
            dispatcher=self.dispatcher,
            section=section or EngineSection(),
            max_model_len=max_model_len,
            clock=clock,
        )
        """The engine itself."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, V] of final hidden states [rows, H], as a recorder saw them."""
        return self._model.logits(hidden.to(self._model.dtype))

    def step(self) -> list[TokenOutput]:
        """Grant everything that is wanted, and run it."""
        wanted = self.engine.wanted()
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=wanted.prefill_rows)
        header = StepHeader(
            generation=1,
            step=self._next_step,
            epoch=1,
            oldest_epoch=1,
            grants=((0, grant),),
            num_micro_batches=self._num_micro_batches if grant.num_rows > 1 else 1,
            exact=grant.prefill_rows > 0,
            bucket=bucket_of(grant.num_rows),
        )
        self._next_step += 1
        return self.engine.step(header)

    def run(self, requests: Sequence[Request]) -> dict[tuple[str, int], list[TokenOutput]]:
        """Serve requests together to their ends; outputs by (request id, choice)."""
        for request in requests:
            self.engine.add_request(request)
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
        """Serve prompts together; one result per prompt. Raises ``RequestFailedError``."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = []
        for prompt, own in zip(prompts, each, strict=True):
            self._next_request += 1
            name = f"local-{self._next_request}"
            requests.append(Request(request_id=name, prompt=tuple(prompt), params=replace(own)))
        outputs = self.run(requests)
        return [_generated(outputs[r.request_id, 0]) for r in requests]


def _generated(outputs: Sequence[TokenOutput]) -> Generated:
    last = outputs[-1]
    assert last.finish_reason is not None, "the last output has a finish reason"
    if last.finish_reason is FinishReason.ERROR:
        raise RequestFailedError(last.error or last.error_code)
    return Generated(
        token_ids=tuple(t for o in outputs for t in o.token_ids),
        logprobs=tuple(p for o in outputs for p in o.logprobs),
        prompt_logprobs=outputs[0].prompt_logprobs,
        finish_reason=last.finish_reason,
    )
