"""Structured output on a whole cluster: grammars are compiled beside the engine, not in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from benchmarks.harness.serving_cluster import (
    ThreadCluster,
    ThreadWorkerGroup,
    make_config,
    serving,
)
from benchmarks.harness.stalls import wait_until
from gateway.text.tokenizer import load_tokenizer
from tests.paths import DEMO
from workers.process.intake.grammar_compilations import GrammarCompilations
from workers.process.worker.worker import Worker
from workers.requests.request import FinishReason, Grammar, GrammarKind, Request, SamplingParams
from workers.sampling.grammar import CompiledGrammar

TOKENIZER = load_tokenizer(str(DEMO))
assert TOKENIZER is not None
PROMPT = TOKENIZER.encode("ROMEO:")
WAIT_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ThreadCluster]:
    """1 attention and 2 expert workers with the bundled model."""
    group = ThreadWorkerGroup(by_role={"attention": CompilingWorker})
    cluster = ThreadCluster(make_config(DEMO, dtype="float32"), group)
    with serving(cluster):
        yield cluster


def request(name: str, text: str | None, max_tokens: int = 40) -> Request:
    """A request that follows a regular expression, or none."""
    grammar = None if text is None else Grammar(kind=GrammarKind.REGEX, text=text)
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, grammar=grammar)
    return Request(request_id=name, prompt=PROMPT, params=params)


class SlowCompiler:
    """Compiles when the test lets it; its clock moves only when the test moves it."""

    def __init__(self, usual: Callable[[Grammar, str], CompiledGrammar]) -> None:
        self._compile = usual
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.now = 0.0

    def compile(self, grammar: Grammar, owner: str) -> CompiledGrammar:
        """See ``GrammarCompiler``."""
        if grammar.text.startswith("slow"):
            self.begun.set()
            assert self.may_end.wait(WAIT_S)
        return self._compile(grammar, owner)


class CompilingWorker(Worker):
    """Its compiler can be slow for a time."""

    @contextmanager
    def slowed(self) -> Iterator[SlowCompiler]:
        assert self.roles.attention is not None
        intake = self.roles.attention.intake
        usual, slow = intake.compilations, SlowCompiler(intake.compilations._compile)
        intake.compilations = GrammarCompilations(
            slow.compile, self._interrupts.wake, clock=lambda: slow.now
        )
        yield slow
        slow.may_end.set()
        intake.compilations = usual


@pytest.fixture
def slow(cluster: ThreadCluster) -> Iterator[SlowCompiler]:
    """The worker's compilations with a compiler that is slow for some."""
    worker = cluster.group.workers["attention-0"]
    assert isinstance(worker, CompilingWorker)
    with worker.slowed() as slow:
        yield slow


def test_streams_go_on_while_a_grammar_is_compiled(
    cluster: ThreadCluster, slow: SlowCompiler
) -> None:
    stream = cluster.stream()
    stream.send(request("hostile", "slow"))
    assert slow.begun.wait(WAIT_S)
    reason = 'num_requests_waiting_by_reason{reason="grammar"}'
    snapshot = cluster.wait(lambda s: s["workers"][0]["stats"].get(reason) == 1, fresh=True)
    assert snapshot["workers"][0]["stats"]["num_requests_waiting"] == 1
    result = stream.finish([request("free", None), request("other", "[a-z]{3}")])
    assert result["free"].reasons == [FinishReason.LENGTH]
    assert result["other"].reasons == [FinishReason.STOP]
    stream.close()


def test_a_request_uses_its_adapter_while_its_grammar_is_compiled(
    cluster: ThreadCluster, slow: SlowCompiler, tmp_path: Path
) -> None:
    folder = random_adapter(target_shapes(DEMO)).write(tmp_path / "sql")
    key = cluster.call("begin", "load_adapter", {"name": "sql", "path": str(folder)})["key"]
    role = cluster.group.attention("attention-0")
    stream = cluster.stream()
    adapted = replace(request("adapted", "slow and adapted"), adapter=key)
    stream.send(adapted)
    assert slow.begun.wait(WAIT_S)
    wait_until(lambda: role.adapters_in_use() == (key,), "the request is counted")
    slow.may_end.set()
    assert stream.collect([adapted])["adapted"].reasons == [FinishReason.STOP]
    stream.close()
    wait_until(lambda: role.adapters_in_use() == (), "the end of the request")
    assert cluster.call("begin", "unload_adapter", {"name": "sql"}) == {"key": key}


def test_a_grammar_over_its_time_is_refused_by_name(
    cluster: ThreadCluster, slow: SlowCompiler
) -> None:
    stream = cluster.stream()
    stream.send(request("hostile", "slow and hostile"))
    assert slow.begun.wait(WAIT_S)
    slow.now += 2.0
    refused = stream.next()
    while refused.request_id != "hostile":
        refused = stream.next()
    assert refused.finish_reason is FinishReason.ERROR
    assert refused.error_code == "invalid_value"
    assert refused.error_param == "structured_outputs"
    assert "was not compiled within 2 s" in (refused.error or "")
    result = stream.finish([request("next", "[a-z]{3}")])
    assert result["next"].reasons == [FinishReason.STOP]
    stream.close()


def test_a_request_that_is_given_up_while_it_waits_never_runs(
    cluster: ThreadCluster, slow: SlowCompiler
) -> None:
    stream = cluster.stream()
    stream.send(request("gone", "slow?"))
    assert slow.begun.wait(WAIT_S)
    stream.abort("gone")
    stream.finish([request("first", None, 3)])  # the abort is through
    slow.may_end.set()
    result = stream.finish([request("second", "slow|quick")])
    assert result["second"].reasons == [FinishReason.STOP]
    left = [o for r in result.values() for o in r.outputs if o.request_id == "gone"]
    assert left == []
    assert cluster.blocks_in_use() == 0
    stream.close()


def test_an_older_attempt_that_comes_late_does_not_end_the_newer_one(
    cluster: ThreadCluster, slow: SlowCompiler
) -> None:
    stream = cluster.stream()
    newer = replace(request("again", "slow|again"), attempt=2)
    stream.send(newer)
    assert slow.begun.wait(WAIT_S)
    stream.send(replace(newer, attempt=1))
    refused = stream.next()
    assert (refused.attempt, refused.finish_reason) == (1, FinishReason.ERROR)
    assert refused.error == "the worker already has attempt 2 of request again"
    slow.may_end.set()
    assert stream.collect([newer])["again"].reasons == [FinishReason.STOP]
    stream.close()


def test_every_choice_follows_the_grammar(cluster: ThreadCluster) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["n"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    params = SamplingParams(max_tokens=200, seed=2, temperature=1.2, grammar=grammar)
    wanted = Request(request_id="r", prompt=PROMPT, params=params, n=3)
    stream = cluster.stream()
    result = stream.finish([wanted])["r"]
    assert result.reasons == [FinishReason.STOP] * 3
    assert TOKENIZER is not None
    for tokens in result.tokens:
        assert isinstance(json.loads(TOKENIZER.decode(tokens))["n"], int)
    stream.close()


@pytest.mark.parametrize("text", ["(unclosed", r"[^\s\S]"])
def test_a_wrong_grammar_is_refused_by_every_choice(cluster: ThreadCluster, text: str) -> None:
    stream = cluster.stream()
    result = stream.finish([request("r", text)])["r"]
    assert result.reasons == [FinishReason.ERROR]
    assert result.outputs[0].error_param == "structured_outputs"
    stream.close()
