"""How long streams pause when hosts or the network between them fail: more rows of the table.

python -m tests.long.reliability_hosts [--rows path-to-expert,head] [--repetitions 5]

Hosts are network namespaces of this machine with a Ray node each (``tests/pretend_hosts``; needs
root). The bundled model with two copies of every expert, default settings, float32,
``--deterministic``; 8 HTTP clients on the host of a gateway. Each repetition waits for full flow,
does the fault at a random moment, watches the streams for a while, and takes the longest time
between two events of one stream. Rows that lose more than a path or a while need a new cluster for
each repetition.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from tests.long.host_load import HostLoad
from tests.long.reliability_report import FaultRow, Found, lost, page_rows, report
from tests.pretend_hosts.hosts import host_of, wait_serving, wait_until, why_not
from tests.pretend_hosts.role_hosts import ROLES, RoleHosts, role_hosts

logger = logging.getLogger(__name__)

_CALM_S = 1.0
_SILENCE_S = 3.5
_AFTER_S = 2.0
"""A pause may be longer than a silence by so much."""
_TWO_ATTENTION = {**ROLES, "h5": "attention"}
_TWO_GATEWAYS = {**ROLES, "h5": "gateway"}
_HEAD_WITH_EXPERTS = {"h0": "expert", "h1": "gateway", "h2": "attention", "h3": "expert"}
_CONTROLLER = "ray::ControllerActor"


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRow(FaultRow):
    """One row, on pretended hosts."""

    roles: dict[str, str]
    """Of the hosts."""
    fault: Callable[[HostSite], object]
    """What happens; returns when the streams have felt it, and ``watch_s`` is over then."""
    watch_s: float = 8.0
    """Time after the fault in which streams are watched."""
    after: Callable[[HostSite], object] = lambda site: None
    """Raises ``RuntimeError`` for what must not be so then."""
    at_controller: bool = False
    """Clients call the gateway of the controller's host, even if there is another."""
    heal: Callable[[HostSite], object] | None = None
    """Undoes the fault; None: the next repetition begins with new hosts."""

    @property
    def options(self) -> tuple[str, ...]:
        """Of ``up``: two copies of every expert, an attention worker and a gateway on each host
        for one."""
        roles = list(self.roles.values())
        attention = ("--num-attention-workers", str(roles.count("attention")))
        gateways = ("--num-gateway-replicas", str(roles.count("gateway")))
        return ("--num-redundant-experts", "64", *attention, *gateways)


class HostSite:
    """The cluster of one row, as the faults see it."""

    def __init__(self, hosts: RoleHosts) -> None:
        self.hosts = hosts
        self.controller = self.controllers()[0]
        """Host of the controller."""
        others = [h for h in self.gateways if h != self.controller]
        self.elsewhere = others[0] if others else self.controller
        """Host of another gateway, if there is one."""
        self.workers: dict[str, int] = {}
        """Processes of workers that must live on."""

    @property
    def gateways(self) -> list[str]:
        """Hosts with a gateway."""
        return [host for host, role in self.hosts.roles.items() if role == "gateway"]

    def controllers(self) -> list[str]:
        """Hosts on which a controller lives."""
        return [host for host in self.gateways if _CONTROLLER in self.hosts.run("pids", host)]

    def cut_from_head(self) -> None:
        """The controller's host loses Ray's head, and no worker, until another controller leads.

        Then an expert worker is killed, and the other controller replaces it.
        """
        before = self.status()["term"]
        self.hosts.run("lose", self.controller, "h0")
        self.hosts.run("lose", "h0", self.controller)
        wait_until(lambda: self.status()["term"] > before, "another controller")
        worker = next(w for w in self.status()["workers"] if w["role"] == "expert")
        self.hosts.run("exec", host_of(worker["node"]), "kill", "-9", str(worker["pid"]))
        wait_until(lambda: self.status()["state"] != "SERVING", "the loss")
        wait_serving(self.status)
        self.workers = self.hosts.serving(self.elsewhere)

    def check_stale(self) -> None:
        """The controller that was cut off has ended no worker of the other one."""
        if self.hosts.serving(self.elsewhere) != self.workers:
            raise RuntimeError("workers of the new controller have ended")

    def status(self) -> dict[str, Any]:
        """Of the cluster; the fault leaves the gateway that is asked alone."""
        return self.hosts.status(self.elsewhere)

    def lose(self, sender: str, receiver: str) -> None:
        """Frames from a host to another vanish."""
        self.hosts.run("lose", sender, receiver)

    def find(self, sender: str, receiver: str) -> None:
        """They arrive again."""
        self.hosts.run("find", sender, receiver)


def _path_row(
    name: str, text: str, sender: str, receiver: str, roles: dict[str, str] = ROLES
) -> HostRow:
    """One direction of the path between two hosts is lost; experts have copies elsewhere."""
    return HostRow(
        name=name,
        text=text,
        limit="3 / 6 s",
        roles=roles,
        fault=lambda site: site.lose(sender, receiver),
        heal=lambda site: site.find(sender, receiver),
    )


ROWS = (
    _path_row("path-to-expert", "all packets lost from an attention to an expert host", "h2", "h3"),
    _path_row(
        "path-from-expert", "all packets lost from an expert to an attention host", "h3", "h2"
    ),
    _path_row(
        "path-attention",
        "all packets lost from the first attention host to another one",
        *("h2", "h5"),
        _TWO_ATTENTION,
    ),
    _path_row(
        "path-back-attention",
        "all packets lost from another attention host to the first one",
        *("h5", "h2"),
        _TWO_ATTENTION,
    ),
    HostRow(
        name="blip",
        text=f"the controller's host silent for {_SILENCE_S:g} s, streams of other gateways",
        limit=f"worst {_SILENCE_S + _AFTER_S:g} s",
        roles=_TWO_GATEWAYS,
        fault=lambda site: site.hosts.silence_for(site.controller, _SILENCE_S),
        heal=lambda site: None,
    ),
    HostRow(
        name="blip-here",
        text=f"the controller's host silent for {_SILENCE_S:g} s, streams of its gateway",
        limit=f"worst {_SILENCE_S + _AFTER_S:g} s",
        roles=_TWO_GATEWAYS,
        fault=lambda site: site.hosts.silence_for(site.controller, _SILENCE_S),
        at_controller=True,
        heal=lambda site: None,
    ),
    HostRow(
        name="head",
        text="the host with the head (GCS) and an expert worker powered off",
        limit="worst 6 s",
        roles=_HEAD_WITH_EXPERTS,
        fault=lambda site: site.hosts.power_off("h0"),
        watch_s=15.0,
    ),
    HostRow(
        name="stale-controller",
        text="the controller loses the head and is replaced, then a worker is lost",
        limit="-",
        roles=_TWO_GATEWAYS,
        fault=HostSite.cut_from_head,
        after=HostSite.check_stale,
    ),
)
"""In the order of the table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much and how often."""

    num_streams: int = 8
    """Clients."""
    num_tokens: int = 200
    """Tokens of a call."""
    repetitions: int = 5
    """Faults of a row."""


def measure_all(rows: Sequence[HostRow], size: Size) -> dict[str, Found]:
    """All repetitions of all rows; rows with the same hosts follow each other on one cluster."""
    found = {row.name: Found() for row in rows}
    draw = random.Random(1)
    with ExitStack() as held:
        site, roles = None, None
        for row in rows:
            for _ in range(size.repetitions):
                if site is None or roles != row.roles:
                    held.close()
                    hosts = held.enter_context(role_hosts(*row.options, roles=row.roles))
                    site, roles = HostSite(hosts), row.roles
                try:
                    _one(row, site, size, draw, found[row.name])
                    if row.heal is None:
                        site = None
                        continue
                    row.heal(site)
                    wait_serving(site.status)
                except (AssertionError, RuntimeError, TimeoutError) as err:
                    found[row.name].note = str(err).strip().rpartition("\n")[2][:120]
                    logger.warning("%s: %s", row.name, found[row.name].note)
                    site = None
    return found


def _one(row: HostRow, site: HostSite, size: Size, draw: random.Random, found: Found) -> None:
    """One fault."""
    wait_serving(site.status)
    entry = site.controller if row.at_controller else site.elsewhere
    load = HostLoad(site.hosts, entry, size.num_streams, size.num_tokens)
    with load.running():
        load.wait_deltas(3)
        time.sleep(_CALM_S + draw.uniform(0.0, 0.3))
        before = site.status()
        time.sleep(_CALM_S)  # a status costs CPU time
        hit_at = time.monotonic()
        row.fault(site)
        time.sleep(row.watch_s)
        load.wait_deltas(3)
        stall_s = load.longest_pause(hit_at)
        calm_s = load.longest_pause(hit_at - _CALM_S, hit_at - 0.1)
    row.after(site)
    after = site.status()
    found.stalls_s.append(stall_s)
    found.calm_s.append(calm_s)
    gone = lost(before, after)
    found.num_lost.append(len(gone))
    found.failures += load.failures
    logger.info("%s: %.3f s, lost %s, %s", row.name, stall_s, gone, load.failures)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and the rows for ``docs/reference/reliability.md``."""
    parser = argparse.ArgumentParser(prog="python -m tests.long.reliability_hosts")
    known = {row.name: row for row in ROWS}
    parser.add_argument("--rows", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--repetitions", type=int, default=Size().repetitions)
    options = parser.parse_args(arguments)
    names = options.rows.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--rows: {name} is not one of {', '.join(known)}")
    if reason := why_not():
        parser.error(reason)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = replace(Size(), repetitions=options.repetitions)
    found = measure_all([known[n] for n in names], size)
    sys.stdout.write(f"{report(ROWS, found)}\n\n{page_rows(ROWS, found)}\n")


if __name__ == "__main__":
    main()
