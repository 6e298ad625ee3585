"""The containers' commands, started as the manifests write them, on pretend hosts: one a pod.

What Kubernetes does is done here by hand: names in /etc/hosts for the Services, the address and the
variables of the pod and the operator's token in the environment, probes and the preStop hook run in
the pod. The overlay is ``cpu-kind``; the part of a command that is Ray's is the operator's
(``Group.start_params``).
"""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fault_rows import Form
from tests.k8s.kuberay import Group, Manifests, NoKubectl
from tests.test_pretend_hosts import TIMEOUT_S, Hosts, stream, why_not

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
FORM = Form(num_streams=4, num_tokens=48)
ENGINE = "/etc/expertmesh/engine/engine.yaml"
RAY_PORT = 6379
HTTP_PORT = 8000


class Pods(Hosts):
    """A host for each pod of the RayCluster, the head first."""

    def __init__(self, folder: Path, manifests: Manifests) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        asks = manifests.cluster["spec"].get("authOptions", {}).get("mode") == "token"
        without = {"RAY_AUTH_MODE": "disabled"}
        super().__init__(folder / "n", PYTHONPATH=str(ROOT), **(token if asks else without))
        self._folder = folder
        self.manifests = manifests
        self.groups = [g for group in manifests.groups for g in [group] * group.replicas]
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._engine = folder / "engine.yaml"
        self._engine.write_text(manifests.engine_text)
        self._names = folder / "hosts"
        services = {f"{manifests.name}-head-svc": "h0", f"{manifests.name}-inside": "h1"}
        lines = [f"{address_of(host)} {name}" for name, host in services.items()]
        self._names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    @property
    def names(self) -> list[str]:
        """All hosts."""
        return [f"h{i}" for i in range(len(self.groups))]

    def of(self, group: str) -> list[str]:
        """The hosts of a group."""
        return [h for h, g in zip(self.names, self.groups, strict=True) if g.name == group]

    def group(self, host: str) -> Group:
        """The group of a host."""
        return self.groups[int(host[1:])]

    def begin(self, host: str) -> None:
        """Start the pod of a host that is up."""
        if host in self._running:  # it has died with its host
            self._running.pop(host).communicate(timeout=TIMEOUT_S)
        self.run("exec", host, "mount", "--bind", str(self._names), "/etc/hosts")
        # Ray takes the address that leads to the outside for the pod's
        self.run("exec", host, "ip", "route", "replace", "default", "dev", "eth0")
        head = f"{self.manifests.name}-head-svc:{RAY_PORT}"
        command = self.manifests.start_command(self.group(host).name, head)
        words = [*self._environment(host), *command]
        self._running[host] = self.start(host, *words, log=self._folder / f"{host}.log")

    def delete(self, host: str) -> None:
        """End a pod at once."""
        self.run("kill", host)

    def replace(self, host: str) -> None:
        """A deleted pod's successor, with the same address."""
        wait_until(lambda: self.boots(host))
        self.begin(host)

    def hook(self, host: str, command: list[str]) -> bool:
        """Run a probe's or a hook's command in a pod; whether it exits with 0."""
        words = [*self._environment(host), *command]
        try:
            self.run("exec", host, *words)
        except AssertionError:
            return False
        return True

    def is_ready(self, host: str) -> bool:
        """The readiness probe's answer."""
        probe = self.group(host).container["readinessProbe"]
        return self.hook(host, probe["exec"]["command"])

    def submit(self, host: str) -> None:
        """What the container of the Job runs."""
        (job,) = self.manifests.kind("Job")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        variables = {e["name"]: e["value"] for e in container["env"] if "value" in e}
        words = [expand(word, variables) for word in container["command"]]
        assert ENGINE in words
        self.run("exec", host, *(str(self._engine) if w == ENGINE else w for w in words))

    def _environment(self, host: str) -> list[str]:
        """``env`` with the variables of the pod's container, and those that the operator sets."""
        variables = dict(self.group(host).env)
        variables |= {"POD_IP": address_of(host), "RAY_PORT": str(RAY_PORT)}
        variables["RAY_ADDRESS"] = f"{self.manifests.name}-head-svc:{RAY_PORT}"
        if host == "h0":
            variables["RAY_ADDRESS"] = f"127.0.0.1:{RAY_PORT}"
        return ["env", *(f"{k}={expand(v, variables)}" for k, v in variables.items())]

    def close(self) -> None:
        """End all that was started here."""
        with suppress(AssertionError):
            self.run("down")
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate(timeout=TIMEOUT_S)


def address_of(host: str) -> str:
    """``h2`` is 10.77.0.12."""
    return f"10.77.0.{10 + int(host[1:])}"


def expand(text: str, variables: dict[str, str]) -> str:
    """``$(NAME)`` as Kubernetes replaces it."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    """The cluster of the manifests, as its Job has started it."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        manifests = Manifests.of("cpu-kind")
    except NoKubectl as err:
        pytest.skip(str(err))
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        made = Pods(Path(folder), manifests)
        try:
            made.run("up", str(len(made.groups)))
            for host in made.names:
                made.begin(host)
            probe = made.group("h0").container["readinessProbe"]["exec"]["command"]
            wait_until(lambda: made.hook("h0", probe))
            made.submit(made.names[-1])
            yield made
        finally:
            made.close()


def wait_until(is_true: Callable[[], bool], limit_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.5)


def gateway_url(pods: Pods, index: int = 0) -> str:
    return f"http://{address_of(pods.of('gateway')[index])}:{HTTP_PORT}"


def test_the_manifests_form_the_cluster_that_they_describe(pods: Pods) -> None:
    status = pods.fetch("h0", f"{gateway_url(pods)}/cluster/v1/status")
    nodes = {
        role: sorted(w["node"] for w in status["workers"] if w["role"] == role)
        for role in ("attention", "expert")
    }
    assert nodes["attention"] == [address_of(h) for h in pods.of("attention")]
    assert nodes["expert"] == [address_of(h) for h in pods.of("experts")]
    body = {"prompt": "ROMEO:", "max_tokens": 8, "temperature": 0}
    texts = {
        pods.fetch("h0", f"{gateway_url(pods, i)}/v1/completions", body)["choices"][0]["text"]
        for i in range(len(pods.of("gateway")))
    }
    assert all(texts)


def test_readiness_is_about_the_workers(pods: Pods) -> None:
    wait_until(lambda: all(map(pods.is_ready, (*pods.of("attention"), *pods.of("experts")))))
    probe = pods.group(pods.of("experts")[0]).container["readinessProbe"]["exec"]["command"]
    assert not pods.hook(pods.of("gateway")[0], probe)


def test_the_job_may_be_applied_again(pods: Pods) -> None:
    url = f"{gateway_url(pods)}/cluster/v1/status"
    before = pods.fetch("h0", url)["controller_pid"]
    pods.submit(pods.of("gateway")[0])
    assert pods.fetch("h0", url)["controller_pid"] == before


def test_a_pod_that_is_to_stop_drains_without_a_failed_request(pods: Pods, tmp_path: Path) -> None:
    host = pods.of("experts")[-1]
    hook = pods.group(host).container["lifecycle"]["preStop"]["exec"]["command"]
    done: list[bool] = []
    log = tmp_path / "clients.log"
    stream(pods, gateway_url(pods), log, FORM, lambda: done.append(pods.hook(host, hook)))
    assert done == [True]
    pods.delete(host)
    pods.replace(host)
    wait_until(lambda: pods.is_ready(host))


def test_a_pod_that_is_deleted_by_force_costs_no_request(pods: Pods, tmp_path: Path) -> None:
    host = pods.of("experts")[0]
    log = tmp_path / "clients.log"
    stream(pods, gateway_url(pods), log, FORM, lambda: pods.delete(host))
    pods.replace(host)
    wait_until(lambda: pods.is_ready(host))
