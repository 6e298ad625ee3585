"""Decides which keys of a checkpoint's ``quantization_config`` are read, ignored or refused.

Besides the meaning of the quantized values, tools also record how they chose them (calibration,
tuning, kernels to load with). A key that no reader has requested is ignored, unless its name
mentions a property of a weight or an activation: bits, scales, zero points, orders, rotations,
additions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.errors import CheckpointError

_NOTHING: tuple[Any, ...] = (None, False, "", "none", [], {})
"""Values with which a key of ``quantization_config`` has no effect, whatever the key."""
_NUMBERS = """
    bits format formats layout order zero zeros scale scales semantics kv
    activation activations rotation rotations hadamard quarot spinquant transform transforms
    permutation adapter adapters lora rank svd codebook codebooks outlier outliers
    residual residuals sparse sparsity pruned pruning
"""
_NUMBER_WORDS = frozenset(_NUMBERS.split())
"""Words in the names of ``quantization_config`` keys that indicate a change of the weights."""
_NUMBER_KEYS = frozenset({"static_attention_dtype", "packing"})
"""Keys of ``quantization_config`` that change the weights, although no word in their names shows
it."""
_HARMLESS_KEYS = frozenset(
    {"scale_dtype", "static_kv_granularity", "static_attention_granularity", "bits_per_weight"}
)
"""Keys of ``quantization_config`` that can be ignored, although words in their names indicate a
change of the weights: the files show the type of the scales."""
WHOLE_BITS = 16
"""Minimum number of bits for which numbers count as not quantized."""


class QuantizationKeys:
    """Keys of one JSON object in ``quantization_config``. Records which keys were read, for
    ``ignored``."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        """``name``: prefix of error messages; ``settings``: the JSON object."""
        self.name = name
        self._settings, self._rest = settings, set(settings)

    def value(self, key: str, default: Any = None) -> Any:
        """Return a key's value, in lower case if it is text."""
        self._rest.discard(key)
        found = self._settings.get(key, default)
        return found.lower() if isinstance(found, str) else found

    def present(self, key: str, older: str) -> str:
        """Return ``key``, or ``older`` if the config has only the older name."""
        return older if older in self._settings and key not in self._settings else key

    def one_of(self, key: str, *known: Any) -> Any:
        """Return a key's value. Raises ``CheckpointError`` if the value is not in ``known``.

        A key may be left out if None is in ``known``.
        """
        found = self.value(key)
        if key not in self._settings and None not in known:
            raise CheckpointError(f"{self.name}: {key} is missing")
        if found not in known:
            raise self.refused(key, " or ".join(repr(value) for value in known))
        return found

    def honoured(self, *keys: str) -> None:
        """Mark keys as read without reading their values, which the tensors in the files already
        show."""
        self._rest.difference_update(keys)

    def refused(self, key: str, rule: str = "") -> CheckpointError:
        """Return, without raising it, the error for an unsupported value of a key. ``rule``: the
        allowed values."""
        words = f"{self.name}: {key} {self._settings.get(key)!r} is not supported"
        return CheckpointError(f"{words}: must be {rule}" if rule else words)

    def ignored(self) -> tuple[str, ...]:
        """Return the keys that were set but not read, sorted; these keys have no effect.

        Raises ``CheckpointError`` for a key that would change the weights.
        """
        found = [key for key in sorted(self._rest) if self._settings[key] not in _NOTHING]
        for key in found:
            if _names_numbers(key) and not is_whole(key, self._settings[key]):
                raise self.refused(key)
        return tuple(found)


def _names_numbers(key: str) -> bool:
    if key in _HARMLESS_KEYS:
        return False
    return key in _NUMBER_KEYS or not _NUMBER_WORDS.isdisjoint(key.split("_"))


def is_whole(key: str, value: object) -> bool:
    """Whether a key's value says that numbers are not quantized, as ``act_bits`` 16 does."""
    return key.endswith("bits") and isinstance(value, int) and value >= WHOLE_BITS


def check_overrides(keys: QuantizationKeys, key: str, same: Mapping[str, Any]) -> None:
    """Check the settings of single modules by pattern, as in GPTQModel's ``dynamic`` and
    AutoRound's ``extra_config``.

    ``key``: name of the object with the patterns. An excluded module (``-:``, or at least 16 bits)
    is stored unquantized and needs no check. Raises ``CheckpointError`` if the settings of any
    other module differ from ``same``, the settings of the whole model.
    """
    found = keys.value(key)
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise keys.refused(key, "an object")
    for pattern, override in found.items():
        if str(pattern).startswith("-:") or override is False:
            continue
        if not isinstance(override, Mapping):
            raise CheckpointError(f"{keys.name}: {key} {pattern!r} {override!r} must be an object")
        if is_whole("bits", override.get("bits")):
            continue
        own = QuantizationKeys(f"{keys.name}: {key} {pattern!r}", override)
        for name in sorted(same.keys() & override.keys()):
            own.one_of(name, same[name])
        own.ignored()
