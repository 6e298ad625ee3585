"""Random checkpoints of any family and size, in the layout of the public ones.

python -m benchmarks.random_checkpoint OUT --hidden 512 --layers 8 --ffn 256
python -m benchmarks.random_checkpoint OUT --family jetmoe --tiny --labels 3

One with the bundled model's vocabulary gets its tokenizer too, and so takes texts.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.checkpoints import random_codes
from benchmarks.checkpoints.random_codes import QUANTIZATION, Stored
from cluster.launch.model_source import bundled_checkpoint
from workers.model.families.base import Family
from workers.model.families.registry import FAMILIES, load_family

MAX_SHARD_BYTES = 512 * 1024 * 1024
"""Files are closed at this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomModel:
    """Size of a random model; the defaults are those of ``make bench``."""

    family: str = "olmoe"
    """``model_type``."""
    hidden: int = 512
    """Width of the model."""
    layers: int = 8
    """Decoder layers."""
    heads: int = 8
    """Attention heads; of JetMoE key heads for each of its ``top_k`` slots together."""
    experts: int = 64
    """Experts a layer."""
    top_k: int = 8
    """Experts a token."""
    ffn: int = 256
    """Width of an expert."""
    vocab: int = 50304
    """Rows of the embedding."""
    max_positions: int = 4096
    """Context."""
    labels: int = 0
    """Classes of a JetMoE with a classification head; 0: a language model."""
    prediction_layers: int = 0
    """1: there is a layer that predicts the token after the next; of families with such layers."""
    stored: Stored = "bfloat16"
    """Matrices of experts; the rest is in bfloat16. ``mxfp4`` is for gpt_oss alone."""
    seed: int = 0
    """Of the weights."""

    def config(self) -> dict[str, object]:
        """Content of ``config.json``."""
        makers = {
            "olmoe": self._olmoe,
            "dots1": self._dots1,
            "jetmoe": self._jetmoe,
            "qwen3_moe": self._qwen3_moe,
            "glm4_moe": self._glm4_moe,
            "mixtral": self._mixtral,
            "minimax_m2": self._minimax_m2,
            "ernie4_5_moe": self._ernie4_5_moe,
            "gpt_oss": self._gpt_oss,
            "flex_olmo": self._flex_olmo,
            "deepseek_v2": self._deepseek_v2,
            "deepseek_v3": self._deepseek_v3,
            "kimi_k2": self._deepseek_v3,
            "glm4_moe_lite": self._glm4_moe_lite,
            "qwen3_next": self._qwen3_next,
            "qwen3_5_moe_text": self._qwen3_5_moe_text,
            "qwen3_5_moe": self._qwen3_5_moe,
        }
        quantization = QUANTIZATION[self.stored]
        return {
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "pad_token_id": 1,
            "eos_token_id": None,
            "torch_dtype": "bfloat16",
            **({"num_nextn_predict_layers": 1} if self.prediction_layers else {}),
            **({"quantization_config": dict(quantization)} if quantization else {}),
            **makers[self.family](),
        }

    def _olmoe(self) -> dict[str, object]:
        return {
            "architectures": ["OlmoeForCausalLM"],
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "attention_bias": False,
        }

    def _dots1(self) -> dict[str, object]:
        """Two shared experts, and a dense first layer as wide as all experts of a token."""
        return {
            "architectures": ["Dots1ForCausalLM"],
            "intermediate_size": self.ffn * (self.top_k + 2),
            "moe_intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_routed_experts": self.experts,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "sliding_window": None,
        }

    def _qwen3_moe(self) -> dict[str, object]:
        """A key head for each four query heads, if there are as many."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "moe_intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(self.heads // 4, 1),
            "head_dim": self.hidden // self.heads,
            "num_experts": self.experts,
            "norm_topk_prob": True,
        }

    def _glm4_moe(self) -> dict[str, object]:
        """One shared expert, and a dense first layer as wide as all experts of a token."""
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "intermediate_size": self.ffn * (self.top_k + 1),
            "moe_intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(self.heads // 4, 1),
            "head_dim": self.hidden // self.heads,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        }

    def _mixtral(self) -> dict[str, object]:
        return {
            "architectures": ["MixtralForCausalLM"],
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(self.heads // 4, 1),
            "num_local_experts": self.experts,
        }

    def _minimax_m2(self) -> dict[str, object]:
        return self._mixtral() | {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "head_dim": self.hidden // self.heads,
            "rotary_dim": self.hidden // self.heads // 2,
        }

    def _ernie4_5_moe(self) -> dict[str, object]:
        """Two shared experts, and a dense first layer as wide as all experts of a token."""
        return {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "intermediate_size": self.ffn * (self.top_k + 2),
            "moe_intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(self.heads // 4, 1),
            "moe_num_experts": self.experts,
            "moe_num_shared_experts": 2,
        }

    def _flex_olmo(self) -> dict[str, object]:
        return self._olmoe() | {"architectures": ["FlexOlmoForCausalLM"]}

    def _qwen3_next(self) -> dict[str, object]:
        """Attention in every fourth layer, two value heads for each key head."""
        dim = self.hidden // self.heads
        return self._qwen3_moe() | {
            "architectures": ["Qwen3NextForCausalLM"],
            "full_attention_interval": min(4, self.layers),
            "linear_num_key_heads": max(self.heads // 2, 1),
            "linear_num_value_heads": self.heads,
            "linear_key_head_dim": dim,
            "linear_value_head_dim": dim,
            "shared_expert_intermediate_size": self.ffn,
        }

    def _qwen3_5_moe_text(self) -> dict[str, object]:
        found = self._qwen3_next() | {"architectures": ["Qwen3_5MoeForCausalLM"]}
        del found["norm_topk_prob"]
        return found

    def _qwen3_5_moe(self) -> dict[str, object]:
        text = self._qwen3_5_moe_text()
        del text["architectures"]
        names = ["Qwen3_5MoeForConditionalGeneration"]
        return {"architectures": names, "text_config": text}

    def _gpt_oss(self) -> dict[str, object]:
        """A window in every other layer."""
        return self._mixtral() | {
            "architectures": ["GptOssForCausalLM"],
            "head_dim": self.hidden // self.heads,
            "sliding_window": 128,
        }

    def _deepseek_v3(self) -> dict[str, object]:
        """The latent vector has half of the hidden size."""
        head = self.hidden // self.heads
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "intermediate_size": self.ffn * (self.top_k + 1),
            "moe_intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.hidden // 2,
            "kv_lora_rank": self.hidden // 2,
            "qk_nope_head_dim": head,
            "qk_rope_head_dim": head // 2,
            "v_head_dim": head,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }

    def _deepseek_v2(self) -> dict[str, object]:
        return self._deepseek_v3() | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "topk_method": "group_limited_greedy",
        }

    def _glm4_moe_lite(self) -> dict[str, object]:
        return self._deepseek_v3() | {
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "n_group": 1,
        }

    def _jetmoe(self) -> dict[str, object]:
        head = "SequenceClassification" if self.labels else "CausalLM"
        names = {str(i): f"class {i}" for i in range(self.labels)}
        return ({"id2label": names, "pad_token_id": 0} if self.labels else {}) | {
            "architectures": [f"JetMoeFor{head}"],
            "intermediate_size": self.ffn,
            "num_key_value_heads": self.heads // self.top_k,
            "kv_channels": self.hidden // self.heads,
            "num_local_experts": self.experts,
        }

    def described(self) -> Family:
        """The model as workers know it."""
        family = load_family(self.config())
        return family.with_predictor() if self.prediction_layers else family

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor by name, one tensor for each expert where a family has that.

        Of matrices that are ``stored`` in blocks, the shape of their numbers.
        """
        family = self.described()
        shapes = {part.name: part.shape for part in family.attention_tensors()}
        for bank in family.banks:
            for exchange, expert in product(bank.exchanges, range(bank.num_experts)):
                for matrix in family.expert_matrices(bank, exchange.index, expert, ()):
                    shapes |= {part.name: part.shape for part in matrix.parts}
        return shapes


TINY = RandomModel(hidden=64, layers=2, heads=4, experts=8, top_k=2, ffn=32, vocab=1024)
"""Made and loaded at once, with the vocabulary of the bundled model."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def write(model: RandomModel, out: Path) -> Path:
    """Write the checkpoint in shards with an index; returns ``out``.

    Two shards at most are in memory.
    """
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(model.seed)
    shards = _shards(model.shapes())
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shard.items():
            tensors |= _draw(model.stored, name, shape, generator)
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (out / "model.safetensors.index.json").write_text(index_text)
    (out / "config.json").write_text(json.dumps(model.config(), indent=2))
    if model.vocab == TINY.vocab:
        for name in _TOKENIZER_FILES:
            shutil.copyfile(bundled_checkpoint() / name, out / name)
    return out


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * torch.bfloat16.itemsize
        if size + num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def _draw(
    stored: Stored, name: str, shape: tuple[int, ...], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """What is on disk for a tensor, by name."""
    if stored != "bfloat16" and random_codes.is_coded(name, shape):
        return random_codes.draw(stored, name, shape, generator)
    if len(shape) == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        return {name: torch.full(shape, value, dtype=torch.bfloat16)}
    drawn: torch.Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return {name: drawn.to(torch.bfloat16)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="olmoe")
    parser.add_argument("--tiny", action="store_true", help="the smallest of everything")
    names = ("hidden", "layers", "heads", "experts", "top_k", "ffn", "vocab", "labels")
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = vars(parser.parse_args())
    if options["labels"] and options["family"] != "jetmoe":
        parser.error("--labels needs --family jetmoe")
    given = {name: options[name] for name in names if options[name] is not None}
    base = TINY if options["tiny"] else RandomModel()
    write(replace(base, family=options["family"], **given), options["out"])
