"""Sums: what pods have against what ``up`` asks for; versions and secrets.

A check yields what is wrong in a rendered overlay, nothing if all is well.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints.public_shape import MODELS
from benchmarks.sizing.guide import known_model
from benchmarks.sizing.layouts import GPUS_PER_NODE, H100_NODE, Layout, best_layout
from cluster.cli.options.serve_config import build_config
from cluster.cli.options.serve_options import OPTIONS
from cluster.config.cluster import ClusterConfig
from cluster.config.resources import NodeResources
from cluster.core.errors import ConfigError
from cluster.core.node_labels import NodeLabels
from cluster.core.topology import Member
from cluster.launch.checkpoint_check import CheckpointFacts, check
from cluster.launch.model_source import ModelSource
from cluster.sizing.start_plan import StartPlan, plan_start
from tests.k8s.checks_network import WORKERS
from tests.k8s.kuberay import Manifests
from tests.paths import ROOT

GPU_BYTES = 0.9 * 80e9
"""What a device of the overlays' smallest kind has to give."""
PROCESS_BYTES = 600 * 2**20
"""A worker without its weights, and Ray's own processes in a pod."""
GUIDE_SIZES = {"headgroup": (1, 4.0, 16.0), "gateway": (2, 4.0, 8.0)}
"""Pods, CPUs and GiB of the groups without GPUs."""
DISK_BYTES_S = 0.2e9
"""A slow disk: weights must come within the startup probe's room."""


def versions(m: Manifests) -> Iterator[str]:
    """One Ray everywhere: locked, in the manifest, in the image's tag; one image for all."""
    locked = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    ours = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert ours is not None
    if m.cluster["spec"]["rayVersion"] != locked["ray"]:
        yield f"rayVersion {m.cluster['spec']['rayVersion']} is not the locked {locked['ray']}"
    images = {g.container["image"] for g in m.groups}
    images |= {c["image"] for g in m.groups for c in g.pod.get("initContainers", [])}
    images |= {
        c["image"] for j in m.kind("Job") for c in j["spec"]["template"]["spec"]["containers"]
    }
    if len(images) != 1:
        yield f"pods have different images: {sorted(images)}"
    for image in sorted(images):
        tag = image.rpartition("/")[2].partition(":")[2].partition("@")[0]
        if tag in ("", "latest"):
            yield f"image {image} has no fixed tag"
        if not tag.startswith(f"{ours[1]}-ray{locked['ray']}-"):
            yield f"image {image} is not named for expertmesh {ours[1]} and Ray {locked['ray']}"


def secrets(m: Manifests) -> Iterator[str]:
    """No secret is in clear."""
    for found in m.objects:
        if found["kind"] == "Secret":
            yield f"Secret/{found['metadata']['name']}: is in the manifests"
        yield from _clear_text(found, found["kind"])
    is_open = m.engine.get("allow-unauthenticated") is True
    if m.cluster["spec"].get("authOptions") != {"mode": "token"} and not is_open:
        yield "RayCluster: Ray asks for no token"
    if "api-key" in m.engine:
        yield "engine.yaml: an API key in clear"
    if "api-key-file" not in m.engine and not is_open:
        yield "engine.yaml: neither keys nor the word that none are wanted"


def _clear_text(x: Any, at: str) -> Iterator[str]:
    if isinstance(x, list):
        for i, item in enumerate(x):
            yield from _clear_text(item, f"{at}[{i}]")
    if not isinstance(x, dict):
        return
    name = str(x.get("name", ""))
    if re.search(r"TOKEN|PASSWORD|SECRET|API_KEY", name) and x.get("value"):
        yield f"{at}: {name} is in clear"
    for key, value in x.items():
        if (
            key in ("redisPassword", "redisUsername")
            and isinstance(value, dict)
            and "value" in value
        ):
            yield f"{at}.{key}: is in clear"
        yield from _clear_text(value, f"{at}.{key}")


# ---- sums -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """What ``up`` makes of an overlay's engine.yaml on the nodes that its pods become."""

    config: ClusterConfig
    facts: CheckpointFacts
    start: StartPlan
    hosts: dict[int, str]
    """Expert device -> pod."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 4 if self.config.model.dtype == "float32" else 2

    @property
    def expert_bytes(self) -> int:
        """Of the slots of one expert worker, spare ones filled."""
        values = sum(int(b["expert_values"]) for b in self.facts.banks)
        return values * self.start.num_slots * self.itemsize

    @property
    def attention_bytes(self) -> int:
        """Weights of one attention worker."""
        return self.facts.attention_weights * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """KV cache of one attention worker."""
        kind = self.config.engine.kv_cache_dtype
        each = self.facts.kv_bytes_per_token(self.config.model.dtype, kind)
        length = self.config.model.max_model_len or self.facts.context_tokens
        engine = self.config.engine
        return engine.num_kv_blocks(each, length) * engine.block_size_tokens * each

    @property
    def num_workers(self) -> dict[str, int]:
        """Group -> workers in it."""
        workers = self.config.workers
        return {"attention": workers.num_attention_ranks, "experts": workers.num_expert_workers}


def ask(m: Manifests) -> Asked:
    """Plan an overlay's start with the product's own code. Raises ``ConfigError``."""
    values: dict[str, Any] = {"gateway.api_keys": ("key",)}
    for option in OPTIONS:
        name = option.flag.removeprefix("--")
        if name in m.engine and name not in ("api-key-file", "admin-key-file"):
            values[option.target] = option.kind(str(m.engine[name]))
    model = str(m.engine.get("model", ""))
    folder = MODELS / Path(model).name if model else ROOT / "workers" / "demo" / "checkpoint"
    facts = _facts(folder)
    config = build_config(values, ModelSource(folder=folder, name="model"))
    nodes = [
        NodeResources(
            node_id=f"{g.name}-{i}",
            address=f"{g.name}-{i}",
            cpus=float(g.start_params()["num-cpus"]),
            gpus=g.limit("nvidia.com/gpu"),
            labels=NodeLabels.of(g.labels, g.name),
        )
        for g in m.groups
        for i in range(g.replicas)
    ]
    start = plan_start(config, facts.banks, nodes)
    count, pool = config.workers.num_expert_workers, m.pool("experts")
    hosts = {rank: f"{pool.name}-{rank * pool.replicas // count}" for rank in range(count)}
    members = [
        Member(name=f"expert-{rank}", role="expert", rank=rank, device=rank, node=host)
        for rank, host in hosts.items()
    ]
    return Asked(config, facts, start.with_members(members), hosts)


@functools.cache
def _facts(folder: Path) -> CheckpointFacts:
    return check(folder, allow_bare=True)


def devices(m: Manifests) -> Iterator[str]:
    """Pods have the CPUs and GPUs that the workers of ``up`` ask for, no GPU more."""
    try:
        asked = ask(m)
    except ConfigError as err:
        yield f"up would refuse: {err}"
        return
    workers = asked.config.workers
    counts = Counter[str]()
    for name, count in asked.num_workers.items():
        counts[m.pool(name).name] += count
    for name, count in counts.items():
        group = m.group(name)
        gpus, cpus = group.limit("nvidia.com/gpu"), group.limit("cpu")
        wanted = workers.gpus_per_worker or 0.0
        if group.replicas * gpus != count * wanted:
            yield f"{name}: {group.replicas} x {gpus:g} GPUs, {count} workers want {wanted:g} each"
        if gpus not in (0, GPUS_PER_NODE):
            yield f"{name}: {gpus:g} GPUs of a pod, which shares its host: no NVLink to the others"
        if wanted and gpus % wanted:
            yield f"{name}: {gpus:g} GPUs of a pod cannot be shared by {wanted:g}"
        if count % group.replicas:
            yield f"{name}: {count} workers on {group.replicas} pods"
        if (workers.cpus_per_worker or 0.0) * count > cpus * group.replicas:
            yield f"{name}: {count} workers want {workers.cpus_per_worker} CPUs each of {cpus:g}"
    if asked.config.gateway.num_gateway_replicas != m.group("gateway").replicas:
        yield "gateway: pods are not replicas"
    if m.engine.get("wait-nodes") != sum(g.replicas for g in m.groups):
        yield f"engine.yaml: waits for {m.engine.get('wait-nodes')} nodes"


def memory(m: Manifests) -> Iterator[str]:
    """Weights, KV and processes fit into GPUs and pods, and come within the startup's room."""
    asked = ask(m)
    weights = {"attention": asked.attention_bytes, "experts": asked.expert_bytes}
    loaded, needed = Counter[str](), Counter[str]()
    for name, share in weights.items():
        group = m.pool(name)
        kv = asked.kv_bytes if name == "attention" else 0
        each = asked.num_workers[name] // group.replicas
        on_gpu = bool(group.limit("nvidia.com/gpu"))
        if on_gpu and share + kv > GPU_BYTES:
            yield f"{name}: {share + kv:.3g} bytes of weights and KV on a GPU"
        loaded[group.name] += each * share
        needed[group.name] += each * (share + PROCESS_BYTES + (0 if on_gpu else kv))
    for name, num_bytes in loaded.items():
        group, wanted = m.group(name), needed[name] + PROCESS_BYTES
        if group.limit("memory") < wanted:
            yield f"{name}: {group.limit('memory'):.3g} bytes of memory, {wanted:.3g} are needed"
        probe = group.container["startupProbe"]
        room_s = probe["periodSeconds"] * probe["failureThreshold"]
        if num_bytes / DISK_BYTES_S > room_s:
            yield f"{name}: {room_s} s to load {num_bytes:.3g} bytes"


@functools.cache
def _best(model: str, num_nodes: int) -> Layout:
    return best_layout(known_model(model), H100_NODE, num_nodes)


def guide(m: Manifests) -> Iterator[str]:
    """Workers of a public model are those of the sizing guide, for GPUs of 80 GB."""
    asked = ask(m)
    workers = asked.config.workers
    model = Path(str(m.engine.get("model", ""))).name
    if not model:
        return
    for name, size in GUIDE_SIZES.items():
        group = m.group(name)
        found_size = (group.replicas, group.limit("cpu"), group.limit("memory") / 2**30)
        if found_size != size:
            yield f"{name}: {found_size} pods, CPUs, GiB; the guide: {size}"
    gpus = sum(m.group(name).limit("nvidia.com/gpu") * m.group(name).replicas for name in WORKERS)
    best = _best(model, int(gpus) // GPUS_PER_NODE)
    wanted = (best.num_attention, best.num_experts, best.num_redundant)
    found = (
        workers.num_attention_ranks,
        workers.num_expert_workers,
        workers.num_redundant_experts,
    )
    weights = (asked.attention_bytes, asked.expert_bytes)
    if weights != (best.attention_bytes, best.expert_bytes):
        yield f"engine.yaml: {weights} bytes of weights on a GPU; the guide: {best}"
    if found != wanted:
        yield f"engine.yaml: {found} attention, expert workers, spare slots; the guide: {wanted}"


def copies(m: Manifests) -> Iterator[str]:
    """Where experts have copies, each has them on two hosts: either may go at any time."""
    asked = ask(m)
    if m.pool("experts").replicas == 1 or not asked.config.workers.num_redundant_experts:
        return
    for bank in asked.start.placement.banks:
        hosts: dict[int, set[str]] = {}
        for device, slots in enumerate(bank.physical_to_logical):
            for expert in slots:
                hosts.setdefault(expert, set()).add(asked.hosts[device])
        alone = sorted(expert for expert, where in hosts.items() if len(where) < 2)
        if alone:
            yield f"{bank.bank} {bank.layer}: experts {alone} are on one host only"
            return
