"""Loads the roles of a worker, in the order of their dependencies."""

from __future__ import annotations

from functools import partial
from typing import Any

from workers.dispatch.colocated import ColocatedDispatcher, LoopbackTransport
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.engine import Engine
from workers.metrics.step_timer import StepTimer
from workers.model.layers import AttentionModel
from workers.model.loading.attention_model import load_attention_model
from workers.process.context import WorkerContext
from workers.process.gpu_memory import check_memory_for_states, section_for_gpu
from workers.process.roles.attention import AttentionRole
from workers.process.roles.attention_listeners import AttentionListeners
from workers.process.roles.experts import BanksOf, ExpertRole, make_slots
from workers.process.roles.roles import Roles
from workers.process.warm_up import warm_attention
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.transport.peer_link import PeerServer
from workers.transport.transport import DataTransport


def load_experts(
    context: WorkerContext, roles: Roles, weights: PeerServer, banks_of: BanksOf | None
) -> dict[str, Any]:
    """Set ``roles.experts`` of an expert worker; returns the facts for ``WorkerReady``."""
    roles.experts = ExpertRole(context, context.transport, weights, banks_of)
    return {"dtype": context.model.dtype_name, **roles.experts.facts()}


def load_attention(
    context: WorkerContext,
    roles: Roles,
    listeners: AttentionListeners,
    weights: PeerServer | None = None,
    banks_of: BanksOf | None = None,
) -> dict[str, Any]:
    """Set ``roles.attention``, and with ``weights`` (on a colocated worker) ``roles.experts`` too.
    Returns the facts for ``WorkerReady``.
    """
    model, timer, facts = _load_model(context), context.new_timer(), dict[str, Any]()
    dispatcher: TokenDispatcher
    if context.config.workers.mode == "local":
        dispatcher = _local_dispatcher(context, timer)
    elif weights is None:
        dispatcher = _remote_dispatcher(context, context.transport, timer)
    else:
        transport = LoopbackTransport(context.transport, context.member.rank)
        roles.experts = ExpertRole(context, transport, weights, banks_of)
        remote = _remote_dispatcher(context, transport, timer)
        dispatcher = ColocatedDispatcher(transport, remote, roles.experts.server)
        facts = roles.experts.facts()
    config = context.family.config
    grammars = GrammarCompiler(
        context.model.checkpoint.path, config.vocab_size, config.eos_token_ids
    )
    grammars.prepare()
    engine = _load_engine(context, model, dispatcher)
    roles.attention = AttentionRole(context, listeners, engine, dispatcher, grammars, timer)
    return {
        "max_model_len": engine.max_model_len,
        "vocab_size": config.vocab_size,
        "num_kv_blocks": engine.pool.num_blocks,
        "model_type": config.model_type,
        "dtype": context.model.dtype_name,
        "kv_cache_dtype": context.config.engine.kv_cache_dtype,
        **facts,
    }


def _load_model(context: WorkerContext) -> AttentionModel:
    model, config = context.model, context.config
    return load_attention_model(
        model.checkpoint,
        model.dtype,
        context.args.device,
        config.model.max_model_len,
        model.compute_threads,
        config.engine.deterministic == "on",
        model.kernels.team,
        model.format_outside_experts(config),
    )


def _local_dispatcher(context: WorkerContext, timer: StepTimer) -> LocalDispatcher:
    """Load all experts, and return the dispatcher of a worker that computes them itself."""
    slots = make_slots(context)
    slots.load_all(context.model.checkpoint)
    return LocalDispatcher(slots.banks, context.family.banks, context.activity, timer)


def _remote_dispatcher(
    context: WorkerContext, transport: DataTransport, timer: StepTimer
) -> RemoteDispatcher:
    return RemoteDispatcher(
        transport,
        context.family.banks,
        rank=context.member.rank,
        combine_mode=context.config.engine.combine_mode,
        dtype=context.model.dtype,
        device=context.args.device,
        activity=context.activity,
        timer=timer,
        team=context.model.kernels.team,
    )


def _load_engine(
    context: WorkerContext, model: AttentionModel, dispatcher: TokenDispatcher
) -> Engine:
    args, family, setup = context.args, context.family, context.model
    make_engine = partial(
        Engine,
        model=model,
        config=family.config,
        banks=family.banks,
        speculation=context.config.speculation,
        max_model_len=context.config.model.max_model_len,
        rank=context.member.rank,
        compute_threads=setup.compute_threads,
        team=setup.kernels.team,
        is_exact=bool(context.member.offer.kernels),
        lora=context.config.lora,
    )
    check_memory_for_states(args, family)
    warm_attention(args, family, setup.dtype, make_engine, dispatcher)
    section = section_for_gpu(args, family, setup.dtype, context.transport)
    engine = make_engine(dispatcher=dispatcher, section=section)
    if args.device.type == "cuda":
        engine.runner.capture_graphs()
    return engine
