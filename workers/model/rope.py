"""Rotary position embedding: parameters in ``config.json``, and cosines and sines of rows.

Source: formulas of transformers ``modeling_rope_utils.py``; ``dynamic`` differs: it is defined per
request (see ``RopeConfig.rope_type``), so a result depends neither on the batch nor on history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from cluster.core.errors import CheckpointError

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
_MAX_NUMBER = 1e18
"""Maximum of a parameter, far above those of any model: its square is a float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Parameters of the rotary position embedding. A rope type leaves unused parameters at their
    defaults."""

    rope_type: RopeType = "default"
    """Scaling method, as in transformers, except that ``dynamic`` scales position p of a request
    for the length max(prompt length, p + 1)."""
    theta: float = 10000.0
    """Base of the frequencies."""
    head_dim: int
    """D: elements of a head."""
    rotary_dim: int
    """R: number of elements of a head that are rotated. If R < D, the other elements have frequency
    0, and all elements are in the order of ``rotation_order``."""
    has_neighbours: bool = False
    """Whether the checkpoint rotates element 2i with 2i + 1, not i with i + R/2."""
    max_position_embeddings: int
    """Context of the model in tokens."""
    original_max_position_embeddings: int
    """Context in tokens before the model's context was extended (yarn, llama3)."""
    factor: float = 1.0
    """Factor by which the context is extended, for all rope types except default."""
    attention_factor: float = 1.0
    """Factor of cosines and sines (yarn)."""
    beta_fast: float = 32.0
    """yarn: frequencies with more rotations than this within the original context are not
    scaled."""
    beta_slow: float = 1.0
    """yarn: frequencies with fewer rotations than this within the original context are divided by
    ``factor``."""
    truncate: bool = True
    """yarn: whether the dimensions that ``beta_fast`` and ``beta_slow`` select are rounded to
    integers."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original context / ``low_freq_factor`` are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original context / ``high_freq_factor`` are not scaled."""


def parse_rope(
    config: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    rotary_share: float | None = None,
    default_theta: float = 10000.0,
    has_neighbours: bool = False,
) -> RopeConfig:
    """Parse the rotary embedding of a ``config.json``: its keys ``rope_parameters``, or
    ``rope_theta`` and ``rope_scaling``.

    ``rotary_share`` is the family's default of ``partial_rotary_factor``; None: the family has no
    such key, and a value other than 1 is refused.

    Raises ``CheckpointError`` for a type that is not supported, such as longrope, and for a
    parameter that is not a positive number.
    """
    params = rope_parameters(config)
    for key, value in params.items():
        is_unknown = key == "partial_rotary_factor" and rotary_share is None
        if isinstance(value, Mapping) or (is_unknown and value not in (None, 1)):
            raise CheckpointError(
                f"config.json: {key} {value!r} of rope_parameters is not supported"
            )
    rotary_dim = head_dim
    if rotary_share is not None:
        rotary_dim = _rotary_dim(config, params, head_dim, rotary_share)
    theta = params.get("rope_theta") or config.get("rope_theta")
    name = params.get("rope_type") or params.get("type") or "default"
    if name not in get_args(RopeType):
        known = ", ".join(get_args(RopeType))
        raise CheckpointError(
            f"config.json: rope type {name!r} is not supported: it is not {known}"
        )
    original = params.get("original_max_position_embeddings")
    if original is None:
        original = config.get("original_max_position_embeddings") or None
    context = int(rope_number("original_max_position_embeddings", original, max_positions, least=1))
    factor = params.get("factor")
    if factor is None and name in ("linear", "dynamic", "llama3"):
        raise CheckpointError(f"config.json: rope type {name!r} needs a factor")
    factor = rope_number("factor", factor, max_positions / context)
    found = RopeConfig(
        rope_type=cast(RopeType, name),
        theta=rope_number("rope_theta", theta or None, default_theta),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        has_neighbours=has_neighbours,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=context,
        factor=factor,
        attention_factor=_attention_factor(params, factor) if name == "yarn" else 1.0,
        beta_fast=rope_number("beta_fast", params.get("beta_fast") or None, 32.0),
        beta_slow=rope_number("beta_slow", params.get("beta_slow") or None, 1.0),
        truncate=bool(params.get("truncate", True)),
        low_freq_factor=rope_number("low_freq_factor", params.get("low_freq_factor"), 1.0),
        high_freq_factor=rope_number("high_freq_factor", params.get("high_freq_factor"), 4.0),
    )
    _check_rope(found)
    return found


def _check_rope(config: RopeConfig) -> None:
    """Raise ``CheckpointError`` for parameters with which a rope type has no frequencies."""
    match config.rope_type:
        case "yarn" if config.theta <= 1:
            rule = f"rope_theta {config.theta:g} must be above 1"
        case "dynamic" if config.rotary_dim <= 2:
            rule = f"the {config.rotary_dim} rotated elements of a head must be more than 2"
        case "llama3" if config.high_freq_factor <= config.low_freq_factor:
            rule = (
                f"high_freq_factor {config.high_freq_factor:g} must be above "
                f"low_freq_factor {config.low_freq_factor:g}"
            )
        case _:
            return
    raise CheckpointError(f"config.json: {rule} with rope type {config.rope_type!r}")


def rope_number(key: str, value: Any, default: float, least: float = 0.0) -> float:
    """Return the parameter ``value`` as a float, or ``default`` if it is None. Raises
    ``CheckpointError`` unless it is a positive number from ``least`` to 1e18."""
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= _MAX_NUMBER or value < least:
        bound = f"of at least {least:g}" if least else "above 0"
        raise CheckpointError(
            f"config.json: {key} {value!r} must be a number {bound} and at most {_MAX_NUMBER:g}"
        )
    return float(value)


def _rotary_dim(
    config: Mapping[str, Any], params: Mapping[str, Any], head_dim: int, default: float
) -> int:
    key, value = "partial_rotary_factor", params.get("partial_rotary_factor")
    if value is None:
        value = config.get("partial_rotary_factor")
    if value is None and isinstance(config.get("rotary_dim"), int):
        key, value = "rotary_dim", config["rotary_dim"]
        dim = value if 0 < value <= head_dim else 0
    else:
        value = default if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        dim = int(head_dim * value) if is_number and 0 < value <= 1 else 0
    if not dim or dim % 2:
        raise CheckpointError(
            f"config.json: {key} {value!r} must leave an even number of the "
            f"{head_dim} elements of a head to rotate"
        )
    return dim


def rotation_order(config: RopeConfig) -> Tensor:
    """Return the new order of a head's elements, [D] int64: for each position, the index of the
    element in the checkpoint's head.

    Checkpoints rotate the first R elements, i with i + R/2 or neighbours, and leave the others as
    they are. In the new order, i is rotated with i + D/2, as in a head that is rotated whole, and
    the unrotated pairs follow the rotated ones. Queries and keys have the same order, so their
    products are unchanged.
    """
    dim = config.rotary_dim
    rotated, others = torch.arange(dim), torch.arange(dim, config.head_dim)
    pairs = rotated.view(-1, 2).T if config.has_neighbours else rotated.view(2, -1)
    return torch.cat((pairs, others.view(2, -1)), 1).flatten()


def context_scale(factor: float, mscale: float) -> float:
    """Return yarn's factor of queries and keys for a context that is extended ``factor`` times.

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
    section 3.4.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object ``rope_scaling`` or ``rope_parameters`` of a ``config.json``, empty if it
    has neither. Raises ``CheckpointError`` if the value is not an object."""
    params = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(params, Mapping):
        raise CheckpointError(f"config.json: rope_scaling {params!r} must be an object")
    return params


def _attention_factor(params: Mapping[str, Any], factor: float) -> float:
    plain = context_scale(factor, 1.0)
    mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
    if mscale and all_dim:
        scales = rope_number("mscale", mscale, 1.0), rope_number("mscale_all_dim", all_dim, 1.0)
        plain = context_scale(factor, scales[0]) / context_scale(factor, scales[1])
    return rope_number("attention_factor", params.get("attention_factor"), plain)


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """Return the frequencies of the rotary embedding in radians per position, [D/2] float32 on the
    CPU. For ``dynamic``, they are valid for requests within the model's context."""
    return _padded(config, _rotated_frequencies(config))


def _rotated_frequencies(config: RopeConfig) -> Tensor:
    """Return the frequencies of the rotated elements only, [R/2]."""
    plain = 1.0 / _powers(config)
    match config.rope_type:
        case "default" | "dynamic":
            return plain
        case "linear":
            return plain / config.factor
        case "yarn":
            return _yarn(config)
        case "llama3":
            return _llama3(config, plain)


def _padded(config: RopeConfig, frequencies: Tensor) -> Tensor:
    """Pad frequencies [.., R/2] with zeros to [.., D/2]."""
    return pad(frequencies, (0, (config.head_dim - config.rotary_dim) // 2))


def _powers(config: RopeConfig) -> Tensor:
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    return torch.pow(config.theta, exponents)


def _yarn(config: RopeConfig) -> Tensor:
    dim = config.rotary_dim

    def dimension(rotations: float) -> float:
        context = config.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(dim // 2, dtype=torch.float32)
    ramp = ((steps - low) / (high - low)).clamp(0, 1)
    powers = _powers(config)
    return (1.0 / (config.factor * powers)) * ramp + (1.0 / powers) * (1 - ramp)


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    context = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelength = 2 * math.pi / plain
    share = (context / wavelength - low) / (high - low)
    between = plain * ((1 - share) / config.factor + share)
    scaled = torch.where(wavelength > context / low, plain / config.factor, between)
    return torch.where(wavelength < context / high, plain, scaled)


class Rope:
    """Rotary embedding: cosines and sines for the rows of a step, in the model dtype.

    They are read from a table of all positions; for rope type ``dynamic``, they are computed for
    each row.
    """

    def __init__(
        self,
        config: RopeConfig,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        row_by_row: bool = False,
    ) -> None:
        """``max_positions``: number of positions in the table. ``row_by_row``: True: a row's bits
        do not depend on other rows, even for rope type ``dynamic``."""
        self._config = config
        self._dtype = dtype
        self._row_by_row = row_by_row
        self._plain = inverse_frequencies(config).to(device)
        self._factors = _attention_factors(config).to(device)
        self._table: Tensor | None = None
        if config.rope_type != "dynamic":
            positions = torch.arange(max_positions, device=device)
            self._table = self._waves(positions, self._plain)
        self.waves_by_position = None if self._table is None else _split(self._table)
        """Cosines and signed sines of all positions, each [max_positions, 1, D]; None for rope type
        ``dynamic``, in which they depend on the request."""

    def rows(self, positions: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines, each [T, 1, D], of positions [T] int64.

        prompt_lengths [T] int64: length of the prompt of each row's request (dynamic only). The
        sines of the first half are negated, so that ``rotate`` needs no negation.
        """
        if self._table is not None:
            waves = self._table.index_select(0, positions)
        else:
            lengths = torch.maximum(prompt_lengths, positions + 1)
            size = 1 if self._row_by_row else max(len(positions), 1)
            rows = zip(torch.split(positions, size), torch.split(lengths, size), strict=True)
            waves = torch.cat([self._waves(p, self._dynamic(n)) for p, n in rows])
        return _split(waves)

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """Return the frequencies [T, D/2] of rope type ``dynamic`` for request lengths [T]."""
        config = self._config
        dim, context, factor = config.rotary_dim, config.max_position_embeddings, config.factor
        n = lengths.clamp(min=context).double()
        theta = config.theta * (factor * n / context - (factor - 1)) ** (dim / (dim - 2))
        steps = torch.arange(0, dim, 2, device=lengths.device) / dim
        scaled = _padded(config, (1.0 / theta.float().unsqueeze(1) ** steps).float())
        return torch.where((lengths > context).unsqueeze(1), scaled, self._plain)

    def _waves(self, positions: Tensor, inverse: Tensor) -> Tensor:
        """Return the cosines and signed sines [T, 2, D] of positions [T]; ``inverse``: frequencies
        [D/2] or [T, D/2]."""
        angles = positions.float().unsqueeze(1) * inverse
        cos, sin = angles.cos(), angles.sin()
        waves = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)
        return (waves * self._factors).to(self._dtype)


def _attention_factors(config: RopeConfig) -> Tensor:
    """Factors of cosines and sines [D] float32; 1 for elements that are not rotated."""
    rotated = torch.full((config.rotary_dim // 2,), config.attention_factor)
    half = pad(rotated, (0, (config.head_dim - config.rotary_dim) // 2), value=1.0)
    return torch.cat((half, half))


def _split(waves: Tensor) -> tuple[Tensor, Tensor]:
    """Split [T, 2, D] into cosines and sines [T, 1, D]."""
    return waves[:, 0].unsqueeze(1), waves[:, 1].unsqueeze(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to heads [T, num_heads, D]; ``cos`` and ``sin`` [T, 1, D] are from
    ``Rope.rows``. Returns a new tensor."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return (heads * cos).add_(swapped.mul_(sin))
