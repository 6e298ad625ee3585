"""The transfers of messages over process groups: one for each part that is not empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from workers.transport.transport import ExpectedMessage, RowMessage, Tag
from workers.transport.world import Item

ItemOf = Callable[[int, Tag, int, Tensor], Item]
"""Function that describes the transfer of one part of a message: (rank, tag, part, tensor)."""


def items_to_send(item_of: ItemOf, tag: Tag, messages: Sequence[RowMessage]) -> list[Item]:
    """Return the sends of ``messages``. Rows are copied, once for all ranks, as the caller may
    overwrite them before they are sent; outputs are not."""
    copies: dict[int, Tensor] = {}
    items = []
    for message in messages:
        for i, part in enumerate(message.parts):
            if not part.numel():
                continue
            data = part
            if tag.direction == "rows":
                if id(part) not in copies:
                    copies[id(part)] = part.clone()
                data = copies[id(part)]
            items.append(item_of(message.rank, tag, i, data.contiguous()))
    return items


def items_to_receive(
    item_of: ItemOf,
    tag: Tag,
    expected: Sequence[ExpectedMessage],
    received: Sequence[tuple[Tensor, ...]],
) -> list[Item]:
    """Return the receives of the ``expected`` messages into the tensors in ``received``."""
    return [
        item_of(message.rank, tag, i, tensor)
        for message, tensors in zip(expected, received, strict=True)
        for i, tensor in enumerate(tensors)
        if tensor.numel()
    ]
