"""The options of ``serve`` and ``up``: one table makes flags, environment names and config.

Precedence: flag, then ``EXPERTMESH_<FLAG>``, then the ``--config`` file, then the default of the
configuration.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli.config_file import MODEL, read_config_file
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.option import ServeOption, parse_bytes, parse_micro_batches, parse_switch
from cluster.cli.option import option as _option
from cluster.cli.security_options import SECURITY_OPTIONS, collect_keys
from cluster.errors import CheckpointError

OPTIONS = (
    _option("--host", "gateway.host", "interface of HTTP and gRPC (127.0.0.1)"),
    _option("--port", "gateway.port", "HTTP port, 0 for a free one (8000)", kind=int),
    _option("--grpc-port", "gateway.grpc_port", "gRPC port, 0 for a free one (50051)", kind=int),
    _option(
        "--admin-port",
        "gateway.admin_port",
        "HTTP port of the admin service (8001, or a free one)",
        kind=int,
    ),
    _option(
        "--admin-grpc-port",
        "gateway.admin_grpc_port",
        "its gRPC port (50052, or a free one)",
        kind=int,
    ),
    _option("--served-model-name", "model.served_model_name", "name that clients use"),
    _option(
        "--dtype",
        "model.dtype",
        "compute type (auto: the checkpoint's own)",
        choices=("auto", "float32", "bfloat16"),
    ),
    _option("--device", "workers.device", "device (auto)", choices=("auto", "cpu", "cuda")),
    _option("--max-model-len", "model.max_model_len", "context limit in tokens", kind=int),
    _option("--max-num-seqs", "engine.max_num_seqs", "sequences in one step (64)", kind=int),
    _option(
        "--max-num-batched-tokens",
        "engine.max_num_batched_tokens",
        "tokens in one step (512)",
        kind=int,
    ),
    _option(
        "--itl-target-ms",
        "engine.itl_target_ms",
        "cut prompts so that no step takes longer while anyone decodes (off)",
        kind=float,
    ),
    _option(
        "--max-queue", "gateway.max_queue", "requests that a gateway holds at once (1024)", kind=int
    ),
    _option(
        "--max-queue-tokens",
        "gateway.max_queue_tokens",
        "prompt and output tokens that these may need (max-queue times the context)",
        kind=int,
    ),
    _option(
        "--max-waiting",
        "engine.max_waiting",
        "sequences that may wait at one attention worker (1024)",
        kind=int,
    ),
    _option(
        "--max-waiting-tokens",
        "engine.max_waiting_tokens",
        "prompt tokens that may wait at one attention worker (no limit)",
        kind=int,
    ),
    _option(
        "--num-micro-batches",
        "engine.num_micro_batches",
        "parts of a step in flight at once: auto, 1 or 2 (auto: 2 where a step is large enough)",
        kind=parse_micro_batches,
    ),
    _option(
        "--micro-batch-decode-threshold",
        "engine.micro_batch_decode_threshold",
        "auto splits steps of so many decode rows on one attention rank, or more (128)",
        kind=int,
    ),
    _option(
        "--micro-batch-prefill-threshold",
        "engine.micro_batch_prefill_threshold",
        "the same for steps with prompt rows (256)",
        kind=int,
    ),
    _option(
        "--kv-cache-bytes",
        "engine.kv_cache_bytes",
        "KV memory of each attention worker, for example 512M",
        kind=parse_bytes,
    ),
    _option(
        "--enable-prefix-caching",
        "engine.enable_prefix_caching",
        "keep the KV of past requests for others that begin with the same tokens (on)",
        kind=parse_switch,
        has_negation=True,
    ),
    _option(
        "--kv-fetch-limit-s",
        "engine.kv_fetch_limit_s",
        "longest wait for KV blocks of another attention worker; 0: none are fetched (2)",
        kind=float,
    ),
    _option(
        "--num-attention-workers", "workers.num_attention_workers", "attention ranks (1)", kind=int
    ),
    _option(
        "--num-expert-workers",
        "workers.num_expert_workers",
        "expert ranks, in colocated mode all workers (2)",
        kind=int,
    ),
    _option(
        "--num-redundant-experts",
        "workers.num_redundant_experts",
        "spare expert slots per expert worker and bank (0)",
        kind=int,
    ),
    _option(
        "--recovery-slots",
        "workers.recovery_slots",
        "expert slots kept free per expert worker and bank (0)",
        kind=int,
    ),
    _option(
        "--device-speed",
        "workers.device_speed",
        "speed of expert workers: given by the labels of their nodes, or measured (given)",
        choices=("given", "measured"),
    ),
    _option(
        "--enable-eplb",
        "rebalance.enable_eplb",
        "move experts to where the load is while serving; needs spare expert slots (off)",
        kind=parse_switch,
        is_switch=True,
    ),
    _option(
        "--rebalance-interval-s",
        "rebalance.interval_s",
        "shortest time between two changes of the placement (30)",
        kind=float,
    ),
    _option(
        "--rebalance-horizon-s",
        "rebalance.horizon_s",
        "time for which a load is taken to stay: its gain in it must exceed the cost (300)",
        kind=float,
    ),
    _option(
        "--rebalance-max-move-fraction",
        "rebalance.max_move_fraction",
        "share of all expert slots that one change may fill (0.1)",
        kind=float,
    ),
    _option(
        "--rebalance-bytes-per-s",
        "rebalance.bytes_per_s",
        "rate at which a worker takes weights in while it serves (100000000)",
        kind=parse_bytes,
    ),
    _option(
        "--rebalance-limit-s",
        "rebalance.limit_s",
        "time for a stage of a change, after which it is given up (120)",
        kind=float,
    ),
    _option(
        "--mode",
        "workers.mode",
        "two pools, workers that are both, or one process (disaggregated)",
        choices=("disaggregated", "colocated", "local", "auto"),
    ),
    _option(
        "--transport",
        "transport.transport",
        "data plane (auto: sockets on CPUs)",
        choices=("auto", "sockets", "collective"),
    ),
    _option(
        "--cpus-per-worker",
        "workers.cpus_per_worker",
        "CPUs of a worker, fractions allowed (equal shares)",
        kind=float,
    ),
    _option(
        "--gpus-per-worker",
        "workers.gpus_per_worker",
        "GPUs of a worker, fractions allowed",
        kind=float,
    ),
    _option(
        "--num-gateway-replicas", "gateway.num_gateway_replicas", "gateway copies (1)", kind=int
    ),
    _option(
        "--routing-policy",
        "gateway.routing_policy",
        "how an attention worker is picked (kv: by cached prefixes and load)",
        choices=("kv", "least-loaded", "round-robin"),
    ),
    _option(
        "--detection-limit-s",
        "transport.detection_limit_s",
        "a silent worker is lost after so long (2)",
        kind=float,
    ),
    _option(
        "--placement-file", "workers.placement_file", "placement instead of the contiguous one"
    ),
    _option(
        "--load-profile",
        "workers.load_profile",
        "plan the first placement for this load (with --enable-eplb: the model's own)",
    ),
    _option(
        "--deterministic",
        "engine.deterministic",
        "same tokens and logprobs to the last bit in any batch and layout (slower, CPU only)",
        kind=parse_switch,
        is_switch=True,
    ),
    _option("--seed", "engine.seed", "base of the seeds of requests without one (0)", kind=int),
    _option("--chat-template", "model.chat_template", "Jinja file instead of the model's template"),
    _option(
        "--metrics-all-experts",
        "gateway.metrics_all_experts",
        "count the tokens of every expert in /metrics, not only of the busiest of each layer",
        kind=parse_switch,
        is_switch=True,
    ),
    _option(
        "--metrics-prefix",
        "gateway.metrics_prefix",
        "in front of the names in /metrics (expertmesh:)",
    ),
    _option(
        "--trace-dir",
        "observability.trace_dir",
        "folder for a timeline of every worker's steps, for Perfetto (none)",
    ),
    _option(
        "--trace-max-bytes",
        "observability.trace_max_bytes",
        "size of a worker's timeline, of which it keeps the last two (64M)",
        kind=parse_bytes,
    ),
    _option(
        "--otlp-endpoint",
        "observability.otlp_endpoint",
        "OpenTelemetry collector for traces of requests, OTLP over gRPC: http://HOST:4317 (none)",
    ),
    _option(
        "--trace-content",
        "observability.trace_content",
        "have prompts and outputs in these traces",
        kind=parse_switch,
        is_switch=True,
    ),
    _option("--address", "address", "join this Ray cluster instead of a private one"),
    _option("--wait-nodes", "wait_nodes", "first wait until that has so many nodes (0)", kind=int),
    _option(
        "--drain-lead-s",
        "gateway.drain_lead_s",
        "after SIGTERM: seconds of serving on without being ready (5)",
        kind=float,
    ),
    _option(
        "--drain-timeout-s",
        "gateway.drain_timeout_s",
        "then: seconds that running requests have to end (120)",
        kind=float,
    ),
    *SECURITY_OPTIONS,
)


COMMON_FLAGS = ("--api-key", "--admin-key")
"""Options that every command has."""


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, every option and ``--dry-run``; absent ones stay None."""
    add_settings(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, show the plan, start nothing"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and every option; absent ones stay None."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or hub id (the bundled checkpoint)"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with values of these options (none)"
    )
    for option in OPTIONS:
        if option.has_negation:
            action = argparse.BooleanOptionalAction
            parser.add_argument(option.flag, action=action, default=None, help=option.help)
        elif option.is_switch:
            parser.add_argument(option.flag, action="store_const", const=True, help=option.help)
        elif option.flag not in COMMON_FLAGS:
            parser.add_argument(
                option.flag,
                type=option.kind,
                choices=option.choices or None,
                help=option.help,
                metavar=None if option.choices else "X",
            )


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of an option, and who gave it."""

    value: Any
    """Parsed."""
    origin: str
    """The flag, the variable or the file."""


def find_settings(
    args: argparse.Namespace, environment: Mapping[str, str]
) -> dict[ServeOption, Setting]:
    """What is given: by the flag, else by the environment, else by the file.

    Where there is none of them it is left out. Raises ``CommandError`` (usage).
    """
    file = _read_file(args)
    found: dict[ServeOption, Setting] = {}
    for option in OPTIONS:
        if (value := getattr(args, option.dest)) is not None:
            found[option] = Setting(value, option.flag)
        elif environment.get(option.variable):
            value = _parse(option, environment[option.variable], option.variable)
            found[option] = Setting(value, option.variable)
        elif option.dest in file:
            value = _parse(option, file[option.dest], f"{option.dest} in {args.config}")
            found[option] = Setting(value, args.config)
    return found


def collect(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """Values of ``find_settings`` by target, and keys. Raises ``CommandError`` (usage)."""
    found = find_settings(args, environment)
    values = {option.target: setting.value for option, setting in found.items()}
    return {**values, **collect_keys(values, environment)}


def wanted_model(args: argparse.Namespace, environment: Mapping[str, str]) -> str | None:
    """MODEL, of the command line, the environment or the file; None for the bundled one."""
    given = args.model or environment.get("EXPERTMESH_MODEL")
    return given or _read_file(args).get(MODEL)


def _read_file(args: argparse.Namespace) -> dict[str, str]:
    names = {option.dest for option in OPTIONS}
    return read_config_file(args.config, names) if args.config else {}


def _parse(option: ServeOption, text: str, origin: str) -> Any:
    """The value of a text that is no flag's; ``origin`` says whose."""
    try:
        value = option.kind(text)
    except ValueError as err:
        message = f"{origin} ({text}) is not valid for {option.flag}"
        raise CommandError(ExitCode.USAGE, message) from err
    if option.choices and value not in option.choices:
        words = ", ".join(option.choices)
        raise CommandError(ExitCode.USAGE, f"{origin} ({text}) must be one of {words}")
    return value


def read_template(text: str) -> str:
    """A chat template: the content of a file, or Jinja text as it is."""
    from gateway.chat_template import ChatTemplate  # Jinja, which reading commands do without

    source = text if "{" in text or "\n" in text else _read_template_file(text)
    try:
        ChatTemplate(source)
    except CheckpointError as err:
        raise CommandError(ExitCode.USAGE, f"--chat-template: {err}") from err
    return source


def _read_template_file(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as err:
        message = f"--chat-template ({path}) cannot be read: {err}"
        raise CommandError(ExitCode.USAGE, message) from err
