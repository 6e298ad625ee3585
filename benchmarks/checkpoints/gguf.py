"""A random OLMoE checkpoint in GGUF, the file format of llama.cpp.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3), names of fields and
tensors from llama.cpp's ``gguf-py/gguf/constants.py``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.checkpoints.ggml_types import BF16, F32, GgmlType
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.checkpoints.random_tokenizer import token_texts

_ALIGNMENT = 32
_QUANTIZATION_VERSION = 2
"""Of the layouts of blocks; must be there where there are any."""
_INT32, _UINT32, _FLOAT32, _STRING, _ARRAY = 5, 4, 6, 8, 9
"""Types of fields."""
_NORMAL_TOKEN = 1
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
"""Tensors of a layer: name here -> name in the checkpoint."""
_FLOAT32_PARTS = ("norm", "gate_inp")
"""Ends of the names of tensors that llama.cpp keeps in float32."""
_EMBEDDING = "token_embd"
"""Stays in bfloat16, as in our server: its rows are looked up, not multiplied."""

Field = int | float | str | Sequence[str] | Sequence[int]


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return self.kind.num_bytes(self.shape)


def write(model: RandomModel, checkpoint: Path, out: Path, matrices: GgmlType = BF16) -> Path:
    """Convert a checkpoint of ``random_checkpoint.write``; returns ``out``.

    ``matrices``: type of those of attention, experts and head.
    """
    assert model.family == "olmoe", "the names below are its"
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    with ExitStack() as stack, out.open("wb") as file:
        shards: dict[str, Any] = {
            name: stack.enter_context(safe_open(checkpoint / name, "pt"))
            for name in set(weight_map.values())
        }

        def load(name: str) -> torch.Tensor:
            tensor: torch.Tensor = shards[weight_map[name]].get_tensor(name)
            return tensor

        entries = list(_entries(model, matrices, load))
        fields = _fields(model, matrices)
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(fields)))
        for name, value in fields.items():
            file.write(_string(name) + _typed(value))
        offset = 0
        for entry in entries:
            dims = entry.shape[::-1]  # the fastest one first
            file.write(_string(entry.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", entry.kind.code, offset))
            offset += entry.num_bytes + _padding(entry.num_bytes)
        file.write(bytes(_padding(file.tell())))
        for entry in entries:
            tensor = entry.load()
            assert tuple(tensor.shape) == entry.shape, entry.name
            file.write(entry.kind.encode(tensor).numpy().tobytes())
            file.write(bytes(_padding(entry.num_bytes)))
    return out


def _fields(model: RandomModel, matrices: GgmlType) -> Mapping[str, Field]:
    texts = token_texts(model.vocab)
    own: dict[str, Field] = {
        "context_length": model.max_positions,
        "embedding_length": model.hidden,
        "block_count": model.layers,
        "feed_forward_length": model.ffn,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "expert_count": model.experts,
        "expert_used_count": model.top_k,
        "vocab_size": model.vocab,
    }
    return {
        "general.architecture": "olmoe",
        "general.name": "random",
        "general.file_type": matrices.file_type,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"olmoe.{name}": value for name, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [_NORMAL_TOKEN] * len(texts),
        "tokenizer.ggml.merges": [f"{texts[0]} {texts[1]}"],  # there must be one
    }


def _entries(
    model: RandomModel, matrices: GgmlType, load: Callable[[str], torch.Tensor]
) -> Iterator[_Entry]:
    shapes = model.shapes()

    def entry(name: str, source: str) -> _Entry:
        kind = BF16 if name == _EMBEDDING else matrices
        if name.endswith(_FLOAT32_PARTS):
            kind = F32
        return _Entry(f"{name}.weight", shapes[source], kind, lambda: load(source))

    def experts(name: str, sources: list[str]) -> _Entry:
        shape = (len(sources), *shapes[sources[0]])
        return _Entry(f"{name}.weight", shape, matrices, lambda: torch.stack([*map(load, sources)]))

    yield entry(_EMBEDDING, "model.embed_tokens.weight")
    yield entry("output_norm", "model.norm.weight")
    yield entry("output", "lm_head.weight")
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        for name, part in _PARTS.items():
            yield entry(f"blk.{layer}.{name}", f"{prefix}.{part}.weight")
        for kind in ("gate", "up", "down"):
            sources = [
                f"{prefix}.mlp.experts.{expert}.{kind}_proj.weight"
                for expert in range(model.experts)
            ]
            yield experts(f"blk.{layer}.ffn_{kind}_exps", sources)


def _typed(value: Field) -> bytes:
    """A value after its type."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    kind, items = _array(value)
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items


def _array(values: Sequence[Any]) -> tuple[int, bytes]:
    """Type of the items, and the items."""
    if isinstance(values[0], str):
        return _STRING, b"".join(map(_string, values))
    return _INT32, struct.pack(f"<{len(values)}i", *values)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(num_bytes: int) -> int:
    """Bytes up to the next multiple of the alignment."""
    return -num_bytes % _ALIGNMENT
