"""The data plane with a trace around it. Without a trace none of this is there.

    attention worker   attention, dispatch, combine; sample      (TracedDispatcher)
    expert worker      receive, experts, send                    (TracedTransport)
    colocated worker   all of them, those of the experts within combine

All but ``attention``, ``experts`` and ``sample`` are calls; these three are what the worker does
between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from torch import Tensor

from cluster.placement import ExpertPlacement
from cluster.topology import Generation
from workers.dist.dispatcher import BatchRows, DispatchHandle, TokenDispatcher
from workers.dist.header import StepHeader
from workers.dist.transport import DataTransport, Expected, Message, Tag
from workers.families.base import BankSpec
from workers.step_trace import StepTrace, now_ns


class _Timeline:
    """Where in which step a worker is, and since when."""

    def __init__(self, trace: StepTrace, banks: Sequence[BankSpec]) -> None:
        self._trace = trace
        self._banks = tuple(banks)
        self._header: StepHeader | None = None
        self._begin_ns = 0
        self._last_ns = 0

    def begin_step(self, header: StepHeader) -> None:
        """A step's first call."""
        self._header = header
        self._begin_ns = self._last_ns = now_ns()

    def until_now(self, name: str, place: dict[str, Any]) -> None:
        """Something ended now that began when the last thing ended."""
        assert self._header is not None, "begin_step comes first"
        now = now_ns()
        self._trace.add(name, self._last_ns, now, {"step": self._header.step, **place})
        self._last_ns = now

    def forget(self) -> None:
        """What the worker did since the last thing is no span."""
        self._last_ns = now_ns()

    def end_step(self, last: str = "") -> None:
        """The step is done, with ``last`` as its last span: write its spans."""
        header = self._header
        if header is None:
            return
        if last:
            self.until_now(last, {})
        place = {
            "step": header.step,
            "generation": header.generation,
            "micro_batches": header.num_micro_batches,
            "rows": {str(rank): grant.num_rows for rank, grant in header.grants},
        }
        self._trace.add("step", self._begin_ns, now_ns(), place)
        self._trace.flush()
        self._header = None

    def place(self, bank: int, exchange: int, micro_batch: int) -> dict[str, Any]:
        """Place of an exchange in its step."""
        spec = self._banks[bank]
        return {
            "layer": spec.layer,
            "bank": spec.bank,
            "exchange": exchange,
            "micro_batch": micro_batch,
        }


class Traced(Protocol):
    """What writes down the steps of a worker."""

    def end_step(self) -> None:
        """The step that was begun is done."""


class TracedDispatcher:
    """``TokenDispatcher`` of an attention worker whose steps are traced."""

    def __init__(
        self, inner: TokenDispatcher, trace: StepTrace, banks: Sequence[BankSpec]
    ) -> None:
        self._inner = inner
        self._timeline = _Timeline(trace, banks)

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """See ``TokenDispatcher``."""
        self._inner.set_placement(placement, generation)

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """See ``TokenDispatcher``."""
        self._timeline.begin_step(header)
        self._inner.begin_step(header, micro_batches)

    def sit_out(self, header: StepHeader) -> None:
        """See ``TokenDispatcher``."""
        self._timeline.begin_step(header)
        self._inner.sit_out(header)

    def dispatch(
        self,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bank: int,
        exchange: int = 0,
        micro_batch: int = 0,
    ) -> DispatchHandle:
        """See ``TokenDispatcher``; what came before was this micro-batch's attention."""
        place = self._timeline.place(bank, exchange, micro_batch)
        self._timeline.until_now("attention", place)
        handle = self._inner.dispatch(rows, topk_ids, topk_weights, bank, exchange, micro_batch)
        self._timeline.until_now("dispatch", place)
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See ``TokenDispatcher``."""
        self._timeline.forget()
        outputs = self._inner.combine(handle)
        place = self._timeline.place(handle.bank.index, handle.exchange, handle.micro_batch)
        self._timeline.until_now("combine", place)
        return outputs

    def end_step(self) -> None:
        """The step is committed."""
        self._timeline.end_step("sample")


class TracedTransport:
    """``DataTransport`` of an expert worker whose steps are traced."""

    def __init__(self, inner: DataTransport, trace: StepTrace, banks: Sequence[BankSpec]) -> None:
        self._inner = inner
        self._timeline = _Timeline(trace, banks)

    def begin_step(self, header: StepHeader) -> None:
        """See ``DataTransport``."""
        self._timeline.begin_step(header)
        self._inner.begin_step(header)

    def post(self, tag: Tag, messages: Sequence[Message], *, sized: bool) -> None:
        """See ``DataTransport``; what came before was the experts' work."""
        place = self._timeline.place(tag.bank, tag.exchange, tag.micro_batch)
        self._timeline.until_now("experts", place)
        self._inner.post(tag, messages, sized=sized)
        self._timeline.until_now("send", place)

    def receive(
        self, tag: Tag, expected: Sequence[Expected], *, sized: bool
    ) -> list[tuple[Tensor, ...]]:
        """See ``DataTransport``."""
        self._timeline.forget()
        received = self._inner.receive(tag, expected, sized=sized)
        place = self._timeline.place(tag.bank, tag.exchange, tag.micro_batch)
        self._timeline.until_now("receive", place)
        return received

    def reject(self, rank: int, reason: str) -> NoReturn:
        """See ``DataTransport``."""
        self._inner.reject(rank, reason)

    def apply_generation(self, generation: Generation) -> None:
        """See ``DataTransport``."""
        self._inner.apply_generation(generation)

    def close(self) -> None:
        """See ``DataTransport``."""
        self._inner.close()

    def end_step(self) -> None:
        """The step is served."""
        self._timeline.end_step()
