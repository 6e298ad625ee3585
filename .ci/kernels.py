"""Build the CPU kernels in a new environment. Standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from installer import ROOT, SetupError, run, say

ZIG_MB = 100
ERROR_CHARACTERS = 400


def build_kernels(venv: Path) -> None:
    """Build the kernels, with zig's compiler where the machine has none.

    zig is removed afterwards. Without a compiler torch computes in place of the kernels.
    """
    python = str(venv / "bin" / "python")
    build = [python, "-m", "workers.native"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 and sys.platform == "linux" and platform.machine() == "x86_64":
        say(f"no working C compiler: downloading zig's for the kernels, about {ZIG_MB} MB")
        with tempfile.TemporaryDirectory(dir=venv) as folder:
            pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
            try:
                run(
                    [*pip, "--constraint", str(ROOT / "constraints.txt"), "ziglang"],
                    venv / "setup.log",
                )
            except SetupError as err:
                say(str(err))
            env = {**os.environ, "PYTHONPATH": folder, "ZIG_GLOBAL_CACHE_DIR": f"{folder}/cache"}
            done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=env)
    say(f"kernels: {done.stdout.strip() or done.stderr.strip()[-ERROR_CHARACTERS:]}")
