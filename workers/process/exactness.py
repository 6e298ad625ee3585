"""Determines whether a worker can compute bit-exact results, and with which kernel libraries.

Compiled kernels compute each row independently. Torch does so only in slower variants
(``workers.model.batch_invariant``), which are used only if exact results are required.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.core.arithmetic import ArithmeticAgreement, ArithmeticOffer
from workers.experts.slots import torch_reason
from workers.model.batch_invariant.numerics import arithmetic_of, torch_digest
from workers.model.config import BankSpec
from workers.native.build import BuildError
from workers.native.library import Library, load_library, runnable
from workers.native.thread_team import Kernels, ThreadTeam
from workers.process.worker_args import WorkerArgs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exactness:
    """How a worker can compute bit-exact results (``offer``), and its kernels and threads."""

    offer: ArithmeticOffer
    threads: int
    """Number of threads that compute matrix products."""
    torch_threads: int
    """Number of torch threads: 1 if results may be exact, as torch splits sums by this number."""
    _team: ThreadTeam | None
    _libraries: Mapping[str, Library]
    """Kernel libraries by arithmetic (way to compute matrix products), fastest first; empty without
    a thread team."""

    @classmethod
    def of(
        cls, args: WorkerArgs, kernels: Kernels, banks: Sequence[BankSpec], dtype: torch.dtype
    ) -> Exactness:
        """Determine how a worker can compute exact results, and build missing kernel libraries."""
        setting, team = args.config.engine.deterministic, kernels.team
        reason = torch_reason(banks, dtype)
        is_native = team is not None and not reason
        computation = _describe_computation(args, kernels.with_exception(reason).description)
        if setting == "off":
            offer = ArithmeticOffer(obstacle="has --deterministic off", computation=computation)
        elif setting == "auto" and not is_native:
            what = (
                kernels.description if team is None else "torch, as no kernel has their activation"
            )
            offer = ArithmeticOffer(
                obstacle=f"computes experts with {what}", computation=computation
            )
        else:
            torch.set_num_threads(1)  # the digest depends on it
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

    def apply_agreement(self, agreement: ArithmeticAgreement) -> None:
        """Use the agreed kernels, or the fastest if results need not be exact. Data thread."""
        if self._team is not None:
            best = next(iter(self._libraries.values()))
            self._team.use(self._libraries.get(agreement.kernels, best))


def _describe_computation(args: WorkerArgs, kernels: str) -> str:
    """Describe the hardware and software that determine the bits of results."""
    device = args.device_facts.get("gpu", args.device.type)
    torch_name = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device}, {kernels}, {torch_name}, {args.threads} threads"


def _libraries(own: Library, dtype: torch.dtype, is_alone: bool) -> dict[str, Library]:
    """Kernel libraries that this worker can use, by arithmetic: ``own``, then an alternative.

    The alternative exists only with AVX-512 BF16, bfloat16 and several workers; see
    ``arithmetic_of``.
    """
    libraries = {arithmetic_of(own, dtype): own}
    if is_alone or dtype != torch.bfloat16 or own.name != "avx512_bf16":
        return libraries
    for choice in runnable():
        if choice.name == own.name:
            continue
        try:
            library = load_library(choice)
        except (BuildError, OSError) as err:
            logger.warning("could not load the kernel library %s: %s", choice.name, err)
            continue
        return {**libraries, arithmetic_of(library, dtype): library}
    return libraries
