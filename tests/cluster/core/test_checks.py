"""``cluster.core.checks``."""

from __future__ import annotations

import pytest

from cluster.core.checks import is_deeper


@pytest.mark.parametrize(
    ("data", "depth"), [([], 1), ([1, "x"], 1), ({"a": []}, 2), ([1, {"a": [[2]]}], 4)]
)
def test_depth_counts_containers_within_containers(data: object, depth: int) -> None:
    for most in range(1, 6):
        assert is_deeper(data, most) == (depth > most)
