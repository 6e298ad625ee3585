"""The engine and all its experts in one process, without Ray or network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from msgspec.structs import replace

from cluster.config.cluster import EngineSection
from cluster.config.lora import LoraSection
from cluster.config.model import Quantize, QuantizeLayers
from cluster.config.speculation import SpeculationSection
from cluster.config.workers import Kernels
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.engine.engine import Engine
from workers.engine.hello import add_capacity, make_hello
from workers.engine.prefill_cap import PrefillCap
from workers.experts.slots import ExpertSlots, torch_reason
from workers.model.compute_threads import ComputeThreads
from workers.model.huge_pages import collapse_weights
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.config_file import resolve_dtype
from workers.model.loading.expert_format import rounded_form
from workers.native.thread_team import start_kernels
from workers.requests.request import Request, TokenOutput
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.requests.wire import EngineHello
from workers.sampling.grammar_compiler import GrammarCompiler

logger = logging.getLogger(__name__)


class EmbeddedEngine:
    """An ``Engine`` with all experts in its own process, without Ray or a network.

    ``step`` also decides which rows to run, as the leader of a cluster does.
    """

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
        """Load a checkpoint from its folder, or use an open one.

        ``num_threads`` sets the kernel threads and the torch threads of this process. None selects
        one kernel thread and keeps the torch threads; an exact engine always uses one torch thread.
        ``kernels`` is as in ``WorkersSection``. ``quantize`` and ``quantize_layers`` are as in
        ``ModelSection`` and are ignored for an open checkpoint. ``wrap`` may replace the
        dispatcher. Raises ``CheckpointError`` and ``ConfigError``.
        """
        place = torch.device(device)
        section = section or EngineSection()
        section = section if place.type == "cpu" else section.on_gpus()
        is_strict = section.deterministic == "on"
        is_native = kernels == "auto" and place.type == "cpu"
        self.team = team = start_kernels(num_threads or 1).team if is_native else None
        """Threads of the native (compiled) CPU kernels; None if torch computes the model."""
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
        """Whether the results of a request have the same bits regardless of other requests."""
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
        """The model's configuration (``config.json``)."""
        self.banks = banks
        """The model's expert banks (sets of experts of one router), in the order of computation."""
        self.dtype = kind
        """Dtype in which the model computes."""
        num_slots = max(b.num_experts for b in banks)
        self.slots = ExpertSlots(banks, num_slots, kind, place, compute_threads, is_strict, team)
        self.slots.load_all(checkpoint)
        collapse_weights(place.type, checkpoint.loaded_bytes)
        local = LocalDispatcher(self.slots.banks, banks)
        self.dispatcher: TokenDispatcher = local if wrap is None else wrap(local)
        """Dispatcher that sends rows to the experts: ``LocalDispatcher``, or its replacement by
        ``wrap``."""
        self.grammars = GrammarCompiler(
            checkpoint.path, checkpoint.config.vocab_size, checkpoint.config.eos_token_ids
        )
        """Compiles the grammars of requests."""
        self._block_size = section.block_size_tokens
        self._num_micro_batches = num_micro_batches
        self.prefill_cap = PrefillCap.of(section)
        """Limit of the prompt rows in a step that also decodes; callers may replace it."""
        self._clock = clock
        self._next_step = 1
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
        """The engine, to which this object gives the headers of its steps."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter from a folder; requests use it by the key ``name``.

        Raises ``CheckpointError``.
        """
        adapters = self.engine.adapters
        for _ in adapters.build(name, adapters.read(folder)):
            pass  # each call loads one part

    def describe(self, name: str) -> EngineHello:
        """Describe this engine to a gateway as the worker ``name``."""
        hello = make_hello(name, self.config, self.banks, str(self.dtype).removeprefix("torch."))
        return add_capacity(replace(hello, generation=1), self.engine, self._block_size)

    def add_request(self, request: Request) -> None:
        """Compile the grammar of a request, if it has one, and queue the request.

        Raises ``RequestError`` for a request that can never run and ``QueueFullError`` if the queue
        is full.
        """
        grammar = request.params.grammar
        compiled = None if grammar is None else self.grammars.compile(grammar)
        self.engine.add_request(request, grammar=compiled)

    def step(self) -> list[TokenOutput]:
        """Run one step, with all decode rows and up to ``prefill_cap`` prompt rows.

        Returns the outputs of the step.
        """
        wanted = self.engine.rows_wanted()
        cap = self.prefill_cap.rows(wanted.decode_rows, num_ranks=1)
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=min(wanted.prefill_rows, cap))
        header = StepHeader(
            generation=1,
            step=self._next_step,
            epoch=1,
            oldest_epoch=1,
            grants=Grants.of({0: grant}),
            num_micro_batches=self._num_micro_batches if grant.num_rows > 1 else 1,
            exact=grant.prefill_rows > 0,
        )
        self._next_step += 1
        was_unread, start = self.engine.steps.is_unread, self._clock()
        outputs = self.engine.step(header)
        if was_unread == self.engine.steps.is_unread:  # otherwise it is not the time of one step
            took_s = self._clock() - start
            self.prefill_cap.observe(grant.decode_rows, grant.prefill_rows, took_s)
        return outputs
