"""Starts that cannot succeed, as users make them: one line, an exit code, and no process is left.

``tests/cluster`` checks the same rules within one process; these are whole commands.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.harness.server import command, environment
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.tiers import quick_rows

pytestmark = pytest.mark.distributed

LIMIT_S = 240.0
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Place:
    """What a case may use."""

    folder: Path
    """A copy of the bundled checkpoint, its own."""
    scratch: Path
    """An empty folder."""
    busy_port: int
    """Somebody listens on it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    errors: str
    left: list[int]
    """Processes that it started and that still run."""
    files: list[str]
    """State files that it left."""


Words = Callable[[Place], list[str]]
"""Prepares a case and gives the arguments of ``serve``."""


def _empty(place: Place) -> list[str]:
    for file in place.folder.iterdir():
        file.unlink()
    return [str(place.folder)]


def _cut_data(place: Place) -> list[str]:
    os.truncate(place.folder / WEIGHTS, (place.folder / WEIGHTS).stat().st_size // 2)
    return [str(place.folder)]


def _cut_header(place: Place) -> list[str]:
    os.truncate(place.folder / WEIGHTS, 500)
    return [str(place.folder)]


def _no_header(place: Place) -> list[str]:
    (place.folder / WEIGHTS).write_bytes(b"\x93NUMPY" * 100)
    return [str(place.folder)]


def _missing_shard(place: Place) -> list[str]:
    (place.folder / WEIGHTS).rename(place.folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = place.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return [str(place.folder)]


def _wrong_shape(place: Place) -> list[str]:
    _change_config(place, vocab_size=1000)
    return [str(place.folder)]


def _other_architecture(place: Place) -> list[str]:
    _change_config(place, model_type="llama", architectures=["LlamaForCausalLM"])
    return [str(place.folder)]


def _change_config(place: Place, **values: object) -> None:
    path = place.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _few_slots(place: Place) -> list[str]:
    path = place.scratch / "placement.json"
    bank = {"bank": "mlp", "layer": 0, "physical_to_logical": [[0, 1, 2], [3, 4]]}
    path.write_text(json.dumps({"schema": 1, "epoch": 1, "banks": [bank]}))
    return ["--placement-file", str(path)]


CASES: dict[str, tuple[Words, int, str]] = {
    "an empty folder": (_empty, 5, "there is no config.json in the folder"),
    "data that is cut": (_cut_data, 5, "model.safetensors is truncated"),
    "a header that is cut": (_cut_header, 5, "model.safetensors is truncated"),
    "no safetensors file": (_no_header, 5, "or not a safetensors file"),
    "a missing shard": (_missing_shard, 5, "names model-00002-of-00002.safetensors, which is not"),
    "a wrong shape": (_wrong_shape, 5, "tensor model.embed_tokens.weight has shape [1024, 128]"),
    "another architecture": (_other_architecture, 5, "model_type 'llama' is not supported"),
    "too few slots": (_few_slots, 5, "num_expert_slots (5) must be at least num_experts (64)"),
    "too little KV memory": (lambda _: ["--kv-cache-bytes", "10"], 5, "--kv-cache-bytes (10) must"),
    "too many attention workers": (
        lambda _: ["--num-attention-workers", "5000"],
        2,
        "--num-attention-workers (5000) must not exceed the 1024 requests",
    ),
    "too many expert workers": (
        lambda _: ["--num-expert-workers", "65"],
        5,
        "--num-expert-workers (65) must not exceed the 64 experts",
    ),
    "CPUs that are not there": (
        lambda _: ["--cpus-per-worker", "1000"],
        5,
        "--cpus-per-worker (1000) does not fit: 3 workers need 3000 CPUs",
    ),
    "GPUs that are not there": (
        lambda _: ["--gpus-per-worker", "1"],
        5,
        "--gpus-per-worker (1) does not fit: 3 workers need 3 GPUs",
    ),
    "an HTTP port in use": (
        lambda place: ["--port", str(place.busy_port)],
        5,
        "is in use on 127.0.0.1",
    ),
    "a gRPC port in use": (
        lambda place: ["--grpc-port", str(place.busy_port)],
        5,
        "--grpc-port (",
    ),
    "a value that no start takes": (
        lambda _: ["--num-redundant-experts", "-1"],
        2,
        "--num-redundant-experts (-1) must not be negative",
    ),
}


QUICK = {"too few slots", "an HTTP port in use"}


def _run(words: Words, home: Path, busy_port: int) -> Outcome:
    place = Place(home / "checkpoint", home, busy_port)
    shutil.copytree(bundled_checkpoint(), place.folder)
    mark = f"CASE_{home.name}"
    done = subprocess.run(
        command("serve", "--port", "0", "--grpc-port", "0", *words(place)),
        env={**environment(home / "state"), mark: "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    left = [p.pid for p in psutil.process_iter() if _has_variable(p, mark)]
    files = [path.name for path in (home / "state").rglob("*") if path.is_file()]
    return Outcome(done.returncode, done.stdout, done.stderr, left, files)


def _has_variable(process: psutil.Process, name: str) -> bool:
    try:
        return name in process.environ()
    except psutil.Error:
        return False  # gone by now, or another user's


@pytest.mark.parametrize("name", quick_rows(QUICK, CASES))
def test_one_line_says_why(name: str, tmp_path: Path) -> None:
    words, code, text = CASES[name]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        outcome = _run(words, tmp_path, int(busy.getsockname()[1]))
    assert outcome.errors.startswith("expertmesh: ")
    assert outcome.errors.count("\n") == 1, outcome.errors
    assert text in outcome.errors
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.left == []
    assert outcome.files == []
