"""The parts of the benchmark of rolls that need no cluster."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.faults.rolls import Answer, Clients, Roll, change_weights, report
from cluster.launch.model_source import bundled_checkpoint


def test_changed_weights_have_the_same_names_and_shapes(tmp_path: Path) -> None:
    source, target = Path(bundled_checkpoint()), tmp_path / "changed"
    change_weights(source, target, seed=0)
    assert {p.name for p in source.iterdir()} == {p.name for p in target.iterdir()}
    for path in source.glob("*.safetensors"):
        before, after = load_file(path), load_file(target / path.name)
        assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
            k: (t.shape, t.dtype) for k, t in after.items()
        }
        assert not any(torch.equal(t, after[k]) for k, t in before.items() if t.numel() > 1)


def test_the_times_of_an_answer() -> None:
    answer = Answer([5, 6, 7], [1.0, 1.5, 1.75, 3.0])
    assert (answer.first_s, answer.gaps) == (0.5, [0.25, 1.25])


def test_the_report_has_a_row_for_each_kind() -> None:
    rolls = [
        Roll(is_in_place=False, killed="", state="READY", took_s=2.0, num_answers=3, gap_s=0.5),
        Roll(is_in_place=False, killed="", state="READY", took_s=4.0, num_answers=2, gap_s=0.1),
        Roll(is_in_place=True, killed="Expert", state="FAILED", took_s=1.0, first_s=9.0),
    ]
    clients = Clients("", {}, [Answer([1], [1.0, 1.1])], ["RuntimeError: lost"])
    text = report(rolls, clients, {"of the first": 1, "of neither": 0})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[2] == ["beside", "-", "2", "2", "5", "3.00 / 4.00", "0.00", "0.30 / 0.50"]
    assert rows[3] == ["in place", "Expert", "1", "0", "0", "1.00 / 1.00", "9.00", "0.00 / 0.00"]
    assert text.endswith(
        "Answers: 1 of the first, 0 of neither; 1 requests failed ['RuntimeError: lost']."
    )
