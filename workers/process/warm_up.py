"""Warm-up steps, before a worker reports readiness.

On a GPU the first step of each kind is slow: kernels are loaded or compiled, and libraries allocate
memory. Other workers would consider it dead. So each role first runs its computations
without other workers; for attention, the experts return zeros. Kernels that are specialized by size
or work division are compiled in all variants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher, LocalHandle
from workers.engine.engine import Engine
from workers.experts.bank import ExpertBank
from workers.experts.slots import ExpertSlots
from workers.model.config import BankSpec
from workers.model.cuda.attention import warm_kernels
from workers.model.families.base import Family
from workers.model.layers import Dispatch
from workers.process.gpu_memory import block_bytes
from workers.process.worker_args import WorkerArgs
from workers.requests.request import Request, SamplingParams
from workers.requests.step_header import Grant, Grants, StepHeader

MakeEngine = Callable[..., Engine]
"""Creates an engine from an ``EngineSection`` and a dispatcher."""
_NUM_TOKENS = 3
"""Number of tokens to generate for each sequence: after the prompt, two decode steps."""


class ZeroDispatcher(LocalDispatcher):
    """``TokenDispatcher`` whose experts return zeros."""

    def __init__(self, banks: Sequence[BankSpec]) -> None:
        super().__init__((), banks)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Do nothing: the zeros do not depend on the placement."""

    def experts(self) -> None:
        """No experts, so that native layers do not compute any."""

    def _dispatch(self, bank: BankSpec, sent: Dispatch, micro_batch: int) -> LocalHandle:
        exchange, (num_rows, top_k) = bank.exchanges[sent.exchange], sent.topk_ids.shape
        slots = () if exchange.weighted else (top_k,)
        result = sent.rows.new_zeros((num_rows, *slots, exchange.out_width))
        return LocalHandle(bank, sent.exchange, micro_batch, num_rows, None, result)


def warm_attention(
    args: WorkerArgs,
    family: Family,
    dtype: torch.dtype,
    make_engine: MakeEngine,
    dispatcher: TokenDispatcher,
) -> None:
    """Run the largest prefill step, decode steps of one and of ``max_num_seqs`` sequences, every
    captured step, and every variant of the attention kernels.

    Does nothing without a GPU. If ``dispatcher`` needs other workers, experts return zeros instead.
    At the end the memory is freed for the KV cache of the serving engine.
    """
    if args.device.type != "cuda":
        return
    experts = dispatcher if args.config.workers.mode == "local" else ZeroDispatcher(family.banks)
    section, context = args.config.engine, args.config.model.max_model_len
    num_seqs = section.max_num_seqs
    longest = (context or family.config.context_tokens) - _NUM_TOKENS
    length = max(1, min(section.step_tokens // num_seqs, longest))
    blocks = -(-(length + _NUM_TOKENS) // section.block_size_tokens)
    own = replace(
        section,
        kv_cache_bytes=num_seqs * blocks * block_bytes(section, family.config, dtype),
        num_cached_states=0,
        enable_prefix_caching=False,
        max_waiting=num_seqs,
        max_waiting_tokens=None,
    )
    engine = make_engine(section=own, dispatcher=experts)
    _run(engine, [_request(i, length) for i in range(num_seqs)])
    _run(engine, [_request(1, 1)])
    if family.config.latent_rank is not None:  # long chunks use another attention variant
        _run(engine, [_request(0, max(1, min(section.step_tokens, longest)))])
    runner = engine.runner
    if isinstance(experts, ZeroDispatcher):  # else the serving engine captures its steps itself
        runner.capture_graphs()
        _warm_slots(family.banks, dtype, runner.model.device)
    _warm_attention(engine, family)
    runner.graphs = None  # breaks a reference cycle with the engine


def _warm_attention(engine: Engine, family: Family) -> None:
    """Run every variant of the attention kernels; none if the KV cache is latent."""
    config, model = family.config, engine.runner.model
    if config.latent_rank is not None:
        return
    shape = (1, config.num_heads, config.head_dim)
    queries = torch.zeros(shape, dtype=model.dtype, device=model.device)
    cache = engine.cache.layers[0]
    warm_kernels(queries, cache, model.windows, engine.max_model_len, family.has_sinks)


def _warm_slots(banks: Sequence[BankSpec], dtype: torch.dtype, device: torch.device) -> None:
    """Choose the slots of a row in all variants of the kernel."""
    from workers.cuda.slots import slots_by_rank  # late: needs Triton

    table = torch.zeros((1, 1), dtype=torch.int32, device=device)
    for top_k in {bank.top_k for bank in banks}:
        ids = torch.zeros((1, top_k), dtype=torch.int64, device=device)
        for weights in (None, ids.float(), ids.to(dtype)):
            for is_row in (None, ids[:, 0]):
                slots_by_rank(table, ids, weights, is_row)


def _request(number: int, length: int) -> Request:
    """A request with random sampling if ``number`` is odd, else with greedy sampling and a penalty,
    after which a GPU samples from float32 logits."""
    params = SamplingParams(
        max_tokens=_NUM_TOKENS,
        temperature=float(number % 2),
        top_p=0.9,
        frequency_penalty=0.0 if number % 2 else 0.1,
        seed=number,
    )
    return Request(request_id=str(number), prompt=(0,) * length, params=params)


def _run(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.add_request(request)
    step = 0
    while engine.has_work:
        step, rows = step + 1, engine.rows_wanted()
        grant = Grant(decode_rows=rows.decode_rows, prefill_rows=rows.prefill_rows)
        engine.step(
            StepHeader(
                generation=1,
                step=step,
                epoch=1,
                oldest_epoch=1,
                grants=Grants.of({engine.runner.rank: grant}),
                exact=grant.prefill_rows > 0,
            )
        )


def warm_experts(args: WorkerArgs, slots: ExpertSlots, sums_are_rounded: bool) -> None:
    """Compute every exchange of every bank with 1, 2, 4, .. rows, up to a worker's largest step.

    Does nothing without a GPU. The kernels' row-block heights double too, so all of them are used.
    ``sums_are_rounded``: see ``DataTransport``.
    """
    if args.device.type != "cuda":
        return
    with torch.inference_mode():
        for bank in slots.banks:
            max_rows = args.config.engine.step_tokens
            for rows in (*(1 << i for i in range((max_rows - 1).bit_length())), max_rows):
                _compute(bank, rows, bank.dtype if sums_are_rounded else torch.float32)
            _check(bank)


def _check(bank: ExpertBank) -> None:
    """Check the slots of a row as they are received, before its weights."""
    from workers.cuda.slots import check_slots  # late: needs Triton

    top_k, device = bank.spec.top_k, bank.device
    received = torch.zeros((1, 2 * top_k), dtype=torch.int32, device=device)
    filled = torch.ones(2, dtype=torch.bool, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    checked = torch.empty((1, top_k), dtype=torch.int64, device=device)
    check_slots(received[:, :top_k], filled, checked, counts, counts)


def _compute(bank: ExpertBank, rows: int, sums_dtype: torch.dtype) -> None:
    """Compute the outputs of ``rows`` rows in slot 0, and their sums if the bank supports them."""
    top_k, device = bank.spec.top_k, bank.device
    ids = torch.zeros((rows, top_k), dtype=torch.int64, device=device)
    pairs = torch.arange(ids.numel(), device=device)
    for exchange in bank.spec.exchanges:
        num_inputs = ids.numel() if exchange.per_slot_input else rows
        inputs = torch.zeros((num_inputs, exchange.in_width), dtype=bank.dtype, device=device)
        source = pairs if exchange.per_slot_input else pairs // top_k
        outputs = [bank.compute(exchange.index, inputs, source, ids.flatten())]
        if exchange.weighted:
            weights = torch.ones(ids.shape, device=device)
            outputs.append(bank.compute_rows(exchange.index, inputs, ids, weights, sums_dtype))
        for output in outputs:
            output[0, 0].item()  # device-to-host sync
