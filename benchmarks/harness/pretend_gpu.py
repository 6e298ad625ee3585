"""A simulated GPU: tensors on ``cuda:0`` whose values are in CPU memory.

Code for a GPU runs here with real values. Launches of kernels are counted, and so are operators for
which the host would wait for a GPU. ``FakeTensor`` also simulates a device but has no values, so a
step would end where it first reads one. Like a GPU, the simulation refuses operands on different
devices.

Source of the operators that wait: ``torch.cuda.set_sync_debug_mode`` and torch's CUDA kernels.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from triton.runtime.interpreter import GridExecutor

DEVICE = "cuda:0"
_CUDA, _META = 1, 14
"""``c10::DeviceType``."""
_READS_SIZES = (
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)
"""Operators whose output has a size that only the device knows, by name."""
_READS_INDICES = ("index", "index_put_", "index_put", "_index_put_impl_")
"""Operators that count the true elements of a mask among their indices."""
_ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
_MIXES = ("_to_copy", "copy_", "lift_fresh", *_READS_INDICES)
"""May have operands on two devices."""


@dataclass
class DeviceLog:
    """What happened on the device."""

    waits: Counter[str] = field(default_factory=Counter)
    """By operator: how often the host waited for the device."""
    launches: Counter[str] = field(default_factory=Counter)
    """By operator: kernels and copies."""
    forms: set[tuple[object, ...]] = field(default_factory=set)
    """What of the launched Triton kernels is compiled apart: name, types, numbers compiled in."""

    def clear(self) -> None:
        self.waits.clear()
        self.launches.clear()


class PretendTensor(Tensor):
    """A tensor of the device."""

    held: Tensor
    """Its values, in CPU memory; views share it."""
    maker: _PretendMode

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, maker: _PretendMode) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(DEVICE),
        )
        made.held, made.maker = values, maker
        return made

    def __init__(self, values: Tensor, maker: _PretendMode) -> None:
        """Everything is done by ``__new__``."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = _Call(func, args, kwargs or {}).tensors
        maker = next(t.maker for t in tensors if isinstance(t, cls))
        return maker.__torch_dispatch__(func, types, args, kwargs)

    def tolist(self) -> Any:
        self.maker.note_wait("tolist")
        return self.held.tolist()


@dataclass(frozen=True)
class _Call:
    """One call of an operator."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.func.name()).removeprefix("aten::").split(".")[0]

    @property
    def tensors(self) -> list[Tensor]:
        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def has_device(self) -> bool:
        """An operand is on the device."""
        return any(isinstance(tensor, PretendTensor) for tensor in self.tensors)

    @property
    def asked(self) -> str:
        """The type of device that is named; empty: none."""
        device = self.kwargs.get("device")
        return "" if device is None else torch.device(device).type

    @property
    def is_there(self) -> bool:
        """The result is on the device."""
        if self.name == "copy_":
            return isinstance(self.args[0], PretendTensor)
        return self.asked == "cuda" or (self.has_device and self.asked != "cpu")

    def check(self) -> None:
        """Raise as torch does for operands on two devices."""
        others = [t for t in self.tensors if not isinstance(t, PretendTensor)]
        if self.has_device and self.name not in _MIXES and any(other.dim() for other in others):
            raise RuntimeError(f"{self.name}: expected all tensors to be on one device")

    def wait(self) -> str:
        """Why the host waits for the device; empty: it does not."""
        if self.name in _READS_SIZES or self.name == "_local_scalar_dense":
            return self.name
        if self.name == "repeat_interleave" and self.kwargs.get("output_size") is None:
            return self.name
        if self.name in _READS_INDICES:
            indices = [i for i in self.args[1] if isinstance(i, Tensor)]
            if any(i.dtype == torch.bool for i in indices):
                return "index by a mask"
            return "" if all(isinstance(i, PretendTensor) for i in indices) else "host index"
        if self.name in ("_to_copy", "copy_"):
            ends = [isinstance(self.args[1 if self.name == "copy_" else 0], PretendTensor)]
            ends.append(self.is_there)
            if ends[0] != ends[1] and not self._is_put_off:
                return "copy from the device" if ends[0] else "copy to the device"
        return ""

    @property
    def _is_put_off(self) -> bool:
        is_third = self.name == "copy_" and len(self.args) > 2 and self.args[2]
        return bool(self.kwargs.get("non_blocking", False) or is_third)

    def run(self) -> Any:
        """The result, on the CPU."""
        kwargs = dict(self.kwargs)
        kwargs.pop("pin_memory", None)
        if self.asked == "cuda":
            kwargs["device"] = torch.device("cpu")
        return self.func(*tree_map(_values, self.args), **tree_map(_values, kwargs))


class _PretendMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs all operators on values in CPU memory."""

    def __init__(self, log: DeviceLog) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = log
        self._capturing: PretendGraph | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        call = _Call(func, args, kwargs or {})
        with _disable_current_modes():
            call.check()
            is_there = call.is_there
            if (is_there or call.has_device) and (why := call.wait()):
                self.note_wait(why)
            result = call.run()
            if "empty" in call.name and is_there:
                result.zero_()  # a capture also computes, and must not overflow
            if (is_there or call.has_device) and not func.is_view and call.name not in _ALLOCATES:
                self.launched(call.name, _without_modes(partial(_repeat, call, result)))
            if call.name == "copy_":
                return args[0]
            return tree_map(self._made, result) if is_there else result

    def note_wait(self, why: str) -> None:
        """The host waits for the device, which no captured code may make it do."""
        if self._capturing is not None:
            raise RuntimeError(f"{why} while a graph is captured")
        self.log.waits[why] += 1

    def launched(self, name: str, again: Callable[[], None]) -> None:
        """A kernel or a copy was launched; ``again`` launches it with the same memory."""
        if self._capturing is not None:
            self._capturing.kernels.append(again)
        else:
            self.log.launches[name] += 1

    def capture(self, graph: PretendGraph | None) -> None:
        """Whose kernels follow; None: they are launched."""
        self._capturing = graph

    def launch(self, kernel: Any, run: Callable[..., None], args: Any, kwargs: Any) -> None:
        """Launch a kernel of Triton in its interpreter."""
        given, named = tree_map(_values, args), tree_map(_values, kwargs)
        types = tuple(value.dtype for value in args if isinstance(value, Tensor))
        self.log.forms.add((kernel.fn.__name__, types, *sorted(kwargs.items())))

        again = _without_modes(partial(run, kernel, *given, **named))
        again()
        self.launched(kernel.fn.__name__, again)

    def _made(self, value: Any) -> Any:
        return PretendTensor(value, self) if isinstance(value, Tensor) else value


@dataclass
class PretendStream:
    """In place of ``torch.cuda.Stream``: all work is done when it is given."""

    device: torch.device

    def wait_stream(self, other: PretendStream) -> None:
        """It has nothing to do."""

    def record_event(self) -> None:
        """It has nothing to do."""

    def wait_event(self, event: None) -> None:
        """It has nothing to do."""

    def synchronize(self) -> None:
        """Of a thread beside the steps: no step waits."""


class PretendEvent:
    """In place of ``torch.cuda.Event``: it has happened when it is recorded."""

    def __init__(
        self,
        enable_timing: bool = False,
        external: bool = False,
        note_wait: Callable[[str], None] | None = None,
    ) -> None:
        """``note_wait`` gets the reason of each wait. Other options are ignored."""
        self._note_wait = note_wait

    def record(self) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Note that the host waits."""
        if self._note_wait is not None:
            self._note_wait("event")

    def elapsed_time(self, end: PretendEvent) -> float:
        """Milliseconds until another event: the device needs no time."""
        return 0.0

    def query(self) -> bool:
        """All work of the device is done."""
        return True


class PretendGraph:
    """In place of ``torch.cuda.CUDAGraph``: the kernels that were launched, with their memory."""

    def __init__(self, mode: _PretendMode) -> None:
        self.kernels: list[Callable[[], None]] = []
        self._mode = mode

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._mode.capture(self)

    def capture_end(self) -> None:
        self._mode.capture(None)

    def replay(self) -> None:
        self._mode.log.launches["graph"] += 1
        for kernel in self.kernels:
            kernel()

    def reset(self) -> None:
        self.kernels.clear()


def _without_modes(run: Callable[[], None]) -> Callable[[], None]:
    def plain() -> None:
        with _disable_current_modes():
            run()

    return plain


def _repeat(call: _Call, result: Any) -> None:
    """Run an operator again, into the memory of its first result."""
    again = call.run()
    if not call.func._schema.is_mutable:
        old, new = (torch.utils._pytree.tree_leaves(r) for r in (result, again))
        for first, second in zip(old, new, strict=True):
            first.copy_(second)


def _values(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


@contextmanager
def _device_guard() -> Iterator[None]:
    """Let torch's C++ code ask for the current device: it gets the guard of ``meta`` tensors.

    A build of torch for CPUs has none for CUDA, and refuses even to index such a tensor.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, name)
    before = guards[_CUDA]
    guards[_CUDA] = before or guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


@contextmanager
def pretend_gpu() -> Iterator[DeviceLog]:
    """Within it, tensors may be on ``DEVICE``."""
    log = DeviceLog()
    found = SimpleNamespace(shared_memory_per_block_optin=227 << 10, major=9, minor=0)
    properties = mock.patch.object(torch.cuda, "get_device_properties", return_value=found)
    # Views of such tensors cannot be made in inference mode.
    no_grad = mock.patch.object(torch._C, "_InferenceMode", side_effect=lambda _: torch.no_grad())
    mode = _PretendMode(log)
    cuda = mock.patch.multiple(
        torch.cuda,
        CUDAGraph=partial(PretendGraph, mode),
        graph_pool_handle=object,
        Stream=PretendStream,
        current_stream=PretendStream,
        stream=nullcontext,
        Event=partial(PretendEvent, note_wait=mode.note_wait),
    )
    with properties, no_grad, cuda, _triton(mode), _device_guard(), FakeTensorMode(), mode:
        yield log


@contextmanager
def _triton(mode: _PretendMode) -> Iterator[None]:
    """Kernels of Triton get the values of tensors."""
    run = GridExecutor.__call__

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        mode.launch(kernel, run, args, kwargs)

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield
