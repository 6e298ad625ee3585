"""Stand-ins for ``threading`` and ``concurrent.futures`` on fibers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from tests.simulation.kernel import Fiber, Kernel

T = TypeVar("T")


def _kernel() -> Kernel:
    assert Kernel.current is not None
    return Kernel.current


class SimThread:
    """``threading.Thread``."""

    def __init__(
        self,
        *,
        target: Callable[..., object],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        name: str = "thread",
        daemon: bool = True,
    ) -> None:
        process = _kernel().process
        assert process is not None, "threads belong to processes"
        self.name = name
        self._has_begun = False
        self._fiber = Fiber(process, lambda: target(*args, **(kwargs or {})), name)

    def start(self) -> None:
        self._has_begun = True
        self._fiber.start()

    def join(self, timeout: float | None = None) -> None:
        self._fiber.join(timeout)

    @property
    def ident(self) -> int | None:
        return id(self) if self._has_begun else None

    def is_alive(self) -> bool:
        return self._has_begun and not self._fiber.is_finished

    def owns(self, fiber: Fiber | None) -> bool:
        return self._fiber is fiber


class _Current:
    """What ``current_thread`` returns: compares equal to the thread that runs."""

    def __init__(self) -> None:
        self._fiber = _kernel().fiber

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimThread) and other.owns(self._fiber)

    def __hash__(self) -> int:
        return hash(self._fiber)


class SimLock:
    """``threading.Lock``."""

    def __init__(self) -> None:
        self._owner: Fiber | None = None
        self._is_held = False
        self._waiting: list[Fiber] = []

    def __enter__(self) -> None:
        kernel = _kernel()
        kernel.maybe_preempt()
        while self._is_held and not kernel.is_over:
            fiber = kernel.this_fiber()
            self._waiting.append(fiber)
            fiber.park()
        self._is_held = True

    def __exit__(self, *error: object) -> None:
        self._is_held = False
        waiting, self._waiting = self._waiting, []
        for fiber in waiting:
            fiber.wake()


class SimCondition:
    """``threading.Condition``."""

    def __init__(self) -> None:
        self._lock = SimLock()
        self._waiting: list[Fiber] = []

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__()

    def notify(self) -> None:
        for fiber in self._waiting[:1]:
            fiber.wake()
        del self._waiting[:1]

    def notify_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for fiber in waiting:
            fiber.wake()

    def wait(self, timeout: float | None = None) -> bool:
        fiber = _kernel().this_fiber()
        self._waiting.append(fiber)
        self._lock.__exit__()
        was_woken = fiber.park(timeout)
        if fiber in self._waiting:
            self._waiting.remove(fiber)
        self._lock.__enter__()
        return was_woken

    def wait_for(self, is_done: Callable[[], bool], timeout: float | None = None) -> bool:
        kernel = _kernel()
        deadline = None if timeout is None else kernel.now + timeout
        while not (found := is_done()):
            left = None if deadline is None else deadline - kernel.now
            if left is not None and left <= 0:
                break
            self.wait(left)
        return found


class SimEvent:
    """``threading.Event``."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Fiber] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        waiting, self._waiting = self._waiting, []
        for fiber in waiting:
            fiber.wake()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        kernel = _kernel()
        deadline = None if timeout is None else kernel.now + timeout
        while not self._is_set:
            left = None if deadline is None else deadline - kernel.now
            if left is not None and left <= 0:
                break
            fiber = kernel.this_fiber()
            self._waiting.append(fiber)
            fiber.park(left)
        return self._is_set


class SimFuture(Future[T]):
    """A future whose result is waited for in virtual time."""

    def result(self, timeout: float | None = None) -> T:
        ended = SimEvent()
        self.add_done_callback(lambda future: ended.set())
        if not ended.wait(timeout):
            raise TimeoutError
        return super().result(0)


class SimExecutor:
    """``ThreadPoolExecutor``: a fiber for each piece of work, at most ``max_workers`` at a time."""

    def __init__(
        self,
        max_workers: int = 1,
        thread_name_prefix: str = "pool",
        initializer: Callable[[], object] | None = None,
    ) -> None:
        process = _kernel().process
        assert process is not None, "threads belong to processes"
        self._process = process
        self._name = thread_name_prefix
        self._max_workers = max_workers
        self._queue: list[tuple[SimFuture[Any], Callable[[], Any]]] = []
        self._num_running = 0
        self._is_shut = False

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> SimFuture[T]:
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: SimFuture[T] = SimFuture()
        self._queue.append((future, lambda: work(*args, **kwargs)))
        if self._num_running < self._max_workers:
            self._num_running += 1
            Fiber(self._process, self._work, self._name).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._is_shut = True
        if cancel_futures:
            for future, _ in self._queue:
                future.cancel()
            self._queue.clear()

    def _work(self) -> None:
        while self._queue:
            future, work = self._queue.pop(0)
            kernel = _kernel()
            if kernel.pool_delay_s:
                kernel.sleep(kernel.rng.uniform(0, kernel.pool_delay_s))
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except Exception as err:
                future.set_exception(err)
            else:
                future.set_result(result)
        self._num_running -= 1


class SimThreading:
    """In place of the module ``threading``."""

    Thread = SimThread
    Condition = SimCondition
    Lock = SimLock
    Event = SimEvent
    current_thread = _Current

    @staticmethod
    def get_native_id() -> int:
        """No thread of the system, so that its scheduler refuses to change it."""
        return -1
