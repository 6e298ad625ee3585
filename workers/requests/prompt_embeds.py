"""A prompt of embeddings instead of tokens. Pure: reads bytes and a shape, never unpickles."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from cluster.core.codec import Message
from cluster.core.errors import RequestError


class PromptEmbeds(Message, frozen=True, array_like=True):
    """Embeddings of a prompt, one vector for each token, that a client sends instead of tokens."""

    width: Annotated[int, Meta(ge=1)]
    """Number of elements of a vector: the model's hidden size."""
    data: bytes
    """Elements of all vectors: [tokens, width] float32, little-endian, row-major."""

    def __repr__(self) -> str:
        return f"PromptEmbeds(width={self.width}, {len(self.data)} bytes)"

    @property
    def num_tokens(self) -> int:
        return len(self.data) // (4 * self.width)

    @property
    def digest(self) -> str:
        """SHA-256 of the embeddings; only prompts with equal embeddings share cached KV blocks."""
        return hashlib.sha256(self.data).hexdigest()

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Return the embeddings of the tokens first .. last - 1, [last - first, width] float32."""
        size = 4 * self.width
        return np.frombuffer(self.data[first * size : last * size], dtype="<f4").reshape(
            -1, self.width
        )


def parse_embeds(shape: Sequence[int], data: bytes) -> PromptEmbeds:
    """Create the embeddings of a prompt from a client's shape [tokens, width] and float32 bytes.

    Raises ``RequestError`` with the invalid value and the rule.
    """
    name = "embeddings"
    sizes = list(shape)[:4]
    if len(shape) != 2 or min(shape) < 1:
        raise RequestError(f"{name}.shape ({sizes}) must be tokens and hidden size", name)
    size = 4 * shape[0] * shape[1]
    if len(data) != size:
        raise RequestError(
            f"{name}.data has {len(data)} bytes, {sizes} float32 numbers have {size}", name
        )
    if not np.isfinite(np.frombuffer(data, dtype="<f4")).all():
        raise RequestError(f"{name}.data must be finite numbers", name)
    return PromptEmbeds(shape[1], data)
