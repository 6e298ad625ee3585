"""Make the Python stubs of all .proto files: ``python protos/generate.py [TARGET]``.

Run it after a change to a .proto file and commit what it writes; a test fails when the committed
stubs are not the current ones. Needs grpcio-tools and mypy-protobuf (both in the ``test`` extra).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(target: Path) -> list[Path]:
    """Write the stubs of every .proto below ``target``/protos; the paths written, sorted."""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "protos").glob("*.proto"))
    outputs = ("python", "mypy", "grpc_python", "mypy_grpc")
    flags = [f"--{name}_out={target}" for name in outputs]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *flags, *sources]
    scripts = str(Path(sys.executable).parent)  # protoc finds its mypy plugin on the PATH
    env = {**os.environ, "PATH": os.pathsep.join((scripts, os.environ.get("PATH", "")))}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stderr=subprocess.PIPE, timeout=120)
    return sorted((target / "protos").glob("*_pb2*.py*"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
