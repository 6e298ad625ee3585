"""What a worker offers for exact results, and the libraries of kernels with which it can keep it.

Compiled kernels compute each row by itself. Torch does so only in forms that cost speed
(``workers.model.batch_invariant``), so it is offered where exact results are demanded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.core.arithmetic import ArithmeticAgreement, ArithmeticOffer
from workers.experts.slots import torch_experts
from workers.model.batch_invariant.numerics import arithmetic_of, torch_digest
from workers.model.config import BankSpec
from workers.native.build import BuildError
from workers.native.library import Library, load_library, runnable
from workers.native.team import Kernels, Team
from workers.process.worker_args import WorkerArgs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exactness:
    """An offer, and what computes."""

    offer: ArithmeticOffer
    threads: int
    """Threads that compute products."""
    torch_threads: int
    """Threads of torch: one where results may be exact, as it splits sums by their number."""
    _team: Team | None
    _libraries: Mapping[str, Library]
    """By arithmetic, best first; empty without a team."""

    @classmethod
    def of(
        cls, args: WorkerArgs, kernels: Kernels, banks: Sequence[BankSpec], dtype: torch.dtype
    ) -> Exactness:
        """What a worker with these experts can offer. Builds the libraries that are missing."""
        setting, team = args.config.engine.deterministic, kernels.team
        torch_reason = torch_experts(banks, dtype)
        is_native = team is not None and not torch_reason
        computation = _computation(args, kernels.noting(torch_reason).words)
        if setting == "off":
            offer = ArithmeticOffer(obstacle="has --deterministic off", computation=computation)
        elif setting == "auto" and not is_native:
            what = kernels.words if team is None else "torch, as no kernel has their activation"
            offer = ArithmeticOffer(
                obstacle=f"computes experts with {what}", computation=computation
            )
        else:
            torch.set_num_threads(1)  # the digest depends on it, too
            is_alone = args.config.workers.mode == "local"
            libraries = {} if team is None else _libraries(team.library, dtype, is_alone)
            counts = args.member.runs_attention or not is_native
            offer = ArithmeticOffer(
                kernels=tuple(libraries) or ("torch",),
                torch=torch_digest(with_products=not is_native) if counts else "",
                is_strict=setting == "on",
                computation=computation,
            )
            return cls(offer, args.threads if libraries else 1, 1, team, libraries)
        return cls(offer, args.threads, args.threads, None, {})

    def follow(self, agreement: ArithmeticAgreement) -> None:
        """Compute as was agreed; in the best way where results are not exact. Data thread."""
        if self._team is not None:
            best = next(iter(self._libraries.values()))
            self._team.use(self._libraries.get(agreement.kernels, best))


def _computation(args: WorkerArgs, kernels: str) -> str:
    """What a worker computes with, as far as its bits depend on it."""
    device = args.device_facts.get("gpu", args.device.type)
    torch_name = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device}, {kernels}, {torch_name}, {args.threads} threads"


def _libraries(own: Library, dtype: torch.dtype, is_alone: bool) -> dict[str, Library]:
    """Libraries by arithmetic, ``own`` first; of other arithmetics unless the worker is alone.

    Only bfloat16 has others, see ``arithmetic_of``.
    """
    found = {arithmetic_of(own, dtype): own}
    if is_alone or dtype != torch.bfloat16 or own.name != "avx512_bf16":
        return found
    for wanted in runnable():
        if wanted.name == own.name:
            continue
        try:
            library = load_library(wanted)
        except (BuildError, OSError) as err:
            logger.warning("no other arithmetic by %s: %s", wanted.name, err)
            continue
        return {**found, arithmetic_of(library, dtype): library}
    return found
