"""Configuration of expert load: how it is measured, and when experts are rebalanced."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config.option_metadata import INTERNAL, flag
from cluster.core.checks import check_each, is_at_least_1, is_not_negative, is_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceSection:
    """When and how fast experts are rebalanced."""

    enable_eplb: bool = False
    """Rebalance experts by load automatically; requires spare expert slots."""
    interval_s: float = field(default=30.0, metadata=INTERNAL)
    """Shortest time in seconds from the end of a rebalancing to the next automatic rebalancing."""
    horizon_s: float = field(default=300.0, metadata=INTERNAL)
    """Time in seconds for which the load is assumed to last; the gain of a rebalancing in this time
    must exceed the cost of its moves.
    """
    max_move_fraction: float = field(default=0.1, metadata=INTERNAL)
    """Largest share of all expert slots that one rebalancing may fill."""
    bytes_per_s: float = field(default=100e6, metadata=flag("--rebalance-bytes-per-s"))
    """Maximum bytes per second of expert weights that each worker receives while serving."""
    limit_s: float = field(default=120.0, metadata=INTERNAL)
    """Time limit in seconds for each stage of a rebalancing, which is aborted after it."""
    slot_cost_pairs: float | None = field(default=None, metadata=INTERNAL)
    """Cost of an activated expert slot, as a number of (row, expert) pairs that cost the same;
    None: from the roofline.
    """

    def __post_init__(self) -> None:
        rates = "interval_s horizon_s bytes_per_s limit_s"
        check_each(self, rates, is_positive, "must be positive", "rebalance_")
        share = "must be from 0 to 1"
        check_each(self, "max_move_fraction", lambda x: 0 <= x <= 1, share, "rebalance_")
        rule = "must not be negative"
        check_each(self, "slot_cost_pairs", is_not_negative, rule, "rebalance_")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSection:
    """How expert load is measured and averaged."""

    report_s: float = field(default=2.0, metadata=INTERNAL)
    """Time in seconds between two load reports of an attention worker to the controller."""
    window_s: float = field(default=10.0, metadata=INTERNAL)
    """Length of one load window (count of the expert load) in seconds."""
    num_windows: int = field(default=60, metadata=INTERNAL)
    """Number of load windows that are kept."""
    half_life_s: float = field(default=60.0, metadata=INTERNAL)
    """Half-life of a load window's weight in the exponential average, in seconds with load."""

    def __post_init__(self) -> None:
        check_each(self, "report_s window_s half_life_s", is_positive, "must be positive")
        check_each(self, "num_windows", is_at_least_1, "must be at least 1")
