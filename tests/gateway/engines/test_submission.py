"""One request from its first assignment to its end, without a worker."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from gateway.engines.submission import (
    MAX_TOTAL_UNACKNOWLEDGED_DEATHS,
    MAX_UNACKNOWLEDGED_DEATHS,
    RequestStage,
    Submission,
    without_first,
)
from workers.requests.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenOutput,
)
from workers.requests.wire import TO_ENGINE


class Sink:
    """Keeps what is delivered."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []

    def put(self, output: TokenOutput) -> None:
        self.outputs.append(output)

    def fail(self, error: Exception) -> None:
        raise error


def output(
    choice: int, index: int, *tokens: int, reason: FinishReason | None = None, code: str = ""
) -> TokenOutput:
    """Tokens of one choice."""
    return TokenOutput(
        request_id="r",
        attempt=0,
        choice=choice,
        index=index,
        token_ids=tokens,
        finish_reason=reason,
        error_code=code,
    )


def submission(n: int = 1, deadline_s: float = 100.0, attempt: int = 0) -> Submission:
    """A prompt of three tokens, ten at most."""
    params = SamplingParams(max_tokens=10)
    request = Request(request_id="r", prompt=(1, 2, 3), params=params, n=n, attempt=attempt)
    return Submission(request, Sink(), deadline_s)


def test_only_what_is_on_its_way_alone_kills_on_receipt() -> None:
    entry = submission()
    silent = {f"attention-{n}": True for n in range(MAX_UNACKNOWLEDGED_DEATHS)}
    found = []
    for stage, deaths in ((RequestStage.SENT, {}), (RequestStage.SENT, silent)):
        entry.stage, entry.deaths = stage, dict(deaths)
        found.append(entry.may_kill_on_receipt)
    entry.stage = RequestStage.QUEUED
    assert [*found, entry.may_kill_on_receipt] == [False, True, False]


@pytest.mark.parametrize(
    ("now_s", "deadline_ms"), [(40.0, 60_000), (99.75, 250), (99.9995, 1), (100.0, 1), (200.0, 1)]
)
def test_the_next_attempt_has_the_time_that_is_left(now_s: float, deadline_ms: int) -> None:
    entry = submission()
    entry.next_attempt(now_s)
    assert entry.message(now_s).deadline_ms == deadline_ms
    assert entry.replays_s == [now_s]


def test_workers_can_read_a_distant_deadline() -> None:
    entry = submission()
    entry.deadline_s = float("inf")
    message = TO_ENGINE.decode(TO_ENGINE.encode(entry.message(0.0)))
    assert isinstance(message, Request)
    assert message.deadline_ms == 2**32 - 1


def test_the_next_attempt_carries_what_was_delivered() -> None:
    entry = submission(n=3)
    entry.deliver(output(0, 0, 7, 8))
    entry.deliver(output(2, 0, 9, reason=FinishReason.STOP))
    entry.set_stage(RequestStage.QUEUED)
    assert entry.record_death() is None
    entry.next_attempt(50.0)
    request = entry.message(50.0)
    assert entry.request == submission(n=3).request
    assert request.attempt == 1
    assert request.output_so_far == ((7, 8), (), (9,))
    assert request.closed_choices == (2,)
    assert request.num_deaths == 1
    entry.next_attempt(60.0)
    assert (entry.attempt, entry.message(60.0).attempt) == (2, 2)


def test_tokens_that_are_still_needed() -> None:
    entry = submission(n=2)
    assert entry.outstanding_tokens == 20 + 3
    entry.deliver(output(1, 0, 7, 8))
    assert entry.outstanding_tokens == 18
    assert entry.num_known_tokens == 3 + 2
    entry.deliver(output(1, 2, 9, reason=FinishReason.LENGTH))
    assert entry.outstanding_tokens == 10
    assert entry.num_known_tokens == 3
    assert entry.is_waiting
    entry.abort()
    assert not entry.is_waiting


def test_a_token_clears_deaths_and_returns() -> None:
    entry = submission()
    entry.set_stage(RequestStage.QUEUED)
    assert entry.record_death() is None
    entry.next_attempt(0.0)
    assert entry.message(0.0).num_deaths == 1
    entry.num_returns = 2
    entry.set_stage(RequestStage.ALONE)
    entry.deliver(output(0, 0))
    assert (entry.num_deaths, entry.num_returns, entry.stage) == (1, 0, RequestStage.ALONE)
    entry.deliver(output(0, 0, 7))
    assert (entry.num_deaths, entry.stage) == (0, RequestStage.QUEUED)


def test_a_request_whose_solo_step_was_withdrawn_is_not_the_cause() -> None:
    entry = submission()
    entry.set_stage(RequestStage.ALONE)
    entry.set_stage(RequestStage.QUEUED)
    assert entry.record_death() is None


@pytest.mark.parametrize(
    ("stage", "num_deaths", "num_silent", "is_cause"),
    [
        (RequestStage.SENT, 1, 1, False),
        (RequestStage.QUEUED, 1, 0, False),
        (RequestStage.ALONE, 1, 0, True),
    ],
)
def test_a_death_counts_by_how_far_the_request_was(
    stage: RequestStage, num_deaths: int, num_silent: int, is_cause: bool
) -> None:
    entry = submission()
    if stage is not RequestStage.SENT:
        entry.set_stage(stage)
    assert (entry.record_death() is not None) is is_cause
    assert (entry.num_deaths, entry.num_unacknowledged_deaths) == (num_deaths, num_silent)


def test_a_worker_that_has_the_request_ends_the_count_of_silent_deaths() -> None:
    entry = submission()
    for number in range(1, MAX_TOTAL_UNACKNOWLEDGED_DEATHS):
        entry.last_worker = f"attention-{number}"
        assert entry.record_death() is None
        assert entry.must_be_sent_alone is (number >= MAX_UNACKNOWLEDGED_DEATHS)
        entry.next_attempt(0.0)
    entry.set_stage(RequestStage.QUEUED)
    assert not entry.must_be_sent_alone
    entry.next_attempt(0.0)
    for number in range(1, MAX_TOTAL_UNACKNOWLEDGED_DEATHS):
        entry.last_worker = f"attention-0.{number}"
        assert entry.record_death() is None
    entry.last_worker = "attention-1.5"
    assert entry.record_death() == "5 workers in a row were lost when they received it"


@pytest.mark.parametrize(
    ("reason", "code", "attempt", "is_back"),
    [
        (FinishReason.ABORT, "", 0, True),
        (FinishReason.STOP, "", 1, False),
        (FinishReason.ERROR, "queue_full", 0, False),
        (FinishReason.ERROR, "queue_full", 1, True),
        (FinishReason.ERROR, "internal", 1, False),
        (None, "", 1, False),
    ],
)
def test_what_a_worker_hands_back(
    reason: FinishReason | None, code: str, attempt: int, is_back: bool
) -> None:
    found = submission(attempt=attempt).is_handed_back(output(0, 0, reason=reason, code=code))
    assert found is is_back


@pytest.mark.parametrize(
    ("count", "index", "tokens"), [(0, 5, (7, 8)), (1, 6, (8,)), (2, 7, ()), (3, 7, ())]
)
def test_tokens_delivered_before_are_dropped(
    count: int, index: int, tokens: tuple[int, ...]
) -> None:
    found = without_first(output(0, 5, 7, 8), count)
    assert (found.index, found.token_ids) == (index, tokens)


class Stream:
    """Keeps what is aborted."""

    worker = "attention-1"

    def __init__(self) -> None:
        self.aborted: list[tuple[str, Sequence[int]]] = []

    def abort(self, request_id: str, choices: Sequence[int] = ()) -> None:
        self.aborted.append((request_id, choices))


def test_its_worker_is_the_current_one_or_the_last() -> None:
    entry = submission()
    assert entry.worker == ""
    entry.stream = Stream()
    assert entry.worker == "attention-1"
    assert not entry.is_waiting
    entry.stream, entry.last_worker = None, "attention-0"
    assert entry.worker == "attention-0"


def test_a_running_request_is_aborted_at_its_worker() -> None:
    entry, stream = submission(n=3), Stream()
    entry.stream = stream
    entry.abort((1,))
    assert stream.aborted == [("r", (1,))]
    assert entry.open_choices == {0, 1, 2}  # until the worker says so
    entry.stream = None
    entry.abort((1,))
    assert entry.open_choices == {0, 2}


def test_a_request_with_output_goes_on_where_it_ended() -> None:
    request = replace(
        submission(n=2).request, output_so_far=((7, 8), (9,)), closed_choices=(1,), attempt=2
    )
    entry = Submission(request, Sink(), 100.0)
    assert entry.open_choices == {0}
    assert entry.outputs == [[7, 8], [9]]
    assert entry.outstanding_tokens == 8


def test_a_worker_that_lives_after_all_takes_back_its_own_death_only() -> None:
    entry = submission()
    entry.last_worker = "attention-0"
    entry.set_stage(RequestStage.QUEUED)
    entry.record_death()
    entry.next_attempt(0.0)
    entry.last_worker = "attention-1"
    entry.record_death()
    entry.retract_death("attention-0")
    assert (entry.num_deaths, entry.num_unacknowledged_deaths) == (1, 1)
    entry.retract_death("attention-1")
    assert (entry.num_deaths, entry.num_unacknowledged_deaths) == (0, 0)
