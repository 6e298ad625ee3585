"""Identity of the computation that made a KV block, and the ranks that need blocks on disk.

Blocks on disk outlive the processes that compute them. Apart from the tokens, their bits depend on
the checkpoint, release, options and dtypes, and on the kernels that the generation's members agreed
to use, so the identity contains these. If results are exact, the agreement determines the bits.
Otherwise they depend on each member, so the identity contains the computations of all members.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from cluster.config.cluster import ClusterConfig
from cluster.config.model import Quantize
from cluster.core.topology import Generation
from workers.kv.cache import KVCache
from workers.transport.handshake import PeerIdentity


def model_identity(me: PeerIdentity) -> str:
    """Text with which the identities of all KV blocks of this checkpoint begin."""
    return f"checkpoint {me.checkpoint_id}\n"


def kv_identity(
    me: PeerIdentity,
    config: ClusterConfig,
    generation: Generation,
    weights: tuple[Quantize, torch.dtype],
    cache: KVCache,
) -> str:
    """Identity of the blocks that a worker computes in a generation, as human-readable text.

    ``weights``: the worker's quantization and dtype, with ``auto`` resolved.
    """
    items = (
        f"release {me.release}",
        f"options {config.kv_fingerprint()}",
        f"experts {me.expert_form or 'as computed'}",
        f"weights {weights[0]} {weights[1]}",
        f"arithmetic {_arithmetic(generation)}",
        f"layout {cache.block_shape} {cache.dtype} {cache.state_shape}",
    )
    return model_identity(me) + "\n".join(items) + "\n"


def _arithmetic(generation: Generation) -> str:
    agreement = generation.agreement
    if agreement.is_exact:
        return f"exact {agreement.kernels} {agreement.torch}"
    ways = {f"{m.role} {m.offer.computation}" for m in generation.members}
    return f"not exact: {'; '.join(sorted(ways))}"


def needed_ranks(
    generation: Generation, places: Collection[str], node: str
) -> frozenset[int] | None:
    """Ranks whose blocks on the disk of ``node`` must stay; None before the first generation.

    These are the attention ranks of that node, and the ranks of places that have no worker now.
    ``places``: names of the cluster's places (``attention-1``), filled or not.
    """
    if not generation.number or not places:
        return None
    elsewhere = {m.rank for m in generation.attention if m.node != node}
    here = {m.rank for m in generation.attention if m.node == node}
    roles = {m.role for m in generation.attention}
    named = (place.rpartition("-") for place in places)
    free = {int(rank) for role, _, rank in named if role in roles} - elsewhere
    return frozenset(here | free)
