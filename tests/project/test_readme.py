"""Calls and commands that README and docs/tutorial/models.md show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.serving_cluster import RayCluster, ThreadCluster, connected_ray
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from gateway.text.tokenizer import load_tokenizer
from tests.gateway.stack import Stack
from tests.harness.served_stack import stack_over
from tests.harness.tiers import quick_rows
from tests.paths import ROOT
from workers.model.families.registry import FAMILIES

pytestmark = pytest.mark.heavy

MODELS = (ROOT / "docs" / "tutorial" / "models.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = README + MODELS
DENSE_FIRST = (
    *("dots1", "glm4_moe", "ernie4_5_moe"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"),
)
"""Families whose first layer has no experts here."""
CALLS = {
    path: json.loads(body)
    for path, body in re.findall(
        r"curl (?:-N )?http://127\.0\.0\.1:8000(\S+)[^']+'[^']+'[^']+'(\{.+?\})'", TEXT
    )
}
"""Bodies by path, those of the models' page last."""
LABELS = [" Ay.", " Nay."]
QUICK_FAMILIES = {"olmoe", "jetmoe"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint as the README's command makes it, with the words of another family."""
    (line,) = re.findall(
        r"^ *\.venv/bin/python (-m benchmarks\.random_checkpoint .+)$", MODELS, re.M
    )
    words = line.partition("#")[0].split()

    @cache
    def make(family: str, *more: str) -> Path:
        path = tmp_path_factory.mktemp("made") / "tiny"
        own = [str(path) if word == "tiny" else word for word in words]
        own[own.index("--family") + 1] = family
        subprocess.run([sys.executable, *own, *more], cwd=ROOT, check=True, timeout=540)
        return path

    return make


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected_ray():
        yield


def answer(stack: Stack, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = stack.http.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def check_calls(stack: Stack) -> None:
    """Completion, classification and inspection of a language model."""
    completed = answer(stack, "/v1/completions", {**CALLS["/v1/completions"], "stream": False})
    assert completed["usage"]["completion_tokens"] == 8
    (row,) = answer(stack, "/classify", CALLS["/classify"])["data"]
    assert row["label"] in LABELS
    assert sum(row["probs"]) == pytest.approx(1.0)
    body = answer(stack, "/v1/inspect", CALLS["/v1/inspect"])
    (found,) = body["data"]
    assert body["loss"] == pytest.approx(-sum(found["logprobs"][1:]) / 2, abs=1e-4)
    assert {len(bank["topk_ids"]) for bank in found["routes"]} == {3}
    assert [len(state) for state in found["hidden_states"]] == [3] * 3


def test_the_calls_are_found() -> None:
    assert set(CALLS) == {"/v1/completions", "/classify", "/v1/inspect"}
    assert CALLS["/classify"]["labels"] == LABELS
    assert CALLS["/v1/completions"]["max_tokens"] == 8


@pytest.mark.parametrize("family", quick_rows(QUICK_FAMILIES, sorted(FAMILIES)))
def test_every_family_answers(
    made: Callable[..., Path], capsys: pytest.CaptureFixture[str], family: str
) -> None:
    path = made(family)
    with stack_over(path, load_tokenizer(str(path)), ThreadCluster) as stack:
        check_calls(stack)
        (line,) = re.findall(r"^ *\.venv/bin/expertmesh (inspect) \"(.+)\"$", MODELS, re.M)
        assert main(["--url", stack.url, "--timeout", "240", *line]) == ExitCode.OK
        shown = capsys.readouterr().out.splitlines()
    kind = "attention:0" if family == "jetmoe" else "mlp:1" if family in DENSE_FIRST else "mlp:0"
    assert shown[0].endswith(f"EXPERTS OF {kind}")
    assert "".join(row.split()[2] for row in shown[1:]) == "ROMEO:"
    assert all(row.count(":") >= 2 for row in shown[1:])


def test_a_classifier_answers(made: Callable[..., Path]) -> None:
    assert "`--family jetmoe --labels 3`" in MODELS
    path = made("jetmoe", "--labels", "3")
    with stack_over(path, load_tokenizer(str(path)), ThreadCluster) as stack:
        body = {key: value for key, value in CALLS["/classify"].items() if key != "labels"}
        (row,) = answer(stack, "/classify", body)["data"]
        assert row["num_classes"] == 3
        assert row["label"] == f"class {row['logits'].index(max(row['logits']))}"


@pytest.mark.ray
def test_real_workers_answer(local_ray: None, made: Callable[..., Path]) -> None:
    path = made("jetmoe")
    with stack_over(path, load_tokenizer(str(path)), RayCluster) as stack:
        check_calls(stack)
