"""Write the files of requirements/ from pyproject.toml and constraints.txt: ``make lock``.

``run.txt`` and ``test.txt`` list every package with the hashes of its files, ``cuda.txt`` what the
default build of torch needs on Linux besides, and ``uv.txt`` the installer. constraints.txt has the
versions; a package that it lacks gets the newest one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from installer import LOCKS, ROOT

UV = "uv==0.13.9"
CUDA = re.compile("(nvidia-|cuda-|triton)")
# The CPU builds of torch, which are in PyTorch's own index, by Python and machine.
# Source: the SHA-256 sums that the index lists for the wheels of torch 2.13.0+cpu.
TORCH_CPU = {
    "cp311 aarch64": "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    "cp311 x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "cp312 aarch64": "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
    "cp312 x86_64": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "cp313 aarch64": "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    "cp313 x86_64": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
}
OPTIONS = (
    *("--universal", "--python-version", "3.11", "--generate-hashes", "--no-header"),
    *("--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"),
    *("--constraint", str(ROOT / "constraints.txt")),
)


def compile_requirements(requirements: Sequence[str]) -> list[str]:
    """All packages that the requirements need, each an entry with its hashes."""
    uv = Path(sys.executable).with_name("uv")
    with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
        source.write("\n".join(requirements))
        source.flush()
        command = [str(uv), "pip", "compile", *OPTIONS, source.name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return re.split(r"\n(?=\S)", done.stdout.strip())


def with_cpu_hashes(entry: str) -> str:
    """The entry of torch with the hashes of the CPU builds added to those of the index."""
    first, *hashes = entry.split(" \\\n")
    added = [f"    --hash=sha256:{sha256}" for sha256 in TORCH_CPU.values()]
    return " \\\n".join([first, *sorted({*hashes, *added})])


def write(name: str, entries: Sequence[str]) -> None:
    """Write one file of requirements/."""
    path = LOCKS / name
    path.write_text("\n".join(["# Written by `make lock`.", *entries]) + "\n")
    sys.stderr.write(f"{path.relative_to(ROOT)}: {len(entries)} packages\n")


def main() -> None:
    """Entry point."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    optional = project["project"]["optional-dependencies"]
    for name, requirements in (
        ("run", run),
        ("test", [*run, *optional["test"], *optional["docs"]]),
    ):
        entries = [
            with_cpu_hashes(entry) if entry.startswith("torch==") else entry
            for entry in compile_requirements(requirements)
        ]
        is_cuda = CUDA if name == "run" else re.compile("(nvidia-|cuda-)")
        write(f"{name}.txt", [entry for entry in entries if not is_cuda.match(entry)])
        if name == "run":
            write("cuda.txt", [entry for entry in entries if CUDA.match(entry)])
    write("uv.txt", compile_requirements([UV]))


if __name__ == "__main__":
    main()
