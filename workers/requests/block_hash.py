"""Hashes of KV blocks: each hash covers a block's tokens and all tokens before this block.

Workers find cached blocks by hash, and gateways learn which worker has which prefix. Both sides
need equal hashes, so only this module computes them. Pure; no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from hashlib import blake2b

from cluster.core.codec import Count, Message
from workers.requests.request import Request

BlockHash = bytes
"""A blake2b hash of 32 bytes for a KV block. Blocks with equal hashes count as equal, so collisions
must not occur."""
HASH_BYTES = 32
SHORT_BYTES = 8
"""Size in bytes of a short block hash in ``KvEvents``: the first bytes of the hash. A collision
costs time, but never gives a wrong block."""


def root_hash(salt: str, owner: str = "", length: int = 0, adapter: str = "") -> BlockHash:
    """Return the root of a chain of block hashes. Sequences share blocks only if roots are equal.

    ``salt``: the request's ``cache_salt``. ``owner``: a request id, if no other request may share
    the blocks. ``length``: the prompt length if attention keys depend on it, else 0. ``adapter``:
    key of the request's LoRA adapter, or empty.
    """
    person = b"kv owner" if owner else b"kv salt"
    own = length.to_bytes(8, "little") if length else b""
    name = (owner or salt).encode()
    plain = blake2b(name, digest_size=HASH_BYTES, person=person, salt=own).digest()
    if not adapter:
        return plain
    return blake2b(plain + adapter.encode(), digest_size=HASH_BYTES, person=b"kv adapter").digest()


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Return the hash of a full block with ``token_ids``.

    ``parent``: hash of the previous block, or for the first block the root (``root_hash``).
    """
    data = parent + struct.pack(f"<{len(token_ids)}I", *token_ids)
    return blake2b(data, digest_size=HASH_BYTES, person=b"kv block").digest()


def state_key(block_hash: BlockHash) -> bytes:
    """Return the key of the recurrent state after a block, when workers exchange blocks and states.

    The key has the size of a block hash and differs from all block hashes, unless they collide. The
    function is its own inverse.
    """
    return bytes((block_hash[0] ^ 0xFF,)) + block_hash[1:]


def request_root(request: Request, length_matters_above: int | None, owner: str = "") -> BlockHash:
    """Return the root of the chain of block hashes of a request; see ``root_hash``.

    ``length_matters_above``: number of prompt tokens above which attention keys depend on the
    prompt's length; None if they never do. ``owner``: as for ``root_hash``.
    """
    embeds, length = request.prompt_embeds, len(request.prompt)
    matters = length_matters_above is not None and length > length_matters_above
    salt = request.cache_salt if embeds is None else f"{request.cache_salt}\0{embeds.digest}"
    return root_hash(salt, owner, length if matters else 0, request.adapter)


def block_hashes(
    request: Request, block_size: int, length_matters_above: int | None
) -> list[BlockHash]:
    """Return the hashes of the full blocks of a request's prompt, in order.

    ``length_matters_above``: as for ``request_root``.
    """
    known: list[BlockHash] = []
    parent = request_root(request, length_matters_above)
    for last in range(block_size, len(request.prompt) + 1, block_size):
        parent = chain_hash(parent, request.prompt[last - block_size : last])
        known.append(parent)
    return known


def sequence_hashes(
    request: Request,
    choice: int,
    block_size: int,
    length_matters_above: int | None,
    prompt: Sequence[BlockHash] = (),
) -> tuple[BlockHash, ...]:
    """Return the hashes of the full blocks of a choice: prompt and ``output_so_far``.

    A block that ends with the newest output token is included, although the KV of this token may
    not be computed yet. ``prompt``: known hashes of the first full prompt blocks.
    ``length_matters_above``: as for ``request_root``.
    """
    known = list(prompt)
    parent = known[-1] if known else request_root(request, length_matters_above)
    tokens = (*request.prompt[block_size * len(known) :], *request.output_so_far[choice])
    for last in range(block_size, len(tokens) + 1, block_size):
        parent = chain_hash(parent, tokens[last - block_size : last])
        known.append(parent)
    return tuple(known)


def prompt_hashes(
    request: Request, block_size: int, length_matters_above: int | None
) -> list[bytes]:
    """Return the short hashes of the full blocks of a request's prompt, as in ``KvEvents``.

    ``length_matters_above``: as for ``request_root``.
    """
    known = block_hashes(request, block_size, length_matters_above)
    return [block_hash[:SHORT_BYTES] for block_hash in known]


class KvEvents(Message, frozen=True, kw_only=True, array_like=True, tag=True):
    """A worker's message to gateways: changes of the blocks in its prefix cache."""

    number: int
    """Number of the message, one more than in the previous message. A gap means lost messages."""
    is_whole: bool = False
    """Whether ``stored`` replaces all blocks that the gateway knows. If it has only some of the
    cached blocks, the next messages have the others."""
    stored: tuple[bytes, ...] = ()
    """Short hashes of blocks that were added to the prefix cache."""
    removed: tuple[bytes, ...] = ()
    """Short hashes of blocks that were removed from the prefix cache."""
    fetch_cost: float = math.inf
    """Time to fetch the KV of one token from another worker, divided by the time to compute one
    prompt token. Infinite if the worker does not fetch blocks."""
    num_free: Count = 0
    """Number of KV blocks that new requests can get, including blocks of unused cached prefixes."""
