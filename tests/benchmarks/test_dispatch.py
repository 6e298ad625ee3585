"""The dispatch benchmark: its summary of steps, and small exchanges between real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.engine import dispatch
from benchmarks.engine.dispatch import Plan, Sizes, main
from benchmarks.engine.idle_ranks import Shape
from benchmarks.harness.distributed import RankError

HIDDEN, TOP_K, EXPERTS = 16, 2, 4
SMALL = ["--hidden", str(HIDDEN), "--top-k", str(TOP_K), "--num-experts", str(EXPERTS)]
ROW_OUT = 2 * HIDDEN + 2 * 4 * TOP_K
"""Bytes: bfloat16, and slots and weights of its experts."""
ROW_BACK = 4 * HIDDEN
"""Bytes: a partial sum in float32."""


def plan(**fields: Any) -> Plan:
    shape = Shape(
        attention_ranks=1,
        expert_ranks=1,
        width=HIDDEN,
        num_experts=EXPERTS,
        top_k=TOP_K,
        max_rows=5,
    )
    default: dict[str, Any] = {"tokens": (3, 5), "repeats": 6, "is_prefill": False, "seed": 0}
    return Plan(shape=shape, **{**default, **fields})


def test_steps_have_numbers_of_their_own() -> None:
    steps = [plan().steps(run) for run in (0, 1, 2)]
    assert steps == [range(1, 9), range(9, 17), range(17, 25)]


def test_ranks_are_put_together() -> None:
    attention = [
        Sizes([{"wire": [5.0, 6.0], "dispatch": [1.0, 2.0], "combine": [10.0, 20.0]}], [], []),
        Sizes([{"wire": [7.0, 8.0], "dispatch": [3.0, 4.0], "combine": [30.0, 40.0]}], [], []),
    ]
    experts = [Sizes([], [[2.0, 3.0]], [{"dispatch": 100.0, "combine": 7.0}])] * 2
    assert dispatch.of_size(0, attention, experts) == {
        "wire_us": {"mean": 6.5, "median": 6.5, "p10": 5.0, "p99": 8.0},
        "dispatch_us": {"mean": 2.5, "median": 2.5, "p10": 1.0, "p99": 4.0},
        "combine_us": {"mean": 25.0, "median": 25.0, "p10": 10.0, "p99": 40.0},
        "exchange_us": {"mean": 27.5, "median": 27.5, "p10": 11.0, "p99": 44.0},
        "experts_us": {"mean": 2.5, "median": 2.5, "p10": 2.0, "p99": 3.0},
        "dispatch_bytes": 200.0,
        "combine_bytes": 14.0,
    }


@pytest.mark.parametrize(
    "wrong",
    [["--top-k", "5"], ["--num-expert-workers", "5"], ["--top-k", "3", "--num-experts", "2"]],
)
def test_wrong_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, *wrong])
    assert ended.value.code == 2
    assert "is at most --num-experts" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("attention", "experts", "transport"), [(1, 1, "sockets"), (2, 2, "collective")]
)
def test_bytes_of_decode_rows(
    attention: int, experts: int, transport: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = ["--num-attention-workers", str(attention), "--num-expert-workers", str(experts)]
    more = ["--tokens", "3,5", "--repeats", "6", "--transport", transport, "--json"]
    assert main([*SMALL, *workers, *more]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, "benchmarks.dispatch")
    assert document["options"]["transport"] == transport
    for tokens, found in document["results"]["tokens"].items():
        rows = int(tokens) * attention * experts
        assert found["dispatch_bytes"] == rows * ROW_OUT
        assert found["combine_bytes"] == rows * ROW_BACK
        assert found["exchange_us"]["median"] > 0
        assert found["wire_us"]["median"] > 0
    assert set(document["results"]["tokens"]) == {"3", "5"}


@pytest.mark.slow
@pytest.mark.distributed
def test_prompt_rows_go_where_they_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """One expert a row: each row goes to one of both workers."""
    words = [*SMALL, "--top-k", "1", "--tokens", "8", "--repeats", "2", "--prefill"]
    assert main(words) == 0
    shown = capsys.readouterr()
    header, row = shown.out.splitlines()
    assert header.split()[-4:] == ["BYTES", "OUT", "BYTES", "BACK"]
    assert row.split()[-1] == str(8 * ROW_BACK)
    assert "1 + 2 processes" in shown.err


@pytest.mark.distributed
def test_ranks_that_take_too_long() -> None:
    with pytest.raises(RankError, match=r"did not finish in 0\.01 s"):
        dispatch.measure(plan(), deadline_s=0.01)
