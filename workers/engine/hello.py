"""Describes an engine to gateways, which need its facts to validate requests."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from workers.engine.engine import Engine
from workers.inspection.buffers import shape_of
from workers.model.config import BankSpec, ModelConfig
from workers.requests.wire import EngineHello


def make_hello(
    worker: str, config: ModelConfig, banks: Sequence[BankSpec], dtype: str
) -> EngineHello:
    """Return the description of a worker's model for gateways.

    Generation and capacity are 0; ``add_capacity`` and the caller set them later.
    """
    shape = shape_of(config, banks)
    return EngineHello(
        worker=worker,
        generation=0,
        max_model_len=0,
        vocab_size=shape.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_kv_tokens=0,
        dtype=dtype,
        model_type=config.model_type,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_attention_layers=shape.num_attention_layers,
        num_heads=shape.num_heads,
        labels=config.labels,
        pad_token_id=config.pad_token_id,
        problem_type=config.problem_type or "",
        banks=shape.banks,
        kv_length_matters_above=config.length_matters_above,
    )


def add_capacity(hello: EngineHello, engine: Engine, block_size: int) -> EngineHello:
    """Return ``hello`` with the engine's context limit and KV capacity in tokens.

    ``block_size``: tokens of a KV block.
    """
    num_tokens = engine.pool.num_blocks * block_size
    return replace(hello, max_model_len=engine.max_model_len, max_kv_tokens=num_tokens)
