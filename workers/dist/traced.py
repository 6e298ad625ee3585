"""The data plane, measured: its spans go to the metrics, and to a trace where one is written.

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
from workers.step_trace import now_ns


class SpanSink(Protocol):
    """Takes what the workers did; ``StepTrace`` and ``StepMetrics`` do."""

    def begin_step(self, header: StepHeader) -> bool:
        """Whether the spans of this step are wanted."""

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        """A span."""

    def flush(self) -> None:
        """The step is done."""


class _Timeline:
    """Where in which step a worker is, and since when."""

    def __init__(self, sinks: Sequence[SpanSink], banks: Sequence[BankSpec]) -> None:
        self._all = tuple(sinks)
        self._sinks: tuple[SpanSink, ...] = ()
        self._banks = tuple(banks)
        self._header: StepHeader | None = None
        self._begin_ns = 0
        self._last_ns = 0

    def begin_step(self, header: StepHeader) -> None:
        """A step's first call."""
        self._header = header
        self._sinks = tuple(sink for sink in self._all if sink.begin_step(header))
        self._begin_ns = self._last_ns = now_ns()

    def until_now(self, name: str, bank: int, exchange: int, micro_batch: int) -> None:
        """Something of an exchange ended now that began when the last thing ended."""
        if self._sinks:
            self._end_span(name, self._place(bank, exchange, micro_batch))

    def forget(self) -> None:
        """What the worker did since the last thing is no span."""
        if self._sinks:
            self._last_ns = now_ns()

    def _end_span(self, name: str, place: dict[str, Any]) -> None:
        assert self._header is not None, "begin_step comes first"
        now = now_ns()
        for sink in self._sinks:
            sink.add(name, self._last_ns, now, {"step": self._header.step, **place})
        self._last_ns = now

    def end_step(self, last: str = "") -> None:
        """The step is done, with ``last`` as its last span: write its spans."""
        header = self._header
        if header is not None and self._sinks:
            self._tell(header, last)
        self._header, self._sinks = None, ()

    def _tell(self, header: StepHeader, last: str) -> None:
        if last:
            self._end_span(last, {})
        place = {
            "step": header.step,
            "generation": header.generation,
            "micro_batches": header.num_micro_batches,
            "rows": {str(rank): grant.num_rows for rank, grant in header.grants},
        }
        for sink in self._sinks:
            sink.add("step", self._begin_ns, now_ns(), place)
            sink.flush()

    def _place(self, bank: int, exchange: int, micro_batch: int) -> dict[str, Any]:
        """Place of an exchange in its step."""
        spec = self._banks[bank]
        return {
            "layer": spec.layer,
            "bank": spec.bank,
            "exchange": exchange,
            "micro_batch": micro_batch,
        }


class Traced(Protocol):
    """What measures the steps of a worker."""

    def end_step(self) -> None:
        """The step that was begun is done."""


class TracedDispatcher:
    """``TokenDispatcher`` of an attention worker whose steps are measured."""

    def __init__(
        self, inner: TokenDispatcher, sinks: Sequence[SpanSink], banks: Sequence[BankSpec]
    ) -> None:
        self._inner = inner
        self._timeline = _Timeline(sinks, banks)

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
        self._timeline.until_now("attention", bank, exchange, micro_batch)
        handle = self._inner.dispatch(rows, topk_ids, topk_weights, bank, exchange, micro_batch)
        self._timeline.until_now("dispatch", bank, exchange, micro_batch)
        return handle

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See ``TokenDispatcher``."""
        self._timeline.forget()
        outputs = self._inner.combine(handle)
        bank, exchange = handle.bank.index, handle.exchange
        self._timeline.until_now("combine", bank, exchange, handle.micro_batch)
        return outputs

    def end_step(self) -> None:
        """The step is committed."""
        self._timeline.end_step("sample")


class TracedTransport:
    """``DataTransport`` of an expert worker whose steps are measured."""

    def __init__(
        self, inner: DataTransport, sinks: Sequence[SpanSink], banks: Sequence[BankSpec]
    ) -> None:
        self._inner = inner
        self._timeline = _Timeline(sinks, banks)
        self.num_bytes = {"dispatch": 0, "combine": 0}
        """Rows that came, and outputs that went home, bytes since the start."""

    def begin_step(self, header: StepHeader) -> None:
        """See ``DataTransport``."""
        self._timeline.begin_step(header)
        self._inner.begin_step(header)

    def post(self, tag: Tag, messages: Sequence[Message], *, sized: bool) -> None:
        """See ``DataTransport``; what came before was the experts' work."""
        self._timeline.until_now("experts", tag.bank, tag.exchange, tag.micro_batch)
        self._inner.post(tag, messages, sized=sized)
        self.num_bytes["combine"] += sum(part.nbytes for m in messages for part in m.parts)
        self._timeline.until_now("send", tag.bank, tag.exchange, tag.micro_batch)

    def receive(
        self, tag: Tag, expected: Sequence[Expected], *, sized: bool
    ) -> list[tuple[Tensor, ...]]:
        """See ``DataTransport``."""
        self._timeline.forget()
        received = self._inner.receive(tag, expected, sized=sized)
        self.num_bytes["dispatch"] += sum(part.nbytes for parts in received for part in parts)
        self._timeline.until_now("receive", tag.bank, tag.exchange, tag.micro_batch)
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

    def stats(self) -> dict[str, float]:
        """Bytes by direction, for the worker's table of stats."""
        return {
            f'dispatch_bytes_total{{direction="{direction}"}}': float(count)
            for direction, count in self.num_bytes.items()
        }
