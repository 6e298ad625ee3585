"""``status``, ``workers``, ``events``: the state and history of a running cluster."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import Any

from cluster.cli.experts.rebalance import describe
from cluster.cli.terminal.arguments import CommandParsers, add_served_model_option
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import colour, note, show, table, time_of_day
from cluster.core.states import is_gone
from cluster.core.topology import LARGE_CLUSTER

WATCH_INTERVAL_S = 1.0
MAX_SHOWN = 16
"""Maximum number of problems, of workers that do not serve, and of ended workers in ``status``."""
_NUM_FULLEST = 4
_COLOURS = {"SERVING": "green", "DEGRADED": "yellow", "RECOVERING": "yellow", "STOPPED": "red"}


def add_commands(commands: CommandParsers) -> None:
    text = "show the state of the cluster; exit with 0 only if it is ready"
    status = commands.add("status", run_status, text)
    status.add_argument("--watch", action="store_true", help="Repeat the output until interrupted")
    text = "show each worker with its node and state"
    workers = commands.add("workers", run_workers, text)
    text = "show the changes of the cluster with cause and effect"
    events = commands.add("events", run_events, text)
    for parser in (status, workers, events):
        add_served_model_option(parser)


def run_status(args: argparse.Namespace) -> int:
    """Print the state of the cluster; return ``NOT_READY`` unless the cluster serves clients."""
    while True:
        client = Client(args)
        status: dict[str, Any] = client.get("/cluster/v1/status")
        ready: dict[str, Any] = client.get("/ready", any_status=True)
        is_ready = bool(ready.get("ready")) and not ready.get("error")
        show(args, status, _status_text(status, colours=not args.no_color))
        _note_partial(status)
        if not is_ready:
            note("; ".join(["not ready", *map(str, ready.get("reasons") or ())]))
        if not args.watch:
            return ExitCode.OK if is_ready else ExitCode.NOT_READY
        time.sleep(WATCH_INTERVAL_S)


def _status_text(status: Mapping[str, Any], colours: bool) -> str:
    state = str(status.get("state"))
    model = status.get("model") or {}
    kind = model.get("kv_cache_dtype")
    kept = f", {kind} KV" if kind not in (None, "auto") else ""
    lines = [
        f"state       {colour(state, _COLOURS.get(state, 'dim'), colours)}",
        f"model       {model.get('name')} ({model.get('model_type')}, {model.get('dtype')}, "
        f"{model.get('max_model_len')} tokens{kept})",
        f"generation  {status.get('generation')}, placement epoch {status.get('placement_epoch')}",
    ]
    if models := status.get("models"):
        lines.append(f"models      {'; '.join(map(_model_text, models))}")
    if stages := status.get("start"):
        lines.append(f"start       {_start_text(stages)}")
    if status.get("mode"):
        reason = status.get("mode_reason")
        lines.append(f"mode        {status['mode']}{f': {reason}' if reason else ''}")
    if results := status.get("results"):
        is_exact, arithmetic = results["exact"], results["arithmetic"]
        how = f"exact, with {arithmetic}" if is_exact else f"not exact: {results['reason']}"
        lines.append(f"results     {how}")
    if status.get("rebalance"):
        lines.append(f"rebalance   {describe(status['rebalance'])}")
    if (autoscale := status.get("autoscale") or {}).get("mode", "off") != "off":
        lines.append(f"autoscale   {_autoscale_text(autoscale)}")
    if adapters := status.get("adapters"):
        shown = ", ".join(f"{adapter['name']} ({adapter['state']})" for adapter in adapters)
        lines.append(f"adapters    {shown}")
    if status.get("error"):
        lines.append(f"error       {status['error']}")
    problems = status.get("problems") or ()
    lines += [f"problem     {problem}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"            and {len(problems) - MAX_SHOWN} more problems")
    return "\n".join([*lines, "", _summary_text(status)])


def _model_text(model: Mapping[str, Any]) -> str:
    """Format ``small revision 1: SERVING, 3 workers``."""
    number = model["num_workers"]
    name = f"{model['name']} revision {model['revision']}"
    return f"{name}: {model['state']}, {number} worker{'s' * (number != 1)}"


def _start_text(stages: Sequence[Mapping[str, Any]]) -> str:
    """Format ``9.5 s: placing 2.1 s (expert-1 last), reading 7.4 s (expert-0 last)``."""
    texts = (
        f"{one['name'].replace('_', ' ')} {one['seconds']:.1f} s ({one['last_worker']} last)"
        for one in stages
    )
    return f"{sum(one['seconds'] for one in stages):.1f} s: {', '.join(texts)}"


def _autoscale_text(autoscale: Mapping[str, Any]) -> str:
    """Format ``on: wants 2 attention and 3 expert workers (KV use 85%, target 70%)``."""
    wanted = " and ".join(f"{count} {role}" for role, count in autoscale["wanted"].items())
    text = f"{autoscale['mode']}: wants {wanted} workers" if wanted else autoscale["mode"]
    text += f" ({autoscale['reason']})" if autoscale["reason"] else ""
    return text + (f"; waits: {autoscale['waits_for']}" if autoscale["waits_for"] else "")


def run_workers(args: argparse.Namespace) -> int:
    status = Client(args).get("/cluster/v1/status")
    document = {"schema": 1, "workers": status["workers"]}
    _note_partial(status)
    return show(args, document, _workers_text(status))


def _summary_text(status: Mapping[str, Any]) -> str:
    """Format a table of all workers or, in a large cluster, of its roles and unusual workers.

    Unusual are workers that do not serve, those with the fullest KV cache and those with the most
    waiting requests.
    """
    living = [w for w in status.get("workers", ()) if not is_gone(w["state"])]
    if len(living) <= LARGE_CLUSTER:
        return _workers_text(status)
    rows = []
    for role in dict.fromkeys(w["role"] for w in living):
        workers = [w for w in living if w["role"] == role]
        counted = Counter(w["state"] for w in workers)
        states = ", ".join(f"{number} {state}" for state, number in counted.items())
        slots, free, total, running, waiting = (
            int(sum(value or 0 for value in values))
            for values in zip(*(map(_numbers, workers)), strict=True)
        )
        held = [f"{slots} expert slots"] if slots else []
        if total:
            held += [f"{free} of {total} KV blocks free", f"{running} running, {waiting} waiting"]
        rows.append((role, len(workers), states, ", ".join(held)))
    odd = [w for w in living if w["state"] != "SERVING"][:MAX_SHOWN]
    busy = {w["name"]: (_numbers(w)[-1] or 0, w.get("kv_usage") or 0) for w in living}
    most = nlargest(_NUM_FULLEST, living, key=lambda w: busy[w["name"]])
    odd += [w for w in most if any(busy[w["name"]])]
    gone = [w for w in status["workers"] if is_gone(w["state"])][-MAX_SHOWN:]
    shown = {w["name"]: w for w in (*odd, *gone)}
    parts = [table(("ROLE", "WORKERS", "STATES", "HOLDS"), rows)]
    parts += [_workers_text({"workers": [*shown.values()]})] if shown else []
    return "\n\n".join([*parts, "all workers: expertmesh workers"])


def _numbers(worker: Mapping[str, Any]) -> tuple[float | None, ...]:
    """Return expert slots, free and all KV blocks, running and waiting requests of a worker."""
    held = (worker.get(name) for name in ("slots", "kv_blocks_free", "kv_blocks_total"))
    stats = worker.get("stats") or {}
    return (*held, stats.get("num_requests_running"), stats.get("num_requests_waiting"))


def _note_partial(status: Mapping[str, Any]) -> None:
    if status.get("is_partial"):
        note("hosts, processes, problems and events are shown to admin keys only: give --admin-key")


def _workers_text(status: Mapping[str, Any]) -> str:
    """Format a table of live workers, and a table of ended workers with the reasons."""
    header = ("NAME", "ROLE", "RANK", "STATE", "NODE", "PID", "THREADS", "HOLDS")
    names = ("name", "role", "rank", "state", "node", "pid", "threads")
    workers = status.get("workers", ())
    living = [w for w in workers if not is_gone(w["state"])]
    gone = [w for w in workers if is_gone(w["state"])]
    rows = [
        (
            *("-" if (value := w.get(name)) in (None, "") else value for name in names),
            _memory_text(w),
        )
        for w in map(_with_group, living)
    ]
    text = table(header, rows)
    if gone:
        rows = [(w["name"], w["state"], w.get("node") or "-", w.get("reason") or "") for w in gone]
        text += f"\n\n{table(('GONE', 'STATE', 'NODE', 'REASON'), rows)}"
    return text


def _with_group(worker: Mapping[str, Any]) -> dict[str, Any]:
    """Return the worker with its step group in its role, as ``attention (prefill)``."""
    group = worker.get("group")
    return {**worker, "role": f"{worker['role']} ({group})"} if group else {**worker}


def _memory_text(worker: Mapping[str, Any]) -> str:
    free, total, slots = (worker.get(k) for k in ("kv_blocks_free", "kv_blocks_total", "slots"))
    held = [f"{slots} expert slots"] if slots is not None else []
    held += [f"{free} of {total} KV blocks free"] if total else []
    return ", ".join(held)


def run_events(args: argparse.Namespace) -> int:
    """Print the history of cluster changes, newest last."""
    document = Client(args).get("/cluster/v1/events")
    rows = [
        (time_of_day(e["time"]), e["generation"], e["cause"], e["effect"])
        for e in document["events"]
    ]
    header = ("TIME", "GENERATION", "CAUSE", "EFFECT")
    return show(args, document, table(header, rows))
