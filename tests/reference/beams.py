"""Beam searches on goldens: what transformers finds, computed once a machine and then kept."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.reference.goldens import Golden
from workers.requests.request import BeamParams, EarlyStopping, Request, SamplingParams, TokenOutput

CLEAR_MARGIN = 5e-4
"""A search that came nearer to another result may have that one in another implementation."""
SCORE_TOLERANCE = 5e-4
_MAKER = "tests.reference.transformers_beams"
_LIMIT_S = 540.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamCase:
    """A search; names are those of ``generate``."""

    prompt: tuple[int, ...]
    num_beams: int
    max_new_tokens: int = 12
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        """The same for an engine."""
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            min_tokens=self.min_new_tokens,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=self.eos_token_id,
            beams=BeamParams(
                length_penalty=self.length_penalty,
                early_stopping=EarlyStopping(str(self.early_stopping).lower()),
            ),
        )

    def request(self, name: str) -> Request:
        """The same as a request."""
        return Request(request_id=name, prompt=self.prompt, n=self.num_beams, params=self.params)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundBeams:
    """What transformers finds."""

    beams: list[list[int]]
    """The best first, ends included."""
    scores: list[float]
    """Empty for one beam, which it does not score."""
    margin: float
    """The smallest difference between two numbers whose order decided something."""


def a_few_cases(golden: Golden) -> list[BeamCase]:
    """Searches with each value of each field, where tokens of a greedy output end it."""
    ends = [_ends(golden, place) for place in range(len(golden.prompts))]
    prompts = golden.prompts
    return [
        BeamCase(prompt=prompts[0], num_beams=4),
        BeamCase(prompt=prompts[1], num_beams=1, eos_token_id=ends[1]),
        BeamCase(
            prompt=prompts[2],
            num_beams=2,
            length_penalty=0.0,
            early_stopping=True,
            eos_token_id=ends[2],
        ),
        BeamCase(
            prompt=prompts[3],
            num_beams=3,
            length_penalty=2.0,
            early_stopping="never",
            eos_token_id=ends[3],
        ),
        BeamCase(prompt=prompts[5], num_beams=4, eos_token_id=ends[5]),
        BeamCase(prompt=prompts[5], num_beams=8, min_new_tokens=4, eos_token_id=ends[5]),
    ]


def many_cases(golden: Golden) -> list[BeamCase]:
    """Searches with many pairs of values."""
    stops: tuple[bool | str, ...] = (False, True, "never")
    return [
        BeamCase(
            prompt=prompt,
            num_beams=1 + (place + number) % 5,
            length_penalty=(0.0, 1.0, 2.0, -0.5)[(place // 2 + number) % 4],
            early_stopping=stops[number % 3],
            eos_token_id=_ends(golden, place) if (place + number // 2) % 4 else (),
        )
        for place, prompt in enumerate(golden.prompts)
        for number in range(6)
    ]


def _ends(golden: Golden, prompt: int) -> tuple[int, ...]:
    greedy = golden.greedy(prompt)
    return tuple(sorted({greedy[place] for place in (3, 7, 11)}))


def transformers_beams(golden: Golden, cases: Sequence[BeamCase]) -> list[FoundBeams]:
    """What transformers finds for each case, kept beside the golden."""
    digest = hashlib.sha256((ROOT / f"{_MAKER.replace('.', '/')}.py").read_bytes())
    given = [{"path": str(golden.path), **asdict(case)} for case in cases]
    digest.update(json.dumps(given).encode())
    kept = golden.path.parent / f"beams-{golden.name}-{digest.hexdigest()[:16]}.json"
    if not kept.is_file():
        _keep(kept, _compute(given))
    return [FoundBeams(**found) for found in json.loads(kept.read_text())]


def _compute(cases: Sequence[dict[str, Any]]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", _MAKER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        timeout=_LIMIT_S,
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{_MAKER} failed: {done.stderr[-2000:]}")
    return done.stdout


def _keep(path: Path, text: str) -> None:
    """Write it under another name first: tests may run side by side."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def check_beams(case: BeamCase, found: FoundBeams, outputs: Sequence[TokenOutput]) -> None:
    """The outputs of all choices are those that transformers finds, in its order."""
    assert [list(output.token_ids) for output in outputs] == found.beams, case
    for output in outputs:
        ends = output.token_ids[-1] in case.eos_token_id
        assert output.finish_reason is not None
        assert output.finish_reason.value == ("stop" if ends else "length")
        assert output.stop_token_id == (output.token_ids[-1] if ends else None)
    if found.scores:
        scores = [output.score for output in outputs]
        assert scores == pytest.approx(found.scores, abs=SCORE_TOLERANCE), case
