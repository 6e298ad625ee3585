"""Look at a checkpoint before anything is started, in a short-lived process of its own.

The check knows every tensor of the model and therefore imports torch, a second and 300 MB that the
front process must not keep. ``python -m cluster.checkpoint_check FOLDER`` prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

CHECK_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFacts:
    """What a start needs to know of a checkpoint."""

    model_type: str
    """Family."""
    dtype: str
    """The checkpoint's own dtype."""
    max_position_embeddings: int
    """Context in tokens."""
    kv_values_per_token: int
    """Numbers that the KV cache keeps of one token, over all layers."""
    banks: tuple[dict[str, Any], ...]
    """Expert banks in the order of their use: ``bank``, ``layer``, ``num_experts``."""
    torch_has_cuda: bool
    """Whether the installed torch can use a GPU at all."""


class CheckpointCheck:
    """A running check; begun early so that it overlaps with other work."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "cluster.checkpoint_check", str(folder)],
            env=dict(environment),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> CheckpointFacts:
        """Wait for it. Raises ``CheckpointError`` with what is wrong."""
        try:
            output, errors = self._child.communicate(timeout=CHECK_LIMIT_S)
        except subprocess.TimeoutExpired as err:
            self.cancel()
            raise CheckpointError(f"check took more than {CHECK_LIMIT_S:g} s") from err
        try:
            answer = json.loads(output)
        except ValueError as err:
            words = errors.strip().splitlines() or [f"exit code {self._child.returncode}"]
            raise CheckpointError(f"the check itself failed: {words[-1]}") from err
        if "error" in answer:
            raise CheckpointError(answer["error"])
        answer["banks"] = tuple(answer["banks"])
        return CheckpointFacts(**answer)

    def cancel(self) -> None:
        """End it."""
        self._child.kill()
        self._child.communicate()


def check(folder: Path) -> CheckpointFacts:
    """Read config and headers, and compare every tensor with the model.

    Raises ``CheckpointError``.
    """
    import torch

    from workers.checkpoint import check_checkpoint
    from workers.kv_cache import kv_values_per_token

    family = check_checkpoint(folder).family
    return CheckpointFacts(
        model_type=family.config.model_type,
        dtype=family.config.dtype,
        max_position_embeddings=family.config.max_position_embeddings,
        kv_values_per_token=kv_values_per_token(family.config),
        banks=tuple(
            {"bank": b.bank, "layer": b.layer, "num_experts": b.num_experts} for b in family.banks
        ),
        torch_has_cuda=torch.version.cuda is not None,
    )


def main() -> None:
    """Entry point of the check's process."""
    try:
        answer = asdict(check(Path(sys.argv[1])))
    except CheckpointError as err:
        answer = {"error": str(err)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
