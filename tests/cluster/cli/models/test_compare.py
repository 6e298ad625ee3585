"""``models compare``: what two revisions of a model do differently."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.models.compare import measured, quantile
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.fake_gateway import FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")

PATH = "/v1/completions"
BASE = 'model_name="m",engine="0"'


def exposition() -> str:
    """What Prometheus would read: revision 1 without a label, and a second one."""
    lines = []
    for labels, errors, times in ((BASE, 0, (2, 4, 4)), (f'{BASE},revision="b"', 1, (0, 1, 3))):
        for reason, number in (("stop", 3), ("error", errors)):
            labelled = f'{labels},finished_reason="{reason}"'
            lines.append(f"expertmesh:request_success_total{{{labelled}}} {number}.0")
        for bound, number in zip(("0.1", "0.2", "+Inf"), times, strict=True):
            name = "expertmesh:time_to_first_token_seconds_bucket"
            lines.append(f'{name}{{{labels},le="{bound}"}} {number}.0')
    other = lines[0].replace('"m"', '"other"').replace("3.0", "90.0")
    return "\n".join([*lines, other, ""])


def scored(*scores: float, first: int = 5) -> dict[str, Any]:
    """The answer of a completion with these log-probabilities of its prompt."""
    entries = [{str(first + i): {"logprob": s, "rank": 1}} for i, s in enumerate(scores)]
    return {"choices": [{"text": "x", "prompt_logprobs": [None, *entries]}]}


def models(*states: str, canary: str = "") -> list[tuple[int, Any]]:
    """The table with the revisions 1 (active), b, c and so on."""
    named = zip(("1", "b", "c"), states, strict=False)
    revisions = [{"name": name, "state": state, "error": ""} for name, state in named]
    entry = {"name": "m", "active": "1", "canary": canary, "revisions": revisions}
    return [(200, {"models": [entry]})]


@pytest.fixture
def served(gateway: FakeGateway) -> FakeGateway:
    gateway.open_admin()
    gateway.admin = models("READY", "READY") * 8
    gateway.metrics = [exposition()]
    gateway.documents = {f"{PATH} 1": scored(-1.0, -2.0), f"{PATH} b": scored(-1.5, -2.0)}
    return gateway


def run(gateway: FakeGateway, *words: str) -> int:
    return main(["--url", gateway.url, "models", "compare", "m", *words])


def test_the_numbers_of_both_revisions_and_their_drift(
    served: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(served, "--json") == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    first, second = found["revisions"]
    assert (first["name"], first["choices"], first["errors"]) == ("1", 3, 0.0)
    assert (second["name"], second["choices"], second["errors"]) == ("b", 4, 0.25)
    assert (first["ttft_p50_s"], first["itl_p50_s"]) == (pytest.approx(0.1), None)
    assert first["perplexity"] == pytest.approx(math.exp(1.5))
    assert second["perplexity"] == pytest.approx(math.exp(1.75))
    drift = found["drift"]
    num_prompts = len(served.bodies) // 2
    assert drift == {"tokens": 2 * num_prompts, "mean": 0.25, "worst": 0.5}
    assert {body["model"] for body in served.bodies} == {"m"}
    assert run(served) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["1", "3", "0.00%"]
    assert "100 ms / 198 ms  - / -" in lines[1]
    assert lines[2].split()[:3] == ["b", "4", "25.00%"]
    assert lines[-1].endswith("differ by 0.25 on average, at most by 0.5")


def test_prompts_of_a_file(served: FakeGateway, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("one\n\ntwo\n")
    assert run(served, "--prompts", str(path)) == ExitCode.OK
    assert [body["prompt"] for body in served.bodies] == ["one", "two"] * 2


@pytest.mark.parametrize(
    ("states", "canary", "words", "code", "error"),
    [
        (("READY",), "", (), ExitCode.REFUSED, "name a revision of m: no other one is ready"),
        (("READY",) * 3, "", (), ExitCode.REFUSED, "name a revision of m: several are ready"),
        (("READY",) * 3, "c", (), ExitCode.OK, ""),
        (("READY", "LOADING"), "", ("--revision", "b"), ExitCode.REFUSED, "another one: none"),
        (("READY",) * 2, "", ("--revision", "1"), ExitCode.REFUSED, "another one: b"),
        (("STOPPED", "READY"), "", (), ExitCode.NOT_READY, "the active revision of m is away"),
    ],
)
def test_which_revision_is_compared(
    served: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    states: Sequence[str],
    canary: str,
    words: Sequence[str],
    code: ExitCode,
    error: str,
) -> None:
    served.admin = models(*states, canary=canary)
    served.documents[f"{PATH} c"] = served.documents[f"{PATH} b"]
    assert run(served, *words) == code
    assert error in capsys.readouterr().err


def test_what_cannot_be_compared(
    served: FakeGateway, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for words, error in (
        (("--prompts", str(empty)), "has no prompt"),
        (("--prompts", str(tmp_path / "none")), "cannot be read"),
    ):
        assert run(served, *words) == ExitCode.USAGE
        assert error in capsys.readouterr().err
    for other in (scored(-1.0), scored(-1.0, -2.0, first=6)):
        served.documents[f"{PATH} b"] = other
        assert run(served) == ExitCode.FAILED
        assert "divide the prompts into other tokens" in capsys.readouterr().err
    for revision in ("1", "b"):
        served.documents[f"{PATH} {revision}"] = scored()
    assert run(served) == ExitCode.USAGE
    assert "a prompt of two tokens or more" in capsys.readouterr().err
    args = ["--url", served.url, "models", "compare", "other"]
    assert main(args) == ExitCode.REFUSED
    assert "the model other is not served" in capsys.readouterr().err


def test_quantiles_are_those_of_prometheus() -> None:
    counts = {0.1: 2.0, 0.2: 4.0, math.inf: 5.0}
    assert quantile(counts, 0.2) == pytest.approx(0.05)
    assert quantile(counts, 0.6) == pytest.approx(0.15)
    assert quantile(counts, 0.99) == 0.2, "the highest finite bound"
    assert quantile({}, 0.5) is None
    assert quantile({0.1: 0.0, math.inf: 0.0}, 0.5) is None


def test_series_of_several_gateways_and_engines_are_summed() -> None:
    text = exposition()
    found = measured(text + text.replace('engine="0"', 'engine="1"'), "m")
    assert {name: one["choices"] for name, one in found.items()} == {"1": 6, "b": 8}
    assert measured(text, "third") == {}
    assert measured(text + text.replace("expertmesh:", "vllm:"), "m") == measured(text, "m")
    for prefix in ("vllm:", "mine_", ""):
        assert measured(text.replace("expertmesh:", prefix), "m") == measured(text, "m")
