"""Cut a release: ``make release`` builds and tests the wheel, the source archive and the image.

Standard library, and the kernels' own list of instruction sets; the interpreter that runs this
needs setuptools and the packages of constraints.txt, on an x86-64 processor with AVX2; zig's
compiler is fetched for the kernels. Everything is built from the commit, not from the working tree.
The image is built where a container engine answers.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workers.native.build import INSTRUCTION_SETS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "expertmesh", "gateway", "protos", "workers")
BUILD_LIMIT_S = 1800.0
COMMAND_LIMIT_S = 300.0
IMAGE_LIMIT_S = 3600.0
ENGINE_LIMIT_S = 20.0
PROFILE = {
    "schema": 1,
    "model": "smoke",
    "top_k": 1,
    "tokens": 10,
    "banks": [{"bank": "mlp", "layer": 0, "counts": [1.0, 2.0, 3.0, 4.0]}],
}
"""Load profile for ``plan placement``."""


class ReleaseError(Exception):
    """The release cannot be cut; the text says why."""


def say(text: str) -> None:
    """One line to the user."""
    sys.stderr.write(f"expertmesh release: {text}\n")
    sys.stderr.flush()


# ---- what is released ---------------------------------------------------------------------------


def version_of(pyproject: str) -> str:
    """The version in the text of pyproject.toml."""
    return str(tomllib.loads(pyproject)["project"]["version"])


def section_of(changelog: str, title: str) -> str:
    """The text below ``## TITLE``, ``## TITLE - DATE`` or ``## TITLE (REMARK)``.

    Raises ``ReleaseError``.
    """
    heading = re.compile(rf"^## \[?{re.escape(title)}\]?(?: - .+| \(.+\))?$", re.M)
    found = heading.search(changelog)
    if found is None:
        raise ReleaseError(f"CHANGELOG.md has no section for {title}: no line '## {title}'")
    text = re.split(r"^## ", changelog[found.end() :], maxsplit=1, flags=re.M)[0].strip()
    if not text:
        raise ReleaseError(f"the section {title} of CHANGELOG.md is empty")
    return text


def wheel_errors(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """Differences between the files of a wheel and the tracked files of the packages.

    One library of kernels for each instruction set comes on top.
    """
    inside = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    wanted = {name for name in tracked if name.split("/")[0] in PACKAGES}
    libraries = [f"workers/native/lib/{kind.name}-*.so" for kind in INSTRUCTION_SETS]
    found = {pattern: fnmatch.filter(inside, pattern) for pattern in libraries}
    missing = [f"missing in the wheel: {name}" for name in sorted(wanted - inside)]
    missing += [f"missing in the wheel: {name}" for name in libraries if len(found[name]) != 1]
    inside.difference_update(*found.values())
    return missing + [f"unknown in the wheel: {name}" for name in sorted(inside - wanted)]


def image_tag(version: str, constraints: str) -> str:
    """Name of the CPU image. Raises ``ReleaseError`` if Ray is not pinned."""
    ray = re.search(r"^ray==(\S+)$", constraints, re.M)
    if ray is None:
        raise ReleaseError("constraints.txt pins no version of ray")
    return f"expertmesh:{version}-ray{ray[1]}-cpu"


def sum_of(path: Path) -> str:
    """A line with the SHA-256, the size and the name of a file."""
    data = path.read_bytes()
    return f"{hashlib.sha256(data).hexdigest()}  {len(data):>9}  {path.name}"


# ---- how it is made -----------------------------------------------------------------------------


def call(
    command: Sequence[str],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    limit_s: float = COMMAND_LIMIT_S,
) -> str:
    """The output of a command. Raises ``ReleaseError`` with its last lines if it fails."""
    name = " ".join(command[:4])
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired as err:
        raise ReleaseError(f"{name} took more than {limit_s:g} s") from err
    except OSError as err:
        raise ReleaseError(f"{name} cannot be run: {err}") from err
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-15:]
        raise ReleaseError("\n".join([f"{name} failed ({done.returncode}):", *lines]))
    return done.stdout


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Extract an archive, with the checks of ``tarfile`` where Python has them (3.11.4)."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)


def export(folder: Path) -> list[str]:
    """Write the files of the commit to ``folder``; their names."""
    done = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        unpack(archive, folder)
    return call(["git", "ls-tree", "-r", "--name-only", "HEAD"]).splitlines()


def install_zig(folder: Path) -> dict[str, str]:
    """Install the pinned compiler that makes kernels for every Linux; the environment with it."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    call([*pip, "--constraint", str(ROOT / "constraints.txt"), "ziglang"], limit_s=BUILD_LIMIT_S)
    paths = {"PYTHONPATH": str(folder), "ZIG_GLOBAL_CACHE_DIR": str(folder / "cache")}
    return {**os.environ, **paths}


def build(kind: str, source: Path, dist: Path, env: Mapping[str, str] | None = None) -> Path:
    """Build an ``sdist`` or ``wheel`` by setuptools' own hook; the file."""
    code = (
        "import sys; from setuptools import build_meta\n"
        f"print(build_meta.build_{kind}(sys.argv[1]), file=sys.stderr)"
    )
    before = set(dist.iterdir())
    call([sys.executable, "-c", code, str(dist)], cwd=source, env=env, limit_s=BUILD_LIMIT_S)
    (made,) = set(dist.iterdir()) - before
    return made


def install_wheel(wheel: Path, base: Path) -> tuple[Path, dict[str, str]]:
    """Install a wheel in a new environment. Raises ``ReleaseError``.

    The environment contains the packages of this interpreter, except its editable installations.

    Returns:
        The folder of its programs, and the variables to run them with.
    """
    venv.create(base, with_pip=True)
    programs = base / "bin"
    site = next((base / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    python = str(programs / "python")
    install = [python, "-m", "pip", "install", "--no-index", "--no-deps", "--force-reinstall"]
    call([*install, str(wheel)], cwd=base, env=env)
    where = call([python, "-c", "import cluster; print(cluster.__file__)"], cwd=base, env=env)
    if not where.startswith(str(base)):
        raise ReleaseError(f"the wheel is not what is imported, but {where.strip()}")
    return programs, env


def smoke_test(wheel: Path, version: str, folder: Path) -> None:
    """Install the wheel in a new environment and run commands. Raises ``ReleaseError``."""
    programs, env = install_wheel(wheel, folder / "venv")
    python, command = str(programs / "python"), str(programs / "expertmesh")
    told = call([command, "version"], cwd=folder, env=env)
    if version not in told:
        raise ReleaseError(f"'expertmesh version' does not name {version}: {told.strip()}")
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    plan = ["plan", "placement", "--profile", "profile.json", "--devices", "2"]
    call([command, *plan, "--plot", "plan.html"], cwd=folder, env=env)
    if "<html" not in (folder / "plan.html").read_text():
        raise ReleaseError("'expertmesh plan placement --plot' wrote no page")
    json.loads(call([command, "serve", "--dry-run", "--json"], cwd=folder, env=env))
    call([python, "-c", "from expertmesh import LLM, Client"], cwd=folder, env=env)
    check_kernels(python, folder, env)


def check_kernels(python: str, folder: Path, env: Mapping[str, str]) -> None:
    """Load the wheel's kernels where there is no compiler. Raises ``ReleaseError``."""
    cache = folder / "no-cache"
    bare = {**env, "PATH": str(folder / "no-programs"), "XDG_CACHE_HOME": str(cache)}
    told = call([python, "-m", "workers.native"], cwd=folder, env=bare).strip()
    if "(" in told or cache.exists():
        raise ReleaseError(f"the wheel's kernels are not loaded: {told}")
    say(f"kernels of the wheel: {told}")


def engine() -> str | None:
    """A container engine that answers, None if there is none."""
    for name in ("docker", "podman"):
        try:
            call([name, "info"], limit_s=ENGINE_LIMIT_S)
        except ReleaseError:
            continue
        return name
    return None


def build_image(engine_name: str, source: Path, tag: str, revision: str, version: str) -> None:
    """Build the image and ask it for its version. Raises ``ReleaseError``."""
    options = ["-f", "k8s/image/Dockerfile", "-t", tag, "--build-arg", f"REVISION={revision}"]
    call([engine_name, "build", *options, "."], cwd=source, limit_s=IMAGE_LIMIT_S)
    told = call([engine_name, "run", "--rm", tag, "expertmesh", "version"])
    if version not in told:
        raise ReleaseError(f"the image {tag} does not name {version}: {told.strip()}")


def release(dist: Path, *, has_image: bool) -> list[str]:
    """Build and test everything; what was made, line by line. Raises ``ReleaseError``."""
    changes = len(call(["git", "status", "--porcelain", "--untracked-files=no"]).splitlines())
    if changes:
        say(f"{changes} changed files are not in the commit and not in the release")
    revision = call(["git", "rev-parse", "HEAD"]).strip()
    with tempfile.TemporaryDirectory(prefix="expertmesh-release-") as name:
        folder = Path(name).resolve()
        source = folder / "source"
        tracked = export(source)
        version = version_of((source / "pyproject.toml").read_text())
        section = section_of((source / "CHANGELOG.md").read_text(), version)
        made = folder / "dist"
        made.mkdir()
        say(f"building {version} from {revision[:12]}")
        sdist = build("sdist", source, made)
        with tarfile.open(sdist) as archive:
            unpack(archive, folder / "sdist")
        (unpacked,) = (folder / "sdist").iterdir()
        say("installing zig for the kernels")
        wheel = build("wheel", unpacked, made, install_zig(folder / "zig"))
        with zipfile.ZipFile(wheel) as packed:
            errors = wheel_errors(packed.namelist(), tracked)
        if errors:
            raise ReleaseError("\n".join(errors))
        say("testing the wheel in a new environment")
        smoke_test(wheel, version, folder)
        image = "no image: no container engine answers" if has_image else "no image"
        if has_image and (engine_name := engine()) is not None:
            image = image_tag(version, (source / "constraints.txt").read_text())
            say(f"building {image} with {engine_name}")
            build_image(engine_name, source, image, revision, version)
        dist.mkdir(parents=True, exist_ok=True)
        files = [dist / path.name for path in (sdist, wheel)]
        for file in files:
            file.write_bytes((made / file.name).read_bytes())
    return [f"expertmesh {version} ({revision})", *map(sum_of, files), image, "", section]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for the files")

    parser.add_argument("--no-image", action="store_true", help="leave the image out")
    options = parser.parse_args(arguments)
    try:
        lines = release(options.dist, has_image=not options.no_image)
    except ReleaseError as err:
        say(str(err))
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
