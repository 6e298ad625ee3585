"""Expert workers are killed while streams are under way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.fault_rows import (
    FORMS,
    Form,
    check_replaced,
    kill_any,
    play_until_retried,
    row_config,
)
from tests.serving_cluster import RayCluster, connected_ray, serving


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_killing_a_worker_whose_experts_have_copies(form: Form) -> None:
    with serving(RayCluster(row_config(1, 3, num_redundant=22))) as cluster:
        draw = random.Random(1)
        played = play_until_retried(cluster, form, draw, lambda: kill_any(cluster, "expert", draw))
        check_replaced(cluster)
        print(played)


@pytest.mark.ray
@pytest.mark.parametrize("form", FORMS)
def test_killing_a_worker_with_the_only_copies(form: Form) -> None:
    with serving(RayCluster(row_config(1, 2))) as cluster:
        draw = random.Random(2)
        played = play_until_retried(cluster, form, draw, lambda: kill_any(cluster, "expert", draw))
        check_replaced(cluster)
        print(played)
