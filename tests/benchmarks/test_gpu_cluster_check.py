"""The check of clusters on the GPUs of a host: divisions, predictions, and all of it on CPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.checkpoints.public_shape import MODELS, public_shape
from benchmarks.gpu_cluster_check import __main__ as command
from benchmarks.gpu_cluster_check.layouts import PUBLIC, Layout, Mode, layouts
from benchmarks.sizing.guide import known_model
from cluster.sizing.gpus import H100
from cluster.sizing.roofline import disaggregated_step
from workers.model.families.registry import load_family


@pytest.mark.parametrize(
    ("num_devices", "found"),
    [
        (1, ["1 local"]),
        (2, ["1 local", "1 + 1", "2 colocated"]),
        (3, ["1 local", "1 + 2", "3 colocated"]),
        (8, ["1 local", "1 + 2", "4 + 4", "6 + 2", "8 colocated"]),
    ],
)
def test_gpus_are_divided_in_several_ways(num_devices: int, found: list[str]) -> None:
    made = list(layouts(num_devices))
    assert [str(layout) for layout in made] == found
    assert max(layout.num_devices for layout in made) == num_devices


def test_a_worker_is_killed_where_another_one_has_its_role() -> None:
    def roles(mode: Mode, attention: int, experts: int) -> tuple[str, ...]:
        return Layout(mode=mode, num_attention=attention, num_experts=experts).killed_roles

    assert roles("disaggregated", 1, 2) == ("expert",)
    assert roles("disaggregated", 4, 4) == ("expert", "attention")
    assert roles("colocated", 1, 8) == ("colocated",)
    assert roles("local", 1, 0) == ()


def test_options_are_those_of_serve() -> None:
    words = Layout(mode="disaggregated", num_attention=6, num_experts=2).options("cuda")
    text = "--mode disaggregated --device cuda --num-expert-workers 2 --transport collective"
    assert " ".join(words) == f"{text} --num-attention-workers 6"


@pytest.mark.parametrize("name", ["OLMoE-1B-7B-0924", "Qwen3-30B-A3B"])
def test_a_public_shape_has_the_tensors_of_its_config(name: str) -> None:
    model = public_shape(name)
    config = json.loads((MODELS / name / "config.json").read_text())
    assert model.described().config.head_dim == load_family(config).config.head_dim
    assert model.layers == config["num_hidden_layers"]
    assert public_shape(name, layers=3).described().config.num_layers == 3


def test_predictions_are_those_of_plan_size() -> None:
    layout = Layout(mode="disaggregated", num_attention=4, num_experts=4)
    for model in PUBLIC.values():
        size = known_model(model.folder).size
        step = disaggregated_step(size, 64, 256, num_attention=4, num_experts=4, device=H100)
        assert layout.predicted(model, 64, 256, H100) == step


def test_predictions_are_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--expect", "--gpus", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # "1 + 2" and "2 + 2" decode 128 and 256 sequences at most
    assert len(lines) == 2 + 2 * (4 + 3 + 4 + 4)
    assert lines[2].startswith("| olmoe, 1 local, 1 | ")


def test_the_share_of_equal_tokens_ends_at_the_first_difference() -> None:
    assert command.equal_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 0.75


def test_a_cluster_holds_the_streams_that_are_measured() -> None:
    streams = {str(layout): layout.max_streams for layout in layouts(8)}
    assert streams == {
        "1 local": 256,
        "1 + 2": 128,
        "4 + 4": 512,
        "6 + 2": 768,
        "8 colocated": 1024,
    }


def test_too_few_gpus_are_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="torch finds 0 GPUs"):
        command.main(["--gpus", "2", "--out", str(tmp_path / "out")])


@pytest.mark.ray
@pytest.mark.slow
def test_clusters_of_three_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["--tiny", "--out", "out"]) == 0, capsys.readouterr().out
    lines = (tmp_path / "out" / command.FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["layout"] for row in rows] == ["1 local", "1 + 2", "3 colocated"]
    assert [list(row["kills"]) for row in rows] == [[], ["expert"], ["colocated"]]
    assert all(row["equal_tokens"] == 1.0 for row in rows)
