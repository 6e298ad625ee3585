"""Steps that are launched before the host has read the step before, on a simulated GPU.

The model says which token follows which two: ``following``. It reads the first of them from the KV
slot of its position. A step with a wrong token, slot or block table would say others.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.pretend_gpu import DeviceLog, pretend_gpu
from cluster.config.cluster import EngineSection
from cluster.core.errors import PeerLostError
from tests.harness.pretend_gpu import DEVICE
from tests.harness.tiers import quick_rows
from workers.dispatch.local import LocalDispatcher
from workers.engine.engine import Engine
from workers.metrics.step_metrics import SAMPLE_INTERVAL, StepMetrics
from workers.metrics.step_timer import StepTimer
from workers.model.config import BankSpec, ExchangeSpec, ModelConfig
from workers.model.layers import Dispatch, LayerSteps, ModelInputs
from workers.requests.request import FinishReason, Request, SamplingParams, TokenOutput
from workers.requests.step_header import Grant, Grants, StepHeader
from workers.requests.traced import StepParents

WIDTH, VOCABULARY, EXPERTS, TOP_K = 16, 200, 4, 2
EXCHANGE = ExchangeSpec(index=0, name="mlp", in_width=WIDTH, out_width=WIDTH, expert_width=WIDTH)
BANK = BankSpec(
    index=0, bank="mlp", layer=0, num_experts=EXPERTS, top_k=TOP_K, exchanges=(EXCHANGE,)
)
SECTION = EngineSection(
    kv_cache_bytes=1 << 20, block_size_tokens=4, max_num_seqs=4, max_num_batched_tokens=32
)
FOREVER = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)


def following(before: Any, token: Any, position: Any) -> Any:
    """The token after ``before`` and ``token``, which is at a position."""
    return (5 * before + 7 * token + 3 * position + 1) % VOCABULARY


SECOND = following(9, following(0, 9, 0), 1)
"""Second token that follows the prompt [9]."""


def continued(request: Request) -> tuple[int, ...]:
    """What the engine must answer to a request."""
    params, tokens = request.params, [0, *request.prompt]
    for _ in range(params.max_tokens):
        tokens.append(following(tokens[-2], tokens[-1], len(tokens) - 2))
        if tokens[-1] in params.stop_token_ids:
            break
    return tuple(tokens[1 + len(request.prompt) :])


class ChainModel:
    """In place of ``AttentionModel``."""

    dtype, device, is_native, predictor = torch.bfloat16, torch.device(DEVICE), False, None
    layers = (BANK,)

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._tokens = torch.zeros(1 << 16, dtype=torch.int64, device=self.device)
        """In place of a KV cache."""

    def forward(self, inputs: ModelInputs, caches: object) -> LayerSteps:
        count = len(inputs.token_ids)
        kinds = {"dtype": self.dtype, "device": self.device}
        ids = torch.stack([(inputs.token_ids + i) % EXPERTS for i in range(TOP_K)], dim=1)
        weights = torch.zeros(count, TOP_K, **kinds)  # type: ignore[call-overload]
        rows: Tensor = torch.zeros(count, WIDTH, **kinds)  # type: ignore[call-overload]
        yield Dispatch(0, 0, rows, ids, weights)
        yield
        new: Tensor = following(self._before(inputs), inputs.token_ids, inputs.positions)
        return rows + new.unsqueeze(1).to(self.dtype)

    def _before(self, inputs: ModelInputs) -> Tensor:
        """Write the token of each row to its slot; read that of the position before, or 0."""
        paged, positions = inputs.attention.paged, inputs.positions
        assert paged is not None
        self._tokens.index_copy_(0, inputs.attention.slot_mapping, inputs.token_ids)
        rows = torch.arange(len(positions), device=self.device)
        owner = (rows.unsqueeze(1) >= paged.first_rows[1:].unsqueeze(0)).sum(1)
        place = (positions - 1).clamp(min=0)
        block = paged.tables[owner, place // self._size].long()
        return self._tokens[block * self._size + place % self._size] * (positions > 0)

    def head(self, hidden: Tensor) -> Tensor:
        every = torch.arange(VOCABULARY, device=self.device)
        return -(every - hidden[:, :1].float()).abs()


class NoExperts:
    """In place of ``ExpertBank``."""

    version = 0

    def native(self, exchange: int) -> None:
        return None

    def compute_rows(
        self, exchange: int, inputs: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype
    ) -> Tensor:
        return torch.zeros(len(slots), WIDTH, dtype=dtype, device=inputs.device)


class Ahead:
    """An engine of one rank, the headers of its leader, and what came out."""

    def __init__(
        self,
        section: EngineSection = SECTION,
        timer: StepTimer | None = None,
        *,
        is_captured: bool = True,
        num_micro_batches: int = 1,
    ) -> None:
        self.num_micro_batches = num_micro_batches
        rope: Any = SimpleNamespace(rope_type="default", factor=1.0)
        config = ModelConfig(
            model_type="chain",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=16,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            eos_token_ids=(),
            dtype="bfloat16",
            rope=rope,
        )
        model: Any = ChainModel(section.block_size_tokens)
        bank: Any = NoExperts()
        self.dispatcher = LocalDispatcher([bank], [BANK], timer=timer)
        self.engine = Engine(
            model=model, config=config, banks=[BANK], dispatcher=self.dispatcher, section=section
        )
        self.num_ahead = 0
        """Steps that began before the step before was read."""
        graphs = self.engine.runner.graphs
        assert graphs is not None
        self.graphs = graphs
        run = graphs.run

        def count(header: StepHeader, parts: Any, *, is_ahead: bool = False) -> Any:
            self.num_ahead += is_ahead
            return run(header, parts, is_ahead=is_ahead)

        graphs.run = count  # type: ignore[method-assign]
        if is_captured:
            self.engine.runner.capture_graphs()
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.next_step = 1

    def add(self, name: str, prompt: Sequence[int], params: SamplingParams = FOREVER) -> Request:
        request = Request(request_id=name, prompt=tuple(prompt), params=params)
        self.engine.add_request(request)
        self.tokens[name] = []
        return request

    def step(self, most: int = 1000) -> list[TokenOutput]:
        wanted = self.engine.rows_wanted()
        decode_rows = min(wanted.decode_rows, most)
        grant = Grant(decode_rows=decode_rows, prefill_rows=wanted.prefill_rows)
        header = StepHeader(
            generation=1,
            step=self.next_step,
            epoch=1,
            oldest_epoch=1,
            grants=Grants.of({0: grant}),
            exact=wanted.prefill_rows > 0,
            num_micro_batches=self.num_micro_batches if decode_rows > 1 else 1,
            parents=((0, wanted.parents),) if wanted.parents else (),
        )
        self.next_step += 1
        return self.take(self.engine.step(header))

    def take(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        for output in outputs:
            known = self.tokens[output.request_id]
            assert output.index == len(known)
            known += output.token_ids
            if output.finish_reason is not None:
                self.reasons[output.request_id] = output.finish_reason
        return outputs

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()

    def check_is_free(self) -> None:
        self.engine.settle()
        self.engine.check_integrity()
        assert self.engine.pool.num_free == self.engine.pool.num_blocks


@pytest.fixture
def log() -> Iterator[DeviceLog]:
    with pretend_gpu() as log, torch.no_grad():
        yield log


def params(max_tokens: int, *stop: int) -> SamplingParams:
    return replace(FOREVER, max_tokens=max_tokens, stop_token_ids=stop)


def test_a_step_is_launched_before_the_step_before_is_read(log: DeviceLog) -> None:
    run = Ahead()
    request = run.add("r", [5, 6, 7], params(6))
    run.step()  # the prompt
    found = []
    for _ in range(5):
        log.clear()
        run.step()
        found.append((log.launches["graph"], sum(log.waits.values()), len(run.tokens["r"])))
    # The last step waits for two: no sequence can have another row.
    assert found == [(1, 0, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4), (1, 2, 6)]
    assert tuple(run.tokens["r"]) == continued(request)
    run.check_is_free()


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_rows_after_an_unforeseen_end_are_dropped(log: DeviceLog, num_micro_batches: int) -> None:
    run = Ahead(num_micro_batches=num_micro_batches)
    requests = [run.add("a", [9], params(9, SECOND)), run.add("b", [5, 6], params(9))]
    run.finish()
    assert run.reasons == {"a": FinishReason.STOP, "b": FinishReason.LENGTH}
    assert [tuple(run.tokens[r.request_id]) for r in requests] == list(map(continued, requests))
    run.check_is_free()
    report = run.engine.load.report()
    # Prompts, and all tokens except the last ones.
    computed = [t for r in requests for t in (*r.prompt, *run.tokens[r.request_id][:-1])]
    assert report.rows == len(computed)
    (counts,) = report.banks.values()
    chosen = Counter((token + i) % EXPERTS for token in computed for i in range(TOP_K))
    found = (counts.prefill + counts.decode).tolist()
    assert dict(enumerate(found)) == {expert: chosen[expert] for expert in range(EXPERTS)}


def test_a_request_that_all_steps_ahead_were_for_ends_without_another_wait(log: DeviceLog) -> None:
    run = Ahead()
    request = run.add("a", [9], params(9, SECOND))
    run.step()
    run.step()
    log.clear()
    run.step()
    assert (log.launches["graph"], sum(log.waits.values())) == (1, 1)
    assert tuple(run.tokens["a"]) == continued(request)
    assert not run.engine.has_work
    run.check_is_free()


def test_the_host_reads_first_what_another_request_needs(log: DeviceLog) -> None:
    """A prompt ends the steps ahead; they go on behind it, for both."""
    run = Ahead()
    requests = [run.add("a", [9], params(12))]
    for _ in range(3):
        run.step()
    requests.append(run.add("b", [5, 6], params(8)))
    run.step()
    assert [len(own) for own in run.tokens.values()] == [4, 1]
    log.clear()
    run.step()
    assert not sum(log.waits.values())
    run.finish()
    assert [tuple(run.tokens[r.request_id]) for r in requests] == list(map(continued, requests))
    run.check_is_free()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"logprobs": 1}, id="logprobs"),
        pytest.param({"presence_penalty": 1e-6}, id="penalties"),
        pytest.param({"bad_words": ((1, 2),)}, id="bad words"),
        pytest.param({"min_tokens": 3, "stop_token_ids": (199,)}, id="min_tokens"),
    ],
)
def test_what_needs_more_than_tokens_is_read_at_once(log: DeviceLog, other: dict[str, Any]) -> None:
    run = Ahead()
    run.add("a", [9], params(9))
    run.add("b", [8], replace(FOREVER, max_tokens=9, **other))
    run.step()
    run.step()
    assert [len(own) for own in run.tokens.values()] == [2, 2]
    run.finish()
    run.check_is_free()


def test_a_paused_request_has_no_output_after_its_pause(log: DeviceLog) -> None:
    run = Ahead()
    request = run.add("a", [9], params(20))
    run.add("b", [8], params(20))
    for _ in range(4):
        run.step()
    assert len(run.tokens["a"]) == 3
    run.engine.requests.pause("a", num_tokens=5)
    run.take(run.engine.poll())  # the tokens of the step ahead
    assert len(run.tokens["a"]) == 4
    assert run.engine.requests.take_paused() == ["a"]
    for _ in range(3):
        run.step()
    assert [len(own) for own in run.tokens.values()] == [4, 7]
    run.engine.requests.resume("a")
    run.finish()
    assert tuple(run.tokens["a"]) == continued(request)
    run.check_is_free()


def test_a_lost_step_takes_the_step_before_with_it(
    log: DeviceLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run again, to the same tokens. A request that ended between them has no row left."""
    run = Ahead()
    requests = [run.add("a", [9], params(20)), run.add("b", [8, 8, 8], params(20))]
    for _ in range(3):
        run.step()
    graphs = run.engine.runner.graphs
    assert graphs is not None
    run.engine.abort("b")
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "run", lambda *_, **__: _lose())
        with pytest.raises(PeerLostError):
            run.step()
    assert run.engine.stats()["steps_abandoned_total"] == 2
    run.engine.check_integrity()
    run.finish()
    assert tuple(run.tokens["a"]) == continued(requests[0])
    run.check_is_free()


def _lose() -> None:
    raise PeerLostError("expert-0", "gone")


@pytest.mark.parametrize("when", ["before the next step", "after its launch", "with the last step"])
def test_a_step_that_is_lost_when_it_is_read_runs_again(log: DeviceLog, when: str) -> None:
    run = Ahead()
    request = run.add("a", [9, 9, 9], params(6))
    num_steps = 5 if when == "with the last step" else 3
    lost = [num_steps]
    finish_later = run.dispatcher.finish_later

    def finish() -> Callable[[], bool]:
        number, end = run.next_step - 1, finish_later()

        def finish_or_lose() -> bool:
            if number in lost:
                _lose()
            return end()

        return finish_or_lose

    run.dispatcher.finish_later = finish  # type: ignore[method-assign]
    while run.next_step <= num_steps:
        run.step()
    if when == "before the next step":
        run.add("b", [8], params(2))
    with pytest.raises(PeerLostError):
        run.step()
    lost.clear()
    run.engine.check_integrity()
    assert run.engine.stats()["steps_abandoned_total"] == 1 + (when != "before the next step")
    run.finish()
    assert tuple(run.tokens["a"]) == continued(request)
    run.check_is_free()


def test_nothing_is_captured_while_a_step_runs(log: DeviceLog) -> None:
    """The host waits for the step, then captures one of another size."""
    run = Ahead(is_captured=False)
    requests = [run.add("a", [9], params(12)), run.add("b", [8, 8], params(4))]
    captured = run.graphs._capture
    unread: list[bool] = []

    def capture(*arguments: Any) -> Any:
        unread.append(run.engine.steps.is_unread)
        return captured(*arguments)

    run.graphs._capture = capture  # type: ignore[method-assign, assignment]
    run.finish()
    assert unread == [False, False]
    assert run.num_ahead > 5
    assert [tuple(run.tokens[r.request_id]) for r in requests] == list(map(continued, requests))


@pytest.mark.parametrize("max_tokens", [2, 5, 6, 9])
def test_a_traced_request_may_end_with_the_step_before(log: DeviceLog, max_tokens: int) -> None:
    """Its header was decided before, and names its spans."""
    run = Ahead()
    request = Request(
        request_id="a", prompt=(9,), params=params(max_tokens, SECOND if max_tokens % 2 else 0)
    )
    parents = StepParents(prefill=b"p" * 24, decode=b"d" * 24)
    run.engine.add_request(replace(request, step_parents=parents))
    run.tokens["a"] = []
    run.finish()
    assert tuple(run.tokens["a"]) == continued(request)
    run.check_is_free()


def test_measured_steps_are_read_at_once(log: DeviceLog) -> None:
    metrics = StepMetrics(None)
    run = Ahead(timer=StepTimer(metrics))
    request = run.add("a", [9], params(3 * SAMPLE_INTERVAL))
    unread = []
    while run.engine.has_work:
        run.step()
        run.dispatcher.timer.end_step()
        unread.append(run.next_step - 1 - len(run.tokens["a"]))
    is_measured = [step % SAMPLE_INTERVAL == 0 for step in range(2, len(unread))]
    assert [not late for late in unread[1:-1]] == is_measured
    assert tuple(run.tokens["a"]) == continued(request)


def test_a_sequence_without_a_row_gets_one_in_the_next_step(log: DeviceLog) -> None:
    """A grant was too small for it."""
    run = Ahead()
    requests = [run.add("a", [9], params(9)), run.add("b", [8], params(9))]
    run.step()
    run.step(most=1)
    for _ in range(3):
        run.step()
    assert min(map(len, run.tokens.values())) > 2
    run.finish()
    assert [tuple(run.tokens[r.request_id]) for r in requests] == list(map(continued, requests))


def test_a_request_whose_blocks_are_known_does_not_wait(log: DeviceLog) -> None:
    """It came from another worker, and lacks one decode row."""
    run = Ahead()
    first = run.add("a", [9], params(14))
    run.finish()
    run.add("b", [8], params(100))
    for _ in range(3):
        run.step()
    known = tuple(run.tokens["a"][:8])  # with the prompt two full blocks and a token
    moved = replace(first, request_id="c", output_so_far=(known,), attempt=1)
    run.tokens["c"] = list(known)
    run.engine.add_request(moved)
    run.step()
    run.step()
    assert run.tokens["c"][:9] == run.tokens["a"][:9]
    run.finish()
    assert run.tokens["c"] == run.tokens["a"]


@pytest.mark.parametrize("seed", quick_rows({0}, range(4)))
def test_a_random_life_gives_the_same_tokens(log: DeviceLog, seed: int) -> None:
    """With arrivals, ends, aborts and preemptions: blocks for half of the sequences."""
    rng = random.Random(seed)
    run = Ahead(replace_blocks(SECTION, 14))
    requests: dict[str, Request] = {}
    aborted = set[str]()
    for turn in range(120):
        if rng.random() < 0.25 and turn < 100:
            stop = [rng.randrange(VOCABULARY) for _ in range(4)]
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
            name = f"r{turn}"
            requests[name] = run.add(name, prompt, params(rng.randint(1, 30), *stop))
        if rng.random() < 0.02 and requests:
            name = rng.choice(list(requests))
            run.engine.abort(name)
            aborted.add(name)
        if run.engine.has_work:
            run.step()
            run.engine.check_integrity()
    run.finish()
    assert run.engine.stats()["num_preemptions_total"]
    assert run.num_ahead > 10
    for name, request in requests.items():
        whole, found = continued(request), tuple(run.tokens[name])
        assert found == whole[: len(found)]
        assert len(found) == len(whole) or name in aborted
    run.check_is_free()


def replace_blocks(section: EngineSection, num_blocks: int) -> EngineSection:
    """The section with KV memory for this many blocks."""
    one = 2 * 16 * 2 * section.block_size_tokens  # keys and values of one head in bfloat16
    return dataclasses.replace(section, kv_cache_bytes=num_blocks * one)
