"""``bench serve`` on a gateway with a scripted engine, over HTTP and gRPC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.fake_gateway import STATUS, FakeGateway
from tests.gateway.fakes import MAX_MODEL_LEN, VOCAB_SIZE, counting_script
from tests.gateway.stack import Stack, running_stack
from tests.harness.certificates import Certificates
from workers.requests.request import Request

pytestmark = [pytest.mark.usefixtures("state_home"), pytest.mark.heavy]

SMALL = ["--num-prompts", "5", "--random-input-len", "7", "--random-output-len", "4"]


@pytest.fixture(scope="module")
def shared_stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


@pytest.fixture
def stack(shared_stack: Stack) -> Iterator[Stack]:
    """The gateway with its engine as new, and nothing running after the test."""
    with shared_stack.as_new():
        yield shared_stack


def words(stack: Stack, protocol: str, *more: str) -> list[str]:
    over = [] if protocol == "http" else ["--grpc", stack.grpc_target]
    return ["--url", stack.url, "bench", "serve", *SMALL, *over, *more]


def measured(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, "bench serve")
    return document


def after_warm_up(stack: Stack, number: int, act: Any) -> None:
    """Let something happen when a request reaches the engine; the warm-up is number 0."""

    def script(request: Request, choice: int) -> list[int]:
        if len(stack.engine.requests) == 1 + number:
            act()
        return counting_script(request, choice)

    stack.engine.script = script


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_counts_are_exact(stack: Stack, capsys: pytest.CaptureFixture[str], protocol: str) -> None:
    asked = words(stack, protocol, "--max-concurrency", "2", "--goodput", "ttft:1e9", "itl:1e9")
    assert main([*asked, "--json"]) == ExitCode.OK
    document = measured(capsys)
    results = document["results"]
    assert (document["options"]["protocol"], document["interrupted"]) == (protocol, False)
    assert document["options"]["request_rate"] is None
    assert (results["successful"], results["failed"], results["unfinished"]) == (5, 0, 0)
    assert (results["prompt_tokens"], results["output_tokens"]) == (5 * 7, 5 * 4)
    assert results["peak_concurrency"] == 2
    assert results["good_requests_per_s"] == results["requests_per_s"] > 0
    assert all(results[f"{name}_ms"]["p99"] > 0 for name in ("ttft", "tpot", "itl", "e2e"))
    sent = stack.engine.requests
    assert len(sent) == 6
    assert all(len(r.prompt) == 7 and max(r.prompt) < VOCAB_SIZE for r in sent)
    assert all(r.params.ignore_eos and r.params.max_tokens == 4 for r in sent)
    assert len({r.prompt for r in sent}) == 6


def test_a_seed_draws_the_same_prompts_over_both(stack: Stack) -> None:
    """Nothing of a run is found in the prefix cache by the next one."""
    drawn: list[set[tuple[int, ...]]] = []
    salts: list[str] = []
    for protocol, seed in (("http", "3"), ("grpc", "3"), ("http", "4")):
        stack.engine.requests.clear()
        assert main(words(stack, protocol, "--seed", seed, "--json")) == ExitCode.OK
        drawn.append({r.prompt for r in stack.engine.requests})
        salts += {r.cache_salt for r in stack.engine.requests}
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(salts) == len(set(salts)) == 3


def test_a_table_and_a_file(
    stack: Stack, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    asked = words(stack, "http", "--request-rate", "1000", "--save", str(path))
    assert main(asked) == ExitCode.OK
    shown = capsys.readouterr()
    assert shown.out.startswith("Successful requests:  5\nFailed requests:      0\nDuration (s): ")
    assert "\nMILLISECONDS  MEAN" in shown.out
    assert f"wrote {path}" in shown.err
    assert json.loads(path.read_text())["options"]["request_rate"] == 1000
    compare = ["bench", "compare", str(path), str(path)]
    assert main(compare) == ExitCode.OK
    stack.engine.requests.clear()
    assert main([*asked[:-1], str(tmp_path / "none" / "a.json")]) == ExitCode.USAGE
    assert stack.engine.requests == [], "before the load, not after it"


def test_the_arrivals_of_a_trace(
    stack: Stack, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 10 * n, "input_length": 20 + n, "output_length": 2} for n in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = ["--url", stack.url, "bench", "serve", "--trace", str(path), "--json"]
    assert main([*asked, "--num-prompts", "3", "--trace-length", "0.5"]) == ExitCode.OK
    document = measured(capsys)
    assert document["options"]["trace"] == "trace.jsonl"
    assert document["results"]["prompt_tokens"] == 10 + 10 + 11
    assert document["results"]["output_tokens"] == 3
    assert main([*asked, "--request-rate", "5"]) == ExitCode.USAGE
    path.write_text("rubbish")
    assert main(asked) == ExitCode.USAGE
    assert "request 1: Expecting value" in capsys.readouterr().err


def test_two_servers_under_the_same_load(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    with running_stack() as other:
        asked = ["bench", "compare", stack.url, other.url, *SMALL, "--threshold", "1000"]
        assert main([*asked, "--json"]) == ExitCode.OK
        assert [len(s.engine.requests) for s in (stack, other)] == [6, 6]
        prompts = [[r.prompt for r in s.engine.requests] for s in (stack, other)]
    assert set(prompts[0]) == set(prompts[1])
    document = json.loads(capsys.readouterr().out)
    assert document["numbers"]["successful"] == {
        "before": 5.0,
        "after": 5.0,
        "ratio": 1.0,
        "better": "higher",
        "worse": False,
    }


def test_a_server_of_another_kind(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    """Its vocabulary must be given."""
    gateway.status = (404, {"error": {"message": "Not Found"}})
    choice = {"text": "x", "finish_reason": "length"}
    gateway.events = [{"choices": [choice], "usage": {"completion_tokens": 1}}]
    asked = ["bench", "compare", gateway.url, gateway.url, "--num-prompts", "1"]
    assert main(asked) == ExitCode.REFUSED
    assert "give --vocab-size" in capsys.readouterr().err
    assert main([*asked, "--vocab-size", "9", "--threshold", "1000"]) == ExitCode.OK


@pytest.mark.parametrize("given", [[], ["--b-api-key", "other"]])
def test_a_server_gets_its_own_key_only(gateway: FakeGateway, given: list[str]) -> None:
    gateway.status = (200, {**STATUS, "model": {"vocab_size": 9}})
    choice = {"text": "x", "finish_reason": "length"}
    gateway.events = [{"choices": [choice], "usage": {"completion_tokens": 1}}]
    asked = ["bench", "compare", gateway.url, gateway.url, "--num-prompts", "1"]
    assert main(["--api-key", "k", *asked, *given, "--threshold", "1000"]) == ExitCode.OK
    assert gateway.keys == ["Bearer k", "Bearer other" if given else None]


def test_a_file_and_a_server(tmp_path: Path) -> None:
    words = ["bench", "compare", str(tmp_path / "a.json"), "http://127.0.0.1:1"]
    assert main(words) == ExitCode.USAGE


@pytest.mark.parametrize(("protocol", "code"), [("http", "internal_error"), ("grpc", "INTERNAL")])
def test_failures_are_counted_by_code(
    stack: Stack, capsys: pytest.CaptureFixture[str], protocol: str, code: str
) -> None:
    engine = stack.engine
    after_warm_up(stack, 3, lambda: setattr(engine, "error", ("broken", "internal_error")))
    asked = words(stack, protocol, "--max-concurrency", "1", "--json")
    assert main(asked) == ExitCode.FAILED
    results = measured(capsys)["results"]
    assert (results["successful"], results["failed"]) == (2, 3)
    ((found, number),) = results["failures"].items()
    assert found.endswith(code)
    assert number == 3


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_request_has_a_limit(
    stack: Stack, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    after_warm_up(stack, 1, lambda: setattr(stack.engine, "is_paused", True))
    assert main(words(stack, protocol, "--timeout", "1", "--json")) == ExitCode.FAILED
    results = measured(capsys)["results"]
    assert results["failures"] == {"timeout": 5}
    assert set(results["ttft_ms"].values()) == {None}
    stack.wait_for(lambda: not stack.engine.running, "the end of what nobody waits for")


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """As on a terminal, also where this process was started to ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_prints_the_results_so_far(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        stack.engine.is_paused = True
        os.kill(os.getpid(), signal.SIGINT)

    after_warm_up(stack, 3, interrupt)
    asked = words(stack, "http", "--max-concurrency", "1", "--json")
    assert main(asked) == ExitCode.INTERRUPTED
    document = measured(capsys)
    assert document["interrupted"] is True
    results = document["results"]
    assert (results["successful"], results["failed"], results["unfinished"]) == (2, 0, 1)
    stack.wait_for(lambda: bool(stack.engine.aborts), "the end of the request that was cut")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_the_server_refuses_ends_it(
    stack: Stack, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    asked = words(stack, protocol, "--random-output-len", str(MAX_MODEL_LEN))
    assert main(asked) == ExitCode.REFUSED
    assert main(words(stack, protocol, "--model", "another")) == ExitCode.REFUSED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert str(MAX_MODEL_LEN) in shown.err
    assert stack.engine.requests == []


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--url", "http://127.0.0.1:1", "bench", "serve"]
    assert main(nowhere) == ExitCode.UNREACHABLE
    assert main([*nowhere, "--grpc", "127.0.0.1:1"]) == ExitCode.UNREACHABLE
    assert capsys.readouterr().out == ""


def test_a_server_that_reports_too_little(gateway: FakeGateway) -> None:
    asked = ["--url", gateway.url, "bench", "serve"]
    assert main(asked) == ExitCode.NOT_READY
    assert main([*asked, "--grpc"]) == ExitCode.REFUSED


def test_keys_and_tls_and_the_address_that_the_server_tells(tmp_path: Path) -> None:
    files = Certificates.make(tmp_path)
    section = files.section(mutual=True, api_keys=("k",))
    with running_stack(section) as stack:
        stack.gateway.status.addresses = {"grpc": stack.grpc_target}
        asked = ["--url", stack.url, "bench", "serve", *SMALL]
        tls = ["--ca-cert", str(files.server_ca), "--client-cert", str(files.client_cert)]
        tls += ["--client-key", str(files.client_key)]
        assert main([*asked, *tls, "--api-key", "k", "--grpc"]) == ExitCode.OK
        assert main([*asked, *tls, "--api-key", "k"]) == ExitCode.OK
        for protocol in (["--grpc", stack.grpc_target], []):
            assert main([*asked, *tls, *protocol, "--api-key", "x"]) == ExitCode.UNAUTHORISED
        assert main([*asked, "--api-key", "k", "--grpc"]) == ExitCode.UNREACHABLE
        assert len(stack.engine.requests) == 2 * 6


def test_a_stream_that_is_cut(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.status = (200, {**STATUS, "model": {"vocab_size": 9}})
    gateway.events = [{"choices": [{"text": "x", "finish_reason": None}], "usage": None}]
    assert main(["--url", gateway.url, "--api-key", "k", "bench", "serve"]) == ExitCode.FAILED
    assert "before the text was finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"error": "the model is overloaded"}, "the model is overloaded"),
        ({"error": {"type": "x", "code": "y", "message": "no"}}, "no"),
        ({"choices": None}, "the response ended before it was complete"),
    ],
)
def test_an_event_of_a_server_of_another_kind(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], event: dict[str, Any], message: str
) -> None:
    gateway.events = [event]
    words = ["--url", gateway.url, "bench", "serve", "--vocab-size", "9"]
    assert main(words) == ExitCode.FAILED
    assert capsys.readouterr().err == f"expertmesh: {message}\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--num-prompts", "0"],
        ["--request-rate", "0"],
        ["--trace-speed", "0"],
        ["--goodput", "ttft"],
        ["--goodput", "speed:1"],
        ["--random-input-len", "x"],
    ],
)
def test_wrong_usage(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *wrong])
    assert caught.value.code == ExitCode.USAGE


def test_neither_torch_nor_ray_is_imported() -> None:
    code = (
        "import sys; from cluster.cli.main import make_parser\n"
        "import cluster.cli.bench.grpc_target\n"
        "make_parser().parse_args(['bench', 'serve', '--grpc'])\n"
        "print([m for m in ('ray', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
