"""Documents about expert load and balancedness, for commands and the admin API.

All devices run the same layer at a time. Therefore the balancedness of all layers is the sum of
their mean device loads divided by the sum of their largest device loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from cluster.core.group_placement import is_apart, prompt_devices
from cluster.core.load_profile import LoadProfile, device_loads
from cluster.core.load_report import BankKey
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.load.tracker import CopyLoad, Floats, LoadTracker, Phase

PHASES: tuple[Phase, Phase] = ("prefill", "decode")
DeviceLoads = Mapping[BankKey, Sequence[float]]
"""Number of tokens of each device that holds experts, by bank."""


def slot_tokens(bank: BankPlacement, load: CopyLoad, phase: Phase | None = None) -> list[list[int]]:
    """Return the tokens that the copy in each slot computed, as ``[device][expert slot]``.

    ``phase`` None: prefill and decode together. ``load`` must be counted in the epoch of ``bank``,
    because its counts are by copy.
    """
    lengths = [*map(len, bank.physical_to_logical)]
    slots = np.array([*chain.from_iterable(bank.physical_to_logical)], np.int64)
    tokens, filled = np.zeros(len(slots), np.int64), np.flatnonzero(slots != FREE_SLOT)
    experts = slots[filled]
    if phase != "decode":
        order = np.argsort(experts, kind="stable")
        by_expert, copy = experts[order], np.empty_like(experts)
        copy[order] = np.arange(len(order)) - np.searchsorted(by_expert, by_expert)
        counted = copy < load.prefill.shape[1]
        tokens[filled[counted]] = load.prefill[experts[counted], copy[counted]]
    if phase != "prefill":
        devices = np.repeat(np.arange(len(lengths)), lengths)[filled]
        decodes = np.array(bank.decode_device, np.int64)[experts] == devices
        tokens[filled[decodes]] += load.decode[experts[decodes]]
    flat = iter(tokens.tolist())
    return [[*islice(flat, length)] for length in lengths]


def achieved_loads(
    placement: ExpertPlacement, load: LoadTracker, phase: Phase | None = None
) -> DeviceLoads:
    """Return the tokens that each device computed in this placement epoch, by bank: those of the
    newest load window, or else all of the epoch."""
    newest, epoch = load.windows[-1] if load.windows else None, placement.epoch
    copies = newest.copies if newest and newest.epoch == epoch else load.copies(epoch)
    return {
        key: _of_holders(bank, [sum(row) for row in slot_tokens(bank, copies[key], phase)], phase)
        for bank in placement.banks
        if (key := (bank.bank, bank.layer)) in copies
    }


def expected_loads(
    placement: ExpertPlacement, profile: LoadProfile | None, phase: Phase | None = None
) -> DeviceLoads:
    """Return the load of each device, by bank, if tokens choose experts as in ``profile``; empty
    without a profile.

    Prefill tokens follow the split weights, decode tokens the decode devices. Without a phase, all
    tokens count as prefill.
    """
    if profile is None:
        return {}
    found: dict[BankKey, Sequence[float]] = {}
    for bank in placement.banks:
        counts = profile.counts(bank.bank, bank.layer)
        if len(counts) != bank.num_experts:
            continue
        if phase == "decode":
            total = [0.0] * bank.num_devices
            for expert, device in enumerate(bank.decode_device):
                total[device] += counts[expert]
        else:
            total = [*device_loads(bank, counts)]
        found[bank.bank, bank.layer] = _of_holders(bank, total, phase or "prefill")
    return found


def balancedness_of(loads: Sequence[Sequence[float]]) -> float | None:
    """Return the balancedness of device loads ``[layer][device]``; None without load.

    The result is the sum of the layers' mean loads divided by the sum of their largest loads.
    """
    peaks = sum(max(each, default=0.0) for each in loads)
    means = sum(sum(each) / max(len(each), 1) for each in loads)
    return means / peaks if peaks > 0 else None


def num_at_risk(bank: BankPlacement, domains: Sequence[str]) -> int:
    """Return the number of a bank's experts with all copies in one failure domain.

    ``domains``: failure domain of each device.
    """
    found: list[set[str]] = [set() for _ in range(bank.num_experts)]
    for device, _, expert in bank.copies():
        found[expert].add(domains[device])
    return sum(len(where) == 1 for where in found)


def placement_report(
    placement: ExpertPlacement, load: LoadTracker, profile: LoadProfile | None
) -> dict[str, Any]:
    """Return the document of ``placement --json``: maps, observed load, and the resulting balance.

    ``load`` of a bank is its tokens by logical expert since the start. Balancedness is
    ``predicted`` from ``profile``, and ``achieved`` by the device loads in this placement epoch;
    None without load.
    """
    totals = load.totals()
    both = _balancedness(placement, load, profile)
    banks = [
        {
            "bank": bank.bank,
            "layer": bank.layer,
            "physical_to_logical": [list(s) for s in bank.physical_to_logical],
            "load": _numbers(totals.counts(key)) if key in totals.prefill else [],
            "balancedness": both[key],
        }
        for bank in placement.banks
        for key in [(bank.bank, bank.layer)]
    ]
    return {"schema": 1, "epoch": placement.epoch, "banks": banks}


def load_document(
    placement: ExpertPlacement,
    load: LoadTracker,
    profile: LoadProfile | None,
    model: str,
    top_k: int,
) -> dict[str, Any]:
    """Return the document of ``load --json``: a load profile since the start, with more fields.

    Fields of a bank: ``prefill`` and ``decode`` are the two parts of ``counts``; ``load`` equals
    ``counts``; ``window`` counts the newest load window, ``average`` is an exponential average;
    ``slots`` has the tokens of the current placement epoch by device and expert slot, None while no
    worker has counted any; ``watched`` lists the busiest experts, ``watched_tokens`` and
    ``rest_tokens`` count their tokens and those of all others (``LoadTracker.watched_tokens``);
    ``copies`` counts the copies of each expert; ``balancedness`` is ``predicted`` from ``profile``
    and ``achieved`` by the device loads in the epoch, and ``phases`` has it for prefill and decode.
    """
    totals, window, average = (load.sums(s) for s in ("total", "window", "average"))
    copies = load.copies(placement.epoch)
    both = _balancedness(placement, load, profile)
    by_phase = {phase: _balancedness(placement, load, profile, phase) for phase in PHASES}
    banks = []
    for bank in placement.banks:
        key = (bank.bank, bank.layer)
        has_load = key in totals.prefill
        sums = totals.counts(key) if has_load else np.zeros(bank.num_experts)
        counts = _numbers(sums)
        own, rest = load.watched_tokens(key, sums)
        banks.append(
            {
                "bank": bank.bank,
                "layer": bank.layer,
                "counts": counts,
                "load": counts,
                "prefill": _numbers(totals.prefill[key]) if has_load else None,
                "decode": _numbers(totals.decode[key]) if has_load else None,
                "window": _numbers(window.counts(key)) if key in window.prefill else None,
                "average": _numbers(average.counts(key)) if key in average.prefill else None,
                "slots": slot_tokens(bank, copies[key]) if key in copies else None,
                "watched": list(load.watched.get(key, ())),
                "watched_tokens": own,
                "rest_tokens": rest,
                "copies": list(bank.replica_count),
                "balancedness": both[key],
                "phases": {phase: found[key] for phase, found in by_phase.items()},
            }
        )
    return {
        "schema": 1,
        "model": model,
        "top_k": top_k,
        "tokens": round(totals.rows),
        "epoch": placement.epoch,
        "window_tokens": round(window.rows),
        "average_tokens": round(average.rows),
        "balancedness": both[None],
        "phases": {phase: found[None] for phase, found in by_phase.items()},
        "banks": banks,
    }


def _balancedness(
    placement: ExpertPlacement,
    load: LoadTracker,
    profile: LoadProfile | None,
    phase: Phase | None = None,
) -> dict[BankKey | None, dict[str, float | None]]:
    """Return ``predicted`` and ``achieved`` balancedness of each bank, and of all layers under
    None."""
    names = {
        "predicted": expected_loads(placement, profile, phase),
        "achieved": achieved_loads(placement, load, phase),
    }
    keys = [(bank.bank, bank.layer) for bank in placement.banks]
    found = {
        key: {
            name: balancedness_of(list(loads.values()) if key is None else [loads.get(key, ())])
            for name, loads in names.items()
        }
        for key in (None, *keys)
    }
    if phase is None and any(map(is_apart, placement.banks)):
        by_phase = [achieved_loads(placement, load, phase) for phase in PHASES]
        for key in found:
            found[key]["achieved"] = _mean_of_groups(by_phase, keys if key is None else [key])
    return found


def achieved_balancedness(placement: ExpertPlacement, load: LoadTracker) -> float | None:
    """Return the balancedness by ``achieved_loads``; None without load.

    If step groups have devices of their own, it is the mean of both groups, weighted by tokens.
    """
    if not any(map(is_apart, placement.banks)):
        return balancedness_of([*achieved_loads(placement, load).values()])
    by_phase = [achieved_loads(placement, load, phase) for phase in PHASES]
    return _mean_of_groups(by_phase, [(bank.bank, bank.layer) for bank in placement.banks])


def _mean_of_groups(by_phase: Sequence[DeviceLoads], keys: Sequence[BankKey]) -> float | None:
    """Return the mean balancedness of the phases in some banks, weighted by tokens; None without
    load."""
    found, total = 0.0, 0.0
    for by_bank in by_phase:
        loads = [by_bank.get(key, ()) for key in keys]
        tokens = sum(map(sum, loads))
        found, total = found + tokens * (balancedness_of(loads) or 0.0), total + tokens
    return found / total if total else None


def _of_holders(bank: BankPlacement, loads: Sequence[float], phase: Phase | None) -> list[float]:
    """Return ``loads`` by device without devices that hold no experts (lost ones).

    If step groups have devices of their own, only the devices of the group of ``phase``.
    """
    rows = enumerate(bank.physical_to_logical)
    held = [d for d, row in rows if any(expert != FREE_SLOT for expert in row)]
    if phase is not None and is_apart(bank):
        own = set(bank.decode_device) if phase == "decode" else prompt_devices(bank)
        held = [d for d in held if d in own]
    return [loads[d] for d in held]


def _numbers(counts: Floats) -> list[float]:
    """Return counts rounded to a tenth, whole numbers as integers."""
    whole = counts.astype(np.int64)
    if (whole == counts).all():
        return list(whole.tolist())
    return [int(c) if c.is_integer() else round(c, 1) for c in counts.tolist()]
