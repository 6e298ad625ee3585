"""Threads that share the cores of one worker, for independent products.

A step consists of thousands of small products. Splitting each of them over an OpenMP team costs a
barrier per product; giving each thread whole products costs one hand-over per layer. 512 products
of 4 rows with 512 x 512 bfloat16 on two cores of an AMD EPYC with torch 2.13 took 23.0 ms in one
thread, 17.3 ms in an OpenMP team of two, and 13.1 ms in two compute threads. Kernels must release
the GIL, as torch operators with a named overload do (see ``torch_private.packed_linear``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

MAX_COMPUTE_THREADS = 4
"""Maximum number of compute threads. More threads would wait for the GIL, so further cores go to an
OpenMP team in each thread."""

T = TypeVar("T")
_Task = tuple[int, Callable[[], Any], bool]
_Answer = tuple[int, Any, BaseException | None]


class ComputeThreads:
    """Group of threads that run independent tasks: the calling thread and ``count`` - 1 helper
    threads. Only one thread at a time may call methods of an object."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        """Number of threads, including the caller."""
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._answers: SimpleQueue[_Answer] = SimpleQueue()
        for i in range(1, count):
            threading.Thread(
                target=_serve, args=(self._tasks, self._answers), name=f"compute-{i}", daemon=True
            ).start()
        weakref.finalize(self, _stop, self._tasks, count - 1)

    @classmethod
    def for_threads(cls, num_threads: int, device_type: str = "cpu") -> ComputeThreads:
        """Divide ``num_threads`` among compute threads, and set the size of their OpenMP teams.

        On a GPU the caller is the only thread: several threads would launch more and smaller
        kernels.
        """
        count = min(num_threads, MAX_COMPUTE_THREADS) if device_type == "cpu" else 1
        torch.set_num_threads(num_threads // count)
        return cls(count)

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Call all tasks, at most ``count``, concurrently; return their results in order.

        Returns when all tasks have ended. If tasks raised exceptions, raises one of them.
        """
        assert len(tasks) <= self.count, f"{len(tasks)} tasks for {self.count} threads"
        is_inference = torch.is_inference_mode_enabled()
        for i, task in enumerate(tasks[1:], 1):
            self._tasks.put((i, task, is_inference))
        results: list[Any] = [None] * len(tasks)
        errors: list[BaseException] = []
        try:
            results[0] = tasks[0]()
        except BaseException as err:  # raised below, when no thread uses the same tensors
            errors.append(err)
        for _ in tasks[1:]:
            i, results[i], error = self._answers.get()
            errors += [error] if error is not None else []
        if errors:
            raise errors[0]
        return results

    def split(self, costs: Sequence[float]) -> list[tuple[int, int]]:
        """Split ``costs`` into at most ``count`` ranges (first, one past the last index) of about
        the same total cost.

        Example: 2 threads, costs [1, 1, 4, 3, 1] -> [(0, 3), (3, 5)].
        """
        total, done = sum(costs), 0.0
        parts: list[tuple[int, int]] = []
        first = 0
        for i, cost in enumerate(costs):
            done += cost
            if done * self.count >= total * (len(parts) + 1) or i == len(costs) - 1:
                parts.append((first, i + 1))
                first = i + 1
        return parts


def _serve(tasks: SimpleQueue[_Task | None], answers: SimpleQueue[_Answer]) -> None:
    while (entry := tasks.get()) is not None:
        i, task, is_inference = entry
        try:
            with torch.inference_mode(is_inference):
                answers.put((i, task(), None))
        except BaseException as err:
            answers.put((i, None, err))
        del entry, task


def _stop(tasks: SimpleQueue[_Task | None], count: int) -> None:
    for _ in range(count):
        tasks.put(None)
