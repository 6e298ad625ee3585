"""Arithmetics of workers, and whether the results of a cluster are exact.

Results are exact if the tokens and log-probabilities of a request depend, to the last bit, on the
request alone. For this, every worker computes each row independently, and all workers use one
arithmetic. A worker offers the arithmetics that it supports. The first generation agrees on one and
later generations keep it, because KV blocks and running requests contain its values. If a new
member ends exactness, exactness does not return.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.codec import Message


class ArithmeticOffer(Message, frozen=True, kw_only=True):
    """The arithmetics in which one worker computes rows independently of each other."""

    kernels: tuple[str, ...] = ()
    """Supported arithmetics of its products, best first; empty if rows depend on each other."""
    torch: str = ""
    """Digest of the computations that torch does; empty if torch does not affect any bit."""
    obstacle: str = "has not said how it computes"
    """Why it supports none, as the end of a sentence about the worker."""
    is_strict: bool = False
    """Whether the worker serves in exact clusters only."""
    computation: str = ""
    """Device, kernels and libraries of the worker. They determine its bits if results are not
    exact."""


class ArithmeticAgreement(Message, frozen=True, kw_only=True):
    """The arithmetic of the members of a generation."""

    kernels: str = ""
    """Arithmetic of all products; empty if results are not exact."""
    torch: str = ""
    """As in ``ArithmeticOffer``."""
    reason: str = "no worker has been heard"
    """Why results are not exact; empty if they are."""

    @property
    def is_exact(self) -> bool:
        return bool(self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Return the agreement as JSON data for ``status``."""
        return {"exact": self.is_exact, "arithmetic": self.kernels, "reason": self.reason}


def agree(
    offers: Mapping[str, ArithmeticOffer], former: ArithmeticAgreement | None = None
) -> ArithmeticAgreement:
    """Return the best arithmetic that all workers offer, or the reason why there is none.

    ``former`` is the agreement of the previous generation; None before the first.

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
