"""A wheel that is installed in an empty environment serves."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from benchmarks.harness.server import GOOD, running_server
from tests.project.scripts import load_script
from workers.native.build import has_kernels


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_an_installed_wheel_serves(tmp_path: Path) -> None:
    """Builds the commit by the compiler of this host, and serves from a folder without sources."""
    release = load_script("release")
    source, dist, home, cwd = (tmp_path / name for name in ("source", "dist", "home", "cwd"))
    for folder in (dist, home, cwd):
        folder.mkdir()
    release.export(source)
    programs, _ = release.install_wheel(release.build("wheel", source, dist), tmp_path / "venv")
    with running_server(
        home,
        program=[str(programs / "expertmesh")],
        cwd=cwd,
        variables={"HOME": str(home), "XDG_CACHE_HOME": "", "PYTHONPATH": "", "VIRTUAL_ENV": ""},
        end_by=signal.SIGINT,
    ) as server:
        answer = server.complete(**GOOD)
        assert answer["choices"][0]["text"]
        assert answer["usage"]["completion_tokens"] == GOOD["max_tokens"]
        if has_kernels():
            pids = [worker["pid"] for worker in server.status()["workers"]]
            assert len(pids) == 3
            for pid in pids:
                assert native_libraries(pid) == {programs.parent}
    assert not list(cwd.iterdir())
    assert not (home / ".cache" / "expertmesh").exists(), "a worker built kernels of its own"


def native_libraries(pid: int) -> set[Path]:
    """Environments from which a worker loaded the compiled kernels."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    names = {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
    paths = [Path(name) for name in names if "/workers/native/" in name]
    return {path.parents[6] for path in paths}
