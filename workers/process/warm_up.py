"""A worker's first steps, before it says that it is ready.

The first step of each kind is slow on a GPU: kernels are loaded or compiled, libraries take their
memory. In a generation that would look like a dead worker. So each role computes here what its
steps compute, without the other workers: attention with experts that return zeros. What is compiled
for a size, or for a way to divide the work, is compiled for all of them.
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
from workers.process.gpu_room import block_bytes
from workers.process.worker_args import WorkerArgs
from workers.requests.request import Request, SamplingParams
from workers.requests.step_header import Grant, StepHeader

MakeEngine = Callable[..., Engine]
"""Makes an engine, given its ``section`` and ``dispatcher``."""
_NUM_TOKENS = 3
"""Tokens of each sequence: two steps of decodes follow the prompts."""


class BlankDispatcher(LocalDispatcher):
    """``TokenDispatcher`` whose experts return zeros."""

    def __init__(self, banks: Sequence[BankSpec]) -> None:
        super().__init__((), banks)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Zeros have no place."""

    def experts(self) -> None:
        """Native layers have none."""

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
    """The largest step of prompts, decodes of as many sequences as there may be, and of one; every
    captured step, and every form of the attention kernels.

    Only on a GPU. ``dispatcher`` is used where it needs no other worker. The engine's memory is
    free again at the end, for the KV of the one that serves.
    """
    if args.device.type != "cuda":
        return
    experts = dispatcher if args.config.workers.mode == "local" else BlankDispatcher(family.banks)
    section, context = args.config.engine, args.config.model.max_model_len
    most = section.max_num_seqs
    longest = (context or family.config.context_tokens) - _NUM_TOKENS
    length = max(1, min(section.max_num_batched_tokens // most, longest))
    blocks = -(-(length + _NUM_TOKENS) // section.block_size_tokens)
    own = replace(
        section,
        kv_cache_bytes=most * blocks * block_bytes(section, family.config, dtype),
        num_cached_states=0,
        enable_prefix_caching=False,
        max_waiting=most,
        max_waiting_tokens=None,
    )
    engine = make_engine(section=own, dispatcher=experts)
    _run(engine, [_request(i, length) for i in range(most)])
    _run(engine, [_request(0, 1)])
    if family.config.latent_rank is not None:  # long chunks take another form of attention
        _run(engine, [_request(0, max(1, min(section.max_num_batched_tokens, longest)))])
    runner = engine.runner
    if isinstance(experts, BlankDispatcher):  # else those that serve are captured before they do
        runner.capture_graphs()
    _warm_attention(engine, family, section.block_size_tokens)
    runner.graphs = None  # they and the engine refer to each other


def _warm_attention(engine: Engine, family: Family, block_size: int) -> None:
    """Every form of the kernels, which read no latent cache."""
    config, model = family.config, engine.runner.model
    if config.latent_rank is not None:
        return
    shape = (config.kv_vectors_per_layer, 1, block_size, config.head_dim)
    cache = torch.zeros(shape, dtype=model.dtype, device=model.device)
    warm_kernels(cache, config.num_heads, model.windows, engine.max_model_len, family.has_sinks)


def _request(number: int, length: int) -> Request:
    """Every other one is drawn at random, so that both ways to a token are taken."""
    params = SamplingParams(
        max_tokens=_NUM_TOKENS, temperature=float(number % 2), top_p=0.9, seed=number
    )
    return Request(request_id=str(number), prompt=(0,) * length, params=params)


def _run(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.add_request(request)
    step = 0
    while engine.has_work:
        step, wanted = step + 1, engine.wanted()
        grant = Grant(decode_rows=wanted.decode_rows, prefill_rows=wanted.prefill_rows)
        engine.step(
            StepHeader(
                generation=1,
                step=step,
                epoch=1,
                oldest_epoch=1,
                grants=((engine.runner.rank, grant),),
                exact=grant.prefill_rows > 0,
            )
        )


def warm_experts(args: WorkerArgs, slots: ExpertSlots, sums_are_rounded: bool) -> None:
    """Every exchange of every bank, for one row, for twice as many as long as that is less than a
    worker's largest step, and for that. Only on a GPU.

    So each height of a block of rows is met, as they double, too. ``sums_are_rounded``: see
    ``DataTransport``.
    """
    if args.device.type != "cuda":
        return
    with torch.inference_mode():
        for bank in slots.banks:
            most = args.config.engine.max_num_batched_tokens
            for rows in (*(1 << i for i in range((most - 1).bit_length())), most):
                _compute(bank, rows, bank.dtype if sums_are_rounded else torch.float32)


def _compute(bank: ExpertBank, rows: int, sums_dtype: torch.dtype) -> None:
    """Outputs of pairs, and their sums where the bank has them; all pairs are slot 0's."""
    top_k, device = bank.spec.top_k, bank.device
    ids = torch.zeros((rows, top_k), dtype=torch.int64, device=device)
    pairs = torch.arange(ids.numel(), device=device)
    for exchange in bank.spec.exchanges:
        num_inputs = ids.numel() if exchange.per_slot_input else rows
        inputs = torch.zeros((num_inputs, exchange.in_width), dtype=bank.dtype, device=device)
        source = pairs if exchange.per_slot_input else pairs // top_k
        found = [bank.compute(exchange.index, inputs, source, ids.flatten())]
        if exchange.weighted:
            weights = torch.ones(ids.shape, device=device)
            found.append(bank.compute_rows(exchange.index, inputs, ids, weights, sums_dtype))
        for output in found:
            output[0, 0].item()  # device-to-host sync
