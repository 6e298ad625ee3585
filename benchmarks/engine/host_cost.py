"""Host time of a decode step: ``python -m benchmarks.engine.host_cost [--json]``.

Runs the engine, the dispatchers and the expert server of a GPU worker over a transport that sends
nothing and a device that computes nothing, for models with different numbers of MoE layers. The
cost of a step should not depend on that number. There is a row for each number and each of three
sides: an attention worker and an expert worker of a disaggregated cluster, and one worker with all
experts (``local``).

``launches``, ``waits`` and ``copies`` are counted on the simulated GPU
(``benchmarks.harness.pretend_gpu``): graphs and kernels that the host launches, times that it waits
for the device, and copies that it starts. ``host_us`` is CPU time of the step's thread, without the
driver's time for a launch, in the shortest of several runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.harness.both_roles import Alone
from benchmarks.harness.pretend_gpu import DeviceLog, PretendEvent, PretendStream, pretend_gpu
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.config.cluster import EngineSection
from cluster.core.placement import BankShape, ExpertPlacement, contiguous
from cluster.core.topology import Generation, Member
from workers.cuda.step_graph import StepGraph
from workers.dispatch.dispatcher import TokenDispatcher
from workers.dispatch.expert_server import ExpertServer
from workers.dispatch.local import LocalDispatcher
from workers.dispatch.remote import RemoteDispatcher
from workers.engine.engine import Engine
from workers.model.config import BankSpec, ExchangeSpec, ModelConfig
from workers.model.layers import Dispatch, LayerSteps, ModelInputs
from workers.requests.buckets import bucket_of, buckets_up_to
from workers.requests.request import Request, SamplingParams
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.transport.transport import ExpectedMessage, RowMessage, Tag, empty_messages

SIDES = ("attention", "expert", "local")
LAYERS = (4, 16, 48)
_DEVICE = torch.device("cuda:0")
_DTYPE = torch.bfloat16
_WIDTH, _NUM_EXPERTS, _TOP_K, _VOCABULARY = 64, 64, 8, 256
_EXPERT_RANKS = 2
_STEPS_PER_RUN = 32
_RUNS = 6
_COPIES = ("copy_", "_to_copy", "clone")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCost:
    """Cost of a decode step on the host."""

    side: str
    layers: int
    """Number of MoE layers."""
    launches: float
    """Graphs and kernels that the host launches in a step."""
    waits: float
    """Times that the host waits for the device in a step."""
    copies: float
    """Copies that the host starts in a step."""
    host_us: float
    """Microseconds of CPU time of a step."""


class NullModel:
    """Replaces ``AttentionModel``: each layer sends rows to experts and computes nothing."""

    dtype = _DTYPE
    device = _DEVICE
    is_native = False
    predictor = None

    def __init__(self, banks: Sequence[BankSpec], max_rows: int) -> None:
        self.layers = tuple(banks)
        self._hidden = torch.zeros(max_rows, _WIDTH, dtype=_DTYPE, device=_DEVICE)
        self._logits = torch.zeros(max_rows, _VOCABULARY, dtype=_DTYPE, device=_DEVICE)
        self._ids = torch.zeros(max_rows, _TOP_K, dtype=torch.int64, device=_DEVICE)
        self._weights = torch.zeros(max_rows, _TOP_K, dtype=_DTYPE, device=_DEVICE)

    def forward(self, inputs: ModelInputs, caches: object) -> LayerSteps:
        """Return final hidden states [T, H] after one exchange for each layer."""
        rows = len(inputs.token_ids)
        for bank in self.layers:
            parts = self._hidden[:rows], self._ids[:rows], self._weights[:rows]
            yield Dispatch(bank.index, 0, *parts)
            yield
        return self._hidden[:rows]

    def head(self, hidden: Tensor) -> Tensor:
        """[rows, H] -> [rows, V]."""
        return self._logits[: len(hidden)]


class NullBank:
    """Replaces ``ExpertBank``: experts that compute nothing."""

    version = 0

    def native(self, exchange: int) -> None:
        """Return None, as no native code runs on a GPU."""

    def compute(
        self, exchange: int, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor
    ) -> Tensor:
        """See ``SlotBank.compute``."""
        return torch.empty(len(pair_slot), _WIDTH, dtype=_DTYPE, device=_DEVICE)

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See ``SlotBank.compute_rows``."""
        return torch.empty(len(slots), _WIDTH, dtype=dtype, device=_DEVICE)


class NullTransport(Alone):
    """``DataTransport`` that sends nothing and whose messages can be captured."""

    sums_are_rounded = True
    captured_state: Hashable = 1

    def capture(self, graph: StepGraph) -> NullMessages:
        """See ``DataTransport.capture``."""
        return NullMessages()

    def post(self, tag: Tag, messages: Sequence[RowMessage], *, sized: bool) -> None:
        """Send nothing."""

    def receive(
        self, tag: Tag, expected: Sequence[ExpectedMessage], *, sized: bool, must_wait: bool
    ) -> list[tuple[Tensor, ...]]:
        """Return zeros."""
        return NullMessages().receive(tag, expected)


class NullMessages:
    """``CapturedMessages`` that are not sent."""

    def post(self, tag: Tag, messages: Sequence[RowMessage]) -> None:
        """Send nothing."""

    def receive(self, tag: Tag, expected: Sequence[ExpectedMessage]) -> list[tuple[Tensor, ...]]:
        """Return zeros: all rows choose the expert in slot 0."""
        received = empty_messages(expected, _DEVICE)
        for parts in received:
            for part in parts:
                part.zero_()
        return received


class _NullGraph:
    """Replaces ``torch.cuda.CUDAGraph``: a replay does nothing."""

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        """Do nothing: what is captured runs at once."""

    def capture_end(self) -> None:
        """Do nothing."""

    def replay(self) -> None:
        """Do nothing."""

    def reset(self) -> None:
        """Do nothing."""


class _OnCpu(TorchFunctionMode):
    """Creates tensors of the device in CPU memory."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if kwargs and kwargs.get("device") == _DEVICE:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if any(arg is _DEVICE for arg in args):
            args = tuple(torch.device("cpu") if arg is _DEVICE else arg for arg in args)
        return func(*args, **(kwargs or {}))


@contextmanager
def null_device() -> Iterator[None]:
    """Context in which the device is a part of CPU memory, and graphs do nothing."""
    cuda = mock.patch.multiple(
        torch.cuda,
        CUDAGraph=_NullGraph,
        graph_pool_handle=object,
        Stream=PretendStream,
        Event=PretendEvent,
        current_stream=PretendStream,
        stream=nullcontext,
        empty_cache=lambda: None,
    )
    with cuda, _OnCpu():
        yield


class _Engine:
    """An engine whose requests decode, over one of the dispatchers."""

    def __init__(self, side: str, num_layers: int, batch: int) -> None:
        banks = _banks(num_layers)
        dispatcher: TokenDispatcher
        if side == "local":
            dispatcher = LocalDispatcher([NullBank()] * num_layers, banks)
        else:
            dispatcher = RemoteDispatcher(
                NullTransport(), banks, rank=0, combine_mode="sum", dtype=_DTYPE, device=_DEVICE
            )
            dispatcher.set_placement(_placement(banks), _generation())
        section = EngineSection(
            kv_cache_bytes=64 << 20, max_num_seqs=batch, max_num_batched_tokens=max(batch, 512)
        )
        model: Any = NullModel(banks, max(batch, 512))
        self._engine = Engine(
            model=model,
            config=_config(num_layers),
            banks=banks,
            dispatcher=dispatcher,
            section=section,
        )
        self._side = side
        self._step = 0
        params = SamplingParams(max_tokens=4_000, temperature=0.0, ignore_eos=True)
        for number in range(batch):
            request = Request(
                request_id=f"r{number}", prompt=(1, 2, 3), params=params, deadline_ms=3_600_000
            )
            self._engine.add_request(request)
        while self._engine.rows_wanted().prefill_rows:
            self.step()

    def step(self) -> None:
        """Run a step of all rows that the engine wants, with the header of a leader."""
        wanted = self._engine.rows_wanted()
        self._step += 1
        self._engine.step(_header(self._step, self._side, wanted.decode_rows, wanted.prefill_rows))


class _Server:
    """The server of an expert worker, to which one attention worker sends rows."""

    def __init__(self, num_layers: int, batch: int) -> None:
        banks = _banks(num_layers)
        self._server = ExpertServer(
            NullTransport(),
            [NullBank()] * num_layers,
            banks,
            device_index=0,
            combine_mode="sum",
            dtype=_DTYPE,
            device=_DEVICE,
            max_kept_rows=1024,
        )
        self._server.set_placement(_placement(banks), _generation())
        self._batch = batch
        self._step = 0

    def step(self) -> None:
        """Serve a step."""
        self._step += 1
        self._server.run_step(_header(self._step, "expert", self._batch, 0))


def _header(step: int, side: str, decode_rows: int, prefill_rows: int) -> StepHeader:
    is_padded = side != "local" and not prefill_rows
    return StepHeader(
        generation=1,
        step=step,
        epoch=1,
        oldest_epoch=1,
        grants=Grants.of({0: Grant(decode_rows=decode_rows, prefill_rows=prefill_rows)}),
        exact=prefill_rows > 0,
        bucket=bucket_of(decode_rows, buckets_up_to(512)) if is_padded else 0,
    )


def _banks(num_layers: int) -> list[BankSpec]:
    exchange = ExchangeSpec(
        index=0, name="mlp", in_width=_WIDTH, out_width=_WIDTH, expert_width=_WIDTH
    )
    return [
        BankSpec(
            index=layer,
            bank="mlp",
            layer=layer,
            num_experts=_NUM_EXPERTS,
            top_k=_TOP_K,
            exchanges=(exchange,),
        )
        for layer in range(num_layers)
    ]


def _placement(banks: Sequence[BankSpec]) -> ExpertPlacement:
    shapes = [BankShape(bank="mlp", layer=b.layer, num_experts=_NUM_EXPERTS) for b in banks]
    return contiguous(shapes, _EXPERT_RANKS)


def _generation() -> Generation:
    experts = [
        Member(name=f"expert-{r}", role="expert", rank=r, device=r) for r in range(_EXPERT_RANKS)
    ]
    home = Member(name="attention-0", role="attention", rank=0, device=-1)
    return Generation(number=1, members=(home, *experts))


def _config(num_layers: int) -> ModelConfig:
    rope: Any = SimpleNamespace(rope_type="default", factor=1.0)
    return ModelConfig(
        model_type="null",
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        num_layers=num_layers,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_ids=(),
        dtype="bfloat16",
        rope=rope,
    )


def _start(side: str, num_layers: int, batch: int) -> Callable[[], None]:
    """Return a function that runs a step of one side, all of whose graphs are captured."""
    loop = _Server(num_layers, batch) if side == "expert" else _Engine(side, num_layers, batch)
    for _ in range(2):
        loop.step()
    return loop.step


def _counts(side: str, num_layers: int, batch: int, steps: int) -> Mapping[str, float]:
    with ExitStack() as stack:
        log: DeviceLog = stack.enter_context(pretend_gpu())
        step = _start(side, num_layers, batch)
        log.clear()
        for _ in range(steps):
            step()
        copies = sum(log.launches[name] for name in _COPIES)
        launches = sum(log.launches.values()) - copies
        found = {"launches": launches, "waits": sum(log.waits.values()), "copies": copies}
    return {name: number / steps for name, number in found.items()}


def _host_us(side: str, num_layers: int, batch: int, steps: int, runs: int) -> float:
    with null_device():
        step = _start(side, num_layers, batch)
        best = float("inf")
        for _ in range(runs):
            began = time.thread_time_ns()
            for _ in range(steps):
                step()
            best = min(best, (time.thread_time_ns() - began) / steps / 1e3)
    return best


def measure(
    side: str, num_layers: int, batch: int, steps: int = _STEPS_PER_RUN, runs: int = _RUNS
) -> HostCost:
    """Return the cost of a decode step of ``batch`` rows on one of ``SIDES``."""
    torch.set_num_threads(1)  # the work of other threads would not be counted
    counts = _counts(side, num_layers, batch, 8)
    host_us = round(_host_us(side, num_layers, batch, steps, runs), 1)
    return HostCost(side=side, layers=num_layers, host_us=host_us, **counts)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.host_cost")
    parser.add_argument("--layers", type=count, nargs="+", default=LAYERS, metavar="N")
    parser.add_argument("--batch", type=count, default=8, metavar="B", help="rows of a step (8)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all sides and print a row for each number of layers."""
    args = make_parser().parse_args(arguments)
    found = [measure(side, layers, args.batch) for side in SIDES for layers in args.layers]
    if args.json:
        sys.stdout.writelines(json.dumps(asdict(cost)) + "\n" for cost in found)
        return 0
    columns = ("side", "layers", "launches", "waits", "copies", "host_us")
    rows = [[getattr(cost, name) for name in columns] for cost in found]
    sys.stdout.write(table([name.upper() for name in columns], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
