"""Placement files, in the format of ``expertmesh plan placement --json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.core.errors import ConfigError
from cluster.core.placement import BankShape, ExpertPlacement


def load_placement(path: Path, banks: Sequence[BankShape], num_devices: int) -> ExpertPlacement:
    """Read a placement file and check it against the model and the number of devices.

    Raises ``ConfigError`` with the name of the file and the rule that the file breaks.
    """
    wrong = partial(ConfigError, "placement_file", path.name)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as err:
        raise wrong(f"cannot be read: {err}") from err
    by_key = {(b.bank, b.layer): b.num_experts for b in banks}
    try:
        found = ExpertPlacement.from_dict(data, by_key)
    except ConfigError as err:
        raise wrong(f"breaks a rule: {err}") from err
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise wrong(f"is not a placement: {err!r}") from err
    order = {(b.bank, b.layer): b for b in found.banks}
    if set(order) != set(by_key):
        raise wrong(f"must have exactly the model's banks {sorted(by_key)}")
    for key, bank in order.items():
        if bank.num_devices != num_devices:
            raise wrong(f"bank {key} has {bank.num_devices} devices, the cluster has {num_devices}")
        if bank.num_experts != by_key[key]:
            raise wrong(f"bank {key} must have {by_key[key]} experts")
    return ExpertPlacement(epoch=found.epoch, banks=tuple(order[b.bank, b.layer] for b in banks))
