"""A front process with a fake launcher: ``python -m tests.cluster.cli.fake_front NAME DETACH``.

DETACH is ``detach`` for ``up``, ``join`` for ``up`` in a Ray that is there; ``serve`` otherwise.
With ``signalled`` in ``FAKE_PARTS`` a SIGTERM arrives while it ends what a lost launcher has left.

Prints ``ready`` on stdout, as ``serve`` does, and ends with the outcome's exit code. A cluster that
does not end is forced to by a second signal alone: for its own limit a test would have to wait.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from cluster.cli.cluster import launcher_process
from cluster.cli.cluster.launcher_process import LauncherProcess, raise_on_signals
from cluster.cli.terminal.exit_codes import CommandError
from cluster.cli.terminal.output import note, write_line
from cluster.cli.terminal.progress import Progress
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.core.process import ProcessIdentity
from cluster.launch import local_ray, state_file
from cluster.launch.checkpoint_check import CheckpointFacts
from cluster.launch.orphans import end_private_ray
from cluster.launch.plan import LaunchPlan


def end_signalled(folder: Path, recorded: Sequence[ProcessIdentity]) -> int:
    """``end_private_ray``, at whose begin a SIGTERM arrives."""
    os.kill(os.getpid(), signal.SIGTERM)
    return end_private_ray(folder, recorded)


def main() -> int:
    """Run it."""
    name, detach = sys.argv[1], sys.argv[2] in ("detach", "join")
    if os.environ.get("FAKE_PARTS") == "signalled":
        mock.patch.object(launcher_process, "end_private_ray", end_signalled).start()
    raise_on_signals()
    state_file.clean_up_dead()
    folder = local_ray.make_temp_dir()
    late = os.environ.get("FAKE_PARTS") == "late"
    gateway = GatewaySection(
        port=0, grpc_port=0, drain_lead_s=0.0, drain_timeout_s=0.0 if late else 600.0
    )
    plan = LaunchPlan(
        command="up" if detach else "serve",
        name=name,
        asked={},
        config=ClusterConfig(model=ModelSection(path="/m", served_model_name="m"), gateway=gateway),
        facts=CheckpointFacts(
            model_type="m",
            dtype="float32",
            context_tokens=16,
            kv_vectors_per_token=1,
            head_dim=1,
            attention_values=1,
            attention_weights=1,
            banks=({"bank": "mlp", "layer": 0, "num_experts": 4},),
            torch_has_cuda=False,
        ),
        profile=None,
        address="auto" if sys.argv[2] == "join" else "",
        temp_dir=str(folder),
        num_cpus=2,
        num_gpus=0,
    )
    log = state_file.log_path(name)
    environment = {**os.environ, **local_ray.common_environment()}
    module = "tests.cluster.cli.fake_launcher"
    front = LauncherProcess(
        log, environment, lambda *_: write_line(f"ready {folder}"), module, 600.0
    )
    front.begin(plan)
    try:
        code = front.run(Progress(), detach)
    except CommandError as err:
        note(str(err))
        code = err.code
    if code and plan.address:  # a folder that the real one would not have made
        shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
