"""A short, seeded run of ``tests.long.fuzz``: a gateway, a control server and a data plane."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.harness.mesh import make_connections
from cluster.actors.control_server import ControlServer
from cluster.core.frames import ControlFrame
from cluster.launch.model_source import bundled_checkpoint
from gateway.text.tokenizer import load_tokenizer
from tests.gateway.stack import Stack, complete
from tests.harness.served_stack import stack_over
from tests.long.fuzz import State, Tally, faults, fuzz, report
from tests.long.fuzz_inputs import BODIES, MESSAGES, Mutator
from tests.long.fuzz_surfaces import Address, Outcome, Target

NUM_INPUTS = 1000


class Silent:
    """No peer may get this far without the token."""

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        raise AssertionError(f"{worker} sent {frame} without the token")

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        raise AssertionError(f"{worker} was let in")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A gateway over the bundled model."""
    checkpoint = bundled_checkpoint()
    with stack_over(checkpoint, load_tokenizer(str(checkpoint))) as stack:
        yield stack


@pytest.fixture
def control(stack: Stack) -> Iterator[Address]:
    server = ControlServer("the right token", Silent())
    host, _, port = stack.run(server.start("127.0.0.1")).rpartition(":")
    yield host, int(port)
    stack.run(server.close())


@pytest.fixture
def data_plane() -> Iterator[Address]:
    connections = make_connections("expert", 0, token="the right token", connect_timeout_s=5.0)
    stop = threading.Event()

    def turn() -> None:
        while not stop.is_set():
            connections.poll(0.01)

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    host, _, port = connections.address.rpartition(":")
    yield host, int(port)
    assert thread.is_alive(), "an input has ended the loop"
    stop.set()
    thread.join()
    assert not connections.edges
    connections.close()


def test_spoilt_inputs_break_nothing(stack: Stack, control: Address, data_plane: Address) -> None:
    good = {"prompt": "ROMEO:", "max_tokens": 8, "temperature": 0}
    before = complete(stack, **good)["choices"]
    host, _, port = stack.url.removeprefix("http://").partition(":")
    grpc_host, _, grpc_port = stack.grpc_target.partition(":")
    target = Target(
        http=(host, int(port)),
        grpc=stack.grpc_target,
        sockets={
            "control": control,
            "data plane": data_plane,
            "gRPC": (grpc_host, int(grpc_port)),
        },
    )
    tally = fuzz(target, NUM_INPUTS, "tests", num_threads=4)
    assert not tally.examples, "\n".join(tally.examples)
    assert tally.num_inputs == NUM_INPUTS
    assert all(tally.counts["HTTP bodies"][o] > 10 for o in ("accepted", "refused"))
    assert all(tally.counts["gRPC messages"][o] > 10 for o in ("accepted", "refused"))
    assert [c["finish_reason"] for c in complete(stack, **good)["choices"]] == [
        c["finish_reason"] for c in before
    ]


def test_inputs_are_the_same_for_a_seed() -> None:
    def some(seed: str) -> list[bytes]:
        mutator = Mutator(seed)
        bodies = [mutator.body(path) for path in BODIES for _ in range(5)]
        return bodies + [mutator.message(method) for method in MESSAGES for _ in range(5)]

    assert some("a") == some("a")
    assert some("a") != some("b")


def test_the_report_names_what_is_wrong() -> None:
    outcomes: Counter[Outcome] = Counter({"accepted": 3, "refused": 5})
    counts = {"HTTP bodies": outcomes}
    tally = Tally(counts=counts, seconds=2.0)
    calm = State(answer=["a"], workers=["w"], rss_bytes=100, num_fds=10)
    text = report(tally, [calm, calm, calm])
    assert "| HTTP bodies | 8 | 3 | 5 | 0 | 0 | 0 |" in text
    assert "Nothing crashed" in text
    worse = State(answer=["b"], workers=["x"], rss_bytes=120, num_fds=90)
    counts["HTTP bodies"]["failed"] = 1
    tally.examples.append("HTTP bodies: failed: 500")
    found = faults(tally, [calm, calm, worse])
    assert len(found) == 5
    assert all(f"- {line}" in report(tally, [calm, calm, worse]) for line in found)
    assert tally.num_wrong == 1
