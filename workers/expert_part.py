"""The part of a worker that holds experts: its slots, what serves steps with them, what loads more.

Expert workers and colocated workers have one each.
"""

from __future__ import annotations

import torch

from cluster.control_frames import LoadExperts
from workers.checkpoint import Checkpoint
from workers.control_client import ControlClient
from workers.dist.activity import Activity
from workers.dist.expert_server import ExpertServer
from workers.dist.transport import DataTransport
from workers.experts.loading import CHECKPOINT, ExpertLoader, OpenSource
from workers.experts.slots import ExpertSlots
from workers.experts.sources import CheckpointSource
from workers.worker_args import WorkerArgs


class ExpertPart:
    """The experts that the first placement gives a worker's device, in memory and ready."""

    def __init__(
        self,
        args: WorkerArgs,
        slots: ExpertSlots,
        checkpoint: Checkpoint,
        transport: DataTransport,
        control: ControlClient,
        *,
        dtype: torch.dtype,
        activity: Activity,
    ) -> None:
        """Fill ``slots``, which are empty. Raises ``CheckpointError``."""
        assert args.placement is not None, "a worker with experts is started with a placement"
        slots.load_placement(args.placement, args.member.device, checkpoint)
        self._slots = slots
        self.server = ExpertServer(
            transport,
            slots,
            checkpoint.family.banks,
            device_index=args.member.device,
            combine_mode=args.config.engine.combine_mode,
            dtype=dtype,
            device=args.device,
            activity=activity,
        )
        """Serves steps."""
        sources: dict[str, OpenSource] = {
            CHECKPOINT: lambda _: CheckpointSource(checkpoint.another())
        }
        can_grow = args.device.type == "cpu"
        max_slots = None if can_grow else args.num_slots
        self._loader = ExpertLoader(slots, sources, control.send, max_slots=max_slots)

    def order(self, order: LoadExperts) -> None:
        """Load experts in the background. Any thread."""
        self._loader.order(order)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for heartbeats; called on the control thread."""
        return {
            "expert_worker_tokens_total": float(self.server.num_tokens),
            "expert_worker_slots": float(max((b.num_slots for b in self._slots.banks), default=0)),
        }

    def close(self) -> None:
        """End loading."""
        self._loader.close()
