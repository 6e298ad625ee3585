"""Ray's nodes: whom its head hears, and what becomes of those that it does not.

A node whose host the head has not heard for Ray's limit is dead to Ray, for good. Its raylet learns
that when the link has healed, and ends, with all of Ray's processes of its host; it returns as
another node with nothing running. What the head sends to a host that is cut off arrives when the
link heals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.kernel import Kernel
from tests.simulation.network import Network, Pipe

HEAD = "head"
"""The host of Ray's head, of the controller and of the first gateway."""
_LOOK_S = 0.25
"""Time between two looks of the head whether it hears the hosts."""
_LEAVE_S = 0.1
"""Time between two looks of a node that drains whether its workers have left."""
_RETURN_S = 1.0
"""Mean time until a raylet that has ended is started again."""


class Node:
    """One raylet, from its start to its end."""

    def __init__(self, host: str, number: int) -> None:
        self.host, self.number = host, number
        self.is_alive = True
        """To Ray's head."""
        self.has_ended = False
        self.drains = False
        self.unheard_s = 0.0
        """Time for which the head has not heard it."""

    @property
    def node_id(self) -> str:
        return f"{self.host}.{self.number}"

    @property
    def is_open(self) -> bool:
        """Processes may start here."""
        return self.is_alive and not self.drains


class Nodes:
    """The nodes of all hosts, as Ray's head knows them."""

    def __init__(self, kernel: Kernel, net: Network, limit_s: float) -> None:
        self._kernel, self._net, self._limit_s = kernel, net, limit_s
        self.of_host: dict[str, Node] = {}
        """The newest node of each host."""
        self.on_dead: list[Callable[[Node], None]] = []
        """The head takes a node for dead."""
        self.on_end: list[Callable[[Node], None]] = []
        """A raylet ends, on its host."""
        self.on_new: list[Callable[[], None]] = []
        """The head has a new node."""
        self.may_die: Callable[[Node], bool] = lambda node: True
        """A node may end with all its processes now."""
        kernel.after(_LOOK_S, self._look)

    def add(self, host: str) -> None:
        """A host of the cluster; no effect for one that is known."""
        self.of_host.setdefault(host, Node(host, 1))

    def alive(self) -> list[Node]:
        """Nodes that live, to Ray's head."""
        return [node for node in self.of_host.values() if node.is_alive]

    def reach(self, host: str, call: Callable[..., object], *args: Any) -> None:
        """What Ray's head sends: it happens when the link is whole and the host runs."""
        Pipe(self._net, HEAD, host).send(self._arrive, host, call, args)

    def tell(self, host: str, call: Callable[..., object], *args: Any) -> None:
        """What a raylet sends to Ray's head."""
        Pipe(self._net, host, HEAD).send(self._arrive, HEAD, call, args)

    def drain(self, host: str, limit_s: float, is_empty: Callable[[Node], bool]) -> None:
        """A host will leave: its node ends when it is empty, or after a while."""
        node = self.of_host[host]
        self._kernel.log("Ray drains %s", node.node_id)
        node.drains = True
        self._leave(node, self._kernel.now + limit_s, is_empty)

    def _arrive(self, host: str, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        until = self._kernel.suspended.get(host, 0.0)
        if until > self._kernel.now:
            self._kernel.at(until, self._arrive, host, call, args)
        else:
            call(*args)

    def _look(self) -> None:
        """The head's health checks; it makes none while its own host stands still."""
        self._kernel.after(_LOOK_S, self._look)
        if self._stands_still(HEAD):
            return
        for node in self.alive():
            node.unheard_s = 0.0 if self._hears(node.host) else node.unheard_s + _LOOK_S
            if node.unheard_s >= self._limit_s and self.may_die(node):
                self._kernel.log("Ray takes %s for dead", node.node_id)
                self._bury(node)
                self.reach(node.host, self._end, node)

    def _hears(self, host: str) -> bool:
        blocks = self._net.link(HEAD, host).num_blocks + self._net.link(host, HEAD).num_blocks
        return host == HEAD or not (blocks or self._stands_still(host))

    def _stands_still(self, host: str) -> bool:
        return self._kernel.suspended.get(host, 0.0) > self._kernel.now

    def _leave(self, node: Node, deadline: float, is_empty: Callable[[Node], bool]) -> None:
        is_due = is_empty(node) or self._kernel.now >= deadline
        if node.has_ended or not node.is_alive:
            return  # sooner, in another way
        if is_due and not self._stands_still(node.host) and self.may_die(node):
            self._end(node)
            self.tell(node.host, self._bury, node)
        else:
            self._kernel.after(_LEAVE_S, self._leave, node, deadline, is_empty)

    def _bury(self, node: Node) -> None:
        """The head knows that a node is dead."""
        if node.is_alive:
            node.is_alive = False
            for call in self.on_dead:
                call(node)

    def _end(self, node: Node) -> None:
        if node.has_ended:
            return
        self._kernel.log("the raylet of %s ends", node.node_id)
        node.has_ended = True
        for call in self.on_end:
            call(node)
        self._kernel.after(
            self._kernel.rng.uniform(0.5, 2.0) * _RETURN_S,
            self.tell,
            node.host,
            self._register,
            Node(node.host, node.number + 1),
        )

    def _register(self, node: Node) -> None:
        self._bury(self.of_host[node.host])
        self._kernel.log("Ray has a new node, %s", node.node_id)
        self.of_host[node.host] = node
        for call in self.on_new:
            call()
