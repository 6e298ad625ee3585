"""What product modules get in place of the operating system, gRPC and the model, in one table."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import grpc
import torch

import cluster.controller.recovery
import workers.dispatch.expert_server
import workers.experts.transfer.loading
import workers.experts.transfer.rate_limit
import workers.kv.transfer.block_provider
import workers.process.control.control_client
import workers.process.engine_server
import workers.process.intake.waiting
import workers.process.roles.experts
import workers.process.roles.loading
import workers.process.worker.worker
import workers.transport.acceptor
import workers.transport.peer_connections
import workers.transport.peer_link
import workers.transport.socket_io  # noqa: F401
from cluster.core.topology import Generation
from tests.simulation.disk import SimReader, ToyCheckpoint, entries, size_and_change, stamp
from tests.simulation.domains import checked_decisions
from tests.simulation.file_disk import SimFile
from tests.simulation.gateways import WatchedQueue
from tests.simulation.kernel import Kernel
from tests.simulation.loops import new_event_loop, start_server
from tests.simulation.network import Network
from tests.simulation.polling import SimSelectors, SimSockets
from tests.simulation.streams import SimChannel, SimGrpcServer, SimRunner
from tests.simulation.threads import SimExecutor, SimFuture, SimThreading
from tests.simulation.toy_adapters import ToyAdapters
from tests.simulation.toy_steps import ToyDispatcher, ToyEngine, ToyExpertServer, ToyTransport
from tests.simulation.toy_text import ToyGrammars
from tests.simulation.worker import ToyModel, ToySlots
from workers.dispatch.expert_server import ExpertServer
from workers.engine.engine import Engine
from workers.model.compute_threads import ComputeThreads
from workers.model.loading.file_stamp import FileStamp
from workers.native.thread_team import Kernels
from workers.process.control.membership import Membership, MembershipState
from workers.transport.handshake import PeerIdentity
from workers.transport.peer_link import PeerServer

_PRODUCT = ("cluster.", "workers.", "gateway.")
_BY_MODULE: dict[str, Any] = {
    "socket": SimSockets,
    "selectors": SimSelectors,
    "threading": SimThreading,
    "ThreadPoolExecutor": SimExecutor,
    "FileIO": SimFile,
}
"""Names that any product module may import, and what they become."""
_THREADS_STAY = ("workers.model.",)
"""Modules with threads of their own that no simulated code starts."""


def _make_identity(args: Any, checkpoint: Any) -> PeerIdentity:
    return PeerIdentity(
        name=args.member.name,
        role=args.member.role,
        rank=args.member.rank,
        checkpoint_id=checkpoint.checkpoint_id,
        config_hash=args.config.fingerprint(),
        kv_cache_dtype=args.config.engine.kv_cache_dtype,
    )


def _open_toy_transport(args: Any, connections: Any, group: int = 0) -> ToyTransport:
    mode, device = args.config.engine.combine_mode, args.device
    return ToyTransport(connections, combine_mode=mode, device=device, group=group)


def _getpid() -> int:
    kernel = Kernel.current
    assert kernel is not None
    return kernel.process.pid if kernel.process else 0


_SINGLE: list[tuple[str, str, Any]] = [
    ("workers.process.context", "Checkpoint", ToyCheckpoint),
    ("workers.process.context", "resolve_dtype", lambda *args: torch.float32),
    ("workers.process.worker.worker", "make_identity", _make_identity),
    ("workers.process.worker.worker", "collapse_weights", lambda *args: None),
    (
        "workers.process.context",
        "ComputeThreads",
        SimpleNamespace(for_threads=lambda count, device_type: ComputeThreads(count)),
    ),
    ("workers.process.worker.worker", "start_kernels", lambda *args: Kernels(None, "")),
    ("workers.process.worker.worker", "thread_cpu_clock", lambda: float),
    ("workers.process.worker.worker", "os", SimpleNamespace(getpid=_getpid)),
    ("workers.process.roles.loading", "load_attention_model", lambda *args: ToyModel()),
    ("workers.process.roles.loading", "GrammarCompiler", ToyGrammars),
    ("workers.process.roles.loading", "Engine", ToyEngine),
    ("workers.engine.engine", "LoadedAdapters", ToyAdapters),
    ("workers.process.roles.loading", "RemoteDispatcher", ToyDispatcher),
    ("workers.process.roles.experts", "ExpertServer", ToyExpertServer),
    ("workers.process.roles.experts", "make_slots", ToySlots),
    ("workers.process.worker.worker", "open_transport", _open_toy_transport),
    ("workers.experts.transfer.loading", "torch", SimpleNamespace(set_num_threads=int)),
    ("workers.kv.transfer.block_provider", "Future", SimFuture),
    ("workers.model.loading.mapped", "safe_open", SimReader),
    ("workers.model.loading.mapped", "entries_of", entries),
    ("workers.model.loading.mapped", "size_and_change", size_and_change),
    ("gateway.calls.gateway", "OutputQueue", WatchedQueue),
    ("cluster.controller.metrics", "to_plain", lambda registry: []),
    ("cluster.policy.silence", "WINDOW_S", 1.0),  # else starts would be remembered to the end
    ("cluster.policy.node_following", "SETTLE_S", 0.5),  # else scenarios end before
    ("cluster.policy.node_following", "RETRY_S", 1.0),
    ("cluster.policy.node_following", "LOST_S", 3.0),
]
"""(module, name, replacement) of the model, the disk, the process, and a time."""


class _Remembered:
    """A property of a generation, computed once for each."""

    def __init__(self, plain: property) -> None:
        self._plain = plain
        self._found: dict[int, tuple[Generation, Any]] = {}

    def __get__(self, generation: Generation, kind: type) -> Any:
        found = self._found.get(id(generation))
        if found is None or found[0] is not generation:
            found = generation, self._plain.__get__(generation)
            self._found[id(generation)] = found
        return found[1]


class _Slips(logging.Handler):
    """Programming errors that product code logs, and survives, are failures."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(logging.WARNING)
        self._kernel = kernel

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AssertionError | AttributeError | LookupError | NameError | TypeError):
            self._kernel.failures.append("".join(traceback.format_exception(error)))


@contextmanager
def replaced(kernel: Kernel, net: Network) -> Iterator[None]:
    """Product code runs on the simulation inside."""
    clocks = (time.monotonic, kernel.monotonic), (time.time, kernel.time)
    with ExitStack() as stack:
        for owner, name, stand_in in (*_everywhere(), *_of_this(kernel)):
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, stand_in)
        for plain, simulated in clocks:
            for function in _with_default(plain):
                _swap_defaults(function, plain, simulated)
                stack.callback(_swap_defaults, function, simulated, plain)
        Kernel.current, Network.current = kernel, net
        level = logging.root.manager.disable
        logging.disable(logging.INFO if kernel.on_log is None else logging.NOTSET)
        slips = _Slips(kernel)
        logging.root.addHandler(slips)
        stack.callback(logging.root.removeHandler, slips)
        gc.freeze()
        gc.disable()  # what it ends would run, and draw random numbers, at any time
        try:
            yield
        finally:
            logging.disable(logging.CRITICAL)
            kernel.close()
            gc.collect()
            gc.enable()
            logging.disable(level)
            Kernel.current = Network.current = None


@cache
def _everywhere() -> list[tuple[Any, str, Any]]:
    """(module or class, name, replacement): the same in every simulation."""
    found: list[tuple[Any, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.startswith(_PRODUCT) and not name.startswith(_THREADS_STAY):
            names = _BY_MODULE.keys() & vars(module).keys()
            found += [(module, attribute, _BY_MODULE[attribute]) for attribute in sorted(names)]
    found += [(sys.modules[where], name, stand_in) for where, name, stand_in in _SINGLE]
    decorated = ((Engine, "step"), (ExpertServer, "start_step"), (ExpertServer, "serve_next"))
    for kind, method in decorated:
        plain = getattr(kind, method).__wrapped__  # without torch's inference mode
        found.append((kind, method, plain))
    found.append((FileStamp, "of", staticmethod(stamp)))
    return [
        *found,
        (asyncio, "new_event_loop", new_event_loop),
        (asyncio, "start_server", start_server),
        (asyncio, "Runner", SimRunner),
        (grpc.aio, "insecure_channel", SimChannel),
        (grpc.aio, "server", SimGrpcServer),
        (grpc.aio, "init_grpc_aio", lambda: None),
    ]


def _of_this(kernel: Kernel) -> list[tuple[Any, str, Any]]:
    """The same of one simulation."""
    return [
        (Membership, "_set_state", _watched(vars(Membership)["_set_state"], kernel)),
        (cluster.controller.recovery, "decide_members", checked_decisions(kernel)),
        (Generation, "attention", _Remembered(vars(Generation)["attention"])),
        (time, "monotonic", kernel.monotonic),
        (time, "time", kernel.time),
        (time, "sleep", kernel.sleep),
        (secrets, "token_hex", lambda size: f"{kernel.rng.getrandbits(8 * size):0{2 * size}x}"),
    ]


def _watched(set_state: Any, kernel: Kernel) -> Any:
    """``Membership._set_state``, after which the simulation looks what can run."""

    def watched(self: Membership, standing: MembershipState) -> None:
        set_state(self, standing)
        if standing is MembershipState.RUNNING:
            kernel.on_running()

    return watched


@cache
def _with_default(value: object) -> list[FunctionType]:
    """Functions of the product whose defaults contain a value: the same in every simulation."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.startswith(_PRODUCT):
            for item in vars(module).values():
                kinds = vars(item).values() if isinstance(item, type) else (item,)
                for function in kinds:
                    if isinstance(function, FunctionType) and _has_default(function, value):
                        found.append(function)
    return found


def _has_default(function: FunctionType, value: object) -> bool:
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return any(default is value for default in given)


def _swap_defaults(function: FunctionType, old: object, new: object) -> None:
    if function.__defaults__:
        function.__defaults__ = tuple(
            new if default == old else default for default in function.__defaults__
        )
    if function.__kwdefaults__:
        function.__kwdefaults__ = {
            name: new if default == old else default
            for name, default in function.__kwdefaults__.items()
        }


__all__ = ["PeerServer", "replaced"]
