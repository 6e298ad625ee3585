"""``serve`` and ``up``: check the options, start the launcher, report when the cluster is ready."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.cli.cluster import dry_run
from cluster.cli.cluster.launcher_process import LauncherProcess, raise_on_signals
from cluster.cli.options.serve_config import (
    build_config,
    build_configs,
    check_files,
    make_plan,
    options_by_flag,
)
from cluster.cli.options.serve_options import (
    StartOptions,
    add_serve_options,
    read_given_options,
    without_keys,
)
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, show
from cluster.cli.terminal.progress import Progress
from cluster.config.cluster import ClusterConfig
from cluster.core.errors import CheckpointError, ConfigError, StartError
from cluster.launch import local_ray, state_file
from cluster.launch.checkpoint_check import CheckpointCheck, CheckpointFacts
from cluster.launch.model_source import ModelSource, find_model
from cluster.launch.plan import LaunchPlan, check_ports, option_differences
from cluster.policy.rebalance import why_impossible
from gateway.auth.tls_files import check_tls_files
from gateway.state.folder import check_folder


def add_commands(commands: CommandParsers) -> None:
    serve = commands.add("serve", run_serve, "start a cluster and stay in the foreground")
    add_serve_options(serve)
    up = commands.add("up", run_up, "start a cluster in the background and return when it is ready")
    add_serve_options(up)


def run_serve(args: argparse.Namespace) -> int:
    """Start a cluster and serve in the foreground until a signal arrives."""
    name = args.name or os.environ.get("EXPERTMESH_NAME") or f"serve-{os.getpid()}"
    record = state_file.read_record(name)
    if record is not None and record.is_alive and not args.dry_run:
        raise CommandError(ExitCode.REFUSED, f"a cluster called {name} runs already")
    return _start(args, "serve", name)


def run_up(args: argparse.Namespace) -> int:
    """Start in the background, unless a cluster of this name and these settings runs already."""
    name = args.name or os.environ.get("EXPERTMESH_NAME") or state_file.DEFAULT_NAME
    raise_on_signals()
    with _start_lock(name):
        record = state_file.read_record(name)
        if args.dry_run or record is None or not _is_up(record, args):
            return _start(args, "up", name)
        note(f"{name} is up already")
        _print_ready(args, record.name, record.http, record.grpc)
        return ExitCode.OK


def _is_up(record: state_file.ClusterRecord, args: argparse.Namespace) -> bool:
    """Return whether the recorded cluster runs with the settings of ``args``.

    Also False if the launcher has to find out what runs in Ray. Raises ``CommandError`` if a
    cluster runs with other settings.
    """
    given = read_given_options(args, os.environ)
    address = _start_options(given.values).address
    if address and not record.is_alive:
        return False  # the launcher checks what runs in Ray
    if not address and record.is_detached:
        differences = [f"--address: {record.address}, not a private Ray"]
    elif not record.is_alive:
        return False
    else:
        differences = option_differences(record.asked, options_by_flag(given))
        if address and not record.joined:
            differences.append(f"--address: a private Ray, not {address}")
    if differences:
        text = "; ".join(differences)
        rule = f"{record.name} is up with other settings ({text})"
        raise CommandError(ExitCode.REFUSED, f"{rule}: expertmesh down --name {record.name} first")
    return True


@contextlib.contextmanager
def _start_lock(name: str) -> Iterator[None]:
    """Serialize ``up`` commands for one cluster name: a second command waits for the first."""
    with state_file.record_path(name).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(args: argparse.Namespace, command: state_file.Command, name: str) -> int:
    raise_on_signals()
    try:
        for line in state_file.clean_up_dead():
            note(line)
        return _launch(args, command, name)
    except (CheckpointError, StartError) as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err


def _launch(args: argparse.Namespace, command: state_file.Command, name: str) -> ExitCode:
    given = read_given_options(args, os.environ)
    start = _start_options(given.values)
    address = start.address or ""
    for one in given.models:
        _check_early(one.values, is_private=not address)
    progress = Progress()
    sources = [find_model(one.model.value, note) for one in given.models]
    configs = build_configs(given.models, sources)
    with contextlib.ExitStack() as undo:  # cleans up if a step fails before the plan is sent
        log = state_file.log_path(name)
        temp_dir, environment = _make_environment(undo, is_private=not address)

        front = None
        if not args.dry_run:  # the launcher imports its modules during the checkpoint check
            state_file.remove_log(name)  # left by a failed start
            undo.callback(log.unlink, missing_ok=True)
            front = LauncherProcess(
                log, environment, lambda *addresses: _ready(args, plan, *addresses)
            )
            undo.callback(front.cancel)
        checks = [_begin_check(config, environment, args.dry_run) for config in configs]
        for check in checks:
            undo.callback(check.cancel)
        progress.update("check")
        facts = [_checked(check, source) for check, source in zip(checks, sources, strict=True)]
        plan = make_plan(
            configs,
            facts,
            command=command,
            name=name,
            asked=options_by_flag(given),
            address=address,
            temp_dir=temp_dir,
            wait_nodes=start.wait_nodes,
            start_limit_s=start.start_timeout,
        )
        if front is None:
            progress.clear()
            _note_rebalancing(plan)
            document = dry_run.describe(plan)
            show(args, document, dry_run.text(document, plan.address))
            return ExitCode.OK
        for workers in (model.config.workers for model in plan.models):
            if workers.mode_reason:  # in a joined Ray the launcher logs it
                note(f"mode {workers.mode}: {workers.mode_reason}")
        _note_rebalancing(plan)
        front.begin(plan)
        undo.pop_all()
    return front.run(progress, detach=command == "up")


def _begin_check(
    config: ClusterConfig, environment: Mapping[str, str], allow_bare: bool
) -> CheckpointCheck:
    return CheckpointCheck(
        Path(config.model.path),
        environment,
        allow_bare,
        config.model.quantize,
        config.speculation.has_predictor,
        config.lora,
    )


def _checked(check: CheckpointCheck, source: ModelSource) -> CheckpointFacts:
    """Return the result of a check, and print what a user may not expect of the checkpoint."""
    facts = check.result()
    if facts.ignored_keys:
        note(f"config.json: ignored, not known: {', '.join(facts.ignored_keys)}")
    if not facts.has_tokenizer:
        note(f"{source.name} has no tokenizer.json: requests must give token ids, not text")
    if not facts.has_weights:
        note(f"{source.name} has no *.safetensors: this is a plan only, a start needs them")
    return facts


def _make_environment(undo: contextlib.ExitStack, is_private: bool) -> tuple[str, dict[str, str]]:
    """Return a private Ray's new folder (or "" for a joined Ray) and the launcher's environment."""
    if not is_private:
        return "", without_keys({**os.environ, **local_ray.common_environment()})
    folder = local_ray.make_temp_dir()
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return str(folder), without_keys(local_ray.private_environment(folder))


def _note_rebalancing(plan: LaunchPlan) -> None:
    """Print why ``--enable-eplb`` has no effect, as ``status`` does for a running cluster."""
    for config in (model.config for model in plan.models):
        experts = config.workers.num_expert_workers
        impossible = why_impossible(config, experts) if config.rebalance.enable_eplb else ""
        if impossible:
            note(f"--enable-eplb: rebalancing is not possible: {impossible}")


def _start_options(values: Mapping[str, Any]) -> StartOptions:
    """Return the start options; ``RAY_ADDRESS`` is the default of the Ray address."""
    given = {target: value for target, value in values.items() if "." not in target}
    address = given.pop("address", None) or os.environ.get("RAY_ADDRESS")
    return StartOptions(address=address, **given)


def _check_early(values: dict[str, Any], is_private: bool) -> None:
    """Check ports and the shape of every setting before a model is looked up or downloaded.

    In a joined Ray the launcher checks the ports: they may be on another host, or belong to the
    requested cluster, which runs already.
    """
    check_files(values)
    section = build_config(dict(values), ModelSource(folder=Path(), name="model")).gateway
    try:
        check_tls_files(section)
        if is_private:
            if section.state_dir is not None:
                check_folder(Path(section.state_dir))
            check_ports(section.host, section.public_ports)
            admin = {n: getattr(section, n) for n in ("admin_port", "admin_grpc_port")}
            check_ports(section.admin_host, {n: port for n, port in admin.items() if port})
    except ConfigError as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err


def _ready(
    args: argparse.Namespace, plan: LaunchPlan, url: str, grpc: str, admin: Mapping[str, str]
) -> None:
    try:
        _print_ready(args, plan.name, url, grpc)
    except CommandError as err:  # a full disk must not end the cluster
        note(f"expertmesh: {err}")
    note(f"  cluster {plan.name}, admin http={admin['http']} grpc={admin['grpc']}")
    if plan.serve_proxy_url:
        note(f"  Ray Serve's proxy http={plan.serve_proxy_url}")
    if plan.name != state_file.DEFAULT_NAME:
        note(f"  expertmesh status --name {plan.name}  # --name where several clusters run here")
    for hint in call_hints(plan.config, url, grpc, plan.facts.has_tokenizer):
        note(f"  {hint}")
    if plan.command == "serve":
        note("  stop with Ctrl-C")


def call_hints(config: ClusterConfig, url: str, grpc: str, has_tokenizer: bool) -> tuple[str, ...]:
    """Return example calls with curl, grpcurl and Python; without a tokenizer, with token ids."""
    section = config.gateway
    key = " -H 'Authorization: Bearer KEY'" if section.requires_keys else ""
    model = config.model.served_model_name
    prompt: Any = "ROMEO:" if has_tokenizer else [1, 2, 3]
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": 40, "stream": True})
    given = {"text": prompt} if has_tokenizer else {"token_ids": {"ids": prompt}}
    call = json.dumps({**given, "sampling_params": {"max_tokens": 40}})
    curl, grpcurl = ("curl -N", "-plaintext")
    if section.has_tls:
        curl, grpcurl = ("curl --cacert CA.pem -N", "-cacert CA.pem")
    if section.tls_client_ca is not None:
        curl += " --cert CLIENT.crt --key CLIENT.key"
        grpcurl += " -cert CLIENT.crt -key CLIENT.key"
    return (
        f"{curl} {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'",
        f"grpcurl {grpcurl}{key} -d '{call}' {grpc} expertmesh.v1.Inference/GenerateStream",
        f"openai.OpenAI(base_url='{url}/v1', api_key='{'KEY' if key else 'none'}')",
    )


def _print_ready(args: argparse.Namespace, name: str, http: str, grpc: str) -> None:
    document = {"schema": 1, "name": name, "http": http, "grpc": grpc}
    show(args, document, f"expertmesh ready http={http} grpc={grpc}")
