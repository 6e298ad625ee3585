"""``serve`` refuses a checkpoint it cannot serve, in one line, before anything is started."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.launch.model_source import bundled_checkpoint

Damage = Callable[[Path], None]
TENSOR = "model.layers.1.self_attn.q_proj.weight"


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_architecture(folder: Path) -> None:
    _change_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def wrong_shape(folder: Path) -> None:
    """Swap the two dimensions in the header: as many bytes, another shape."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    rows, columns = header[TENSOR]["shape"]
    header[TENSOR]["shape"] = [rows // 2, columns * 2]
    text = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def other_width(folder: Path) -> None:
    _change_config(folder, intermediate_size=64)


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.usefixtures("state_home", "check_in_process")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (empty, "config.json"),
        (truncated, "model.safetensors is truncated"),
        (without_weights, "model.safetensors"),
        (other_architecture, "model_type 'llama' is not supported"),
        (broken_config, "config.json cannot be read"),
        (wrong_shape, f"tensor {TENSOR} has shape [64, 256] on disk"),
        (other_width, "has shape"),
    ],
)
def test_a_checkpoint_that_cannot_be_served(
    damage: Damage,
    words: str,
    tmp_path: Path,
    temp_dirs: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_checkpoint(), folder)
    damage(folder)
    assert main(["serve", str(folder), "--port", "0", "--grpc-port", "0"]) == ExitCode.REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("expertmesh: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert [p for p in temp_dirs if p.exists()] == []
