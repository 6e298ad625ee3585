"""Every overlay against every check, and a change of what each looks at."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.k8s import checks_network, checks_pods, checks_sizes, checks_wiring, validator
from tests.k8s.changes import CHANGES
from tests.k8s.kuberay import GROUPS, K8S, OVERLAYS, Manifests, NoKubectl, matches
from tests.paths import ROOT

pytestmark = pytest.mark.heavy

Check = Callable[[Manifests], Iterator[str]]
_WORDS = {"expertmesh", "public", "gateways", "monitoring", "nvidia", "Never"}
"""Values of settings that are words elsewhere too, of groups of kinds for example."""


def valid(m: Manifests) -> Iterator[str]:
    """Every object fits its schema, strictly, and the operator's rules."""
    yield from validator.problems(m.objects)


CHECKS: dict[str, Check] = {
    "schemas": valid,
    "selectors": checks_network.selectors,
    "affinities": checks_network.affinities,
    "open ports": checks_network.reach,
    "leaving": checks_network.leaving,
    "port numbers": checks_network.ports,
    "disruption": checks_pods.budgets,
    "grace": checks_pods.grace,
    "tolerations": checks_pods.tolerations,
    "probes": checks_pods.probes,
    "commands": checks_pods.commands,
    "options": checks_pods.options,
    "mounts": checks_pods.mounts,
    "privileges": checks_pods.confined,
    "job": checks_wiring.job,
    "variables": checks_wiring.variables,
    "keys": checks_wiring.keys,
    "head": checks_wiring.head,
    "routes": checks_wiring.routes,
    "monitors": checks_wiring.monitors,
    "fabric": checks_wiring.fabric,
    "images": checks_wiring.images,
    "labels": checks_wiring.labels,
    "shape": checks_pods.shape,
    "versions": checks_sizes.versions,
    "secrets": checks_sizes.secrets,
    "devices": checks_sizes.devices,
    "memory": checks_sizes.memory,
    "guide": checks_sizes.guide,
    "copies": checks_sizes.copies,
}


def rendered(overlay: str) -> Manifests:
    try:
        return Manifests.of(overlay)
    except NoKubectl as err:
        pytest.skip(str(err))


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("check", CHECKS)
def test_an_overlay_holds(check: str, overlay: str) -> None:
    assert list(CHECKS[check](rendered(overlay))) == []


@pytest.mark.parametrize(
    ("check", "overlay", "change"),
    [(check, overlay, change) for check, overlay, _, change in CHANGES],
    ids=[f"{check}: {what}" for check, _, what, _ in CHANGES],
)
def test_a_change_is_seen(check: str, overlay: str, change: Callable[[Manifests], object]) -> None:
    m = rendered(overlay)
    change(m)
    assert list(CHECKS[check](m)) != []


def test_every_check_has_a_change_that_it_sees() -> None:
    assert {check for check, *_ in CHANGES} == CHECKS.keys()


@pytest.mark.parametrize("overlay", ["cpu-kind", "gpu-multi-node"])
def test_a_second_cluster_has_objects_of_its_own(overlay: str, tmp_path: Path) -> None:
    """Blue and green, as in how-to/kubernetes.md: only what clients use is the same."""
    first = rendered(overlay)
    second = _renamed(overlay, tmp_path / "beside", {"cluster": "expertmesh-b"})
    same = {(d["kind"], d["metadata"]["name"]) for d in first.objects}
    same &= {(d["kind"], d["metadata"]["name"]) for d in second.objects}
    assert {kind for kind, _ in same} <= {
        *("ServiceAccount", "ConfigMap", "Service", "HTTPRoute", "GRPCRoute")
    }
    assert {name for kind, name in same if kind == "Service"} == {
        *("expertmesh-gateway", "expertmesh-gateway-headless")
    }
    for kind, name in sorted(same):
        assert first.named(kind, name) == second.named(kind, name)
    for policy in second.kind("NetworkPolicy"):
        assert second.selected(policy["spec"]["podSelector"])
    both = {"cluster": "expertmesh-b", "serving-cluster": "expertmesh-b"}
    switched = _renamed(overlay, tmp_path / "switched", both)
    for name in ("schemas", "selectors", "affinities", "open ports", "port numbers", "disruption"):
        assert list(CHECKS[name](switched)) == []


def _renamed(overlay: str, root: Path, values: dict[str, str]) -> Manifests:
    """The overlay with other settings, in a copy of the manifests."""
    shutil.copytree(K8S, root)
    settings = root / "overlays" / overlay / "settings.yaml"
    text = settings.read_text()
    for name, value in values.items():
        text = re.sub(rf"^  {name}: \S+", f"  {name}: {value}", text, flags=re.M)
    settings.write_text(text)
    return Manifests.of(overlay, root)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_must_be_changed_is_in_one_file(overlay: str, tmp_path: Path) -> None:
    """Every value of settings.yaml comes to where it belongs, and stands nowhere else."""
    rendered(overlay)
    settings = yaml.safe_load((K8S / "overlays" / overlay / "settings.yaml").read_text())["data"]
    unused = {"none"} if overlay == "cpu-kind" else set()  # no keys, no claim
    text = [k for k, v in settings.items() if re.search(r"[a-z]{4}", v) and v not in unused]
    others = {key: f"another{number}" for number, key in enumerate(text)}
    others["image-pull-policy"] = "Always"
    numbers = {key: str(700 + n) for n, key in enumerate(settings.keys() - others.keys() - unused)}
    changed = _renamed(overlay, tmp_path / "changed", {**others, **numbers}).objects
    words = yaml.safe_dump(changed)
    used = {**others, **numbers}
    for key, value in used.items():
        assert re.search(rf"\b{value}\b", words) or settings[key] in unused, key
    names = {settings[key] for key in others} - _WORDS
    left = [name for name in names if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", words)]
    assert left == []
    assert "example.com" not in words


def test_ray_s_autoscaler_may_be_added(tmp_path: Path) -> None:
    """What it adds is all that differs: the account's token of the head, and pods that go."""
    rendered("cpu-kind")
    root = tmp_path / "k8s"
    shutil.copytree(K8S, root)
    overlay = root / "overlays" / "cpu-kind" / "kustomization.yaml"
    before = "components:\n"
    overlay.write_text(
        overlay.read_text().replace(before, f"{before}- ../../components/ray-autoscaler\n")
    )
    m = Manifests.of("cpu-kind", root)
    found = {name: list(check(m)) for name, check in CHECKS.items()}
    assert {name: problems for name, problems in found.items() if problems} == {
        "privileges": ["headgroup: has a service account's token"],
        "shape": ["the operator may delete pods by itself"],
    }


def test_all_workers_of_one_node_are_in_one_pod() -> None:
    """NVLink needs one host, and every pod is a host of its own to NCCL."""
    m = rendered("gpu-single-node")
    asked = checks_sizes.ask(m)
    assert set(asked.hosts.values()) == {"attention-0"}
    assert asked.num_workers == {"attention": 6, "experts": 2}
    assert m.group("attention").limit("nvidia.com/gpu") == 8
    assert [g.name for g in m.groups if g.name in GROUPS[2:] and g.replicas] == ["attention"]


def test_the_table_of_the_page_has_every_check() -> None:
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    _, _, rows = page.partition("| Check | cpu-kind | gpu-single-node | gpu-multi-node |")
    named = re.findall(r"^\| ([a-z ]+) \|", rows.partition("\n\n")[0], re.M)
    assert named == list(CHECKS)


def test_label_selectors_are_those_of_kubernetes() -> None:
    labels = {"a": "1", "b": "2"}
    assert matches({}, labels)
    assert matches({"matchLabels": {"a": "1"}}, labels)
    assert not matches({"matchLabels": {"a": "2"}}, labels)
    for operator, values, holds in (
        ("In", ["1"], True),
        ("In", ["2"], False),
        ("NotIn", ["2"], True),
        ("NotIn", ["1"], False),
        ("Exists", None, True),
        ("DoesNotExist", None, False),
    ):
        expression = {"key": "a", "operator": operator, "values": values}
        assert matches({"matchExpressions": [expression]}, labels) is holds
