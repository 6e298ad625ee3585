"""Tiny models written without transformers, and stand-ins for parts of the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from selectors import SelectorKey
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.core.errors import PeerLostError
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.dispatch.dispatcher import BatchRows, DispatchHandle, TokenDispatcher
from workers.model.layers import Dispatch
from workers.requests.step_header import StepHeader
from workers.transport.peer_connections import PeerConnections

TINY_CONFIG: Mapping[str, Any] = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
"""Config of ``write_tiny_checkpoint``."""


def tiny_tensors(config: Mapping[str, Any] = TINY_CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors of an OLMoE, with logits wide enough for clear greedy choices."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    kv = hidden // heads * kv_heads

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        values: Tensor = torch.randn(rows, columns, generator=generator)
        return values * (gain / math.sqrt(columns))

    tensors = {
        "model.embed_tokens.weight": torch.randn(
            int(config["vocab_size"]), hidden, generator=generator
        ),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": matrix(int(config["vocab_size"]), hidden, 8.0),
    }
    for layer in range(int(config["num_hidden_layers"])):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{attention}.q_proj.weight": matrix(hidden, hidden),
            f"{attention}.k_proj.weight": matrix(kv, hidden),
            f"{attention}.v_proj.weight": matrix(kv, hidden),
            f"{attention}.o_proj.weight": matrix(hidden, hidden),
            f"{attention}.q_norm.weight": torch.ones(hidden),
            f"{attention}.k_norm.weight": torch.ones(kv),
            f"{prefix}.mlp.gate.weight": matrix(int(config["num_experts"]), hidden, 2.0),
        }
        for expert in range(int(config["num_experts"])):
            name = f"{prefix}.mlp.experts.{expert}"
            tensors[f"{name}.gate_proj.weight"] = matrix(inner, hidden)
            tensors[f"{name}.up_proj.weight"] = matrix(inner, hidden)
            tensors[f"{name}.down_proj.weight"] = matrix(hidden, inner, 2.0)
    return tensors


def write_tiny_checkpoint(
    path: Path,
    config: Mapping[str, Any] = TINY_CONFIG,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)))
    save_file(
        dict(tiny_tensors(config) if tensors is None else tensors), path / "model.safetensors"
    )


class FailingDispatcher:
    """Passes everything on to another dispatcher, and loses a peer at the test's order."""

    def __init__(self, inner: TokenDispatcher) -> None:
        self._inner = inner
        self.fail_at: int | None = None
        """Calls (dispatch, combine and finish) of a step before the peer is lost; None: never."""
        self.num_failures = 0
        """Peers lost so far."""
        self.num_calls = 0
        """Such calls so far."""
        self.leaves_out = False
        """The next step to end has left rows out."""
        self._calls = 0

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        self._calls = 0
        self._inner.begin_step(header, micro_batches)

    def run_empty_step(self, header: StepHeader) -> None:
        self._inner.run_empty_step(header)

    def dispatch(self, sent: Dispatch, micro_batch: int = 0) -> DispatchHandle:
        self._count()
        return self._inner.dispatch(sent, micro_batch)

    def combine(self, handle: DispatchHandle) -> Tensor:
        self._count()
        return self._inner.combine(handle)

    def finish_step(self) -> None:
        self._count()
        self._inner.finish_step()

    def end_step(self) -> bool:
        has_left_out, self.leaves_out = self.leaves_out, False
        return self._inner.end_step() and not has_left_out

    @property
    def edge_share(self) -> int:
        return self._inner.edge_share

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        self._inner.set_placement(placement, generation)

    def _count(self) -> None:
        if self._calls == self.fail_at:
            self.fail_at = None
            self.num_failures += 1
            raise PeerLostError("expert-0", "reset in a test")
        self._calls += 1
        self.num_calls += 1


class Wakeups:
    """Counts how often the select loop of a worker's connections wakes up."""

    def __init__(self, connections: PeerConnections) -> None:
        self.count = 0
        self._select = connections._selector.select
        connections._selector.select = self._counted  # type: ignore[method-assign]

    def _counted(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        events = self._select(timeout)
        self.count += 1
        return events
