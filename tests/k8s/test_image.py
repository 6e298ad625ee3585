"""The image: its Dockerfile, what is sent to its build, and its steps in a clean folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.k8s import dockerfile
from tests.paths import ROOT
from workers.native.library import runnable

DOCKERFILE = ROOT / "k8s" / "image" / "Dockerfile"
STEPS = dockerfile.read(DOCKERFILE)
BEFORE, *STAGES = dockerfile.stages(STEPS)
LAST = STAGES[-1]
MAX_CONTEXT_BYTES = 20_000_000


def _texts(name: str, steps: list[dockerfile.Instruction] = LAST) -> list[str]:
    return [s.text for s in steps if s.name == name]


def test_the_base_has_the_locked_ray_and_can_be_pinned() -> None:
    arguments = dockerfile.arguments(BEFORE)
    locked = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert locked is not None
    assert arguments["RAY_VERSION"] == locked[1]
    assert (arguments["VARIANT"], arguments["BASE_DIGEST"]) == ("cpu", "")
    for stage in STAGES:
        image = stage[0].text.partition(" AS ")[0]
        assert image == (
            "rayproject/ray:${RAY_VERSION}-${PYTHON}-${VARIANT}${BASE_DIGEST:+@${BASE_DIGEST}}"
        )


def test_it_runs_as_ray_and_says_what_it_is() -> None:
    users = _texts("USER")
    assert users[-1] == "1000:100"
    assert not any(user.startswith(("0", "root")) for user in users)
    labels = "".join(_texts("LABEL"))
    for name in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    (health,) = _texts("HEALTHCHECK")
    assert "localhost:8000/health" in health
    assert _texts("EXPOSE") == ["8000 50051"]
    (command,) = [s for s in LAST if s.name == "CMD"]
    assert command.json_words == ["expertmesh", "serve", "--host", "0.0.0.0"]


def test_what_it_sets_is_what_the_launcher_sets() -> None:
    from cluster.launch.local_ray import common_environment

    words = dockerfile.environment(LAST)
    ours = common_environment()
    assert words == {name: ours[name] for name in words}
    assert "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD" in words


def test_the_context_is_what_the_package_is_built_of() -> None:
    files = {str(p.relative_to(ROOT)) for p in dockerfile.context(ROOT)}
    assert {"pyproject.toml", "constraints.txt", "cluster/launch/launch.py"} <= files
    assert "workers/demo/checkpoint/model.safetensors" in files
    tops = {f.partition("/")[0] for f in files}
    assert tops <= {
        *("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"),
        *("cluster", "expertmesh", "gateway", "protos", "workers"),
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    assert {f"{package.replace('.', '/')}/__init__.py" for package in packages} <= files
    assert not [f for f in files if "__pycache__" in f]
    assert sum((ROOT / f).stat().st_size for f in files) < MAX_CONTEXT_BYTES


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("README.md", False),
        ("tests/conftest.py", True),
        ("cluster/launch/launch.py", False),
        ("cluster/cli/__pycache__/main.pyc", True),
        ("secret.txt", True),
    ],
)
def test_ignore_rules_are_read_as_docker_does(path: str, ignored: bool) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert dockerfile.is_ignored(Path(path), rules) is ignored


def test_hadolint_finds_nothing() -> None:
    """A program of the test extra, on machines that it is built for."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=places)
    if hadolint is None:
        pytest.skip("hadolint is not installed: its package is for Linux on x86-64")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("has_packages", [True, False], ids=["packages there", "from nothing"])
def test_the_steps_run_in_a_clean_folder(has_packages: bool, tmp_path: Path) -> None:
    """Everything but the base image, whose place an environment takes.

    It sees the packages of this one as an image sees those of its base, or has none, so that Ray
    and torch come too.
    """
    sent = tmp_path / "context"
    for path in dockerfile.context(ROOT):
        target = sent / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "base"], check=True, timeout=300)
    settings = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    base = {"PATH": f"{tmp_path}/base/bin:/usr/local/bin:/usr/bin:/bin", **settings}
    if has_packages:
        folder = next((tmp_path / "base" / "lib").glob("python*/site-packages"))
        (folder / "of_the_base.pth").write_text(sysconfig.get_path("purelib"))
    build = dockerfile.Build(tmp_path / "image", sent, base, {"TORCH_INDEX": ""})
    image = build.run(STEPS)
    assert not list((image / "home/ray/expertmesh").glob("dist"))
    run = [
        str(tmp_path / "base/bin/python"),
        "-c",
        "import cluster.launch.launch as x; print(x.__file__)",
    ]
    done = subprocess.run(run, cwd=image, env=base, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().startswith(str(tmp_path / "base")), done.stderr
    if runnable():
        bare = {**base, "PATH": str(tmp_path / "none"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        run[1:] = ["-m", "workers.native"]
        done = subprocess.run(run, cwd=image, env=bare, capture_output=True, text=True, timeout=120)
        assert done.stdout == f"native {runnable()[0].name}\n"
        assert not (tmp_path / "cache").exists(), "the wheel has them"
    command = str(tmp_path / "base/bin/expertmesh")
    size = ["plan", "size", "--workers", "3", "--json"]
    for words in (["serve", "--dry-run", "--json"], size):
        done = subprocess.run(
            [command, *words], cwd=image, env=base, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    here = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *size],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == here.stdout != ""
