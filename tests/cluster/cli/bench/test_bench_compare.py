"""``bench compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.bench.compare import ValueChange, changes
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode

RESULTS: dict[str, Any] = {
    "successful": 10,
    "failed": 0,
    "failures": {},
    "requests_per_s": 5.0,
    "peak_concurrency": 4,
    "ttft_ms": {"mean": 10.0, "median": 9.0, "p99": None},
}


def write(path: Path, command: str = "bench serve", **results: Any) -> str:
    document = {"schema": 1, "command": command, "options": {"seed": 0}}
    path.write_text(json.dumps({**document, "results": {**RESULTS, **results}}))
    return str(path)


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("requests_per_s", "higher"),
        ("batches.8.decode_tokens_per_s", "higher"),
        ("successful", "higher"),
        ("ttft_ms.p99", "lower"),
        ("duration_s", "lower"),
        ("tokens.64.dispatch_us.median", "lower"),
        ("tokens.64.dispatch_bytes", "lower"),
        ("failures.429 queue_full", "lower"),
        ("unfinished", "lower"),
        ("peak_concurrency", "neither"),
        ("output_tokens", "neither"),
        ("sent_late_ms.p90", "neither"),
    ],
)
def test_which_direction_is_better(name: str, better: str) -> None:
    assert ValueChange(name, 1.0, 1.0).better == better


@pytest.mark.parametrize(
    ("name", "before", "after", "worse"),
    [
        ("ttft_ms.mean", 10.0, 10.4, False),
        ("ttft_ms.mean", 10.0, 10.6, True),
        ("ttft_ms.mean", 10.0, 1.0, False),
        ("requests_per_s", 10.0, 9.6, False),
        ("requests_per_s", 10.0, 9.4, True),
        ("requests_per_s", 10.0, 100.0, False),
        ("peak_concurrency", 1.0, 9.0, False),
        ("failed", 0.0, 1.0, True),
        ("failed", 0.0, 0.0, False),
        ("successful", 3.0, 0.0, True),
    ],
)
def test_worse_is_beyond_the_threshold(name: str, before: float, after: float, worse: bool) -> None:
    assert ValueChange(name, before, after).is_worse(1.05) is worse


def test_only_shared_numbers_are_compared_and_all_failures() -> None:
    found = changes({"a_ms": 1, "b_ms": None, "failures": {"x": 2}}, {"a_ms": 2, "b_ms": 3})
    assert [(c.name, c.before, c.after) for c in found] == [
        ("a_ms", 1.0, 2.0),
        ("failures.x", 2.0, 0.0),
    ]


def test_no_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = write(tmp_path / "a.json")
    assert main(["bench", "compare", same, same]) == ExitCode.OK
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split() == [
        "NUMBER",
        "BEFORE",
        "AFTER",
        "RATIO",
        "BETTER",
        "IS",
    ]
    assert "WORSE" not in shown.out
    assert "nothing" in shown.err


def test_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a.json")
    after = write(tmp_path / "b.json", requests_per_s=4.0, failed=1, failures={"timeout": 1})
    assert main(["bench", "compare", before, after]) == ExitCode.FAILED
    shown = capsys.readouterr()
    (row,) = [line.split() for line in shown.out.splitlines() if line.startswith("requests_per_s")]
    assert row == ["requests_per_s", "5", "4", "0.800", "higher", "WORSE"]
    assert shown.err == "worse by more than 1.05: failed, requests_per_s, failures.timeout\n"
    assert main(["bench", "compare", after, before]) == ExitCode.OK
    capsys.readouterr()
    assert main(["bench", "compare", before, after, "--threshold", "1.3", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, "bench compare")
    assert (document["of"], document["worse"]) == ("bench serve", True)
    assert document["numbers"]["requests_per_s"]["worse"] is False
    assert document["numbers"]["failed"] == {
        "before": 0.0,
        "after": 1.0,
        "ratio": None,
        "better": "lower",
        "worse": True,
    }


def test_other_settings_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = write(tmp_path / "a.json"), tmp_path / "b.json"
    document = {**json.loads(Path(before).read_text()), "options": {"seed": 5}}
    after.write_text(json.dumps(document))
    assert main(["bench", "compare", before, str(after)]) == ExitCode.OK
    assert "not the same seed: 0 and 5" in capsys.readouterr().err


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    mine = write(tmp_path / "a.json")
    other = write(tmp_path / "b.json", command="benchmarks.engine")
    assert main(["bench", "compare", mine, other]) == ExitCode.REFUSED
    assert main(["bench", "compare", mine, str(tmp_path / "none")]) == ExitCode.USAGE
    for text in ("x", "[]", "{}", '{"schema": 1, "command": "bench x", "options": 1}'):
        (tmp_path / "c.json").write_text(text)
        assert main(["bench", "compare", mine, str(tmp_path / "c.json")]) == ExitCode.USAGE
