"""A small OLMoE whose tokens fall into domains, each with favourite experts of its own.

The router of every layer looks at the current token alone, and an output stays in the domain of its
prompt, so that the expert load follows from the domains of the requests. What an expert computes
changes which of the domain's tokens comes next: a wrong weight changes the text.

    hidden = token dims (one-hot embedding, never written to) + content dims (attention and experts)
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import RandomModel

_CONTENT = 32
"""Dims that attention and experts write to."""
_STAY = 8.0
"""What being of the same domain adds to a token's logit, a dim of the norm's output each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainModel:
    """Sizes, and how uneven the load of a domain is."""

    num_domains: int = 2
    """Domains."""
    tokens_a_domain: int = 48
    """Tokens of each; the first is token 0 of the vocabulary."""
    layers: int = 2
    """Decoder layers."""
    experts: int = 16
    """Experts a layer."""
    top_k: int = 2
    """Experts a token."""
    ffn: int = 16
    """Width of an expert."""
    skew: float = 0.8
    """The favourite number i of a domain is chosen in proportion to ``(i + 1) ** -skew``."""
    max_positions: int = 2048
    """Context."""
    seed: int = 0
    """Of weights and favourites."""

    @property
    def vocab(self) -> int:
        """Tokens of all domains."""
        return self.num_domains * self.tokens_a_domain

    @property
    def hidden(self) -> int:
        """Width of the model: divisible by its four heads."""
        return self.vocab + _CONTENT

    def tokens(self, domain: int) -> range:
        """The tokens of a domain."""
        first = domain * self.tokens_a_domain
        return range(first, first + self.tokens_a_domain)

    def experts_of(self, layer: int, token: int) -> tuple[int, ...]:
        """The experts that a layer's router chooses for a token."""
        domain = token // self.tokens_a_domain
        order = list(range(self.experts))
        random.Random(f"{self.seed}/{layer}/{domain}").shuffle(order)
        weights = [(i + 1) ** -self.skew for i in range(self.experts)]
        rng = random.Random(f"{self.seed}/{layer}/{token}")
        chosen: list[int] = []
        while len(chosen) < self.top_k:
            (place,) = rng.choices(range(self.experts), weights)
            if order[place] not in chosen:
                chosen.append(order[place])
        return tuple(chosen)


def write(model: DomainModel, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint; returns ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    plain = RandomModel(
        hidden=model.hidden,
        layers=model.layers,
        heads=4,
        experts=model.experts,
        top_k=model.top_k,
        ffn=model.ffn,
        vocab=model.vocab,
        max_positions=model.max_positions,
    )
    generator = torch.Generator().manual_seed(model.seed)
    tensors = {
        name: _draw(model, name, shape, generator).to(dtype).contiguous()
        for name, shape in plain.shapes().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    name = str(dtype).removeprefix("torch.")
    config = {**plain.config(), "torch_dtype": name, "pad_token_id": None}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def _draw(
    model: DomainModel, name: str, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    drawn: Tensor = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if name.endswith("embed_tokens.weight"):
        drawn = torch.eye(model.vocab, model.hidden)
    elif name.endswith("mlp.gate.weight"):
        drawn = _router(model, int(name.split(".")[2]))
    elif name.endswith("lm_head.weight"):
        domain = torch.arange(model.vocab) // model.tokens_a_domain
        drawn *= 2.0
        drawn[:, : model.vocab] = _STAY * (domain[:, None] == domain[None, :])
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        drawn[: model.vocab] = 0.0
    return drawn


def _router(model: DomainModel, layer: int) -> Tensor:
    """[experts, hidden]: high where a token has the expert, not quite the same for each."""
    weight = torch.zeros(model.experts, model.hidden)
    for token in range(model.vocab):
        for rank, expert in enumerate(model.experts_of(layer, token)):
            weight[expert, token] = 0.5 - 0.02 * rank
    return weight
