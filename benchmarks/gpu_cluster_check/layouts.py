"""Divisions of a host's GPUs into workers, and the models that they serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.checkpoints import random_checkpoint
from benchmarks.checkpoints.public_shape import public_shape
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.gpu_check.predicted import model_size
from cluster.sizing.roofline import DeviceSpec, StepTime, colocated_step, disaggregated_step

PUBLIC = {"olmoe": public_shape("OLMoE-1B-7B-0924"), "qwen3": public_shape("Qwen3-30B-A3B")}
"""Models whose speed is measured, by name on the command line."""
Mode = Literal["local", "disaggregated", "colocated"]
SMALL = {"small": replace(random_checkpoint.TINY, experts=16, top_k=4)}
"""The model that is compared in float32, and of a check without GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Workers of one device each."""

    mode: Mode
    """``--mode``: ``local``, ``disaggregated`` or ``colocated``."""
    num_attention: int = 1
    """Attention workers of a disaggregated cluster."""
    num_experts: int = 0
    """Expert workers of a disaggregated cluster, all workers of a colocated one."""

    def __str__(self) -> str:
        if self.mode == "disaggregated":
            return f"{self.num_attention} + {self.num_experts}"
        return f"{self.num_experts} colocated" if self.mode == "colocated" else "1 local"

    @property
    def num_devices(self) -> int:
        """Number of workers, each with one device."""
        return self.num_experts + self.num_attention * (self.mode != "colocated")

    @property
    def max_num_seqs(self) -> int:
        """``--max-num-seqs``. With 128 at most, no host waits for the number of prompt rows."""
        return 256 if self.mode == "local" else 128

    @property
    def max_streams(self) -> int:
        """Number of sequences that decode at the same time."""
        ranks = self.num_attention if self.mode == "disaggregated" else max(self.num_experts, 1)
        return self.max_num_seqs * ranks

    @property
    def killed_roles(self) -> tuple[str, ...]:
        """Roles of which a worker is killed: those with another worker."""
        if self.mode == "disaggregated":
            numbers = {"expert": self.num_experts, "attention": self.num_attention}
            return tuple(role for role, number in numbers.items() if number > 1)
        return ("colocated",) if self.mode == "colocated" else ()

    def options(self, device: str) -> list[str]:
        """Options of ``serve``. ``device``: ``cuda`` or ``cpu``."""
        words = ["--mode", self.mode, "--device", device]
        if self.mode != "local":
            words += ["--num-expert-workers", str(self.num_experts)]
            words += ["--transport", "collective" if device == "cuda" else "sockets"]
        if self.mode == "disaggregated":
            words += ["--num-attention-workers", str(self.num_attention)]
        return words

    def predicted(
        self, model: RandomModel, batch: int, context: int, device: DeviceSpec
    ) -> StepTime:
        """Return the roofline's decode step of ``batch`` sequences of ``context`` tokens."""
        size = model_size(model, torch.bfloat16)
        if self.mode == "disaggregated":
            return disaggregated_step(
                size,
                batch,
                context,
                num_attention=self.num_attention,
                num_experts=self.num_experts,
                device=device,
            )
        workers = max(self.num_experts, 1)
        return colocated_step(size, batch, context, num_workers=workers, device=device)


def layouts(num_devices: int) -> Iterator[Layout]:
    """Yield the divisions of up to ``num_devices`` devices, in the order of their size.

    8 devices: 1 local, 1 + 2, 4 + 4, 6 + 2, 8 colocated
    """
    yield Layout(mode="local")
    halves = (num_devices // 2, num_devices - num_devices // 2)
    pairs = dict.fromkeys([(1, 2), halves, (num_devices - 2, 2)])
    for num_attention, num_experts in pairs:
        if num_attention >= 1 and num_attention + num_experts <= num_devices:
            yield Layout(mode="disaggregated", num_attention=num_attention, num_experts=num_experts)
    if num_devices >= 2:
        yield Layout(mode="colocated", num_experts=num_devices)
