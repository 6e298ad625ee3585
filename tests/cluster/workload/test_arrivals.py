"""When requests are sent, and what they hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cluster.cli.bench.workload import Workload
from cluster.workload.arrivals import Arrival, poisson, read_trace

MOONCAKE = """\
{"timestamp": 3000, "input_length": 1500, "output_length": 20, "hash_ids": [7, 8, 9]}

{"timestamp": 1000, "input_length": 600, "output_length": 4, "hash_ids": [7, 5]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9000000,374,44
2023-11-17 00:00:00.1500000,396,0
"""


def trace(folder: Path, text: str, name: str = "trace.jsonl") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_gaps_have_the_rate_as_their_mean() -> None:
    found = poisson(5000, 50.0, 4, 1, seed=1)
    assert found[0].due_s == 0.0
    assert found[-1].due_s / len(found) == pytest.approx(1 / 50, rel=0.1)
    assert found == poisson(5000, 50.0, 4, 1, seed=1) != poisson(5000, 50.0, 4, 1, seed=2)
    assert {a.due_s for a in poisson(9, math.inf, 4, 1, seed=1)} == {0.0}


def test_a_trace_of_mooncake(tmp_path: Path) -> None:
    first, second = read_trace(trace(tmp_path, MOONCAKE), None)
    assert (first.due_s, first.input_len, first.output_len) == (0.0, 600, 4)
    assert (second.due_s, second.input_len, second.output_len) == (2.0, 1500, 20)
    assert first.prompt(100, "a")[:512] == second.prompt(100, "b")[:512]
    assert first.prompt(100, "a")[512:] != second.prompt(100, "b")[512:600]
    assert len(second.prompt(100, "b")) == 1500


def test_a_trace_of_azure(tmp_path: Path) -> None:
    first, second = read_trace(trace(tmp_path, AZURE, "trace.csv"), None)
    assert (first.due_s, first.input_len, first.output_len) == (0.0, 374, 44)
    assert second.due_s == pytest.approx(0.25, abs=1e-5)
    assert second.output_len == 1


def test_a_trace_of_azure_with_a_time_zone(tmp_path: Path) -> None:
    """As the traces of 2024 have it."""
    rows = ("2024-05-10 00:00:00.009930+00:00,20,3", "2024-05-10 00:00:01+00:00,21,4")
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows)
    _, second = read_trace(trace(tmp_path, text, "trace.csv"), None)
    assert second.due_s == pytest.approx(0.99007)


@pytest.mark.parametrize(
    "row",
    [
        *("20,3", "20,x,2024-05-10", "20,3,never"),
        *("0,3,2024-05-10", "20,-3,2024-05-10", "20,10000000000,2024-05-10"),
    ],
)
def test_a_bad_row_of_azure(tmp_path: Path, row: str) -> None:
    text = f"ContextTokens,GeneratedTokens,TIMESTAMP\n{row}"
    with pytest.raises(ValueError, match="request 1: "):
        read_trace(trace(tmp_path, text, "trace.csv"), None)


def test_a_trace_is_faster_and_shorter(tmp_path: Path) -> None:
    path = trace(tmp_path, MOONCAKE)
    assert len(read_trace(path, 1)) == 1
    first, second = read_trace(path, None, speed=4.0, length=0.1)
    assert (second.due_s, second.input_len, second.output_len) == (0.5, 150, 2)
    assert first.output_len == 1
    assert first.prompt(100, "a")[:51] == second.prompt(100, "b")[:51]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no request"),
        ('{"timestamp": 0, "input_length": 5}', "request 1: 'output_length' is missing"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "input_length .0. must be"),
        ("[]", "request 1"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1}', "timestamp must be"),
        ('{"timestamp": 0, "input_length": true, "output_length": 1}', "whole number"),
        ('{"timestamp": 0, "input_length": 2.9, "output_length": 1}', "whole number"),
        ('{"timestamp": 0, "input_length": 10000000000, "output_length": 1}', "whole number"),
        ("rubbish", "request 1: Expecting value"),
        (f'{{"timestamp": 1{"0" * 400}, "input_length": 5, "output_length": 1}}', "request 1: int"),
    ],
)
def test_a_bad_trace(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_trace(trace(tmp_path, text), None)


def test_a_trace_of_azure_with_a_quote_that_does_not_end(tmp_path: Path) -> None:
    text = AZURE + '2023-11-17 00:00:01,"5,1\n' + "2023-11-17 00:00:02,5,1\n" * 10_000
    with pytest.raises(ValueError, match="request 3: field larger than field limit"):
        read_trace(trace(tmp_path, text, "trace.csv"), None)


def test_parts_of_a_load_are_the_load() -> None:
    arrivals = [Arrival(2.0 * n, 5, 1) for n in range(5)]
    load = Workload(arrivals=arrivals, max_concurrency=None, vocab_size=1000, seed=1, timeout_s=1.0)
    parts = load.parts(2)
    assert [[a.due_s for a in part.arrivals] for part in parts] == [[0.0, 2.0, 4.0], [0.0, 2.0]]
    prompts = [part.prompt(n) for part in parts for n in range(len(part.arrivals))]
    assert prompts == [load.prompt(n) for n in range(5)]
    assert load.warm_up_prompt() not in prompts
    assert load.prompt(0) == load.prompt(0) != load.prompt(1)
    assert max(load.prompt(0)) < 1000
