"""Rotary embedding: each type against its formula in double precision, both config spellings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.errors import CheckpointError
from workers.model.rope import Rope, inverse_frequencies, parse_rope, rotate

D = 16
CPU = torch.device("cpu")


def rope(config: dict[str, Any], context: int = 64) -> Rope:
    return Rope(parse_rope(config, D, context), 256, torch.float32, CPU)


def angles(made: Rope, positions: list[int], prompt_length: int = 1) -> torch.Tensor:
    """[T, D/2] rotation of each pair, from -pi to pi."""
    rows = torch.tensor(positions)
    cos, sin = made.rows(rows, torch.full_like(rows, prompt_length))
    return torch.atan2(sin[:, 0, D // 2 :], cos[:, 0, D // 2 :])


def assert_angles(got: torch.Tensor, positions: list[int], inverse: list[float]) -> None:
    for row, position in zip(got.tolist(), positions, strict=True):
        for angle, frequency in zip(row, inverse, strict=True):
            difference = (angle - position * frequency) % (2 * math.pi)
            assert min(difference, 2 * math.pi - difference) < 2e-4


def plain(theta: float) -> list[float]:
    return [theta ** (-2 * i / D) for i in range(D // 2)]


def test_default_and_linear() -> None:
    positions = [0, 1, 7, 200]
    assert_angles(angles(rope({"rope_theta": 500.0}), positions), positions, plain(500.0))
    linear = rope({"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert_angles(angles(linear, positions), positions, [f / 4 for f in plain(10000.0)])


def test_dynamic_depends_on_the_request_alone() -> None:
    made = rope({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, context=48)

    def scaled(length: int) -> list[float]:
        if length <= 48:
            return plain(10000.0)
        return plain(10000.0 * ((4.0 * length / 48) - 3.0) ** (D / (D - 2)))

    assert_angles(angles(made, [0, 20, 47], 10), [0, 20, 47], scaled(48))
    assert_angles(angles(made, [3], 100), [3], scaled(100))  # a row of a long prompt
    assert_angles(angles(made, [120], 100), [120], scaled(121))  # beyond it: its own length
    together = angles(made, [3, 120], 100)
    assert torch.equal(together[:1], angles(made, [3], 100))


def test_yarn() -> None:
    config = {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
        }
    }
    parsed = parse_rope(config, D, 512)
    assert parsed.attention_factor == pytest.approx(0.1 * math.log(8) + 1)

    def dimension(rotations: float) -> float:
        return D * math.log(64 / (rotations * 2 * math.pi)) / (2 * math.log(10000))

    low, high = max(math.floor(dimension(4)), 0), min(math.ceil(dimension(1)), D - 1)
    expected = []
    for i, frequency in enumerate(plain(10000.0)):
        ramp = min(max((i - low) / (high - low), 0), 1)
        expected.append(frequency / 8 * ramp + frequency * (1 - ramp))
    assert inverse_frequencies(parsed).tolist() == pytest.approx(expected, rel=1e-5)
    cos, sin = Rope(parsed, 64, torch.float32, CPU).rows(torch.tensor([5]), torch.tensor([1]))
    assert (cos**2 + sin**2).mean().sqrt() == pytest.approx(parsed.attention_factor, rel=1e-5)


def test_yarn_mscales() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    parsed = parse_rope({"rope_scaling": scaling}, D, 64)
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert parsed.attention_factor == pytest.approx(expected)


def test_llama3() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    expected = []
    for frequency in plain(10000.0):
        wavelength = 2 * math.pi / frequency
        share = (64 / wavelength - 1) / 3
        if wavelength > 64:
            expected.append(frequency / 8)
        elif wavelength < 16:
            expected.append(frequency)
        else:
            expected.append((1 - share) * frequency / 8 + share * frequency)
    found = inverse_frequencies(parse_rope({"rope_scaling": scaling}, D, 512))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_new_spelling_and_null() -> None:
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}
    parsed = parse_rope({"rope_parameters": parameters, "rope_theta": 5.0}, D, 64)
    assert (parsed.rope_type, parsed.theta, parsed.factor) == ("linear", 777.0, 2.0)
    assert parse_rope({"rope_scaling": None, "rope_theta": None}, D, 64).theta == 10000.0


@pytest.mark.parametrize("name", ["longrope", "su", "mrope"])
def test_unknown_type_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"rope type '{name}' is not supported"):
        parse_rope({"rope_scaling": {"rope_type": name, "factor": 2.0}}, D, 64)


@pytest.mark.parametrize(
    ("name", "head_dim", "more", "message"),
    [
        ("yarn", D, {"rope_theta": 1}, "rope_theta 1 must be above 1 with rope type 'yarn'"),
        ("dynamic", 2, {}, "the 2 rotated elements of a head must be more than 2"),
        ("llama3", D, {"low_freq_factor": 4}, "high_freq_factor 4 must be above low_freq_factor 4"),
    ],
)
def test_parameters_without_frequencies_are_refused(
    name: str, head_dim: int, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_rope({"rope_scaling": {"rope_type": name, "factor": 2.0, **more}}, head_dim, 64)


def test_missing_factor_and_wrong_kind_are_refused() -> None:
    with pytest.raises(CheckpointError, match="'linear' needs a factor"):
        parse_rope({"rope_scaling": {"type": "linear"}}, D, 64)
    with pytest.raises(CheckpointError, match="must be an object"):
        parse_rope({"rope_scaling": "linear"}, D, 64)


def test_rotation_turns_pairs_and_keeps_lengths() -> None:
    made = rope({})
    heads = torch.randn(3, 2, D, generator=torch.Generator().manual_seed(0))
    cos, sin = made.rows(torch.tensor([0, 5, 9]), torch.ones(3, dtype=torch.int64))
    turned = rotate(heads, cos, sin)
    assert torch.equal(turned[0], heads[0])
    as_complex = torch.complex(heads[..., : D // 2], heads[..., D // 2 :])
    phase = torch.polar(torch.ones(3, 1, D // 2), angles(made, [0, 5, 9]).unsqueeze(1))
    expected = torch.view_as_real(as_complex * phase)
    assert torch.allclose(turned[..., : D // 2], expected[..., 0], atol=1e-5)
    assert torch.allclose(turned[..., D // 2 :], expected[..., 1], atol=1e-5)


def inverse_of(config: dict[str, Any], context: int, length: int) -> list[float]:
    """Plain frequencies of every type for a request of ``length`` tokens."""
    scaling = config.get("rope_scaling") or {}
    name, factor = scaling.get("rope_type", "default"), scaling.get("factor", 1.0)
    base = plain(config["rope_theta"])
    if name == "linear":
        return [f / factor for f in base]
    if name == "dynamic" and length > context:
        stretch = (factor * length / context) - (factor - 1)
        return plain(config["rope_theta"] * stretch ** (D / (D - 2)))
    if name == "llama3":
        return [between(f, scaling) for f in base]
    if name == "yarn":
        return ramped(base, config["rope_theta"], scaling)
    return base


def ramped(base: list[float], theta: float, scaling: dict[str, float]) -> list[float]:
    """yarn's frequencies."""
    edges = []
    for rotations in (scaling["beta_fast"], scaling["beta_slow"]):
        original = scaling["original_max_position_embeddings"]
        edges.append(D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta)))
    low, high = edges
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramps = [min(max((i - low) / (high - low or 0.001), 0), 1) for i in range(len(base))]
    factor = scaling["factor"]
    return [f / factor * r + f * (1 - r) for f, r in zip(base, ramps, strict=True)]


def between(frequency: float, scaling: dict[str, float]) -> float:
    """llama3's frequency."""
    original, wavelength = scaling["original_max_position_embeddings"], 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength > original / low:
        return frequency / scaling["factor"]
    if wavelength < original / high:
        return frequency
    share = (original / wavelength - low) / (high - low)
    return (1 - share) * frequency / scaling["factor"] + share * frequency


SCALINGS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": st.floats(1.5, 8.0)}
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1.5, 8.0),
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
            "original_max_position_embeddings": st.integers(16, 128),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": st.floats(1.5, 8.0),
            "original_max_position_embeddings": st.integers(16, 128),
            "beta_fast": st.floats(2.0, 40.0),
            "beta_slow": st.floats(0.25, 1.5),
            "truncate": st.booleans(),
        }
    ),
)


@given(
    scaling=SCALINGS,
    theta=st.floats(500.0, 1e6),
    context=st.integers(16, 128),
    rows=st.lists(st.tuples(st.integers(0, 255), st.integers(1, 256)), min_size=1, max_size=6),
)
def test_every_row_has_the_angles_of_its_own_position_and_length(
    scaling: dict[str, Any] | None, theta: float, context: int, rows: list[tuple[int, int]]
) -> None:
    """Rows are (position, prompt length) of different requests in one step."""
    config = {"rope_theta": theta, "rope_scaling": scaling}
    positions, prompts = (torch.tensor(column) for column in zip(*rows, strict=True))
    cos, sin = rope(config, context).rows(positions, prompts)
    found = torch.atan2(sin[:, 0, D // 2 :], cos[:, 0, D // 2 :])
    for row, (position, prompt) in zip(found, rows, strict=True):
        expected = inverse_of(config, context, max(prompt, position + 1))
        assert_angles(row.unsqueeze(0), [position], expected)


@pytest.mark.parametrize("value", ["x", [1], -1.0, math.nan, math.inf, 10**400, True])
@pytest.mark.parametrize(
    "key",
    [
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
        "low_freq_factor",
        "high_freq_factor",
    ],
)
def test_a_parameter_that_is_no_positive_number_is_refused_by_name(key: str, value: Any) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, key: value}
    with pytest.raises(CheckpointError, match=f"{key} .* must be a number"):
        parse_rope({"rope_scaling": scaling}, D, 64)


@pytest.mark.parametrize("key", ["rotary_dim", "partial_rotary_factor"])
@pytest.mark.parametrize("value", [-1, D + 2, 10**400])
def test_a_rotated_share_that_is_none_is_refused_by_name(key: str, value: int) -> None:
    with pytest.raises(CheckpointError, match=f"{key} {value} must leave an even number"):
        parse_rope({key: value}, D, 64, rotary_share=0.5)


def test_a_null_parameter_is_absent() -> None:
    scaling = {"rope_type": "llama3", "factor": 2.0}
    nulls = dict.fromkeys(("low_freq_factor", "high_freq_factor", "rope_theta"))
    assert parse_rope({"rope_scaling": scaling | nulls}, D, 64) == parse_rope(
        {"rope_scaling": scaling}, D, 64
    )
