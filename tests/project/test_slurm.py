"""The batch script for SLURM, run with stand-ins for SLURM's commands and for ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.paths import ROOT

SCRIPT = ROOT / "docs" / "how-to" / "examples" / "slurm.sh"
STAND_INS = {
    "scontrol": 'printf "n1\\nn2\\nn3\\nn4\\n"',
    # The words after the options, on the node of -w.
    "srun": """
while [[ $1 == -* ]]; do
    if [[ $1 == -w ]]; then node=$2; shift; fi
    shift
done
NODE=$node exec "$@"
""",
    "hostname": 'echo "10.0.0.${NODE#n} fe80::1"',
    "sleep": "",
    "expertmesh": """
read -r token < "$RAY_AUTH_TOKEN_PATH"
echo "$NODE $* ${#token} $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH")" >> "$LOG"
if [[ $1 == up && $(grep -c " up " "$LOG") -lt $FAILS ]]; then exit 1; fi
""",
}


def run(folder: Path, fails: int, **variables: str) -> tuple[int, list[str]]:
    """Exit code, and what was asked of ``expertmesh`` on which node; ``up`` fails at first."""
    programs, log = folder / "bin", folder / "log"
    programs.mkdir()
    for name, text in STAND_INS.items():
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder),
        "LOG": str(log),
        "FAILS": str(fails + 1),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-4]",
        **variables,
    }
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, timeout=60)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_every_node_joins_the_first_and_the_cluster_is_started(tmp_path: Path) -> None:
    code, asked = run(tmp_path, fails=2, MODEL="/models/m")
    assert code == 0
    joins = sorted(line for line in asked if " node " in line)
    tail = "64 token 600"
    assert joins == [
        f"n1 node --head --node-ip 10.0.0.1 {tail}",
        *(f"n{i} node --join 10.0.0.1 {tail}" for i in (2, 3, 4)),
    ]
    starts = [line for line in asked if " up " in line]
    assert len(starts) == 3
    assert starts[-1] == (
        "n1 up /models/m --address 10.0.0.1:6379 --wait-nodes 4 --host 0.0.0.0 "
        f"--num-attention-workers 8 --num-expert-workers 24 --gpus-per-worker 1 {tail}"
    )
    assert not list(tmp_path.glob(".expertmesh-token-*"))


def test_a_start_that_never_succeeds_ends_the_job(tmp_path: Path) -> None:
    code, asked = run(tmp_path, fails=99, MODEL="/models/m")
    assert code == 1
    assert sum(" up " in line for line in asked) == 12
    assert not list(tmp_path.glob(".expertmesh-token-*"))


def test_a_model_is_needed(tmp_path: Path) -> None:
    assert run(tmp_path, fails=0) == (1, [])


def test_workers_have_the_gpus_of_the_nodes() -> None:
    """Four nodes of 8 GPUs, a GPU each."""
    text = SCRIPT.read_text()
    nodes, gpus = (
        int(text.split(f"#SBATCH --{name}=")[1].split()[0]) for name in ("nodes", "gpus-per-node")
    )
    workers = [int(text.split(f"{{{name}:-")[1].split("}")[0]) for name in ("EXPERTS", "ATTENTION")]
    assert sum(workers) == nodes * gpus
