"""Starts and ends fleets in Ray for the actor that keeps the table of models."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.config.cluster import ClusterConfig, section_types
from cluster.config.option_metadata import FLAG
from cluster.core.codec import from_plain, to_plain
from cluster.core.errors import ConfigError, ConflictError
from cluster.core.fleets import MODELS_NAME, NAMESPACE, own_folder
from cluster.core.topology import Role
from cluster.launch.checkpoint_check import CheckpointCheck
from cluster.launch.fleet import Fleet
from cluster.launch.model_plan import ModelPlan, make_model_plan
from cluster.launch.model_source import find_model
from cluster.launch.teardown import end_fleet
from cluster.sizing.start_plan import plan_start

_SHARED_SECTIONS = ("gateway", "observability")
_MEMORY_RESERVE = 1.2
"""Host memory that a fleet needs, as a multiple of its weights: weights and what steps use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOrder:
    """A client's order to load a revision."""

    model: str
    """Name of the model, served or new."""
    path: str = ""
    """Folder or hub id of the checkpoint; empty: as the active revision."""
    revision: str = ""
    """Name of the revision; empty: the next number."""
    settings: Mapping[str, Any]
    """Options that differ from the active revision, by field name: ``num_expert_workers``.
    For a new model, from the defaults."""
    percent: float = 0.0
    keys: tuple[str, ...] = ()
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class RayFleets:
    """Plans, starts and ends fleets. Its methods block; use threads."""

    selector: Mapping[str, str]
    """Labels of the nodes on which controllers run; empty: Ray's head node."""
    start_limit_s: float

    def plan(
        self,
        order: LoadOrder,
        first: ModelPlan,
        base: ModelPlan | None,
        others: Iterable[ModelPlan],
        fleet: str,
    ) -> dict[str, Any]:
        """Check an order, and plan the fleet of its revision.

        Args:
            order: the order.
            first: plan of the first model: all models share its gateway options.
            base: plan of the active revision; None for a new model.
            others: plans of the fleets that run beside the new one.
            fleet: name of the new fleet.

        Raises ``ConfigError``, ``CheckpointError``, and ``ConflictError`` without room for a
        further fleet.
        """
        from cluster.actors.ray_tools import cluster_nodes

        if base is None and not order.path:
            raise ConfigError("path", "", f"is required: {order.model} is not served yet")
        pools = Counter[Role]()
        for other in others:
            pools.update(other.config.workers.pools)
        config = _make_config(order, first, base, pools, fleet)
        facts = _check_checkpoint(config)
        if base is not None and facts.model_type != base.facts.model_type:
            rule = f"is of the family {facts.model_type}, not {base.facts.model_type}"
            raise ConfigError("path", order.path, rule)
        nodes = cluster_nodes()
        plan = make_model_plan(config, facts).resolved(nodes)
        start = plan_start(plan.config, plan.facts.banks, nodes, None, plan.profile)
        if not order.in_place:
            number = sum(plan.config.workers.pools.values())
            _check_room(plan, len(nodes), start.share.gpus * number, start.share.cpus * number)
        return dict(to_plain(plan))

    def start(self, plan: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> None:
        """Start the fleet of a plan; return when it serves. Raises ``StartError``."""
        model = as_plan(plan)
        Fleet(model.config.namespace).start(
            model,
            on_progress,
            asked={},
            limit_s=self.start_limit_s,
            selector=self.selector,
            is_running=True,
        )

    def stop(self, namespace: str) -> None:
        """End a fleet with its controller, and free its resources. An ended fleet is no error."""
        end_fleet(namespace)

    def keep(self, table: Mapping[str, Any]) -> None:
        """Store the table of models in Ray, for a restarted actor."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(MODELS_NAME, json.dumps(table), overwrite=True, namespace=NAMESPACE)

    def kept(self) -> dict[str, Any] | None:
        """Return the stored table; None without one."""
        from ray.experimental.internal_kv import _internal_kv_get

        found = _internal_kv_get(MODELS_NAME, namespace=NAMESPACE)
        return None if found is None else dict(json.loads(found))


def as_plan(plan: Mapping[str, Any]) -> ModelPlan:
    """Make the plan of a revision from its plain data."""
    return from_plain(dict(plan), ModelPlan)


def renamed(plan: Mapping[str, Any], fleet: str) -> dict[str, Any]:
    """Return the plan of the same revision for a new fleet."""
    known = as_plan(plan)
    workers = known.config.workers
    workers = replace(workers, reserves_cpus=workers.cpus_per_worker is not None)
    token = secrets.token_hex(32)
    config = replace(known.config, workers=workers, fleet=fleet, cluster_token=token)
    return dict(to_plain(replace(known, config=config)))


def _make_config(
    order: LoadOrder, first: ModelPlan, base: ModelPlan | None, pools: Counter[Role], fleet: str
) -> ClusterConfig:
    """Return the configuration of an order's revision. Raises ``ConfigError``."""
    source = find_model(order.path, lambda line: None) if order.path else None
    data = (base or first).config.to_dict()
    if base is None:
        data |= {name: {} for name in section_types() if name not in _SHARED_SECTIONS}
    if source is not None:
        data["model"] |= {"path": str(source.folder)}
    data["model"] |= {"served_model_name": order.model}
    for name, value in order.settings.items():
        section, field = _find_setting(name)
        data[section][field] = value
    for section, name in (("kv_tiers", "kv_disk_dir"), ("observability", "trace_dir")):
        if (folder := data[section].get(name)) is not None:
            data[section] = {**data[section], name: own_folder(folder, fleet)}
    has_own_cpus = data["workers"].get("cpus_per_worker") is not None
    data["workers"] |= {
        "other_pools": sorted(pools.items()),
        "reserves_cpus": has_own_cpus,
    }
    token = secrets.token_hex(32)
    return ClusterConfig.from_dict({**data, "fleet": fleet, "cluster_token": token})


def _find_setting(name: str) -> tuple[str, str]:
    """Return section and field of an option of a model. Raises ``ConfigError``."""
    wanted = name.replace("-", "_")
    for section, kind in section_types().items():
        for field in fields(kind):
            if field.name == wanted and field.metadata.get(FLAG) != "":
                if wanted == "served_model_name":
                    raise ConfigError(name, "", "is the name of the model: give it as model")
                if section in _SHARED_SECTIONS:
                    raise ConfigError(name, "", "holds for all models, and is set at the start")
                return section, wanted
    raise ConfigError(name, "", "is not an option of serve")


def _check_checkpoint(config: ClusterConfig) -> Any:
    check = CheckpointCheck(
        Path(config.model.path),
        os.environ,
        False,
        config.model.quantize,
        config.speculation.has_predictor,
        config.lora,
    )
    check.yield_cpus()
    return check.result()


def _check_room(plan: ModelPlan, num_nodes: int, gpus: float, cpus: float) -> None:
    """Raise ``ConflictError`` unless a fleet fits beside those that run.

    A fleet on CPUs shares cores that others have reserved, but not their memory.
    """
    import psutil

    from cluster.actors.ray_tools import free_resources

    free = free_resources()
    advice = "there is no room for a second set of workers: load it in place, without a canary"
    for kind, wanted in (("GPU", gpus), ("CPU", cpus)):
        if wanted > free.get(kind, 0.0) + 1e-3:
            text = f"{wanted:g} {kind}s are needed and {free.get(kind, 0.0):g} free: {advice}"
            raise ConflictError(text)
    if gpus:
        return
    weights = sum(_weight_bytes(plan))
    available = psutil.virtual_memory().available * num_nodes
    if weights * _MEMORY_RESERVE > available:
        text = (
            f"its weights have {weights} bytes and {available} bytes of memory are free: {advice}"
        )
        raise ConflictError(text)


def _weight_bytes(plan: ModelPlan) -> Iterable[float]:
    """Yield the bytes of the weights of each attention worker, and of all experts, once for each
    step group that has its own."""
    facts, workers = plan.facts, plan.config.workers
    itemsize = facts.itemsize(plan.config.model.dtype)
    yield facts.attention_weights * itemsize * workers.num_attention_ranks
    for bank in facts.banks:
        each = bank["expert_bytes"] or bank["expert_values"] * itemsize
        yield each * bank["num_experts"] * (2 if workers.num_prefill_experts else 1)
