"""Expert loads for placements: measured, extended from measured ones, and random."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cluster.core.load_profile import BankLoad, LoadProfile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DATA = Path(__file__).parents[1] / "data"
TOP_K = 8


@functools.cache
def olmoe() -> dict[str, Floats]:
    """Kind of text -> [3 layers, 64 experts] shares of the load."""
    return _counts("olmoe_expert_counts.json")


@functools.cache
def mixtral() -> dict[str, Floats]:
    """Kind of text -> [3 layers, 8 experts] shares; not used to develop the planner."""
    return _counts("mixtral8x7b_expert_counts.json")


def _counts(name: str) -> dict[str, Floats]:
    found = json.loads((DATA / name).read_text())["counts"]
    return {domain: _unit(np.array(counts, dtype=np.float64)) for domain, counts in found.items()}


def _unit(loads: Floats) -> Floats:
    return np.asarray(loads / loads.sum(-1, keepdims=True))


def dots_like(loads: Floats, layers: int = 61, seed: int = 0) -> Floats:
    """Loads [layers, 128]; each layer joins two shuffled and distorted layers of ``loads``."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        i, j = generator.integers(3), generator.integers(3)
        first, second = generator.permutation(64), generator.permutation(64)
        bend, part = generator.uniform(0.8, 1.2), generator.uniform(0.4, 0.6)
        halves = (_unit(loads[i][first] ** bend), _unit(loads[j][second] ** bend))
        found.append(np.concatenate([part * halves[0], (1 - part) * halves[1]]))
    return np.array(found)


def lognormal(experts: int, spread: float, layers: int = 15, seed: int = 7) -> Floats:
    """Independent loads [layers, experts]; not used to develop the planner."""
    generator = np.random.default_rng(seed)
    return _unit(np.exp(spread * generator.normal(size=(layers, experts))))


def zipf(experts: int, power: float, layers: int = 15, seed: int = 7) -> Floats:
    """Loads [layers, experts] that fall by a power of the rank; not used in development."""
    generator = np.random.default_rng(seed)
    ranks = np.array([generator.permutation(experts) for _ in range(layers)]) + 1.0
    return _unit(ranks**-power)


def dirichlet(experts: int, concentration: float, layers: int = 15, seed: int = 7) -> Floats:
    """Loads [layers, experts] from a Dirichlet distribution; not used in development."""
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(experts, concentration), layers) + 1e-9


@functools.cache
def token_rows() -> dict[str, Ints]:
    """Kind of text -> [3 layers, 401 token ids, 64 experts] counts."""
    with np.load(DATA / "olmoe_token_experts.npz") as file:
        return {name: file[name].astype(np.int64) for name in file.files}


def routes(counts: Ints, num_tokens: int, seed: int = 0) -> Ints:
    """Experts [num_tokens, 8] of token ids sampled by frequency, from the counts of each id."""
    generator = np.random.default_rng(seed)
    frequency = counts.sum(1) / counts.sum()
    ids = generator.choice(len(counts), num_tokens, p=frequency)
    return draw(counts[ids].astype(np.float64), generator)


def draw(weights: Floats, generator: np.random.Generator) -> Ints:
    """Sample distinct experts [rows, 8] without replacement by weights [rows, experts]."""
    keys = np.log(weights + 1e-9) + generator.gumbel(size=weights.shape)
    return np.asarray(np.argpartition(-keys, TOP_K, axis=-1)[..., :TOP_K])


def coactivation(counts: Ints) -> Floats:
    """Expected numbers [64, 64] of tokens that choose two experts together."""
    tokens = counts.sum(1) / TOP_K
    known = tokens > 0
    chance = np.minimum(counts[known] / tokens[known, None], 1.0)
    return np.asarray((chance * tokens[known, None]).T @ chance)


def profile(loads: Floats, top_k: int = TOP_K) -> LoadProfile:
    """Return a load profile with one bank for each layer."""
    banks = tuple(
        BankLoad(bank="mlp", layer=layer, counts=tuple(map(float, row)))
        for layer, row in enumerate(loads)
    )
    return LoadProfile(model="measured", top_k=top_k, tokens=1_000_000, banks=banks)
