"""Virtual time, processes and threads: one event queue, whose order the seed decides.

A ``Fiber`` is a thread of a simulated process. It runs until it blocks in a simulated call (a
select, a sleep, a lock); now and then the kernel also takes the processor from it in a call that
does not block, as the operating system may do anywhere.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from math import inf, log
from typing import TYPE_CHECKING, Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet

if TYPE_CHECKING:
    from tests.simulation.loops import SimLoop
    from tests.simulation.sockets import SimSocket

_START_S = 1000.0
_SWITCH_S = 40e-6
"""Mean time until a thread that can run does run."""
_LOOK_EVENTS = 32
"""Events between two looks whether a run is done."""
_SLOW_SWITCH_S = 5e-3
"""The same on a machine that is busy, now and then."""
_SLOW_SWITCHES = 0.005
"""Share of the switches that are slow."""


class Thread(Protocol):
    """A thread, or the event loop of one."""

    def hold(self) -> None: ...

    def release(self) -> None: ...


class Kernel:
    """The simulated machines' time and processors."""

    current: Kernel | None = None
    """The kernel of the simulation that runs in this Python process."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.rng = random.Random(seed)
        self.now = _START_S
        self.process: Process | None = None
        """The process whose code runs now; None for the simulation's own."""
        self.fiber: Fiber | None = None
        """The thread that runs now; None in event loops and in the simulation's own code."""
        self.is_over = False
        self.preemption = 0.01
        """Chance that a call which does not block takes the processor from its thread."""
        self._calls_left = 0
        """Such calls until the next one that does."""
        self.num_events = 0
        self.num_writes: Counter[str] = Counter()
        """By worker, matrices written into expert slots, and slots given back."""
        self.failures: list[str] = []
        """What product code must never do: unexpected errors of loops and threads."""
        self.on_running: Callable[[], object] = int
        """Called when a worker begins to run a generation."""
        self.on_log: Callable[[str], None] | None = None
        self.slowness = 1.0
        """Factor on the time of all computation."""
        self.pool_delay_s = 0.0
        """Longest time until a thread of a pool begins a piece of work."""
        self.deaths: dict[str, str] = {}
        """Workers that have ended themselves, and why."""
        self.suspended: dict[str, float] = {}
        """Hosts that stand still, and until when."""
        self.clocks: dict[str, float] = {}
        """What the clocks of hosts are ahead of the simulation's, in seconds."""
        self.disk: Any = None
        self.state: Any = None
        """The gateways' disk; None: they store nothing."""
        self.kv_disk: Any = None
        """Those of the workers, a folder for each host; None: they keep no blocks on disk."""
        self.num_banks = 1
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._next_number = itertools.count().__next__
        self._fibers: list[Fiber] = []
        self.hub = getcurrent()
        """Runs the event queue; each thread returns to it when it blocks and when it ends."""
        self.leave: Callable[[], bool] = self.hub.switch
        """Return from the running thread to the event queue, until it is resumed."""

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Call at a time; what happens at the same time keeps its order."""
        heappush(self._events, (when, self._next_number(), call, args))

    def after(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Call in a while; a negative delay is none."""
        when = self.now + delay_s if delay_s > 0.0 else self.now
        heappush(self._events, (when, self._next_number(), call, args))

    def run(self, until: float, is_done: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass; whether ``is_done`` before ``until``."""
        queue = self._events
        while queue and queue[0][0] <= until:
            self.now, _, call, args = heappop(queue)
            self.num_events += 1
            call(*args)
            if not self.num_events % _LOOK_EVENTS and is_done():
                return True
        self.now = until
        return is_done()

    def close(self) -> None:
        """End all threads."""
        self.is_over = True
        self._events.clear()
        for fiber in self._fibers:
            fiber.end()

    def log(self, text: str, *args: object) -> None:
        """Note an event of the simulation, for people."""
        if self.on_log is not None:
            who = self.process.name if self.process else "-"
            self.on_log(f"{self.now - _START_S:9.4f} {who}: {text % args if args else text}")

    def switch_delay_s(self) -> float:
        """Time until a thread or loop that can run gets a processor."""
        chance = self.rng.random()
        if chance < _SLOW_SWITCHES:
            return -log(1 - chance / _SLOW_SWITCHES) * _SLOW_SWITCH_S
        return -log(chance) * _SWITCH_S

    def maybe_preempt(self) -> None:
        """Take the processor from the running thread, perhaps."""
        if self.fiber is None:
            return
        self._calls_left -= 1
        if self._calls_left < 0:
            self._preempt()

    def _preempt(self) -> None:
        """Draw the next call that takes the processor; this one does."""
        if self.preemption <= 0.0 or self.is_over:
            self._calls_left = 1 << 30
            return
        self._calls_left = int(log(1 - self.rng.random()) / log(1 - self.preemption))
        self.this_fiber().park(self.switch_delay_s())

    # ---- what product code calls in place of the module ``time`` -----------------------------

    def monotonic(self) -> float:
        if self.fiber is not None:
            self._calls_left -= 1
            if self._calls_left < 0:
                self._preempt()
        process = self.process
        return self.now if process is None else self.now + process.clock_offset_s

    def time(self) -> float:
        ahead_s = self.clock(self.process.host) if self.process is not None else 0.0
        return self.now + 1.7e9 + ahead_s

    def clock(self, host: str) -> float:
        """What a host's time of day is ahead of the simulation's: no two agree."""
        if host not in self.clocks:
            self.clocks[host] = random.Random(f"{self._seed} {host}").uniform(-60, 60)
        return self.clocks[host]

    def sleep(self, seconds: float) -> None:
        self.this_fiber().park(seconds)

    def this_fiber(self) -> Fiber:
        """The running thread; an event loop must not block."""
        if self.fiber is None:
            raise AssertionError("an event loop would block here")
        return self.fiber

    def register(self, fiber: Fiber) -> None:
        self._fibers.append(fiber)

    def threads(self, process: Process) -> list[Thread]:
        """Threads of a process that have not ended, and its event loops."""
        fibers = [f for f in self._fibers if f.process is process and not f.is_finished]
        return [*fibers, *process.loops]


class Process:
    """A simulated process: its threads, event loops and sockets live and die together."""

    def __init__(self, kernel: Kernel, name: str, host: str, pid: int) -> None:
        self.kernel, self.name, self.host, self.pid = kernel, name, host, pid
        self.clock_offset_s = kernel.rng.uniform(0, 1e5)
        """Monotonic clocks of hosts have nothing in common."""
        self.is_dead = False
        self.is_paused = False
        self.stall_s = 0.0
        """Time that its next computation takes longer."""
        self.loops: list[SimLoop] = []
        self.sockets: dict[SimSocket, None] = {}
        self.on_death: list[Callable[[], None]] = []
        self._deferred: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        until = kernel.suspended.get(host, 0.0)
        if until > kernel.now:  # it is started there once the host goes on
            self.is_paused = True
            kernel.at(until, self.resume)
        self._loop: SimLoop | None = None

    @property
    def loop(self) -> SimLoop:
        """The event loop of its main thread."""
        from tests.simulation.loops import SimLoop

        if self._loop is None:
            self._loop = SimLoop(self)
        return self._loop

    def run(self, call: Callable[..., object], *args: Any) -> None:
        """Run code of this process now, or when it is awake; never when it is dead."""
        if self.is_dead:
            return
        if self.is_paused:
            self._deferred.append((call, args))
            return
        before = self.kernel.process
        self.kernel.process = self
        try:
            call(*args)
        finally:
            self.kernel.process = before

    def threads(self) -> list[Thread]:
        """What can stand still while the rest goes on."""
        return self.kernel.threads(self)

    def pause(self) -> None:
        """SIGSTOP."""
        self.kernel.log("pause %s", self.name)
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT."""
        if self.is_dead or not self.is_paused:
            return
        self.kernel.log("resume %s", self.name)
        self.is_paused = False
        deferred, self._deferred = self._deferred, []
        for call, args in deferred:
            self.kernel.after(self.kernel.switch_delay_s(), self.run, call, *args)

    def kill(self, why: str = "killed") -> None:
        """SIGKILL: nothing of it runs again, and the kernel closes its sockets."""
        if self.is_dead:
            return
        self.kernel.log("%s ends: %s", self.name, why)
        self.is_dead = True
        for sock in list(self.sockets):
            sock.close()
        for call in self.on_death:
            call()


class Fiber:
    """One thread of a process."""

    def __init__(self, process: Process, target: Callable[[], object], name: str) -> None:
        self.process, self.name = process, name
        self.is_finished = False
        self._target = target
        self._ticket = 0
        """Grows with each ``park`` and each end of one."""
        self._woken = 0
        """The ticket whose end is on its way, or that of a thread which runs."""
        self._waiting_for_end: list[Fiber] = []
        self._deadline = inf
        """Time at which its ``park`` ends without ``wake``."""
        self._timers: list[float] = []
        """Times of timer events to come, the nearest one last: most waits need none of their own,
        since they end before an event that is there already."""
        self._held: list[tuple[int, bool]] | None = None
        """While it stands still: what would resume it."""
        self._kernel = process.kernel
        self.greenlet = greenlet(self._main, self._kernel.hub)  # by default, of its starter
        self._kernel.register(self)

    def start(self) -> None:
        self._kernel.after(self._kernel.switch_delay_s(), self._resume, self._ticket, True)

    def park(self, timeout_s: float | None = None) -> bool:
        """Wait for ``wake``; False when it was not called in time. Called by the thread itself."""
        kernel = self._kernel
        if kernel.is_over:
            raise GreenletExit
        self._ticket += 1
        self._deadline = inf
        if timeout_s is not None:
            deadline = self._deadline = kernel.now + timeout_s if timeout_s > 0.0 else kernel.now
            timers = self._timers
            if not timers or deadline < timers[-1]:
                self._set_timer()
        return kernel.leave()

    def wake(self) -> None:
        """End its ``park`` soon."""
        if self._woken != self._ticket and not self.is_finished:
            self._woken = self._ticket
            self._kernel.after(self._kernel.switch_delay_s(), self._resume, self._ticket, True)

    def join(self, timeout_s: float | None = None) -> None:
        """Another thread waits for the end of this one."""
        if not self.is_finished:
            caller = self._kernel.this_fiber()
            self._waiting_for_end.append(caller)
            caller.park(timeout_s)

    def end(self) -> None:
        """The simulation is over: unwind the thread, whose calls have no effect any more."""
        if not self.is_finished and self.greenlet:
            self.process.is_dead = True
            with suppress(Exception, GreenletExit):
                self.greenlet.throw(GreenletExit)

    def hold(self) -> None:
        """It stands still, and the rest of its process does not."""
        self._kernel.log("thread %s of %s stands still", self.name, self.process.name)
        self._held = self._held or []

    def release(self) -> None:
        """It goes on."""
        held, self._held = self._held or (), None
        for ticket, is_woken in held:
            self._kernel.after(self._kernel.switch_delay_s(), self._resume, ticket, is_woken)

    def _set_timer(self) -> None:
        self._timers.append(self._deadline)
        self._kernel.at(self._deadline, self._expire)

    def _expire(self) -> None:
        """The nearest timer."""
        self._timers.pop()
        if self._woken == self._ticket or self._deadline == inf:
            return  # it runs, or soon will; or it waits without a limit
        if self._deadline <= self._kernel.now:
            self._resume(self._ticket, False)
        elif not self._timers or self._deadline < self._timers[-1]:
            self._set_timer()

    def _resume(self, ticket: int, is_woken: bool) -> None:
        if ticket != self._ticket or self.is_finished:
            return
        process, kernel = self.process, self._kernel
        if process.is_dead:
            return
        if process.is_paused:
            process.run(self._resume, ticket, is_woken)
            return
        if self._held is not None:
            self._held.append((ticket, is_woken))
            return
        self._ticket = self._woken = ticket + 1
        before, kernel.process = kernel.process, process
        kernel.fiber = self
        try:
            self.greenlet.switch(is_woken)
        finally:
            kernel.process, kernel.fiber = before, None

    def _main(self, _: bool) -> None:
        try:
            self._target()
        except GreenletExit:
            pass
        except Exception as err:
            if not self._kernel.is_over and not self.process.is_dead:
                self._kernel.failures.append(
                    f"thread {self.name} of {self.process.name} ended: {type(err).__name__}: {err}"
                )
        finally:
            self.is_finished = True
            for other in self._waiting_for_end:
                other.wake()
