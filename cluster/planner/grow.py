"""Extends a placement to new devices, which take over experts; no other expert moves. Pure.

This is fast to compute, and the former device of an expert can serve it until the new one does.
Rebalancing finds better placements later.

Example, one bank of 6 experts without load on 2 devices, and device 2 is new:

    ((0, 1, 2), (3, 4, 5))  ->  ((-1, 1, 2), (-1, 4, 5), (0, 3))
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from msgspec import structs

from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement

ExpertLoads = Mapping[tuple[str, int], Sequence[float]]
"""(bank, layer) -> tokens by logical expert; experts of banks without a key count equally."""


def grow(
    placement: ExpertPlacement, devices: Collection[int], loads: ExpertLoads, num_slots: int
) -> ExpertPlacement:
    """Return ``placement`` extended to new ``devices``, which take over their part of the experts.

    Each new device gets at most ``num_slots`` experts of a bank. Half of an expert's weight is its
    load, the other half is equal for all experts: if a step activates nearly all experts, each of
    them costs the same.
    """
    banks = (
        _GrowingBank(bank, loads.get((bank.bank, bank.layer), ())).fill(sorted(devices), num_slots)
        for bank in placement.banks
    )
    return structs.replace(placement, banks=tuple(banks))


class _GrowingBank:
    """One bank while copies of its experts move to new devices."""

    def __init__(self, bank: BankPlacement, counts: Sequence[float]) -> None:
        self._bank = bank
        mean = sum(counts) / bank.num_experts
        weights = [1.0 + (c / mean) for c in counts] if mean > 0 else [1.0] * bank.num_experts
        copies = bank.replica_count
        self._weight = [w / n for w, n in zip(weights, copies, strict=True)]
        self._rows = [list(row) for row in bank.physical_to_logical]
        self._split = [list(row) for row in bank.split]
        self._decode = list(bank.decode_device)
        self._burden = [sum(self._weight[e] for e in self._held(d)) for d in range(len(self._rows))]

    def fill(self, devices: Sequence[int], num_slots: int) -> BankPlacement:
        """Move copies to the new ``devices`` as long as that makes loads more even.

        Returns the bank's placement; a device gets at most ``num_slots`` experts.
        """
        missing = max(devices, default=-1) + 1 - len(self._rows)
        self._rows += [[] for _ in range(missing)]
        self._split += [[] for _ in range(missing)]
        self._burden += [0.0] * missing
        for device in devices:  # a device that returns may have free slots
            pairs = zip(self._rows[device], self._split[device], strict=True)
            held = [(e, share) for e, share in pairs if e != FREE_SLOT]
            self._rows[device] = [e for e, _ in held]
            self._split[device] = [share for _, share in held]
        room = {device: num_slots - len(self._rows[device]) for device in devices}
        while open_ := [device for device in devices if room[device] > 0]:
            taker = min(open_, key=lambda d: (self._burden[d], d))
            move = self._best_move(taker, devices)
            if move is None:
                break
            self._move(*move, taker)
            room[taker] -= 1
        return structs.replace(
            self._bank,
            physical_to_logical=tuple(map(tuple, self._rows)),
            split=tuple(map(tuple, self._split)),
            decode_device=tuple(self._decode),
        )

    def _best_move(self, taker: int, devices: Collection[int]) -> tuple[int, int] | None:
        """Return the best move to device ``taker``: (device that gives a copy, expert), or None.

        The move takes the heaviest copy of the busiest possible device, such that ``taker`` has
        less load afterwards than the giver had before. Other new ``devices`` give nothing.
        """
        givers = (d for d in range(len(self._rows)) if d not in devices and self._held(d))
        for giver in sorted(givers, key=lambda d: (-self._burden[d], d)):
            gap = self._burden[giver] - self._burden[taker]
            able = [
                e
                for e in self._held(giver)
                if e not in self._rows[taker] and self._weight[e] < gap * (1 - 1e-9)
            ]
            if able:
                return giver, max(able, key=lambda e: (self._weight[e], -e))
        return None

    def _move(self, giver: int, expert: int, taker: int) -> None:
        slot = self._rows[giver].index(expert)
        self._rows[giver][slot] = FREE_SLOT
        share, self._split[giver][slot] = self._split[giver][slot], 0.0
        self._rows[taker].append(expert)
        self._split[taker].append(share)
        self._burden[giver] -= self._weight[expert]
        self._burden[taker] += self._weight[expert]
        if self._decode[expert] == giver:
            self._decode[expert] = taker

    def _held(self, device: int) -> list[int]:
        return [e for e in self._rows[device] if e != FREE_SLOT]
