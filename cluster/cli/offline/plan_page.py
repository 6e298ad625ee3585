"""Makes the self-contained HTML page of ``plan placement --plot``."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement
from cluster.planner.base import Plan

TEMPLATE = Path(__file__).with_name("plan_page.html")


def make_page(profile: LoadProfile, names: tuple[str, str], plans: tuple[Plan, Plan]) -> str:
    """Make the HTML page for two placements of the same banks; ``plans[1]`` is the new plan."""
    planned = plans[1]
    data = {
        "names": names,
        "devices": planned.placement.num_devices,
        "banks": [_bank(load, plans, index) for index, load in enumerate(profile.banks)],
        "moves": [m.to_dict() for m in planned.moves],
        "decode": [_decode(plan) for plan in plans],
        "move_fraction": planned.move_fraction,
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = f"Expert placement of {html.escape(profile.model)}"
    return TEMPLATE.read_text().replace("{{title}}", title).replace("{{data}}", text)


def _bank(load: BankLoad, plans: Sequence[Plan], index: int) -> dict[str, Any]:
    total = sum(load.counts) or 1.0
    return {
        "name": f"layer {load.layer}, {load.bank}",
        "bank": load.bank,
        "layer": load.layer,
        "load": [round(c / total, 7) for c in load.counts],
        "balancedness": [round(p.balancedness[index], 5) for p in plans],
        "copies": [_copies(_find(p, load)) for p in plans],
    }


def _find(plan: Plan, load: BankLoad) -> BankPlacement:
    key = (load.bank, load.layer)
    return next(b for b in plan.placement.banks if (b.bank, b.layer) == key)


def _copies(bank: BankPlacement) -> list[list[list[float]]]:
    """Return, as ``[device][copy]``: expert, prefill share of the copy, 1 if it serves decode."""
    return [
        [
            [expert, round(share, 5), int(bank.decode_device[expert] == device)]
            for expert, share in zip(slots, split, strict=True)
            if expert != FREE_SLOT
        ]
        for device, (slots, split) in enumerate(
            zip(bank.physical_to_logical, bank.split, strict=True)
        )
    ]


def _decode(plan: Plan) -> dict[str, float]:
    return {str(rows): round(v, 4) for rows, v in plan.decode_slots_over_floor.items()}
