"""Arithmetics of workers, and whether the results of a cluster are exact.

Exact: a request's tokens and log-probabilities depend on the request alone, to the last bit. For
that every worker computes each row by itself, and all do it in one arithmetic. A worker offers the
arithmetics that it has. The first generation agrees on one and the later ones keep it, as blocks of
KV and running requests hold its numbers; so exactness that a new member ends does not come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.codec import Message


class ArithmeticOffer(Message, frozen=True, kw_only=True):
    """How one worker can compute so that rows do not depend on each other."""

    kernels: tuple[str, ...] = ()
    """Arithmetics of its products, best first; empty where rows depend on each other."""
    torch: str = ""
    """Digest of what torch computes beside them; empty where that changes no bit."""
    obstacle: str = "has not said how it computes"
    """Why it has none, as the end of a sentence about the worker."""
    is_strict: bool = False
    """The worker serves in exact clusters only."""
    computation: str = ""
    """Device, kernels and libraries of the worker: what decides its bits where results are not
    exact."""


class ArithmeticAgreement(Message, frozen=True, kw_only=True):
    """How the members of a generation compute."""

    kernels: str = ""
    """Arithmetic of all products; empty where results are not exact."""
    torch: str = ""
    """As in ``ArithmeticOffer``."""
    reason: str = "no worker has been heard"
    """Why results are not exact; empty where they are."""

    @property
    def is_exact(self) -> bool:
        return bool(self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """For ``status``, fit for JSON."""
        return {"exact": self.is_exact, "arithmetic": self.kernels, "reason": self.reason}


def agree(
    offers: Mapping[str, ArithmeticOffer], former: ArithmeticAgreement | None = None
) -> ArithmeticAgreement:
    """The best arithmetic that all workers offer, by name, or why there is none.

    ``former`` is that of the generation before; None before the first.

    (dot, fma) and (fma) -> fma;  (dot) and (fma) -> not exact
    """
    if not offers or (former is not None and not former.is_exact):
        return former or ArithmeticAgreement()
    for name, offer in offers.items():
        if not offer.kernels:
            return ArithmeticAgreement(reason=f"{name} {offer.obstacle}")
    first, *_ = offers
    wanted = (former.kernels,) if former is not None else offers[first].kernels
    common = [k for k in wanted if all(k in offer.kernels for offer in offers.values())]
    if not common:
        other = next(name for name, offer in offers.items() if wanted[-1] not in offer.kernels)
        theirs, ours = offers[other].kernels[0], wanted[0]
        return ArithmeticAgreement(reason=f"{other} computes with {theirs}, the others with {ours}")
    torch = former.torch if former is not None else ""
    for name, offer in offers.items():
        if offer.torch and torch and offer.torch != torch:
            return ArithmeticAgreement(
                reason=f"torch computes otherwise on {name} ({offer.torch}, {torch})"
            )
        torch = torch or offer.torch
    return ArithmeticAgreement(kernels=common[0], torch=torch, reason="")
