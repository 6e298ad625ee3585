"""``models``: loads, promotes and unloads revisions of models while the cluster serves."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.cli.models import compare
from cluster.cli.options.config_file import SHARED_SECTIONS
from cluster.cli.options.serve_options import OPTIONS
from cluster.cli.terminal.admin_client import find_admin
from cluster.cli.terminal.arguments import CommandParsers, Number, add_wait_option
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import show, table
from cluster.cli.terminal.parser import suggestion
from cluster.cli.terminal.progress import Progress

DEFAULT_WAIT_S = 1800.0
_CHECK_LIMIT_S = 200.0
"""Time limit of a call that checks or downloads a checkpoint, unless ``--timeout`` is given."""
_POLL_S = 0.2
_SETTLED = ("READY", "FAILED", "STOPPED")
"""States that do not change by themselves."""
_percent = Number(kind=float, rule="must be from 0 to 100", low=0, high=100)


def add_commands(commands: CommandParsers) -> None:
    kinds = commands.add_group("models", "load, promote, roll back or unload revisions of models")
    kinds.add("list", run_list, "list the models with their revisions")
    load = _add(kinds, "load", run_load, "load a revision of a model, or a further model")
    text = "Folder or hub id of the checkpoint (default: as the active revision)"
    load.add_argument("path", nargs="?", metavar="CHECKPOINT", help=text)
    text = "Name of the revision (default: the next number)"
    load.add_argument("--revision", metavar="NAME", default="", help=text)
    text = "Option of serve that differs from the active revision: num-expert-workers=4"
    load.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help=text)
    text = "Take the place of the active revision; new requests wait meanwhile"
    load.add_argument("--in-place", action="store_true", help=text)
    promote = _add(kinds, "promote", run_promote, "send all requests, or a share, to a revision")
    text = "Name of the revision (default: the canary, or the only other one)"
    promote.add_argument("--revision", metavar="NAME", default="", help=text)
    for parser in (load, promote):
        text = "Share of the new requests that the revision serves as a canary"
        parser.add_argument("--percent", type=_percent, metavar="NUMBER", help=text)
        text = "Name of an API key with requests for the canary; may be repeated"
        parser.add_argument("--key", action="append", default=[], metavar="NAME", help=text)
    text = "end a canary, or return to the revision before"
    rollback = _add(kinds, "rollback", run_rollback, text)
    text = "unload a revision, or a model, after its requests"
    unload = _add(kinds, "unload", run_unload, text)
    text = "Name of the revision (default: all of the model)"
    unload.add_argument("--revision", metavar="NAME", default="", help=text)
    text = "compare errors, latencies and log-probabilities of two revisions"
    compare.add_arguments(_add(kinds, "compare", run_compare, text))
    for parser in (load, rollback, unload):
        add_wait_option(parser, DEFAULT_WAIT_S)


def _add(
    kinds: CommandParsers, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command on the revisions of one model."""
    parser = kinds.add(name, run, text)
    parser.add_argument("served", metavar="MODEL", help="Name of the model in requests")
    return parser


def run_list(args: argparse.Namespace) -> int:
    """Print a line for each revision."""
    return _show(args, _models(_admin(args)))


def run_load(args: argparse.Namespace) -> int:
    """Load a revision and wait until it serves. Raises ``CommandError`` if it fails."""
    path = args.path or ""
    if path and Path(path).expanduser().is_dir():
        path = str(Path(path).expanduser().absolute())
    admin = _admin(args, _CHECK_LIMIT_S)
    known = _revisions(_models(admin), args.served)
    body = {
        "model": args.served,
        "path": path,
        "revision": args.revision,
        "settings": dict(map(_setting, args.set)),
        "percent": args.percent or 0.0,
        "keys": args.key,
        "in_place": args.in_place,
    }
    models = admin.post("/admin/v1/models/load", body)["models"]
    found = _revisions(models, args.served)
    name = args.revision or next(iter(found.keys() - known.keys()))

    def is_done(models: Sequence[Mapping[str, Any]]) -> bool:
        revision = _revisions(models, args.served).get(name)
        if revision is None or revision["state"] == "FAILED":
            reason = "it was unloaded" if revision is None else revision["error"]
            raise CommandError(ExitCode.FAILED, f"revision {name} of {args.served}: {reason}")
        return bool(revision["state"] == "READY")

    return _show(args, _wait(args, admin, models, is_done))


def run_promote(args: argparse.Namespace) -> int:
    """Make a revision active, or change its share of the requests."""
    body: dict[str, Any] = {"model": args.served, "revision": args.revision, "keys": args.key}
    if args.percent is not None:
        body["percent"] = args.percent
    if (args.key or args.percent is not None) and not args.revision:
        raise CommandError(ExitCode.USAGE, "--percent and --key need --revision")
    return _show(args, _admin(args).post("/admin/v1/models/promote", body)["models"])


def run_rollback(args: argparse.Namespace) -> int:
    """Undo the last step, and wait until the revision that lost its requests has ended."""
    admin = _admin(args)
    models = admin.post("/admin/v1/models/rollback", {"model": args.served})["models"]
    return _show(args, _wait(args, admin, models, lambda found: _is_settled(found, args.served)))


def run_unload(args: argparse.Namespace) -> int:
    """Unload a revision or a model, and wait until its workers have ended."""
    admin = _admin(args)
    body = {"model": args.served, "revision": args.revision}
    models = admin.post("/admin/v1/models/unload", body)["models"]
    return _show(args, _wait(args, admin, models, lambda found: _is_settled(found, args.served)))


def run_compare(args: argparse.Namespace) -> int:
    """Print how the active revision and another one differ."""
    found = [model for model in _models(_admin(args)) if model["name"] == args.served]
    if not found:
        raise CommandError(ExitCode.REFUSED, f"the model {args.served} is not served")
    return compare.compare(args, found[0])


def _admin(args: argparse.Namespace, limit_s: float | None = None) -> Client:
    """Return a client of the admin port. ``limit_s``: time limit without ``--timeout``."""
    args.timeout = args.timeout or limit_s
    admin = find_admin(args)
    if admin is None:
        raise CommandError(ExitCode.UNREACHABLE, "the admin port cannot be reached: --admin-url")
    return admin


def _models(admin: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = admin.get("/admin/v1/models")["models"]
    return found


def _revisions(models: Sequence[Mapping[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Return the revisions of a model by name; empty if it is not served."""
    found = next((model for model in models if model["name"] == name), None)
    return {} if found is None else {one["name"]: one for one in found["revisions"]}


def _is_settled(models: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(one["state"] in _SETTLED for one in _revisions(models, name).values())


def _wait(
    args: argparse.Namespace,
    admin: Client,
    models: list[dict[str, Any]],
    is_done: Callable[[Sequence[Mapping[str, Any]]], bool],
) -> list[dict[str, Any]]:
    """Show the progress until ``is_done``; return the models. Raises ``CommandError``."""
    give_up = time.monotonic() + args.wait
    with Progress(lines=False) as progress:
        while args.wait and not is_done(models):
            if time.monotonic() > give_up:
                late = f"not done within {args.wait:g} s: expertmesh models list"
                raise CommandError(ExitCode.NOT_READY, late)
            progress.update("; ".join(_pending(models, args.served)) or "waiting")
            time.sleep(_POLL_S)
            models = _models(admin)
    return models


def _pending(models: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    for one in _revisions(models, name).values():
        if one["state"] not in _SETTLED:
            yield f"revision {one['name']} {one['state']}{_share(one)}"


def _share(revision: Mapping[str, Any]) -> str:
    loaded, total = int(revision["loaded_bytes"]), int(revision["total_bytes"])
    return f" {loaded / total:.0%}" if revision["state"] == "LOADING" and total else ""


def _setting(text: str) -> tuple[str, Any]:
    """Parse ``OPTION=VALUE``; return the option's field and value. Raises ``CommandError``."""
    key, equals, value = text.partition("=")
    own = {option.key: option for option in OPTIONS if option.section not in SHARED_SECTIONS}
    option = own.get(key.replace("_", "-").removeprefix("--"))
    if option is None or not equals:
        meant = suggestion(key, own)
        rule = f"--set ({text}) must be OPTION=VALUE with an option of a model{meant}"
        raise CommandError(ExitCode.USAGE, rule)
    try:
        parsed = option.kind(value)
    except ValueError as err:
        raise CommandError(ExitCode.USAGE, f"--set {key} ({value}) {option.rule}") from err
    return option.field, parsed


def _show(args: argparse.Namespace, models: Sequence[Mapping[str, Any]]) -> int:
    rows = [
        (model["name"], one["name"], one["state"] + _share(one), _use(model, one), one["error"])
        for model in models
        for one in model["revisions"]
    ]
    header = ("MODEL", "REVISION", "STATE", "REQUESTS", "ERROR")
    return show(args, {"schema": 1, "models": list(models)}, table(header, rows))


def _use(model: Mapping[str, Any], revision: Mapping[str, Any]) -> str:
    """Describe which requests a revision serves."""
    name = revision["name"]
    if name == model["active"]:
        return "wait" if model["held"] else "active"
    if name == model["canary"]:
        keys = f", keys {', '.join(model['keys'])}" if model["keys"] else ""
        return f"{model['percent']:g}%{keys}"
    return "previous" if name == model["previous"] else "-"
