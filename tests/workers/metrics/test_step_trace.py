"""Timelines: valid files of bounded size that never stop the work."""

from __future__ import annotations

import contextlib
import json
import resource
from pathlib import Path

import pytest

from cluster.core.errors import ConfigError
from tests.harness.faulty_files import FaultyFiles, Killed, each_fault
from tests.harness.step_traces import events_of, read_spans
from workers.metrics.step_trace import StepTrace


def test_spans_are_chrome_trace_events(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path / "new" / "folder", "expert-3", 1 << 20)
    trace.add("experts", 1_000, 3_500, {"step": 7, "micro_batch": 1})
    trace.close()
    (file,) = (tmp_path / "new" / "folder").iterdir()
    *names, event = json.loads(file.read_text())
    assert {n["name"] for n in names} == {"process_name", "thread_name"}
    assert all(n["ph"] == "M" and n["args"] == {"name": "expert-3"} for n in names)
    assert (event["ph"], event["ts"], event["dur"]) == ("X", 1.0, 2.5)
    assert event["args"] == {"step": 7, "micro_batch": 1}
    assert event["pid"] == names[0]["pid"]


def test_a_file_can_be_read_while_its_worker_lives(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, "expert-0", 1 << 20)
    assert read_spans(tmp_path) == []
    trace.add("send", 0, 1, {"step": 1})
    trace.flush()
    assert [s.name for s in read_spans(tmp_path)] == ["send"]
    trace.close()


def test_a_worker_keeps_two_files_of_bounded_size(tmp_path: Path) -> None:
    trace = StepTrace(tmp_path, "attention-0", 2000)
    for step in range(200):
        trace.add("attention", step, step + 1, {"step": step})
        trace.flush()
    trace.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert all(file.stat().st_size < 2300 for file in files)
    steps = sorted(e["args"]["step"] for f in files for e in events_of(f) if e["ph"] == "X")
    assert steps == list(range(steps[0], 200)), "the latest steps, without a gap"
    assert steps[0] > 100


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"trace_dir .*file.* must be writable"):
        StepTrace(tmp_path / "file" / "folder", "expert-0", 2000)


def test_a_full_disk_costs_steps_of_the_trace_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = StepTrace(tmp_path, "expert-0", 1 << 20)
    trace.add("send", 0, 1, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        trace.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("could not write steps to the trace: ") == 1
    trace.add("send", 0, 1, {"step": 2})
    trace.close()
    assert [span.args["step"] for span in read_spans(tmp_path)] == [2]


def test_a_file_that_cannot_be_kept_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = StepTrace(tmp_path, "expert-0", 10)
    (file,) = tmp_path.iterdir()
    (tmp_path / f"previous-{file.name}").mkdir()
    before = file.read_bytes()
    trace.add("send", 0, 1, {"step": 1})
    trace.flush()
    assert "could not write steps to the trace: " in caplog.text
    assert file.read_bytes() == before
    trace.close()


def test_a_trace_has_whole_events_whatever_the_disk_does(tmp_path: Path) -> None:
    for folder, fault in each_fault(tmp_path):
        files = FaultyFiles(folder, fault)
        with contextlib.suppress(ConfigError, Killed), files:
            trace = StepTrace(folder, "expert-0", 600)
            for step in range(8):
                trace.add("send", 0, 1, {"step": step})
                trace.flush()
            files.heal()
            trace.add("send", 0, 1, {"step": 8})
            trace.close()
            assert 8 in [span.args["step"] for span in read_spans(folder)], fault
            assert all(events_of(file) for file in folder.iterdir()), fault
