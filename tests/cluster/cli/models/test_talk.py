"""``chat``, ``tokenize``, ``top``."""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
import time
from typing import Any

import pytest

from cluster.cli.cluster.top import make_document, parse_series
from cluster.cli.main import main
from cluster.cli.terminal import client
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.fake_gateway import STATUS, FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")

ATTENTION = 'model_name="demo",engine="0",worker="attention-0",node="here"'
EXPERT = 'model_name="demo",engine="",worker="expert-0",node="here"'


def exposition(rows: int, busy: int) -> str:
    """What Prometheus would read."""
    return f"""\
# TYPE expertmesh:expert_worker_tokens_total counter
expertmesh:num_requests_running{{{ATTENTION}}} 3.0
expertmesh:iteration_tokens_total_sum{{{ATTENTION}}} {rows}
expertmesh:num_requests_waiting{{{ATTENTION}}} 0.0
expertmesh:kv_cache_usage_perc{{{ATTENTION}}} 0.25
expertmesh:expert_worker_tokens_total{{{EXPERT}}} {rows}
expertmesh:expert_worker_busy_seconds_total{{{EXPERT}}} {busy}
"""


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": None}


def test_chat_says_one_thing(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.events = [delta("Good "), delta("day.", "stop"), {"choices": [], "usage": {"n": 1}}]
    words = ["chat", "Hello", "--system", "Be kind.", "--max-tokens", "5", "--seed", "1"]
    assert main(["--url", gateway.url, *words]) == ExitCode.OK
    assert capsys.readouterr().out == "Good day.\n"
    (body,) = gateway.bodies
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert (body["max_tokens"], body["seed"], body["stream"]) == (5, 1, True)


def test_chat_remembers(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.events = [delta("Yes.", "stop")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\nTwo?\n"))
    assert main(["--url", gateway.url, "chat", "--json"]) == ExitCode.OK
    said = json.loads(capsys.readouterr().out)["messages"]
    assert [m["content"] for m in said] == ["One?", "Yes.", "Two?", "Yes."]
    assert gateway.bodies[1]["messages"] == said[:3]


def test_a_prompt_that_takes_longer_than_other_calls_is_awaited(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "DEFAULT_TIMEOUT_S", 0.2)
    gateway.events = [delta("Late.", "stop")]
    gateway.before_answer = lambda: time.sleep(0.5)  # longer than the limit of other calls
    assert main(["--url", gateway.url, "chat", "Hello"]) == ExitCode.OK
    assert capsys.readouterr().out == "Late.\n"
    words = ["--url", gateway.url, "--timeout", "0.2", "chat", "Hello"]
    assert main(words) == ExitCode.NOT_READY
    assert "within 0.2 s (--timeout)" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if "sir." in self.getvalue():
                was_shown.set()
            return written

    def interrupt_first() -> None:
        if len(gateway.bodies) == 1:
            assert was_shown.wait(60)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            was_left.wait(1)  # a signal just before `recv` counts once more bytes arrive

    was_shown, was_left, screen = threading.Event(), threading.Event(), Screen()
    gateway.events = [delta("Yes, "), delta("sir.", "stop")]
    gateway.before_end = interrupt_first
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\nTwo?\n"))
    monkeypatch.setattr(sys, "stdout", screen)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # `serve` has its own
    try:
        assert main(["--url", gateway.url, "chat"]) == ExitCode.OK
    finally:
        was_left.set()
        signal.signal(signal.SIGINT, before)
    _, second = gateway.bodies
    assert [m["content"] for m in second["messages"]] == ["One?", "Yes, sir.", "Two?"]
    assert screen.getvalue() == "Yes, sir.\nYes, sir.\n"
    assert "(interrupted)" in capsys.readouterr().err


def test_on_a_terminal_a_failed_answer_leaves_the_conversation(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_first() -> None:
        is_first = len(gateway.bodies) == 1
        gateway.events = [{"error": {"message": "no room"}}] if is_first else [delta("A.", "stop")]

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    gateway.before_end = fail_first  # decides the answer to the next message
    gateway.events = [delta("Yes.", "stop")]
    monkeypatch.setattr(sys, "stdin", Terminal("One?\nTwo?\nThree?\n"))
    assert main(["--url", gateway.url, "chat"]) == ExitCode.OK
    assert "no room" in capsys.readouterr().err
    said = [m["content"] for m in gateway.bodies[2]["messages"]]
    assert said == ["One?", "Yes.", "Three?"]


def test_an_answer_without_an_end_is_an_error(gateway: FakeGateway) -> None:
    gateway.events = [delta("Good ")]
    assert main(["--url", gateway.url, "chat", "Hello"]) == ExitCode.FAILED


def test_an_error_in_the_stream_is_reported(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.events = [{"error": {"message": "no template", "code": "c"}}]
    assert main(["--url", gateway.url, "chat", "Hello"]) == ExitCode.FAILED
    assert "no template" in capsys.readouterr().err


def test_tokenize_there_and_back(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"count": 2, "max_model_len": 64, "tokens": [5, 60], "token_strs": ["To", " be"]}
    gateway.documents = {"/tokenize": found, "/detokenize": {"prompt": "To be"}}
    assert main(["--url", gateway.url, "tokenize", "To be"]) == ExitCode.OK
    shown = capsys.readouterr()
    assert shown.out == "ID  TOKEN\n5   'To'\n60  ' be'\n"
    assert "2 tokens" in shown.err
    assert main(["--url", gateway.url, "tokenize", "--ids", "5,60"]) == ExitCode.OK
    assert capsys.readouterr().out == "To be\n"
    assert main(["--url", gateway.url, "tokenize", "To be", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == {"schema": 1, **found}
    assert main(["--url", gateway.url, "tokenize"]) == ExitCode.USAGE


def test_top_shows_rates(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.metrics = [exposition(rows=10, busy=1)]
    words = ["--url", gateway.url, "top", "--interval", "0.01"]
    assert main([*words, "--once"]) == ExitCode.OK
    first, _, header, attention, expert = capsys.readouterr().out.splitlines()
    assert first == "SERVING: 0 tokens/s of prompts and answers"
    assert header.split()[:4] == ["NAME", "STATE", "NODE", "RUNNING"]
    assert attention.split() == ["attention-0", "SERVING", "here", "3", "0", "25%", "0", "-"]
    assert expert.split() == ["expert-0", "SERVING", "here", "-", "-", "-", "0", "0%"]
    assert main([*words, "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["workers"][0]["kv_usage"] == 0.25


@pytest.mark.parametrize("prefix", ["my_company:", "em2_", "vllm:"])
def test_top_reads_the_names_of_any_prefix(prefix: str) -> None:
    text = exposition(rows=10, busy=1)
    assert parse_series(text.replace("expertmesh:", prefix)) == parse_series(text)


def test_top_does_not_count_the_series_under_the_names_of_vllm() -> None:
    text = exposition(rows=10, busy=1)
    both = text + text.replace("expertmesh:", "vllm:")
    assert parse_series(both) == parse_series(text)
    assert parse_series(text)["kv_cache_usage_perc", "attention-0"] == 0.25


def test_rates_are_differences_over_time() -> None:
    before, now = (parse_series(exposition(rows=10 * n, busy=n)) for n in (1, 2))
    document = make_document(STATUS, before, now, 4.0)
    assert document["tokens_per_s"] == document["workers"][0]["rows_per_s"] == 2.5
    assert (document["workers"][1]["rows_per_s"], document["workers"][1]["busy"]) == (2.5, 0.25)
    restarted = make_document(STATUS, now, before, 4.0)
    assert restarted["tokens_per_s"] == 0.0
