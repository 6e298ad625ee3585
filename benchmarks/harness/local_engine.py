"""The engine with its experts in one process, without Ray or network.

The reference that everything distributed is tested against, and the base line of the benchmarks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from cluster.config.cluster import EngineSection
from cluster.config.lora import LoraSection
from cluster.config.model import Quantize, QuantizeLayers
from cluster.config.speculation import SpeculationSection
from cluster.config.workers import Kernels
from cluster.core.errors import RequestFailedError
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.engine.engine import Engine
from workers.engine.prefill_cap import PrefillCap
from workers.experts.slots import ExpertSlots, torch_reason
from workers.model.compute_threads import ComputeThreads
from workers.model.config import ModelConfig
from workers.model.huge_pages import collapse_weights
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.config_file import resolve_dtype
from workers.model.loading.expert_format import rounded_form
from workers.native.team import start_kernels
from workers.requests.inspection import InspectionParams, NamedArray
from workers.requests.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)
from workers.requests.step_header import Grant, StepHeader
from workers.sampling.grammar_compiler import GrammarCompiler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One finished choice."""

    token_ids: tuple[int, ...]
    """New tokens."""
    logprobs: tuple[TokenLogprob, ...]
    """One per token where asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    """Where asked for."""
    class_logits: tuple[float, ...]
    """From a sequence classifier."""
    finish_reason: FinishReason
    """Why it ended."""


class LocalEngine:
    """``Engine`` over a ``LocalDispatcher`` (EP = 1), with a loop that grants what is wanted."""

    def __init__(
        self,
        source: Path | str | Checkpoint,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        section: EngineSection | None = None,
        speculation: SpeculationSection | None = None,
        lora: LoraSection | None = None,
        max_model_len: int | None = None,
        num_micro_batches: int = 1,
        num_threads: int | None = None,
        kernels: Kernels = "auto",
        quantize: Quantize = "auto",
        quantize_layers: QuantizeLayers = "experts",
        wrap: Callable[[TokenDispatcher], TokenDispatcher] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load a checkpoint, by its folder or opened. Raises ``CheckpointError``, ``ConfigError``.

        ``num_threads`` sets the threads of the kernels, and those of torch in this process, which
        are divided among compute threads; None: one of the kernels, and those of torch as they
        are; an exact engine always sets one of torch. ``kernels`` as in ``WorkersSection``,
        ``quantize`` and ``quantize_layers`` as in ``ModelSection``, of a checkpoint by its folder.
        ``wrap`` may replace the engine's dispatcher.
        """
        section = section or EngineSection()
        is_strict = section.deterministic == "on"
        place = torch.device(device)
        is_native = kernels == "auto" and place.type == "cpu"
        self.team = team = start_kernels(num_threads or 1).team if is_native else None
        """Threads of its kernels; None: torch computes."""
        kept_as = "none" if quantize == "auto" and team is None else quantize
        checkpoint = (
            source if isinstance(source, Checkpoint) else Checkpoint(source, quantize=kept_as)
        )
        kind = resolve_dtype(dtype, checkpoint.config)
        banks = checkpoint.family.banks
        if checkpoint.config.ignored_keys:
            logger.warning(
                "config.json: ignored, not known: %s", ", ".join(checkpoint.config.ignored_keys)
            )
        can_be_exact = team is not None and not torch_reason(banks, kind)
        self.is_exact = is_strict or (section.deterministic == "auto" and can_be_exact)
        """Results depend on the request alone, to the last bit."""
        torch_threads = 1 if self.is_exact else num_threads
        compute_threads = (
            ComputeThreads()
            if torch_threads is None
            else ComputeThreads.for_threads(torch_threads, place.type)
        )
        form = rounded_form(quantize, ()) if quantize_layers == "all" else None
        model = load_attention_model(
            checkpoint, kind, place, max_model_len, compute_threads, is_strict, team, form
        )
        self._model = model
        self.config = checkpoint.config
        """Numbers of the model."""
        self.banks = banks
        """Its expert banks."""
        self.dtype = kind
        """Compute dtype."""
        num_slots = max(b.num_experts for b in banks)
        self.slots = ExpertSlots(banks, num_slots, kind, place, compute_threads, is_strict, team)
        self.slots.load_all(checkpoint)
        collapse_weights(place.type, checkpoint.loaded_bytes)
        local = LocalDispatcher(self.slots.banks, banks)
        self.dispatcher: TokenDispatcher = local if wrap is None else wrap(local)
        """Sends rows to the experts."""
        self.grammars = GrammarCompiler(
            checkpoint.path, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids
        )
        """Compiles the grammars of requests."""
        self._num_micro_batches = num_micro_batches
        self.prefill_cap = PrefillCap.of(section)
        """Limits prompt rows beside decodes; may be replaced."""
        self._clock = clock
        self._next_step = 1
        self._next_request = 0
        self.engine = Engine(
            model=model,
            config=checkpoint.config,
            banks=banks,
            dispatcher=self.dispatcher,
            section=section,
            speculation=speculation,
            lora=lora,
            max_model_len=max_model_len,
            compute_threads=compute_threads,
            team=team,
            clock=clock,
            is_exact=self.is_exact,
        )
        """The engine itself."""

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, V] of final hidden states [rows, H], as a recorder saw them."""
        return self._model.head(hidden.to(self._model.dtype))

    def add_request(self, request: Request) -> None:
        """Queue a request; compiles its grammar first. Raises what ``Engine.add_request`` does."""
        grammar = request.params.grammar
        compiled = None if grammar is None else self.grammars.compile(grammar)
        self.engine.add_request(request, grammar=compiled)

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

    def step(self) -> list[TokenOutput]:
        """Grant what is wanted, prompt rows as a leader would, and run it."""
        wanted = self.engine.rows_wanted()
        cap = self.prefill_cap.rows(wanted.decode_rows, num_ranks=1)
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=min(wanted.prefill_rows, cap))
        header = StepHeader(
            generation=1,
            step=self._next_step,
            epoch=1,
            oldest_epoch=1,
            grants=((0, grant),),
            num_micro_batches=self._num_micro_batches if grant.num_rows > 1 else 1,
            exact=grant.prefill_rows > 0,
        )
        self._next_step += 1
        start = self._clock()
        outputs = self.engine.step(header)
        self.prefill_cap.observe(grant.decode_rows, grant.prefill_rows, self._clock() - start)
        return outputs

    def run(self, requests: Sequence[Request]) -> dict[tuple[str, int], list[TokenOutput]]:
        """Serve requests together to their ends; outputs by (request id, choice)."""
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
        """Serve prompts together; one result per prompt. Raises ``RequestFailedError``."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self._request(p, own) for p, own in zip(prompts, each, strict=True)]
        outputs = self.run(requests)
        return [generated(outputs[r.request_id, 0]) for r in requests]

    def _request(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """A request with a name of its own."""
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
    """All outputs of a choice together. Raises ``RequestFailedError``."""
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
