"""A launcher whose parts are a sleeping child: ``python -m tests.cluster.cli.fake_launcher``.

``FAKE_PARTS`` in the environment makes it misbehave: ``fail``, ``refuse``, ``bug`` (an error that
nobody foresaw), ``crash``, ``slow`` (a long start), ``stuck`` (an end that never comes), ``lost``
(ready, then lost), ``busy`` (a few requests that run), ``endless`` and ``late`` (one
that does not end, with much time for it and with none). With ``threads`` it says what the workers
compute with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from cluster.config.gateway import ShutdownStage
from cluster.core.errors import ConfigError, StartError
from cluster.core.process import ProcessIdentity
from cluster.launch.fleet import describe_threads
from cluster.launch.launch import main
from cluster.launch.orphans import end_private_ray, find_by_files
from cluster.launch.parts import ClusterParts, ProgressFn
from cluster.launch.plan import LaunchPlan
from cluster.launch.state_file import log_path


def stages_path(name: str) -> Path:
    """File for the stages that the gateway was sent."""
    return log_path(name).with_suffix(".stages")


class FakeParts(ClusterParts):
    """Stands for Ray by a child with a log in the folder, as Ray's own processes have."""

    def __init__(self, plan: LaunchPlan, progress: ProgressFn) -> None:
        super().__init__(plan, progress)
        self._folder = Path(plan.temp_dir)
        self._how = os.environ.get("FAKE_PARTS", "")
        self._num_running = {"busy": 4, "endless": 10**9, "late": 10**9}.get(self._how, 0)

    def start_ray(self) -> str:
        self._progress("ray", 0, 0)
        with (self._folder / "child.log").open("w") as log:
            command = [sys.executable, "-c", "import time; time.sleep(600)"]
            subprocess.Popen(command, stdout=log, start_new_session=True)
        return "127.0.0.1:1"

    def start_services(self) -> None:
        if self._how == "fail":
            raise StartError("expert-1", "its disk is on fire")
        if self._how == "refuse":
            raise ConfigError("port", 1, "differs")
        if self._how == "bug":
            raise RuntimeError("the actor died\n  name: nobody\n  and a page more")
        if self._how == "crash":
            os._exit(9)
        if self._how == "slow":
            time.sleep(600)
        self._progress("weights", 1_000_000, 2_000_000)
        if self._how == "threads":
            self.compute_threads = describe_threads(
                [{"threads": number, "state": "SERVING"} for number in (2, 1)]
            )

    def find_loss(self) -> str | None:
        return "the controller is lost" if self._how == "lost" else None

    def processes(self) -> list[ProcessIdentity]:
        return find_by_files(self._folder)

    def send_shutdown_stage(self, stage: ShutdownStage) -> int:
        with stages_path(self.plan.name).open("a") as file:
            print(stage, file=file)
        self._num_running -= 1
        return max(0, self._num_running)

    def stop_services(self) -> None:
        if self._how == "stuck":
            time.sleep(600)

    def stop_ray(self) -> None:
        if self.plan.address:
            return  # it is left, not ended
        if self._how == "stuck":
            time.sleep(600)
        end_private_ray(self._folder, ())


if __name__ == "__main__":
    main(FakeParts, lambda: None)
