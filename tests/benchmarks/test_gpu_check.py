"""The check of the GPU path: what runs its sections, and the sections on a CPU, tiny."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.checkpoints.random_checkpoint import TINY
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import runner
from benchmarks.gpu_check.candidates_attention import (
    FLASHINFER,
    PREFILL,
    attention_case,
    prefill_case,
)
from benchmarks.gpu_check.candidates_measure import measure
from benchmarks.gpu_check.compare import Worst
from benchmarks.gpu_check.device import covered, host_waits, kernels_of
from benchmarks.gpu_check.engines import Differences, equal
from benchmarks.gpu_check.runner import (
    FILE,
    Settings,
    exit_code,
    limit_of,
    limit_together,
    run,
    summary,
)
from benchmarks.gpu_check.section import Place, Report, Section
from benchmarks.gpu_check.sections import SECTIONS
from benchmarks.gpu_check.torch_needs import Need, documented, problem_of
from benchmarks.gpu_check.weights import RandomCheckpoint
from benchmarks.gpu_check.workers import Case, survival, watch_s
from benchmarks.harness.local_engine import Generated
from tests.paths import ROOT
from workers.experts.sources import CheckpointSource
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import QuantizedMatrix
from workers.requests.request import FinishReason, TokenLogprob

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
SLOW_ON_A_CPU = ("speed", "engine-", "prompts", "qwen3", "peer")
"""Beginnings of the names of sections whose test runs before a release."""
IN_PROCESSES = {"sockets": "sockets", "collective": "collective", "kills": "collective"}
"""Sections that start workers, and their transports."""


def section(name: str, **changes: Any) -> Section:
    """A section of ``gpu_check_sections``."""
    own = Section(
        name=name,
        what="a test",
        function=f"tests.benchmarks.gpu_check_sections:{name}",
        seconds=10.0,
        least_s=1.0,
        is_correctness=True,
        needs_gpu=False,
    )
    return replace(own, **changes)


def settings(out: Path, budget_s: float = 600.0) -> Settings:
    return Settings(budget_s=budget_s, out=out, device="cpu", is_tiny=True)


def collected() -> tuple[Report, list[dict[str, Any]]]:
    """A report, and what it writes."""
    lines: list[dict[str, Any]] = []
    return Report(lambda line: lines.append(json.loads(line))), lines


def failures(lines: list[dict[str, Any]]) -> list[str]:
    return [line["failure"] for line in lines if "failure" in line]


# What runs the sections


def test_every_section_is_reported_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        section("right"),
        section("wrong"),
        section("raises", is_correctness=False),
        section("crashes"),
        section("gpu", needs_gpu=True),
        section("large", least_s=1e6),
    ]
    right, wrong, raises, crashes, gpu, large = outcomes = run(wanted, settings(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [s.name for s in wanted]
    assert (right.status, right.failures, right.words) == ("ok", [], "all is well")
    assert right.values["limit_s"] == pytest.approx(100.0, abs=0.1)  # six equal parts
    assert right.values["not a number"] == ["nan", {"x": "inf"}]
    assert not Path(right.values["folder"]).exists()
    assert (tmp_path / "right.log").read_text() == "for the log\n"
    assert wrong.status == "failed"
    assert wrong.failures == ["2 is not 3", "division: ZeroDivisionError: division by zero"]
    assert wrong.values["after"] == 1
    assert raises.failures == ["section: ValueError: on purpose"]
    assert (crashes.status, crashes.values) == ("failed", {"before": 1})
    assert crashes.failures == ["its process ended: out of memory"]
    assert (gpu.status, gpu.words) == ("skipped", "needs a GPU")
    assert (large.status, large.words[:16]) == ("no time", "needs 1000000 s,")
    text = (tmp_path / FILE).read_text()
    assert [json.loads(line)["section"] for line in text.splitlines()] == [s.name for s in wanted]
    assert "nan" not in text.replace('"nan"', "").lower().replace("nanos", "")
    _, *rows = summary(outcomes).splitlines()
    assert len(rows) == len(wanted)
    assert rows[-1].split()[:4] == ["large", "no", "time", "needs"]


@pytest.mark.parametrize(
    ("name", "changes", "code"),
    [
        ("right", {}, 0),
        ("wrong", {}, 1),
        ("wrong", {"is_correctness": False}, 0),
        ("crashes", {}, 1),
        ("right", {"needs_gpu": True}, 0),
        ("right", {"least_s": 1e6}, 1),
        ("right", {"least_s": 1e6, "is_correctness": False}, 0),
    ],
)
def test_the_exit_code_is_that_of_sections_about_correctness(
    name: str, changes: dict[str, Any], code: int, tmp_path: Path
) -> None:
    assert exit_code(run([section(name, **changes)], settings(tmp_path))) == code


def test_a_section_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    first, second = run([section("hangs", seconds=1.0), section("right")], settings(tmp_path, 88.0))
    assert first.status == "timed out"
    assert first.failures == ["not done within 8 s, see hangs.log"]
    assert has_ended(first.values["child"])  # what it found before stays
    assert second.status == "ok"
    assert exit_code([first]) == 1


def has_ended(pid: int) -> bool:
    """Whether a process has been killed; its parent may not have noticed."""
    deadline = time.monotonic() + 60.0
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    return True


def test_a_section_has_its_part_of_what_is_left_and_no_less_than_its_least() -> None:
    some = [section("a", seconds=30.0), section("b", seconds=60.0, least_s=70.0)]
    assert limit_of(some, 180.0) == 60.0
    assert limit_of(some[1:], 180.0) == 180.0
    assert limit_of([some[1], some[0]], 90.0) == 70.0
    assert all(limit_of(some[1:], left / 7) == left / 7 for left in range(700, 5000)), "rounding"
    assert limit_of([some[1], some[0]], 69.0) == 0.0


def test_sections_about_correctness_may_run_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that wait for each other, and one that measures, alone behind them."""
    meeting = tmp_path / "meeting"
    os.mkfifo(meeting)
    monkeypatch.setenv("MEETING", str(meeting))
    wanted = [
        section("meets_other"),
        section("right", is_correctness=False),
        section("meets_one", seconds=20.0),
        section("crashes"),
        section("large", least_s=1e6),
    ]
    outcomes = run(wanted, replace(settings(tmp_path), jobs=2))
    assert {o.section: o.status for o in outcomes} == {
        "meets_other": "ok",
        "meets_one": "ok",
        "crashes": "failed",
        "large": "no time",
        "right": "ok",
    }
    text = (tmp_path / FILE).read_text()
    names = [json.loads(line)["section"] for line in text.splitlines()]
    assert names == ["meets_other", "meets_one", "crashes", "large", "right"]


def test_sections_side_by_side_have_their_part_of_what_is_left() -> None:
    some = [section(name, seconds=part) for name, part in (("a", 30.0), ("b", 60.0), ("c", 30.0))]
    later = [section("d", seconds=30.0)]
    assert limit_together(some, later, 2, 180.0) == 120.0
    assert limit_together(some, later, 1, 180.0) == 144.0
    assert limit_together(some, [], 3, 180.0) == 180.0
    assert limit_together([], later, 2, 180.0) == 0.0


def test_an_interrupt_ends_sections_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []

    def interrupted(line: str) -> None:
        entry = json.loads((tmp_path / FILE).read_text().splitlines()[0])
        children.append(entry["values"]["pid"])
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "write_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([section("says_pid"), section("hangs")], replace(settings(tmp_path, 1e4), jobs=2))
    assert has_ended(children[0])


def test_a_run_adds_to_the_file(tmp_path: Path) -> None:
    for _ in range(2):
        run([section("gpu", needs_gpu=True)], settings(tmp_path))
    entries = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [entry["status"] for entry in entries] == ["skipped"] * 2


# The command


def test_names_choose_sections_in_their_own_order() -> None:
    parse = command.make_parser().parse_args
    names = [s.name for s in parse(["--only", "speed,operators,facts"]).only]
    assert names[0] == "facts"
    assert names[-2:] == ["speed", "speed-codes"]
    assert sum(name.startswith("operators-") for name in names) == 6
    assert len(names) == 9
    others = [s.name for s in SECTIONS if s not in parse([]).only]
    assert others == ["kills", "prompts", "qwen3", "peer"]
    assert [s.name for s in parse(["--only", "kills"]).only] == ["kills"]


def test_an_unknown_section_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.make_parser().parse_args(["--only", "facts,oparators"])
    assert "oparators is not one of facts, ceilings" in capsys.readouterr().err


def test_the_command_runs_a_section_and_shows_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--only", "facts", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert command.main(words) == 0
    captured = capsys.readouterr()
    assert f"torch {torch.__version__}" in captured.out
    assert "SECTION" in captured.out
    entry = json.loads((tmp_path / FILE).read_text())
    assert entry["values"]["packages"]["torch"] == torch.__version__
    assert "tensors" in entry["values"]["signatures"]["send"]


def test_the_sections_fit_into_the_budget() -> None:
    sections = command.make_parser().parse_args([]).only
    assert sum(s.seconds for s in sections) <= 1200  # parts, of which most need less
    assert sum(s.least_s for s in sections) < 570
    assert len({s.name for s in SECTIONS}) == len(SECTIONS)


# Where it runs


_IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module

class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {barred}:
            raise ModuleNotFoundError(f"{{name}} is not for gpu-check", name=name)

sys.meta_path.insert(0, Bar())
import benchmarks.gpu_check as package
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    import_module(module.name)
"""
BARRED = {
    *("ray", "pydantic", "grpc", "google", "fastapi", "starlette", "uvicorn", "aiohttp", "yaml"),
    *("prometheus_client", "opentelemetry", "psutil", "tokenizers", "huggingface_hub"),
    *("transformers", "flashinfer", "triton", "pytest"),
}


def test_it_imports_neither_ray_nor_what_serving_and_tests_need() -> None:
    script = _IMPORT_ALL.format(barred=BARRED)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def python_for(*candidates: object) -> subprocess.CompletedProcess[str]:
    """What ``make gpu-check`` finds among some Pythons."""
    script = str(ROOT / "benchmarks" / "gpu_check" / "find-python.sh")
    command = ["sh", script, *map(str, candidates)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def program(path: Path, text: str) -> Path:
    """A script in place of a Python."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_python_without_its_packages_is_refused_by_their_names(tmp_path: Path) -> None:
    bare = program(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')
    done = python_for(bare, tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"gpu-check: {bare} has no torch, no safetensors, no numpy, no msgspec, no llguidance\n"
        f"gpu-check: {tmp_path}/none was not found\n"
    )


def test_a_python_whose_torch_sees_a_gpu_is_taken_before_others(tmp_path: Path) -> None:
    other = program(tmp_path / "other", "echo cpu")
    has_gpu = program(tmp_path / "has-gpu", "echo a warning >&2; echo cuda")
    done = python_for(other, has_gpu)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{has_gpu}\n", "")
    done = python_for(other)
    assert (done.returncode, done.stdout) == (0, f"{other}\n")
    assert done.stderr == f"gpu-check: {other} is taken: its torch sees no GPU\n"


def test_this_python_has_all_that_it_needs() -> None:
    assert python_for(sys.executable).stdout == f"{sys.executable}\n"


# The sections


def run_section(name: str, folder: Path) -> list[dict[str, Any]]:
    """On a CPU with tiny shapes, in this process; what it reports."""
    (own,) = [s for s in SECTIONS if s.name == name]
    module, function = own.function.split(":")
    report, lines = collected()
    place = Place(device_name="cpu", limit_s=300.0, folder=folder, is_tiny=True)
    getattr(import_module(module), function)(place, report)
    assert any("say" in line for line in lines)
    return lines


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(s.name, marks=[pytest.mark.slow] * s.name.startswith(SLOW_ON_A_CPU))
        for s in SECTIONS
        if s.name not in IN_PROCESSES
    ],
)
def test_a_section_finds_nothing_wrong_on_a_cpu(name: str, tmp_path: Path) -> None:
    lines = run_section(name, tmp_path)
    assert failures(lines) == []
    assert any("value" in line for line in lines) or name == "operators-sampling"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_workers_survive_a_kill_on_a_cpu(name: str, tmp_path: Path) -> None:
    lines = run_section(name, tmp_path)
    assert failures(lines) == []
    values = dict(line["value"] for line in lines if "value" in line)
    found = values[f"{IN_PROCESSES[name]}, killed"]
    assert found["rounds"] >= 1
    assert found["notice_s"] > 0


# What they are made of


@pytest.mark.parametrize(
    ("need", "problem"),
    [
        (Need("cuda.CUDAGraph.capture_end"), ""),
        (Need("nn.functional.no_such_function", 2), "is missing"),
        (Need("nn.functional.rms_norm", 2, ("ends",)), "2 without names, ends, but takes (input"),
        (Need("_C._distributed_c10d.Backend.send", 2), "takes (self, tensors, dstRank, tag)"),
        (Need("_C._distributed_c10d.Backend._end_coalescing", 1), "but takes (self)"),
        (Need("ops.mkldnn._linear_pointwise.default", 5), "is called with 5"),
    ],
)
def test_what_torch_lacks_is_named(need: Need, problem: str) -> None:
    found = problem_of(need)
    assert problem in found
    assert bool(found) == bool(problem)


def test_a_missing_function_fails_the_section_with_the_version_of_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)  # a class of C++ keeps its methods
    found = failures(run_section("facts", tmp_path))
    assert f"torch {torch.__version__}: torch.cuda.CUDAGraph.capture_begin is missing" in found


def test_signatures_of_compiled_functions_are_read_from_their_docstrings() -> None:
    text = """make(*args, **kwargs)
    Overloaded function.

    1. make(self: a.B, sizes: tuple[int, int] = (1, 2), op: Op = <Op.SUM: 0>) -> None

    Make it.

    2. make(self: a.B, *, name: str = 'x') -> None
    """
    first, second = documented(inspect.cleandoc(text), "make")
    assert [p.name for p in first.parameters.values()] == ["self", "sizes", "op"]
    assert first.bind(None).args == (None,)
    assert second.parameters["name"].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_survivor_that_is_watched_too_briefly_is_marked(tmp_path: Path) -> None:
    times = {"notice_s": 0.012, "served_s": 1.2, "alive_s": 55.4}
    long, short = (
        Place(device_name="cuda:0", limit_s=limit_s, folder=tmp_path) for limit_s in (140.0, 100.0)
    )
    assert (watch_s(long), watch_s(short)) == (90.0, 55.0)
    case = Case(place=short, transport="collective", killed_in_step=6, alive_s=55.0, is_short=True)
    words = "loss noticed in 0.01 s, served again after 1.20 s"
    assert survival(case, times) == f"short: watched for 55 of 90 s; {words}"
    assert survival(replace(case, is_short=False), times) == f"watched for 55 s; {words}"
    assert survival(replace(case, is_short=False, alive_s=0.0), times) == words


_FLASHINFER = """
import torch


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_tensor_cores=False):
        assert (float_workspace_buffer.dtype, kv_layout) == (torch.uint8, "HND")

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        *, q_data_type="float16", kv_data_type=None,
    ):
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        assert q_data_type == kv_data_type == torch.bfloat16
        assert len(indices) == indptr[-1]
        self.given = indptr.tolist(), indices, last_page_len.tolist()
        self.shape = num_kv_heads, page_size, head_dim

    def run(self, q, paged_kv_cache):
        keys, values = paged_kv_cache
        assert keys.stride() == values.stride()
        assert keys.shape[1:] == values.shape[1:] == self.shape
        indptr, indices, last = self.given
        rows = []
        for i, query in enumerate(q):
            pages = indices[indptr[i] : indptr[i + 1]].long()
            length = (len(pages) - 1) * self.shape[1] + last[i]
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (keys, values))
            rows.append(torch.nn.functional.scaled_dot_product_attention(query.unsqueeze(1), k, v))
        return torch.stack(rows).squeeze(2)
"""


def test_flashinfer_is_given_our_cache_as_it_documents_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = Place(device_name="cpu", limit_s=60.0, folder=tmp_path, is_tiny=True)
    case = attention_case(place, 5)
    found = measure(place, FLASHINFER, case, "bytes", case.num_bytes)
    assert found["FlashInfer"] == "not installed"
    (tmp_path / "flashinfer.py").write_text(_FLASHINFER)
    spec = spec_from_file_location("flashinfer", tmp_path / "flashinfer.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    found = measure(place, FLASHINFER, case, "bytes", case.num_bytes)
    assert found["FlashInfer"]["off"] < 0.05
    assert found["FlashInfer"]["bytes_per_s"] > 0


def test_attention_of_whole_prompts_in_one_call_is_that_of_a_server(tmp_path: Path) -> None:
    place = Place(device_name="cpu", limit_s=60.0, folder=tmp_path, is_tiny=True)
    case = prefill_case(place, 3, 20)
    found = measure(place, PREFILL, case, "flops", case.flops)
    assert found["SDPA"]["off"] < 0.05
    assert found["our kernel"] == "needs a GPU"


def test_a_tensor_that_is_off_is_a_failure() -> None:
    report, lines = collected()
    worst, want = Worst(), torch.ones(3, 4)
    worst.compare(report, "same", want.clone(), want)
    worst.compare(report, "near", want + 1e-6, want)
    assert not failures(lines)
    worst.compare(report, "far", want + 0.01, want)
    worst.compare(report, "shape", want[:2], want)
    worst.compare(report, "type", want.bfloat16(), want)
    worst.compare(report, "none", torch.full_like(want, torch.nan), want)
    assert [failure.split()[0] for failure in failures(lines)] == ["far", "shape", "type", "none"]
    worst.compare(report, "rounded", want.bfloat16() + 0.01, want.bfloat16())
    assert len(failures(lines)) == 4


def answer(*entries: tuple[int, float, float]) -> Generated:
    """Tokens with their log-probability and the margin to the next best."""
    logprobs = tuple(
        TokenLogprob(token_id=t, logprob=p, top_ids=(t, t + 1), top_logprobs=(p, p - margin))
        for t, p, margin in entries
    )
    return Generated(
        token_ids=tuple(t for t, _, _ in entries),
        logprobs=logprobs,
        prompt_logprobs=None,
        class_logits=(),
        finish_reason=FinishReason.LENGTH,
    )


@pytest.mark.parametrize(
    ("mine", "found"),
    [
        (answer((1, -0.1, 2.0), (5, -0.2, 2.0), (7, -0.3, 2.0)), []),
        (answer((1, -0.1, 2.0), (5, -0.2005, 2.0), (8, -0.3, 2.0)), ["token 2 of request 0"]),
        (answer((1, -0.1, 2.0), (5, -0.21, 2.0), (7, -0.3, 2.0)), ["off by 1.0e-02"]),
        (answer((2, -0.1, 2.0), (5, -0.2, 2.0)), ["token 0 of request 0", "0 of 3 tokens"]),
    ],
)
def test_other_tokens_and_log_probabilities_are_failures(mine: Generated, found: list[str]) -> None:
    want = answer((1, -0.1, 2.0), (5, -0.2, 2.0), (7, -0.3, 2.0))
    report, lines = collected()
    equal(report, "x", "float32", [mine], [want], Differences())
    assert len(failures(lines)) == len(found)
    for failure, words in zip(failures(lines), found, strict=True):
        assert words in failure


def test_nearly_equal_tokens_may_change_places() -> None:
    want = answer((1, -0.1, 2.0), (5, -0.2, 2.0), (7, -0.7, 1e-4))
    mine = answer((1, -0.1, 2.0), (5, -0.2, 2.0), (8, -0.7, 1e-4))
    report, lines = collected()
    equal(report, "x", "float32", [mine], [want], Differences())
    assert not failures(lines)


def test_waits_of_the_host_are_counted_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with host_waits(torch.device("cuda:0")) as waits:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    ((place, count),) = waits.items()
    assert place.startswith("tests/benchmarks/test_gpu_check.py:")
    assert count == 3


def test_kernels_are_counted() -> None:
    x = torch.ones(4)

    def call() -> None:
        for _ in range(3):
            x.add_(1.0)

    found = kernels_of(CPU, call)
    assert found.count == 3
    assert found.top(1)[0] == ("aten::add_", 1.0)
    assert found.busy_s > 0


def test_spans_that_overlap_count_once() -> None:
    assert covered([(0, 2), (1, 3), (1.5, 2.5), (5, 6)]) == 4
    assert covered([]) == 0


def test_random_weights_depend_on_their_names_alone() -> None:
    first, second = (RandomCheckpoint(TINY, CPU) for _ in range(2))
    parts = list(first.family.attention_tensors())
    drawn = [first.read_stacked([part], torch.float32) for part in parts]
    again = [second.read_stacked([part], torch.bfloat16) for part in reversed(parts)]
    for one, other in zip(drawn, reversed(again), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=0)
    equal_shapes = [x for x, part in zip(drawn, parts, strict=True) if part.shape == (64, 64)]
    assert not torch.equal(equal_shapes[0], equal_shapes[1])


def test_random_weights_may_be_in_codes_zero_or_merged() -> None:
    plain = RandomCheckpoint(TINY, CPU)
    parts = {part.name: part for part in plain.family.attention_tensors()}
    first, second = (
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    )
    delta = torch.full(parts[second].shape, 0.5)
    form = WeightFormat(codes="int8", group=32)
    other = RandomCheckpoint(TINY, CPU, form=form, zeros=("o_proj.weight",), deltas={second: delta})
    for name, part in parts.items():
        one, same = (c.read_stacked([part], torch.float32) for c in (plain, other))
        if name.endswith("o_proj.weight"):
            one = torch.zeros_like(one)
        assert torch.equal(same, one + delta if name == second else one)
    assert not plain.read_stacked([parts[first]], torch.float32).eq(0).all()
    bank = other.family.banks[0]
    for _, _, weight in CheckpointSource(other).weights(bank, 0, torch.float32):
        assert isinstance(weight, QuantizedMatrix)
        assert weight.format == form


def test_a_prediction_layer_may_pass_the_embedding_on() -> None:
    size = replace(TINY, family="glm4_moe", prediction_layers=1)
    checkpoint = RandomCheckpoint(size, CPU, zeros=("eh_proj.weight",))
    (part,) = (p for p in checkpoint.family.attention_tensors() if "eh_proj" in p.name)
    expected = torch.cat((torch.eye(size.hidden), torch.zeros(size.hidden, size.hidden)), 1)
    assert torch.equal(checkpoint.read_stacked([part], torch.float32), expected)
