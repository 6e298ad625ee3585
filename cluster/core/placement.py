"""Expert placement: which expert slot of which device holds a copy of which logical expert.

Example, one bank of 4 experts on 2 devices with one redundant expert each (3 expert slots):

    physical_to_logical = ((0, 1, 2), (2, 3, 0))
    logical_to_physical(2) = ((0, 2), (1, 0))     (device, expert slot) of each copy
    replica_count = (2, 1, 2, 1)

``split`` is the share of an expert's prefill tokens that each copy gets. ``decode_device`` is the
only device that serves an expert's decode tokens, as prefill and decode are balanced separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from msgspec.structs import replace

from cluster.core.codec import Message, to_plain
from cluster.core.errors import ConfigError

FREE_SLOT = -1
"""Value that stands for the expert of an empty slot."""
_MAX_TABLE = 1 << 24
"""Maximum number of (device, expert) pairs for which a table is allocated."""


class BankPlacement(Message, frozen=True, kw_only=True):
    """The expert placement of one bank. A device is the index ``Member.device`` of an expert
    worker."""

    bank: str
    """Kind of bank within its layer, ``mlp`` or ``attention``."""
    layer: int
    """Index of the bank's layer in the model."""
    num_experts: int
    """Number of logical experts of the bank."""
    physical_to_logical: tuple[tuple[int, ...], ...]
    """Logical expert in each slot, as ``[device][expert slot]``; ``FREE_SLOT`` for an empty
    slot."""
    split: tuple[tuple[float, ...], ...]
    """Share of its expert's prefill tokens that the copy in each slot computes, as
    ``[device][expert slot]``; the shares of an expert's copies sum to 1."""
    decode_device: tuple[int, ...]
    """Device that computes the decode tokens of each expert, as ``[logical expert]``."""

    def __post_init__(self) -> None:
        if not self._is_valid():
            self._refuse()

    def _is_valid(self) -> bool:
        """Whether the fields keep all rules; False also if ``_refuse`` must decide.

        Every worker checks every placement, in which a large model has tens of thousands of slots,
        so columns are compared at once.
        """
        num_experts, rows = self.num_experts, self.physical_to_logical
        lengths = [*map(len, rows)]
        is_even = lengths == [*map(len, self.split)] and len(self.decode_device) == num_experts
        if not is_even or len(rows) * num_experts > _MAX_TABLE:
            return False
        try:
            slots = np.fromiter(chain.from_iterable(rows), np.int64, sum(lengths))
            decode = np.array(self.decode_device, np.int64)
        except OverflowError:
            return False
        filled = slots != FREE_SLOT
        experts = slots[filled]
        if not len(experts) or experts.min() < 0 or experts.max() >= num_experts:
            return False
        shares = np.fromiter(chain.from_iterable(self.split), np.float64, len(slots))[filled]
        if decode.min() < 0 or decode.max() >= len(rows) or not shares.min() >= 0:  # or NaN
            return False
        first = np.repeat(np.arange(0, len(rows) * num_experts, num_experts), lengths)[filled]
        holds = np.zeros(len(rows) * num_experts, bool)
        holds[first + experts] = True
        totals = np.bincount(experts, shares, num_experts)
        is_decoded = holds[decode * num_experts + np.arange(num_experts)].all()
        is_once = np.count_nonzero(holds) == len(experts)
        return bool(is_once and is_decoded and (abs(totals - 1.0) <= 1e-6).all())

    def _refuse(self) -> None:
        """Raise ``ConfigError`` with the first rule that the fields break, if they break one."""
        where = f"placement of bank {self.bank} layer {self.layer}"
        shares = [0.0] * self.num_experts
        holders: list[list[int]] = [[] for _ in range(self.num_experts)]
        if len(self.split) != len(self.physical_to_logical):
            raise ConfigError(where, len(self.split), "split must have a row for each device")
        if len(self.decode_device) != self.num_experts:
            rule = f"decode_device must have one for each of the {self.num_experts} experts"
            raise ConfigError(where, len(self.decode_device), rule)
        for device, slots in enumerate(self.physical_to_logical):
            held = [e for e in slots if e != FREE_SLOT]
            bad = [e for e in held if not 0 <= e < self.num_experts]
            if bad:
                raise ConfigError(where, bad[0], f"expert must be below {self.num_experts}")
            if len(set(held)) != len(held):
                raise ConfigError(where, list(slots), f"device {device} holds an expert twice")
            if len(self.split[device]) != len(slots):
                raise ConfigError(where, len(self.split[device]), "split must match the slots")
            for expert, share in zip(slots, self.split[device], strict=True):
                if expert != FREE_SLOT:
                    if not share >= 0:  # also refuses NaN
                        rule = f"share of expert {expert} must be from 0 to 1"
                        raise ConfigError(where, share, rule)
                    shares[expert] += share
                    holders[expert].append(device)
        num_slots = sum(len(slots) for slots in self.physical_to_logical)
        if num_slots < self.num_experts:
            rule = f"must be at least num_experts ({self.num_experts}) in total: {where}"
            raise ConfigError("num_expert_slots", num_slots, rule)
        for expert, total in enumerate(shares):
            if not holders[expert]:
                raise ConfigError(where, expert, "expert has no copy")
            if abs(total - 1.0) > 1e-6:
                raise ConfigError(where, total, f"shares of expert {expert} must sum to 1")
            if self.decode_device[expert] not in holders[expert]:
                raise ConfigError(
                    where, self.decode_device[expert], f"decode_device holds no expert {expert}"
                )

    @property
    def num_devices(self) -> int:
        """Number of devices in the placement, including devices without experts."""
        return len(self.physical_to_logical)

    def copies(self) -> Iterator[tuple[int, int, int]]:
        """Yield all copies of experts as (device, expert slot, logical expert), by device and
        slot."""
        for device, slots in enumerate(self.physical_to_logical):
            for slot, expert in enumerate(slots):
                if expert != FREE_SLOT:
                    yield device, slot, expert

    def holders(self, expert: int) -> tuple[int, ...]:
        """Return the devices that hold a copy of an expert, ascending."""
        return tuple(device for device, _ in self.logical_to_physical(expert))

    @property
    def replica_count(self) -> tuple[int, ...]:
        """Number of copies of each expert, as ``[logical expert]``."""
        counts = Counter(chain.from_iterable(self.physical_to_logical))
        return tuple(counts[expert] for expert in range(self.num_experts))

    def logical_to_physical(self, expert: int) -> tuple[tuple[int, int], ...]:
        """Return (device, expert slot) of all copies of an expert, by device."""
        return tuple(
            (device, slots.index(expert))
            for device, slots in enumerate(self.physical_to_logical)
            if expert in slots
        )

    @classmethod
    def from_maps(
        cls,
        *,
        bank: str,
        layer: int,
        num_experts: int,
        physical_to_logical: Sequence[Sequence[int]],
        split: Sequence[Sequence[float]] | None = None,
        decode_device: Sequence[int] | None = None,
    ) -> BankPlacement:
        """Build a bank's placement with defaults: equal shares, and decode on each expert's lowest
        device."""
        maps = tuple(tuple(int(e) for e in slots) for slots in physical_to_logical)
        holders: list[list[int]] = [[] for _ in range(num_experts)]
        for device, slots in enumerate(maps):
            for e in set(slots):
                if 0 <= e < num_experts:
                    holders[e].append(device)
        if split is None:
            split = [
                [1.0 / len(holders[e]) if 0 <= e < num_experts else 0.0 for e in s] for s in maps
            ]
        if decode_device is None:
            decode_device = [each[0] if each else -1 for each in holders]
        return cls(
            bank=bank,
            layer=layer,
            num_experts=num_experts,
            physical_to_logical=maps,
            split=tuple(tuple(float(x) for x in s) for s in split),
            decode_device=tuple(int(d) for d in decode_device),
        )

    def with_slots(
        self, rows: Sequence[Sequence[int]], decode_device: Sequence[int] | None = None
    ) -> BankPlacement:
        """Return a placement with other slots; copies that stay on their device keep their roles.

        ``rows``: ``[device][slot]``, with every expert; tuples are kept. The other copies get the
        shares of removed ones in proportion. The lowest device with an expert replaces a decode
        device that lost it; if that had no prompts, at best one without. ``decode_device``: all.
        """
        maps = tuple(row if isinstance(row, tuple) else tuple(map(int, row)) for row in rows)
        idle = {d for d, shares in enumerate(self.split) if not any(shares)}  # no prompts
        decode = decode_device or [
            d
            if e in maps[d]
            else min(((i in idle) != (d in idle), i) for i, row in enumerate(maps) if e in row)[1]
            for e, d in enumerate(self.decode_device)
        ]
        return replace(
            self, physical_to_logical=maps, split=self._shares(maps), decode_device=tuple(decode)
        )

    def _shares(self, rows: Sequence[tuple[int, ...]]) -> tuple[tuple[float, ...], ...]:
        """Return the shares of copies in other slots. Experts that do not move keep theirs."""
        slots, split = self.physical_to_logical, self.split
        pairs = (pair for pair in zip_longest(slots, rows, fillvalue=()) if pair[0] != pair[1])
        moved = set(chain.from_iterable(chain.from_iterable(pairs))) - {FREE_SLOT}
        before = {  # of the devices with other shares
            d: dict(zip(slots[d], split[d], strict=True)) if d < len(slots) else {}
            for d, row in enumerate(rows)
            if slots[d : d + 1] != (row,) or not moved.isdisjoint(row)
        }
        totals, copies = dict.fromkeys(moved, 0.0), dict.fromkeys(moved, 0)
        for device, known in before.items():
            for expert in moved.intersection(rows[device]):
                totals[expert] += known.get(expert, 0.0)
                copies[expert] += 1

        def part(known: Mapping[int, float], expert: int) -> float:
            share = 0.0 if expert == FREE_SLOT else known.get(expert, 0.0)
            if expert not in moved:
                return share
            return share / totals[expert] if totals[expert] > 0 else 1.0 / copies[expert]

        return tuple(
            tuple([part(before[device], expert) for expert in row])
            if device in before
            else split[device]
            for device, row in enumerate(rows)
        )

    def without_devices(self, lost: frozenset[int]) -> BankPlacement | None:
        """Return the placement without experts on the ``lost`` devices; None if an expert has no
        copy left.

        Shares and decode devices change as in ``with_slots``. Device indices do not change.
        """
        rows = [
            (FREE_SLOT,) * len(slots) if d in lost else slots
            for d, slots in enumerate(self.physical_to_logical)
        ]
        is_whole = len(set().union(*rows) - {FREE_SLOT}) == self.num_experts
        return self.with_slots(rows) if is_whole else None


class ExpertPlacement(Message, frozen=True, kw_only=True):
    """The expert placement of all banks in one placement epoch."""

    epoch: int
    """Number of the placement epoch; each new placement has a higher one."""
    banks: tuple[BankPlacement, ...]
    """Placement of each bank, in the order of the model's bank list."""

    @property
    def num_devices(self) -> int:
        """Number of devices in the placement, including devices without experts."""
        return self.banks[0].num_devices if self.banks else 0

    def missing(self, device: int, held: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
        """Yield (bank, slot, expert) for each expert that the placement assigns to a device's slot
        and that is not in this slot.

        ``held``: ``[bank][slot]``, the expert in each slot, or ``FREE_SLOT``. Banks and slots
        beyond the end of ``held`` count as empty.
        """
        for bank, maps in enumerate(self.banks):
            row, wanted = tuple(held[bank] if bank < len(held) else ()), maps.physical_to_logical
            if row == wanted[device]:
                continue
            for slot, expert in enumerate(wanted[device]):
                if expert != FREE_SLOT and row[slot : slot + 1] != (expert,):
                    yield bank, slot, expert

    def packed(self) -> ExpertPlacement:
        """Return a placement with the same experts on each device, but without free slots."""
        banks = (
            b.with_slots([[e for e in row if e != FREE_SLOT] for row in b.physical_to_logical])
            for b in self.banks
        )
        return replace(self, banks=tuple(banks))

    def up_to(self, num_devices: int) -> ExpertPlacement:
        """Return the placement of the first ``num_devices`` devices; all further devices must be
        empty."""
        banks = (
            replace(
                b,
                physical_to_logical=b.physical_to_logical[:num_devices],
                split=b.split[:num_devices],
            )
            for b in self.banks
        )
        return replace(self, banks=tuple(banks))

    def with_shares(self, other: ExpertPlacement) -> ExpertPlacement:
        """Return this placement's slots with the shares and decode devices of ``other``."""
        by_key = {(b.bank, b.layer): b for b in other.banks}
        banks = (by_key[b.bank, b.layer].with_slots(b.physical_to_logical) for b in self.banks)
        return replace(self, banks=tuple(banks))

    def without_devices(self, lost: frozenset[int], epoch: int) -> ExpertPlacement | None:
        """Return the placement without experts on ``lost`` devices, with the number ``epoch``; None
        if an expert has no copy left."""
        left = [b.without_devices(lost) for b in self.banks]
        kept = tuple(b for b in left if b is not None)
        return ExpertPlacement(epoch=epoch, banks=kept) if len(kept) == len(left) else None

    def to_dict(self) -> dict[str, Any]:
        """Return the placement as plain data in the file format."""
        return {"schema": 1, **to_plain(self)}

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], num_experts: Mapping[tuple[str, int], int] | None = None
    ) -> ExpertPlacement:
        """Read a placement from plain data in the file format. Raises ``ConfigError`` with the
        invalid bank.

        ``num_experts``: by (bank, layer), for data without these numbers.
        """
        if data.get("schema") != 1:
            raise ConfigError("placement.schema", data.get("schema"), "must be 1")
        banks = []
        for entry in data["banks"]:
            key = (str(entry["bank"]), int(entry["layer"]))
            total = entry.get("num_experts") or (num_experts or {}).get(key)
            if total is None:
                raise ConfigError("placement.banks", key, "is not a bank of this model")
            bank = BankPlacement.from_maps(
                bank=key[0],
                layer=key[1],
                num_experts=int(total),
                physical_to_logical=entry["physical_to_logical"],
                split=entry.get("split"),
                decode_device=entry.get("decode_device"),
            )
            banks.append(bank)
        return cls(epoch=int(data.get("epoch", 1)), banks=tuple(banks))


@dataclass(frozen=True, kw_only=True, slots=True)
class BankShape:
    """Kind, layer and number of experts of one bank, which a planner needs."""

    bank: str
    """Kind of bank within its layer, ``mlp`` or ``attention``."""
    layer: int
    """Index of the bank's layer in the model."""
    num_experts: int


def contiguous(
    banks: Sequence[BankShape], num_devices: int, num_redundant: int = 0, epoch: int = 1
) -> ExpertPlacement:
    """Return a placement in which each device has an equal block of consecutive experts.

    The ``num_redundant`` spare slots of device d hold the first experts of devices d+1, d+2, .. or
    stay free. Raises ``ConfigError`` if a bank has fewer experts than there are devices.
    """
    placed = []
    for shape in banks:
        if num_devices > shape.num_experts:
            raise ConfigError(
                "num_expert_workers",
                num_devices,
                f"must not exceed the {shape.num_experts} experts of a bank: "
                "more workers than can ever have work",
            )
        base, extra = divmod(shape.num_experts, num_devices)
        slots_each = base + (1 if extra else 0) + num_redundant
        maps: list[list[int]] = []
        owners: list[int] = []
        for d in range(num_devices):
            start = len(owners)
            owners += [d] * (base + (d < extra))
            own = list(range(start, len(owners)))
            num_others = shape.num_experts - len(own)
            others = range(len(owners), len(owners) + min(num_redundant, num_others))
            slots = own + [e % shape.num_experts for e in others]
            maps.append(slots + [FREE_SLOT] * (slots_each - len(slots)))
        placed.append(
            BankPlacement.from_maps(
                bank=shape.bank,
                layer=shape.layer,
                num_experts=shape.num_experts,
                physical_to_logical=maps,
                decode_device=owners,
            )
        )
    return ExpertPlacement(epoch=epoch, banks=tuple(placed))
