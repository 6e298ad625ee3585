"""The containers' commands, started as the manifests write them, on pretend hosts: one a pod.

What Kubernetes does is done here by hand: names in /etc/hosts for the Services, the address and the
variables of the image, the pod and the operator's token in the environment, probes and the preStop
hook run in the pod. The overlay is ``cpu-kind``; what is Ray's in a command is the operator's
(``Group.start_params``).
"""

from __future__ import annotations

import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.clients import NO_REDIS, redis_server
from tests.harness.fault_rows import Form
from tests.k8s import dockerfile
from tests.k8s.kuberay import K8S, Group, Manifests, NoKubectl
from tests.paths import ROOT
from tests.pretend_hosts.hosts import (
    CLIENT,
    TIMEOUT_S,
    NodeHosts,
    address_of,
    stream,
    wait_serving,
    wait_until,
    why_not,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FORM = Form(num_streams=4, num_tokens=48)
LONG = Form(num_streams=4, num_tokens=400)
ENGINE = "/etc/expertmesh/engine/engine.yaml"
RAY_PORT = 6379
HTTP_PORT = 8000
REDIS_PORT = 6390
REDIS_PASSWORD = "of-redis"


class Pods(NodeHosts):
    """A host for each pod of the RayCluster, the head first."""

    def __init__(self, folder: Path, manifests: Manifests) -> None:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        asks = manifests.cluster["spec"].get("authOptions", {}).get("mode") == "token"
        without = {"RAY_AUTH_MODE": "disabled"}
        super().__init__(folder, PYTHONPATH=str(ROOT), **(token if asks else without))
        self.manifests = manifests
        self.groups = [g for group in manifests.groups for g in [group] * group.replicas]
        steps = dockerfile.read(K8S / "image" / "Dockerfile")
        self._image = dockerfile.environment(dockerfile.stages(steps)[-1])
        self._engine = folder / "engine.yaml"
        self._engine.write_text(manifests.engine_text)
        self._names = folder / "hosts"
        services = {"head-svc": "h0", "inside": "h1"}
        lines = [f"{address_of(h)} {manifests.name}-{name}" for name, h in services.items()]
        self._names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._no_dns = folder / "resolv.conf"  # Ray asks it before it believes /etc/hosts
        self._no_dns.write_text("nameserver 127.0.0.1\n")

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

    def begin_pod(self, host: str) -> None:
        """Start the pod of a host that is up."""
        self.run("exec", host, "mount", "--bind", str(self._names), "/etc/hosts")
        self.run("exec", host, "mount", "--bind", str(self._no_dns), "/etc/resolv.conf")
        # Ray takes the address that leads to the outside for the pod's
        self.run("exec", host, "ip", "route", "replace", "default", "dev", "eth0")
        head = f"{self.manifests.name}-head-svc:{RAY_PORT}"
        command = self.manifests.start_command(self.group(host).name, head)
        script = f"ulimit -n 65536; {' '.join(command)}"  # as the operator writes it
        self.begin(host, *self._environment(host), "bash", "-c", script)

    def add_pod(self, group: str) -> str:
        """One pod more in a group, as with more replicas; its host."""
        self.groups.append(self.manifests.group(group))
        host = self.names[-1]
        self.run("boot", host)
        self.begin_pod(host)
        return host

    def delete_pod(self, host: str) -> None:
        """What Kubernetes does with a pod that is deleted: the hook, SIGTERM, the end."""
        assert self.hook(
            host, self.group(host).container["lifecycle"]["preStop"]["exec"]["command"]
        )
        self.stop(host)
        self.kill(host)

    def replace(self, host: str) -> None:
        """A deleted pod's successor, with the same address."""
        wait_until(lambda: self.boots(host), f"{host} is quite gone")
        self.begin_pod(host)

    def hook(self, host: str, command: list[str]) -> bool:
        """Run a probe's or a hook's command in a pod; whether it exits with 0."""
        words = [*self._environment(host), *command]
        try:
            self.run("exec", host, *words)
        except AssertionError:
            return False
        return True

    def is_ready(self, host: str) -> bool:
        """The readiness probe's answer; fails once the container's command has ended."""
        self.check_running(host)
        probe = self.group(host).container["readinessProbe"]
        return self.hook(host, probe["exec"]["command"])

    def submit(self, host: str) -> None:
        """What the container of the Job runs."""
        (job,) = self.manifests.kind("Job")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        variables = {e["name"]: e["value"] for e in container["env"] if "value" in e}
        words = [expand(word, variables) for word in container["command"]]
        assert ENGINE in words
        command = [str(self._engine) if w == ENGINE else w for w in words]
        self.run("exec", host, "env", *(f"{k}={v}" for k, v in self._image.items()), *command)

    def _environment(self, host: str) -> list[str]:
        """``env`` with the variables of the pod's container, and those that the operator sets."""
        group = self.group(host)
        variables = self._image | group.env | self.manifests.operator_env(group.name)
        variables |= {"POD_IP": address_of(host), "RAY_PORT": str(RAY_PORT)}
        variables["RAY_ADDRESS"] = f"{self.manifests.name}-head-svc:{RAY_PORT}"
        if host == "h0":
            variables["RAY_ADDRESS"] = f"127.0.0.1:{RAY_PORT}"
            variables["REDIS_PASSWORD"] = REDIS_PASSWORD  # of the Secret
        return ["env", *(f"{k}={expand(v, variables)}" for k, v in variables.items())]


def expand(text: str, variables: dict[str, str]) -> str:
    """``$(NAME)`` as Kubernetes replaces it."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)


@pytest.fixture(scope="module", params=["cpu-kind", "with gcs-ft and auth-token"])
def pods(request: pytest.FixtureRequest) -> Iterator[Pods]:
    """The cluster of the manifests, as its Job has started it."""
    if reason := why_not():
        pytest.skip(reason)
    is_plain = request.param == "cpu-kind"
    server = redis_server()
    if not is_plain and not server:
        pytest.skip(NO_REDIS)
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        try:
            found = Manifests.of("cpu-kind") if is_plain else fault_tolerant(Path(folder))
        except NoKubectl as err:
            pytest.skip(str(err))
        made = Pods(Path(folder), found)
        redis = None
        try:
            made.run("up", str(len(made.groups)))
            if not is_plain:
                words = ["--port", str(REDIS_PORT), "--requirepass", REDIS_PASSWORD, "--save", ""]
                redis = made.start("h1", server, *words, log=Path(folder) / "redis.log")
            made.begin_pod("h0")
            wait_until(lambda: made.is_ready("h0"), "the head answers")  # as its init container
            for host in made.names[1:]:
                made.begin_pod(host)
            made.submit(made.names[-1])
            yield made
        finally:
            made.close()
            if redis is not None:
                redis.communicate(timeout=TIMEOUT_S)


def fault_tolerant(folder: Path) -> Manifests:
    """``cpu-kind`` with two more components and a second attention pod, written as a user does."""
    root = folder / "k8s"
    shutil.copytree(K8S, root)
    overlay = root / "overlays" / "cpu-kind"
    main = overlay / "kustomization.yaml"
    before = "components:\n"
    more = "- ../../components/gcs-ft\n- ../../components/auth-token\n"
    main.write_text(main.read_text().replace(before, before + more))
    values = {
        "redis-address": f"{address_of('h1')}:{REDIS_PORT}",
        "redis-secret": "redis",
        "attention-replicas": '"2"',
        "attention-min-available": '"1"',
    }
    set_values(overlay / "settings.yaml", "  ", values)
    set_values(overlay / "engine.yaml", "", {"wait-nodes": "7", "num-attention-workers": "2"})
    return Manifests.of("cpu-kind", root)


def set_values(path: Path, indent: str, values: dict[str, str]) -> None:
    """Write values into a file of ``name: value`` lines; what is there already is replaced."""
    kept = [
        line
        for line in path.read_text().splitlines()
        if line.strip().partition(":")[0] not in values
    ]
    added = [f"{indent}{name}: {value}" for name, value in values.items()]
    path.write_text("\n".join([*kept, *added, ""]))


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
    workers = (*pods.of("attention"), *pods.of("experts"))
    wait_until(lambda: all(map(pods.is_ready, workers)), "all workers serve")
    probe = pods.group(pods.of("experts")[0]).container["readinessProbe"]["exec"]["command"]
    assert not pods.hook(pods.of("gateway")[0], probe)


def test_the_job_may_be_applied_again(pods: Pods) -> None:
    url = f"{gateway_url(pods)}/cluster/v1/status"
    before = pods.fetch("h0", url)["controller_pid"]
    pods.submit(pods.of("gateway")[0])
    assert pods.fetch("h0", url)["controller_pid"] == before


@pytest.mark.parametrize("group", ["experts", "attention"])
def test_a_pod_that_is_to_stop_drains_without_a_failed_request(
    pods: Pods, tmp_path: Path, group: str
) -> None:
    """The drain of the only pod of a role is refused: no other pod could take its requests."""
    *others, host = pods.of(group)
    hook = pods.group(host).container["lifecycle"]["preStop"]["exec"]["command"]
    done: list[bool] = []
    log = tmp_path / "clients.log"
    stream(pods, gateway_url(pods), log, FORM, lambda: done.append(pods.hook(host, hook)))
    assert done == [bool(others)]
    if others:
        pods.kill(host)
        pods.replace(host)
        wait_until(lambda: pods.is_ready(host), "its workers serve")


@pytest.mark.parametrize("group", ["experts", "attention"])
def test_more_replicas_are_used_and_fewer_are_not_missed(
    pods: Pods, tmp_path: Path, group: str
) -> None:
    """The pods come and go while clients stream; the same streams come without and with them."""
    log, url = tmp_path / "clients.log", gateway_url(pods)
    wait_serving(lambda: pods.fetch("h0", f"{url}/cluster/v1/status"))
    calm, count = stream(pods, url, log, FORM, lambda: None), len(worker_pids(pods))

    def act() -> None:
        host = pods.add_pod(group)
        wait_until(lambda: pods.is_ready(host), "the new pod's worker serves")
        assert len(worker_pids(pods)) == count + 1
        pods.delete_pod(host)
        pods.groups.pop()
        wait_serving(lambda: pods.fetch("h0", f"{url}/cluster/v1/status"))
        assert len(worker_pids(pods)) == count

    with ThreadPoolExecutor() as pool:
        acting = pool.submit(act)
        while not acting.done():
            assert stream(pods, url, log, FORM, lambda: None).tokens == calm.tokens
        acting.result()


def test_a_gateway_pod_that_is_to_stop_serves_what_it_has(pods: Pods, tmp_path: Path) -> None:
    host = pods.of("gateway")[-1]
    hook = pods.group(host).container["lifecycle"]["preStop"]["exec"]["command"]
    with ThreadPoolExecutor() as pool:
        done: list[Future[bool]] = []
        url = f"http://{address_of(host)}:{HTTP_PORT}"
        log = tmp_path / "clients.log"
        stream(pods, url, log, LONG, lambda: done.append(pool.submit(pods.hook, host, hook)))
        assert [future.result() for future in done] == [True]
    ask = [sys.executable, "-c", CLIENT, f"{url}/ready"]
    assert not pods.hook(host, ask)
    pods.kill(host)
    body = {"prompt": "ROMEO:", "max_tokens": 8, "temperature": 0}
    assert pods.fetch("h0", f"{gateway_url(pods)}/v1/completions", body)["choices"][0]["text"]
    pods.replace(host)
    wait_until(lambda: pods.hook(host, ask), "a gateway serves there again")


def test_a_pod_that_is_deleted_by_force_costs_no_request(pods: Pods, tmp_path: Path) -> None:
    host = pods.of("experts")[0]
    log = tmp_path / "clients.log"
    stream(pods, gateway_url(pods), log, FORM, lambda: pods.kill(host))
    pods.replace(host)
    wait_until(lambda: pods.is_ready(host), "its workers serve")


def test_requests_wait_for_the_successors_of_all_attention_pods(pods: Pods, tmp_path: Path) -> None:
    hosts = pods.of("attention")

    def lose() -> None:
        for host in hosts:
            pods.kill(host)
        for host in hosts:
            pods.replace(host)

    stream(pods, gateway_url(pods), tmp_path / "clients.log", FORM, lose)
    wait_until(lambda: all(map(pods.is_ready, hosts)), "their workers serve")


@pytest.mark.parametrize("pods", ["with gcs-ft and auth-token"], indirect=True)
def test_streams_outlive_the_head_pod(pods: Pods, tmp_path: Path) -> None:
    assert pods.manifests.operator_env("headgroup")
    url = gateway_url(pods)
    before = worker_pids(pods)
    log = tmp_path / "clients.log"
    stream(pods, url, log, FORM, lambda: pods.kill("h0"), clients_on=pods.of("attention")[0])
    pods.replace("h0")
    wait_until(lambda: pods.is_ready("h0"), "the head answers")
    pods.submit("h0")
    assert worker_pids(pods) == before


def worker_pids(pods: Pods) -> dict[str, int]:
    status = pods.fetch(pods.of("attention")[0], f"{gateway_url(pods)}/cluster/v1/status")
    return {w["name"]: w["pid"] for w in status["workers"] if w["state"] == "SERVING"}
