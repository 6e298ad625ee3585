"""Finds the workers from whose memory a new worker can read its experts. Pure.

Example, one bank: device 2 needs experts 0 and 2, and the current placement is ((0, 1), (2, 3, 0)):

    expert-0 holds ((0,),)    expert-1 holds ((0, 2),)
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.codec import Message
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.core.topology import Member


class ExpertHolder(Message, frozen=True, kw_only=True):
    """A serving worker, with the experts that a new worker can copy from its memory."""

    name: str
    address: str
    """``host:port`` at which the worker provides the weights of its experts."""
    experts: tuple[tuple[int, ...], ...]
    """``[bank]``: logical experts that the new worker can copy, ascending."""


def expert_holders(
    members: Sequence[Member], current: ExpertPlacement, target: ExpertPlacement, device: int
) -> tuple[ExpertHolder, ...]:
    """Return the members that hold experts which ``target`` assigns to ``device``.

    ``current`` is the placement that the members run. The experts that a member holds may change
    later.
    """
    wanted = _by_bank(target, device)
    holders = []
    for member in members:
        if member.holds_experts and member.weights_address and member.device != device:
            held = _by_bank(current, member.device)
            experts = tuple(
                tuple(sorted(own & asked)) for own, asked in zip(held, wanted, strict=True)
            )
            if any(experts):
                address = member.weights_address
                holders.append(ExpertHolder(name=member.name, address=address, experts=experts))
    return tuple(holders)


def _by_bank(placement: ExpertPlacement, device: int) -> list[set[int]]:
    """Return the logical experts of a device, as ``[bank]``; empty sets for a device beyond the
    placement."""
    return [
        set(bank.physical_to_logical[device]) - {FREE_SLOT}
        if 0 <= device < bank.num_devices
        else set()
        for bank in placement.banks
    ]
