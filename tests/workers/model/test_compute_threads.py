"""Compute threads: tasks run side by side, results keep their order, errors arrive, threads end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from workers.model.compute_threads import ComputeThreads
from workers.model.layers import Linear

TIMEOUT_S = 60.0


def test_tasks_run_at_the_same_time_and_results_keep_their_order() -> None:
    meeting = threading.Barrier(3)

    def meet(name: str) -> str:
        meeting.wait(TIMEOUT_S)  # broken unless all three are there
        return name

    assert ComputeThreads(3).run([partial(meet, name) for name in "abc"]) == ["a", "b", "c"]


def test_an_error_is_raised_when_every_task_has_ended() -> None:
    compute_threads = ComputeThreads(2)
    ended: list[int] = []

    def fail() -> None:
        raise ValueError("no")

    def end(task: int) -> None:
        ended.append(task)

    both: list[list[Callable[[], None]]] = [[fail, partial(end, 1)], [partial(end, 2), fail]]
    for tasks in both:
        with pytest.raises(ValueError, match="no"):
            compute_threads.run(tasks)
    assert ended == [1, 2]
    assert compute_threads.run([lambda: 3, lambda: 4]) == [3, 4]


@pytest.mark.parametrize("is_inference", [True, False])
def test_a_thread_takes_over_the_inference_mode_of_the_caller(is_inference: bool) -> None:
    with torch.inference_mode(is_inference):
        found: list[Tensor] = ComputeThreads(2).run(
            [lambda: torch.zeros(1), lambda: torch.zeros(1)]
        )
    assert [t.is_inference() for t in found] == [is_inference, is_inference]


@pytest.mark.parametrize(
    ("count", "costs", "parts"),
    [
        (2, [1, 1, 4, 3, 1], [(0, 3), (3, 5)]),
        (1, [1, 2, 3], [(0, 3)]),
        (3, [5], [(0, 1)]),
        (3, [9, 1, 1], [(0, 1), (1, 2), (2, 3)]),
        (2, [], []),
    ],
)
def test_split_gives_neighbours_of_about_the_same_cost(
    count: int, costs: list[float], parts: list[tuple[int, int]]
) -> None:
    assert ComputeThreads(count).split(costs) == parts


def test_threads_end_with_their_owner() -> None:
    before = set(threading.enumerate())
    compute_threads = ComputeThreads(3)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    del compute_threads
    gc.collect()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("num_rows", [1, 80])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_on_threads_equals_one_without(num_rows: int, has_bias: bool) -> None:
    """Of 2048 x 2048 each thread keeps a part, of 512 x 1024 each thread takes rows."""
    generator = torch.Generator().manual_seed(0)
    for out, width in ((2048, 2048), (512, 1024)):
        weight = torch.randn(out, width, generator=generator) / width**0.5
        bias = torch.randn(out, generator=generator) if has_bias else None
        x = torch.randn(num_rows, width, generator=generator)
        found = Linear(weight, bias, compute_threads=ComputeThreads(2))(x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))


def test_on_a_gpu_the_caller_is_alone() -> None:
    before = torch.get_num_threads()
    try:
        assert ComputeThreads.for_threads(3, "cuda").count == 1
        assert torch.get_num_threads() == 3
        assert ComputeThreads.for_threads(3).count == 3
    finally:
        torch.set_num_threads(before)
