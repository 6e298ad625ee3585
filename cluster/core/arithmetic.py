"""The arithmetics that workers support, and whether the results of a cluster are exact.

Results are exact if the tokens and log-probabilities of a request depend, to the last bit, on the
request alone. For this, every worker computes each row independently, and all workers compute
matrix products in one way, called an arithmetic. A worker offers the arithmetics that it supports.
The first generation agrees on one arithmetic, and later generations keep it, as KV blocks and
running requests contain its values. If a new member does not support it, no later generation has
exact results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.core.codec import Message


class ArithmeticOffer(Message, frozen=True, kw_only=True):
    """Arithmetics (ways to compute matrix products) in which one worker can compute each row
    independently of other rows."""

    kernels: tuple[str, ...] = ()
    """Arithmetics (ways to compute matrix products) of the worker, fastest first; empty if none."""
    torch: str = ""
    """Digest of results that torch computes on the worker; empty if torch does not affect any
    bit."""
    obstacle: str = "has not reported its arithmetic"
    """Why the worker supports no arithmetic (way to compute matrix products): the rest of a
    sentence that begins with the worker's name."""
    is_strict: bool = False
    """Whether the worker only serves in a cluster with exact results."""
    computation: str = ""
    """Device, kernels and libraries of the worker, which determine the bits of results that are not
    exact."""


class ArithmeticAgreement(Message, frozen=True, kw_only=True):
    """The arithmetic (way to compute matrix products) that the members of a generation use."""

    kernels: str = ""
    """Arithmetic (way to compute matrix products) in use; empty if results are not exact."""
    torch: str = ""
    """Digest of results that torch computes, equal on all members; empty if torch does not affect
    any bit."""
    reason: str = "no worker has reported its arithmetic"
    """Why results are not exact; empty if results are exact."""

    @property
    def is_exact(self) -> bool:
        return bool(self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """Return the agreement as JSON data for ``status``."""
        return {"exact": self.is_exact, "arithmetic": self.kernels, "reason": self.reason}


def agree(
    offers: Mapping[str, ArithmeticOffer], former: ArithmeticAgreement | None = None
) -> ArithmeticAgreement:
    """Return the fastest arithmetic that all workers offer, or why there is none.

    An arithmetic is a way to compute matrix products. ``offers``: by worker name. ``former``:
    agreement of the previous generation, kept if all workers support it; None before the first.

        Example: workers with (dot, fma) and (fma) use fma; with (dot) and (fma), no result is exact
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
