"""Runs ranks as CPU processes with a time limit; failures name the rank.

    run_ranks(3, worker, "tcp")        # worker(rank, size, ports, "tcp") in three processes

``worker`` must be a module-level function: processes are forks of a server that has imported torch
and the module of the first such function.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from cluster.launch.plan import free_port


class RankError(Exception):
    """One rank failed; the message carries the rank and its traceback."""


def free_ports(count: int) -> list[int]:
    """Return different free ports of the loopback interface."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port("127.0.0.1"))
    return list(ports)


def run_ranks(
    size: int,
    worker: Callable[..., Any],
    *args: Any,
    timeout_s: float = 240.0,
    may_die: frozenset[int] = frozenset(),
) -> list[Any]:
    """Run ``worker(rank, size, ports, *args)`` in ``size`` processes of one thread each.

    ``ports`` are ``2 * size`` free ports, the same list in all ranks. Returns the results by rank,
    None for a rank of ``may_die`` that died. Raises ``RankError`` naming the first rank that
    failed, died or did not finish in time; all processes are ended then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", worker.__module__])
    ports = free_ports(2 * size)
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process: BaseProcess = context.Process(
            target=_run, args=(sender, worker, rank, size, ports, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, timeout_s, may_die)
    finally:
        for process in processes:
            process.kill()
            process.join(10.0)
        for pipe in pipes:
            pipe.close()


def _collect(pipes: list[Connection], timeout_s: float, may_die: frozenset[int]) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout_s
    while open_pipes:
        ready = wait(list(open_pipes), max(deadline - time.monotonic(), 0.0))
        if not ready:
            raise RankError(f"rank {min(open_pipes.values())} did not finish in {timeout_s:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                ok, value = pipe.recv()
            except EOFError:
                if rank not in may_die:
                    raise RankError(f"rank {rank} died") from None
                continue
            if not ok:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _run(
    pipe: Connection,
    worker: Callable[..., Any],
    rank: int,
    size: int,
    ports: list[int],
    args: tuple[Any, ...],
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        import torch

        torch.set_num_threads(1)
        pipe.send((True, worker(rank, size, ports, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
