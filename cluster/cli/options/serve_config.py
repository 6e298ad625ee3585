"""Builds the configuration and the plan of a start from option values."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.cli.options.serve_options import (
    OPTIONS,
    GivenModel,
    GivenOptions,
    read_template,
)
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.config.cluster import ClusterConfig, section_types
from cluster.config.gateway import GatewaySection
from cluster.core.checks import check
from cluster.core.errors import ConfigError
from cluster.core.fleets import fleet_name, own_folder
from cluster.core.process import count_cpus
from cluster.core.topology import Role
from cluster.launch.checkpoint_check import CheckpointFacts
from cluster.launch.model_plan import make_model_plan
from cluster.launch.model_source import ModelSource
from cluster.launch.plan import LaunchPlan, count_gpus, free_port
from gateway.auth.key_file import read_key_file

REFUSED_FIELDS = ("host", "admin_host")
"""Settings that exit with ``REFUSED`` if invalid, because they concern safety, not syntax."""
_KEY_FIELDS = ("api_keys", "api_key_file", "admin_keys", "admin_key_file")
_HEARTBEATS_PER_LIMIT = 4
_MAX_HEARTBEAT_S = 0.5


def check_files(values: Mapping[str, Any]) -> None:
    """Raise ``CommandError`` (usage) unless every file in ``values`` can be read."""
    for option in OPTIONS:
        path = values.get(option.target)
        if option.metavar == "FILE" and option.field != "chat_template" and path:
            try:
                with Path(path).open("rb"):
                    pass
            except OSError as err:
                message = f"{option.field} ({path}) cannot be read: {err.strerror}"
                raise CommandError(ExitCode.USAGE, message) from err


def build_config(values: Mapping[str, Any], model: ModelSource) -> ClusterConfig:
    """Build the configuration from option values, by ``ServeOption.target``.

    Raises ``CommandError``: usage for an invalid value, refused for an unsafe one.
    """
    sections = _sections(values)
    sections["model"] = {
        "path": str(model.folder),
        "served_model_name": model.name,
        **sections["model"],
    }
    _add_files(sections)
    _add_heartbeat(sections["transport"])
    if not any(sections["gateway"].get(name) for name in _KEY_FIELDS):
        sections["lora"].setdefault("lora_roots", ("/",))  # without keys any folder is allowed
    try:
        _check_key_files(sections["gateway"])
        _check_exporter(sections["observability"].get("otlp_endpoint"))
        return ClusterConfig.from_dict({**sections, "cluster_token": secrets.token_hex(32)})
    except ConfigError as err:
        code = ExitCode.REFUSED if err.field in REFUSED_FIELDS else ExitCode.USAGE
        raise CommandError(code, str(err)) from err


def build_configs(
    models: Sequence[GivenModel], sources: Sequence[ModelSource]
) -> list[ClusterConfig]:
    """Build the configuration of each model; see ``build_config``.

    Raises ``CommandError`` (usage) if two models cannot be served together.
    """
    if len(models) == 1:
        return [build_config(models[0].values, sources[0])]
    found = []
    for place, (given, source) in enumerate(zip(models, sources, strict=True)):
        try:
            found.append(build_config(given.values, source))
        except CommandError as err:
            raise CommandError(err.code, f"models[{place}]: {err}") from err
    try:
        _check_together(found)
    except ConfigError as err:
        raise CommandError(ExitCode.USAGE, str(err)) from err
    return [_one_of_several(place, found) for place in range(len(found))]


def _check_together(configs: Sequence[ClusterConfig]) -> None:
    """Raise ``ConfigError`` if two models have the same name or the same port."""
    names: set[str] = set()
    endpoints: set[str] = set()
    for config in configs:
        name = config.model.served_model_name
        for field, one in (
            ("served_model_name", name),
            *(("lora_modules", adapter) for adapter, _ in config.lora.modules),
        ):
            check(one not in names, field, one, "must be another name for each model and adapter")
            names.add(one)
        if (endpoint := config.kv_events.kv_events_endpoint) is not None:
            rule = f"must be another one for each model: {name} has it too"
            check(endpoint not in endpoints, "kv_events_endpoint", endpoint, rule)
            endpoints.add(endpoint)


def _one_of_several(place: int, configs: Sequence[ClusterConfig]) -> ClusterConfig:
    """Return a model's configuration as one of ``configs``, which share nodes and folders."""
    config, fleet = configs[place], fleet_name(place)
    others = Counter[Role]()
    for other in (*configs[:place], *configs[place + 1 :]):
        others.update(other.workers.pools)
    tiers, observability = config.kv_tiers, config.observability
    if fleet and tiers.kv_disk_dir is not None:
        tiers = replace(tiers, kv_disk_dir=own_folder(tiers.kv_disk_dir, fleet))
    if fleet and observability.trace_dir is not None:
        folder = own_folder(observability.trace_dir, fleet)
        observability = replace(observability, trace_dir=folder)
    workers = replace(config.workers, other_pools=tuple(sorted(others.items())))
    return replace(
        config, workers=workers, kv_tiers=tiers, observability=observability, fleet=fleet
    )


def options_by_flag(given: GivenOptions) -> dict[str, str]:
    """Return the user's options by flag. Starts with equal options request the same cluster.

    API keys are replaced by fingerprints. Of several models, each one's options are one text.
    """
    if len(given.models) == 1:
        (one,) = given.models
        return {"MODEL": one.model.value or "", **_by_flag(one.values)}
    asked = _by_flag(given.values)
    for place, one in enumerate(given.models):
        found = {"MODEL": one.model.value or "", **_by_flag(one.values)}
        own = [f"{flag} {text}" for flag, text in found.items() if asked.get(flag) != text]
        asked[f"models[{place}]"] = " ".join(own)
    return asked


def _by_flag(values: Mapping[str, Any]) -> dict[str, str]:
    asked = {}
    for option in OPTIONS:
        if option.section and option.target in values:
            text = str(values[option.target])
            if option.is_secret:
                text = hashlib.sha256(text.encode()).hexdigest()[:16]
            asked[option.flag] = text
    return asked


def _sections(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group the values by section and field; omit values that belong to no section."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in section_types()}
    for target, value in values.items():
        section, _, field = target.partition(".")
        if field:
            sections[section][field] = value
    return sections


def _check_key_files(gateway: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` if a key file holds no key."""
    for name in ("api_key_file", "admin_key_file"):
        path = gateway.get(name)
        check(path is None or bool(read_key_file(path, name)), name, path, "holds no key")


def _check_exporter(endpoint: str | None) -> None:
    """Raise ``ConfigError`` if packages that gateways need to export traces are missing."""
    if endpoint is not None:
        from cluster.tracing.exporter import load_exporter  # imports OpenTelemetry only if needed

        load_exporter(endpoint)


def _add_files(sections: dict[str, dict[str, Any]]) -> None:
    """Read the chat template; make other paths absolute, because workers run in other folders."""
    model = sections["model"]
    if "chat_template" in model:
        model["chat_template"] = read_template(model["chat_template"])
    lora = sections["lora"]
    if "lora_modules" in lora:
        lora["lora_modules"] = tuple(map(_absolute_module, lora["lora_modules"]))
    if "lora_roots" in lora:
        lora["lora_roots"] = tuple(str(Path(root).absolute()) for root in lora["lora_roots"])
    for option in OPTIONS:
        section = sections.get(option.section, {})
        if option.is_path and option.field != "chat_template" and section.get(option.field):
            section[option.field] = str(Path(section[option.field]).absolute())


def _absolute_module(module: str) -> str:
    """Make the folder in ``NAME=FOLDER`` absolute; other text is returned unchanged."""
    name, _, folder = module.partition("=")
    return f"{name}={Path(folder).absolute()}" if folder else module


def _add_heartbeat(transport: dict[str, Any]) -> None:
    """Set a heartbeat interval several times shorter than the detection limit."""
    limit = transport.get("detection_limit_s", 0.0)
    if limit > 0:
        transport["heartbeat_s"] = min(_MAX_HEARTBEAT_S, limit / _HEARTBEATS_PER_LIMIT)


def make_plan(
    configs: Sequence[ClusterConfig], facts: Sequence[CheckpointFacts], **values: Any
) -> LaunchPlan:
    """Check each model's configuration against its facts, and make the plan of a start.

    ``values``: further fields of ``LaunchPlan``. Raises ``CommandError`` (refused).
    """
    num_cpus = count_cpus()
    num_gpus = count_gpus() if facts[0].torch_has_cuda else 0
    try:
        gateway = _with_ports(configs[0].gateway)
        models = [
            make_model_plan(replace(config, gateway=gateway), known)
            for config, known in zip(configs, facts, strict=True)
        ]
        plan = LaunchPlan(
            config=models[0].config,
            facts=models[0].facts,
            profile=models[0].profile,
            others=tuple(models[1:]),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            **values,
        )
        if plan.temp_dir:  # the resources of a joined cluster are known only after joining
            plan = plan.planned(plan.private_nodes)
    except ConfigError as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err
    return plan


def _with_ports(section: GatewaySection) -> GatewaySection:
    """Return the section with each public port 0 replaced by a different free port."""
    names = ("port", "grpc_port", "serve_proxy")
    ports = {name: getattr(section, name) for name in names}
    for name in names:
        while ports[name] == 0:
            port = free_port(section.host)
            ports[name] = port if port not in ports.values() else 0
    return replace(section, **ports)
