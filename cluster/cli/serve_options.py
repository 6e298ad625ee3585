"""The options of ``serve`` and ``up``: one table makes flags, environment names and config.

Precedence: flag, then ``EXPERTMESH_<FLAG>``, then the default of the configuration.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.cli.exit_codes import CommandError, ExitCode

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_bytes(text: str) -> int:
    """``4096``, ``64M``, ``2GiB``: a number of bytes. Raises ``ValueError``."""
    digits = text.strip().removesuffix("iB").removesuffix("B")
    unit = digits[-1:].upper() if digits[-1:].isalpha() else ""
    number = digits.removesuffix(digits[-1:]) if unit else digits
    if unit not in _UNITS:
        raise ValueError(f"{text} is not a number of bytes")
    return int(float(number) * _UNITS[unit]) if unit else int(number)


def parse_switch(text: str) -> bool:
    """The value of an environment variable that stands for a flag. Raises ``ValueError``."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise ValueError(f"{text} is neither true nor false")
    return words[text.lower()]


def parse_micro_batches(text: str) -> str | int:
    """``auto``, or a number of micro-batches. Raises ``ValueError``."""
    return text if text == "auto" else int(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOption:
    """One flag of ``serve``."""

    flag: str
    """With its dashes."""
    target: str
    """``section.field`` of ``ClusterConfig``; a bare name is for the launcher alone."""
    help: str
    """What the user reads, default included."""
    kind: Callable[[str], Any] = str
    """From text to value; raises ``ValueError``."""
    choices: tuple[str, ...] = ()
    """Allowed words."""
    is_switch: bool = False
    """A flag without value."""
    has_negation: bool = False
    """A flag without value that has a ``--no-`` form too."""

    @property
    def dest(self) -> str:
        """Attribute in argparse's result."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        """Name in the environment."""
        return f"EXPERTMESH_{self.dest.upper()}"


def _option(flag: str, target: str, help: str, **more: Any) -> ServeOption:
    return ServeOption(flag=flag, target=target, help=help, **more)


OPTIONS = (
    _option("--host", "gateway.host", "interface of HTTP and gRPC (127.0.0.1)"),
    _option("--port", "gateway.port", "HTTP port, 0 for a free one (8000)", kind=int),
    _option("--grpc-port", "gateway.grpc_port", "gRPC port, 0 for a free one (50051)", kind=int),
    _option(
        "--admin-port",
        "gateway.admin_port",
        "HTTP port of the admin service, on loopback (8001, or a free one)",
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
    _option("--api-key", "gateway.api_keys", "key that clients must present"),
    _option("--api-key-file", "api_key_file", "file with one key a line"),
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
        "--allow-unauthenticated",
        "gateway.allow_unauthenticated",
        "allow a public --host without keys",
        kind=parse_switch,
        is_switch=True,
    ),
    _option(
        "--trust-request-chat-template",
        "gateway.trust_request_chat_template",
        "render the chat templates that clients send, which can keep a core busy for ever",
        kind=parse_switch,
        is_switch=True,
    ),
    _option(
        "--metrics-all-experts",
        "gateway.metrics_all_experts",
        "count the tokens of every expert in /metrics, not only of the busiest of each layer",
        kind=parse_switch,
        is_switch=True,
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
    _option("--address", "address", "join this Ray cluster instead of a private one"),
)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and every option; absent ones stay None."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or hub id (the bundled checkpoint)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, show the plan, start nothing"
    )
    for option in OPTIONS:
        if option.has_negation:
            action = argparse.BooleanOptionalAction
            parser.add_argument(option.flag, action=action, default=None, help=option.help)
        elif option.is_switch:
            parser.add_argument(option.flag, action="store_const", const=True, help=option.help)
        elif option.flag != "--api-key":  # every command has that one
            parser.add_argument(
                option.flag,
                type=option.kind,
                choices=option.choices or None,
                help=option.help,
                metavar=None if option.choices else "X",
            )


def collect(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """Option values by target: the flag's, else the environment's; neither leaves it out."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        value = getattr(args, option.dest)
        if value is None and environment.get(option.variable):
            value = _from_environment(option, environment[option.variable])
        if value is not None:
            values[option.target] = value
    return values


def _from_environment(option: ServeOption, text: str) -> Any:
    try:
        value = option.kind(text)
    except ValueError as err:
        message = f"{option.variable} ({text}) is not valid for {option.flag}"
        raise CommandError(ExitCode.USAGE, message) from err
    if option.choices and value not in option.choices:
        words = ", ".join(option.choices)
        raise CommandError(ExitCode.USAGE, f"{option.variable} ({text}) must be one of {words}")
    return value


def read_keys(path: str) -> tuple[str, ...]:
    """Keys of a key file: one a line, empty lines and ``#`` comments left out."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise CommandError(
            ExitCode.USAGE, f"--api-key-file ({path}) cannot be read: {err}"
        ) from err
    keys = tuple(s for line in lines if (s := line.strip()) and not s.startswith("#"))
    if not keys:
        raise CommandError(ExitCode.USAGE, f"--api-key-file ({path}) holds no key")
    return keys


def read_template(text: str) -> str:
    """A chat template: the content of a file, or Jinja text as it is."""
    if "{" in text or "\n" in text:
        return text
    try:
        return Path(text).read_text()
    except (OSError, UnicodeDecodeError) as err:
        message = f"--chat-template ({text}) cannot be read: {err}"
        raise CommandError(ExitCode.USAGE, message) from err
