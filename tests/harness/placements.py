"""Placements of what is left of a cluster."""

from __future__ import annotations

from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement


def bank_without(bank: BankPlacement, *lost: int) -> BankPlacement:
    """The same maps after ``lost`` devices emptied; their indices stay."""
    rows = [
        (FREE_SLOT,) * len(slots) if d in lost else slots
        for d, slots in enumerate(bank.physical_to_logical)
    ]
    return bank.with_slots(rows)


def placement_without(placement: ExpertPlacement, epoch: int, *lost: int) -> ExpertPlacement:
    """The placement of the survivors as ``epoch``."""
    return ExpertPlacement(
        epoch=epoch, banks=tuple(bank_without(b, *lost) for b in placement.banks)
    )
