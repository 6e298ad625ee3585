"""Blocks that a cluster with another checkpoint has left on the workers' disks: all are wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.simulation.asks import Ask
from tests.simulation.configuration import BLOCK_TOKENS
from tests.simulation.toy_model import BLOCK_TOKEN_BYTES
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.folders import claim_folder
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import chain_hash, root_hash

_LEFT_AT_S = 1.6e9
"""Time of day at which they were written."""


def leave_blocks(folder: Path, rank: int, asks: Sequence[Ask]) -> None:
    """Those of the prompts of all requests, in the folder of a rank."""
    tier = DiskTier(claim_folder(folder, rank), 1 << 30)
    tier.use("checkpoint of another model\n")
    data = torch.zeros(BLOCK_TOKEN_BYTES * BLOCK_TOKENS, dtype=torch.uint8)
    for ask in asks:
        names = list(_names(ask))
        hints = KeepHints(tenant=ask.cache_salt)
        use = TurnUse(names=names, num_prompt=len(names), hints=hints)
        turn = tier.begin(use)
        for name, parent in use.items:
            tier.put(turn, name, parent, data)
        tier.end(turn)
    tier.close()
    for file in folder.rglob("*.kv"):
        os.utime(file, (_LEFT_AT_S, _LEFT_AT_S))


def _names(ask: Ask) -> Iterator[bytes]:
    """Of the full blocks of a prompt without an adapter."""
    parent = root_hash(ask.cache_salt)
    for last in range(BLOCK_TOKENS, len(ask.prompt) + 1, BLOCK_TOKENS):
        parent = chain_hash(parent, ask.prompt[last - BLOCK_TOKENS : last])
        yield parent
