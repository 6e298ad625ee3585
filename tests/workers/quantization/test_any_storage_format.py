"""Any value in ``quantization_config`` is read, or refused with words."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import CheckpointError
from workers.quantization.storage_format import StorageFormat, parse_storage_format

pytestmark = pytest.mark.heavy

TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "num_bits": 4,
                "actorder": None,
            },
        }
    },
}
KNOWN: list[dict[str, Any]] = [
    {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_convert": None,
    },
    {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "checkpoint_format": "gptq",
        "dynamic": None,
    },
    {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "gemm"},
    TENSORS,
]
NUMBERS = st.integers(-2, 300) | st.floats()
WORDS = st.sampled_from(["fp8", "gptq", "awq", "compressed-tensors", "int", "group", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda own: st.lists(own, max_size=3) | st.dictionaries(WORDS | st.text(), own, max_size=3),
    max_leaves=6,
)
"""What JSON can say."""


def places(found: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where each value is, the whole included."""
    yield path
    keys = (
        found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    )
    for key in keys:
        yield from places(found[key], (*path, key))


def changed(known: dict[str, Any], path: tuple[str | int, ...], value: object) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    found: Any = copy.deepcopy(known)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


def is_read_or_refused(found: Any) -> bool:
    try:
        return isinstance(parse_storage_format(found), StorageFormat) or found is None
    except CheckpointError as err:
        return "quantization_config" in str(err)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: str(known["quant_method"]))
def test_what_is_known_is_read(known: dict[str, Any]) -> None:
    assert isinstance(parse_storage_format(known), StorageFormat)


@given(found=VALUES)
def test_any_value_is_read_or_refused(found: Any) -> None:
    assert is_read_or_refused(found)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: str(known["quant_method"]))
@given(data=st.data(), value=VALUES)
def test_any_value_of_a_key_is_read_or_refused(
    known: dict[str, Any], data: st.DataObject, value: object
) -> None:
    path = data.draw(st.sampled_from(list(places(known))))
    assert is_read_or_refused(changed(known, path, value)), path
    assert is_read_or_refused({**known, "more": value})


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: str(known["quant_method"]))
@pytest.mark.parametrize("value", [None, True, -1, 0.5, "x", [], ["x"], {}, {"x": []}], ids=repr)
def test_values_of_each_type_are_read_or_refused(known: dict[str, Any], value: object) -> None:
    for path in places(known):
        assert is_read_or_refused(changed(known, path, value)), path
