"""Reads ``adapter_config.json``, the parameters of a LoRA adapter. Pure; no torch.

Unknown fields and values that request unsupported features are refused with an error.

Source: the fields of ``LoraConfig`` of PEFT 0.18.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.core.errors import CheckpointError

Number = TypeVar("Number", int, float)
CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 1024 * 1024
_MAX_ALPHA = 1e6
_PATTERN_KEY = re.compile(r"\^?(?:[\w-]|\\?\.)+")

_HAS_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Ignored fields of ``adapter_config.json``: they are about training, or about modules that have no
tensors in the adapter."""
_READ = frozenset(
    {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "target_modules", "use_rslora"}
)
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` with which PEFT leaves the model's own weights unchanged."""
_TASKS = (None, "", "CAUSAL_LM")


def _is_default(value: object) -> bool:
    """Whether a field of ``adapter_config.json`` has its default value, so that its feature is
    off."""
    return value is None or value is False or value in ("", [], {})


_CHECKED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "bias": (lambda v: v in (None, "none"), "must be 'none': biases are not adapted"),
    "init_lora_weights": (
        lambda v: v in _STARTS,
        "is not supported: it may have changed the model's own weights; convert the adapter",
    ),
    "peft_type": (lambda v: v == "LORA", "must be 'LORA'"),
    "task_type": (lambda v: v in _TASKS, "must be 'CAUSAL_LM'"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSettings:
    """Parameters of a LoRA adapter, from its ``adapter_config.json``."""

    rank: int
    """Rank of modules that ``rank_pattern`` does not name."""
    alpha: float
    """Alpha of modules that ``alpha_pattern`` does not name."""
    has_root_scale: bool
    """Whether the scale of deltas is alpha / sqrt(rank) instead of alpha / rank."""
    ranks: Mapping[str, int]
    """Ranks from ``rank_pattern``, by the end of a module's name, or by ``^`` and the complete
    name."""
    alphas: Mapping[str, float]
    """Alphas from ``alpha_pattern``, by the end of a module's name, or by ``^`` and the complete
    name."""
    targets: tuple[str, ...] | None
    """Ends of the names of target modules; None (any module) if the file has no such list."""

    def rank_of(self, module: str) -> int:
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the scale of a module's delta."""
        rank = self.rank_of(module)
        return _matching(self.alphas, module, self.alpha) / (
            math.sqrt(rank) if self.has_root_scale else rank
        )

    def has_target(self, module: str) -> bool:
        """Whether ``targets`` permits tensors for a module; always True if ``targets`` is None."""
        return self.targets is None or any(_ends_with(module, end) for end in self.targets)


def read_settings(folder: Path) -> tuple[AdapterSettings, bytes]:
    """Return the parameters of an adapter folder, and the bytes of its ``adapter_config.json``.

    Raises ``CheckpointError``.
    """
    file = folder / CONFIG_FILE
    try:
        if not file.is_file():
            raise CheckpointError(f"{folder.name}: there is no {CONFIG_FILE} in the folder")
        with file.open("rb") as opened:
            data = opened.read(_MAX_CONFIG_BYTES + 1)
    except OSError as err:
        raise CheckpointError(f"{CONFIG_FILE} cannot be read: {err.strerror}") from err
    if len(data) > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{CONFIG_FILE} has more than {_MAX_CONFIG_BYTES} bytes")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{CONFIG_FILE} is not JSON: {err}") from err
    if not isinstance(fields, dict):
        raise CheckpointError(f"{CONFIG_FILE} must hold a JSON object")
    return parse_settings(fields), data


def parse_settings(fields: Mapping[str, Any]) -> AdapterSettings:
    """Parse the fields of ``adapter_config.json``. Raises ``CheckpointError`` with field, value and
    rule."""
    for name in ("peft_type", "r", "lora_alpha"):
        if name not in fields:
            raise CheckpointError(f"{CONFIG_FILE}: {name} is missing")
    for name, value in fields.items():
        _check_field(name, value)
    rank = _integer("r", fields["r"])
    alpha = _number("lora_alpha", fields["lora_alpha"])
    return AdapterSettings(
        rank=rank,
        alpha=alpha,
        has_root_scale=_flag("use_rslora", fields.get("use_rslora")),
        ranks=_pattern("rank_pattern", fields.get("rank_pattern"), _integer),
        alphas=_pattern("alpha_pattern", fields.get("alpha_pattern"), _number),
        targets=_targets(fields.get("target_modules")),
    )


def _check_field(name: str, value: object) -> None:
    if name in _HAS_NO_EFFECT or name in _READ:
        return
    is_right, rule = _CHECKED.get(name, (_is_default, "is not supported"))
    if not is_right(value):
        raise _refused(name, value, rule)


def _refused(name: str, value: object, rule: str) -> CheckpointError:
    return CheckpointError(f"{CONFIG_FILE}: {name} ({_shown(value)}) {rule}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 128 else f"{text[:125]}..."


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | None):
        raise _refused(name, value, "must be true or false")
    return bool(value)


def _integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refused(name, value, "must be an integer of at least 1")
    return value


def _number(name: str, value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, int | float) or not is_number or not abs(value) <= _MAX_ALPHA:
        raise _refused(name, value, f"must be a number within +-{_MAX_ALPHA:g}")
    return float(value)


def _pattern(name: str, value: object, read: Callable[[str, object], Any]) -> Mapping[str, Any]:
    """Parse a mapping by module names or ends of names. Raises ``CheckpointError`` for other
    regular expressions."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _refused(name, value, "must be an object")
    found = {}
    for key, number in value.items():
        if not _PATTERN_KEY.fullmatch(key):
            raise _refused(name, key, "must name modules without a regular expression")
        found[key.replace("\\.", ".")] = read(f"{name}.{key}", number)
    return found


def _targets(value: object) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _refused("target_modules", value, "must be a list of names, or a string")
    return tuple(value)


def _matching(numbers: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first key that matches a module, or ``default``."""
    for key, number in numbers.items():
        if module == key[1:] if key.startswith("^") else _ends_with(module, key):
            return number
    return default


def _ends_with(module: str, end: str) -> bool:
    return module == end or module.endswith(f".{end}")
