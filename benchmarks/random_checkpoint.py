"""Random OLMoE checkpoints of any size, in the layout of the public one.

python -m benchmarks.random_checkpoint OUT --hidden 512 --layers 8 --ffn 256
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

MAX_SHARD_BYTES = 512 * 1024 * 1024
"""Files are closed at this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomModel:
    """Size of a random OLMoE model; the defaults are those of ``make bench``."""

    hidden: int = 512
    """Width of the model."""
    layers: int = 8
    """Decoder layers."""
    heads: int = 8
    """Attention heads."""
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
    seed: int = 0
    """Of the weights."""

    def config(self) -> dict[str, object]:
        """Content of ``config.json``."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": False,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rope_theta": 10000.0,
            "pad_token_id": 1,
            "eos_token_id": None,
            "torch_dtype": "bfloat16",
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        hidden, ffn = self.hidden, self.ffn
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}.{norm}.weight", (hidden,)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
            for name in ("q_norm", "k_norm"):
                yield f"{prefix}.self_attn.{name}.weight", (hidden,)
            yield f"{prefix}.mlp.gate.weight", (self.experts, hidden)
            for expert in range(self.experts):
                base = f"{prefix}.mlp.experts.{expert}"
                yield f"{base}.gate_proj.weight", (ffn, hidden)
                yield f"{base}.up_proj.weight", (ffn, hidden)
                yield f"{base}.down_proj.weight", (hidden, ffn)


def write(model: RandomModel, out: Path) -> Path:
    """Write the checkpoint in bf16, in shards with an index; returns ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(model.seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in model.shapes():
        tensor = _draw(shape, generator)
        if size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (out / "model.safetensors.index.json").write_text(index_text)
    (out / "config.json").write_text(json.dumps(model.config(), indent=2))
    return out


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn: torch.Tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return drawn.to(torch.bfloat16)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    for name in ("hidden", "layers", "heads", "experts", "ffn", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=getattr(RandomModel(), name))
    values = vars(parser.parse_args())
    out = values.pop("out")
    write(RandomModel(**values), out)


if __name__ == "__main__":
    main()
