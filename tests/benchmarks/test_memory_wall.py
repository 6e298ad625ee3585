"""The memory wall: its bounds worked out by hand, its table, and that every row runs."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.harness.prompts import random_prompts
from benchmarks.memory_wall import engine as wall_engine
from benchmarks.memory_wall import quantized as wall_quantized
from benchmarks.memory_wall import table as memory_wall
from benchmarks.memory_wall import workers as wall_workers
from benchmarks.memory_wall.bounds import (
    decode_bound,
    file_rate,
    forget_files,
    matrix_rate,
    prefill_flops,
    read_bandwidth,
    step_weight_bytes,
    two_worker_cap,
)
from benchmarks.memory_wall.engine import timed_kernels
from benchmarks.memory_wall.rows import Bench, Row, at_least, at_most, report
from workers.quantization.rounding import FORMATS

MODEL = RandomModel(
    hidden=64, layers=2, heads=4, experts=4, top_k=2, ffn=32, vocab=1000, max_positions=64
)


def test_a_step_reads_everything_but_the_embedding_and_the_unused_experts() -> None:
    attention, norms, router, head = 4 * 64 * 64, 4 * 64, 4 * 64, 1000 * 64
    layer, expert = attention + norms + router, 3 * 64 * 32
    rest = 2 * layer + head + 64
    assert step_weight_bytes(MODEL, 1, 2) == 2 * (rest + 2 * 2 * expert)
    assert step_weight_bytes(MODEL, 2, 4) == 4 * (rest + 2 * 3 * expert)  # 1 - (1 - 1/2) ** 2 of 4


def test_decoding_is_bound_by_the_bytes_of_a_step() -> None:
    assert decode_bound(MODEL, 2, 3 * step_weight_bytes(MODEL, 2, 4), itemsize=4) == 2 * 3


def test_codes_are_read_with_their_scales() -> None:
    """int4 in groups of 32 with scales and zero points: 4.75 bits, of half of the experts."""
    attention, norms, router, head = 4 * 64 * 64, 4 * 64, 4 * 64, 1000 * 64
    kept, experts = 2 * (norms + router) + 64, 2 * 2 * 3 * 64 * 32
    found = step_weight_bytes(MODEL, 1, 2, FORMATS["int4"])
    assert found == 2 * (kept + 2 * attention + head) + experts * 19 / 32
    found = step_weight_bytes(MODEL, 1, 2, FORMATS["int4"], "all")
    assert found == 2 * kept + (2 * attention + head + experts) * 19 / 32
    assert decode_bound(MODEL, 1, 3 * found, form=FORMATS["int4"], layers="all") == 3


def test_products_that_are_no_experts_are_read_in_groups_that_fill_their_rows() -> None:
    """Groups of 24 take 5 bits, those of experts of the same width 4.75."""
    model = replace(MODEL, hidden=96, ffn=96)
    kept, experts = 2 * (4 * 96 + 4 * 96) + 96, 2 * 2 * 3 * 96 * 96
    products = 2 * 4 * 96 * 96 + 1000 * 96
    found = step_weight_bytes(model, 1, 2, FORMATS["int4"], "all")
    assert found == 2 * kept + products * 5 / 8 + experts * 19 / 32


def test_a_prompt_takes_its_products_and_its_pairs_of_positions() -> None:
    """Of a prompt of three tokens, six pairs of a query and a key count."""
    products = 4 * 64 * 64 + 4 * 64 + 2 * 3 * 64 * 32
    layer = 3 * products + 6 * 2 * 64
    assert prefill_flops(MODEL, 3) == 2 * (2 * layer + 1000 * 64)


@pytest.mark.parametrize(
    ("attention", "experts", "cap"), [(1.0, 1.0, 1.0), (3.0, 1.0, 2 / 3), (0.0, 5.0, 0.5)]
)
def test_the_longer_part_of_a_step_sets_the_pace(
    attention: float, experts: float, cap: float
) -> None:
    assert two_worker_cap(attention, experts) == pytest.approx(cap)
    assert two_worker_cap(experts, attention) == pytest.approx(cap)


def test_machines_have_rates_and_torch_keeps_its_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert read_bandwidth(2, num_bytes=1 << 22) > 0
    assert matrix_rate(2, width=64) > 0
    assert torch.get_num_threads() == before
    file = tmp_path / "weights"
    file.write_bytes(bytes(100_000))
    forget_files([file])
    assert file_rate([file, file]) > 0
    assert file.read_bytes() == bytes(100_000)


def test_prompts_are_the_same_for_the_same_seed() -> None:
    found = random_prompts("a", 2, 3, limit=6)
    assert found == random_prompts("a", 2, 3, limit=6) != random_prompts("b", 2, 3, limit=6)
    assert [len(prompt) for prompt in found] == [3, 3]
    assert {token for prompt in found for token in prompt} <= {4, 5}


def test_ratios_are_of_numbers_of_the_same_repeat() -> None:
    row = Row(
        what="decode",
        unit="tokens/s",
        measured=[10.0, 80.0, 3000.0],
        bound=[20.0, 100.0, 1000.0],
        asked=at_least(0.8, 0.9),
    )
    assert row.ratio == 0.8  # of 0.5, 0.8 and 3
    assert report([row]).splitlines()[-1] == (
        "| decode, tokens/s | 80 | 100 | 0.80 | >= 0.8, aim 0.9 |"
    )
    assert at_most(1, 60 / 150) == "<= 1, aim 0.4"
    assert at_least(0.7) == ">= 0.7"


def test_time_in_kernels_is_counted_and_the_library_is_restored() -> None:
    library = ctypes.CDLL(None)
    usleep = library.usleep
    with timed_kernels(library) as seconds:
        library.usleep(20_000)
        assert 0.02 <= seconds() < 20
    assert library.usleep is usleep


def test_the_whole_model_is_measured_only_by_name() -> None:
    assert "whole" not in memory_wall.make_parser().parse_args([]).rows
    assert memory_wall.make_parser().parse_args(["--rows", "whole,step"]).rows == ("whole", "step")
    with pytest.raises(SystemExit):
        memory_wall.make_parser().parse_args(["--rows", "nothing"])


def test_a_checkpoint_is_written_once(tmp_path: Path) -> None:
    bench = Bench(folder=tmp_path, repeats=1, cores=1, is_tiny=True)
    path = bench.checkpoint(TINY)
    written = (path / "config.json").stat().st_mtime_ns
    assert bench.checkpoint(TINY) == path
    assert (path / "config.json").stat().st_mtime_ns == written


def _rows(capsys: pytest.CaptureFixture[str], names: Sequence[str]) -> list[list[str]]:
    before = os.sched_getaffinity(0), torch.get_num_threads()
    assert memory_wall.main(["--tiny", "--repeats", "1", "--rows", ",".join(names)]) == 0
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]
    for row in rows:
        assert len(row) == 5, row
        assert all(math.isfinite(float(cell.replace(",", ""))) for cell in row[1:4]), row
    return rows


def test_the_rows_of_one_process_run(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, tuple(wall_engine.ROWS))
    assert len(rows) == 3 + 2 + 1 + 2 + 2
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


@pytest.mark.slow
def test_the_rows_of_weights_in_codes_run(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, tuple(wall_quantized.ROWS))
    assert len(rows) == 2 * len(wall_quantized.KINDS) + 2 * len(wall_quantized.STORED)
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)


@pytest.mark.ray
@pytest.mark.slow
def test_the_rows_of_several_processes_run(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(capsys, tuple(wall_workers.ROWS))
    assert len(rows) == 3 + 2 + 3 + 1
    assert all(float(row[1].replace(",", "")) > 0 for row in rows)
