"""The runbooks against the code: every state, every problem, every command."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess

import pytest

from cluster.cli.main import make_parser
from cluster.cli.options.serve_options import add_missing_values
from cluster.controller.host_disks import NEARLY_FULL
from cluster.controller.recovery import RecoveryProblem
from cluster.core.states import ClusterState
from cluster.policy.progress import STEPS_WAIT
from docs.generate.pages import PAGES as GENERATED
from tests.paths import ROOT

pytestmark = pytest.mark.heavy

DOCS = ROOT / "docs"
PAGES = sorted(
    str(page.relative_to(DOCS)) for page in DOCS.glob("*/*.md") if page.name not in GENERATED
)
RUNBOOKS = ("how-to/runbooks.md", "how-to/upgrade.md")
_ENDS = {">", "|", "&&", "||"}
"""Words of the shell that end a command."""
SLURM = DOCS / "how-to" / "examples" / "slurm.sh"


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def commands_in(text: str) -> list[list[str]]:
    """Every whole ``expertmesh`` command in code: continued lines joined, comments cut."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.M | re.S)
    inline = [" ".join(c.split()) for c in re.findall(r"(?<!`)`(expertmesh [^`]+)`", text)]
    lines = [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *inline]
    split = (
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("expertmesh ")
    )
    return [list(itertools.takewhile(lambda word: word not in _ENDS, words)) for words in split]


def is_whole(words: list[str]) -> bool:
    """Whether it is meant to be typed: names of commands and forms (``ID|NAME``) are not."""
    is_form = any(c in " ".join(words) for c in "[]|") or words[-1] == "..."
    return len(words) > 1 and not is_form and not words[-1].startswith("--node")


def test_every_state_has_its_section() -> None:
    sections = re.findall(r"^### ([A-Z]+)$", text_of(RUNBOOKS[0]), re.M)
    assert sorted(sections) == sorted(state.value for state in ClusterState)


def test_every_problem_of_status_has_its_section() -> None:
    problems = text_of(RUNBOOKS[0]).partition("## Problems")[2].partition("\n## ")[0]
    sections = re.findall(r"^### (.+)$", problems, re.M)
    known = [*(problem.value for problem in RecoveryProblem), NEARLY_FULL, STEPS_WAIT]
    assert sorted(sections) == sorted(known)


@pytest.mark.parametrize("page", RUNBOOKS)
def test_every_runbook_names_a_test_that_there_is(page: str) -> None:
    text, _, table = text_of(page).partition("## What tests these pages")
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, re.M)[1:]
    named = {title for titles, _ in rows for title in titles.split(", ")}
    sections = set(re.findall(r"^##+ (.+)$", text, re.M)) - {s.value for s in ClusterState}
    assert sections - named <= {"No answer", "Problems"}
    assert named <= sections
    for path, _, test in (
        name.partition("::") for _, tests in rows for name in re.findall(r"`([^`]+)`", tests)
    ):
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert f"def {test or 'test_'}" in source, (path, test)


def test_every_drill_names_a_test_that_there_is() -> None:
    text = text_of("how-to/failure-drills.md").partition("\n## Chaos")[0]
    drills, _, tests = text.partition("Each drill is a test")
    names = re.findall(r"^\| ([a-z][^|]+?) \|", drills, re.M)
    rows = re.findall(r"^\| ([a-z][^|]+?) \| (`.+`) \|$", tests, re.M)
    assert names == [drill for drill, _ in rows]
    for path, test in re.findall(r"`([\w/.]+)::(\w+)`", " ".join(cell for _, cell in rows)):
        assert f"def {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one(page: str) -> None:
    for words in filter(is_whole, commands_in(text_of(page))):
        if all(word.isalpha() or word == "--help" for word in words):  # is named, not shown
            with pytest.raises(SystemExit, match=r"^0$"):
                make_parser().parse_args([*words, "--help"])
            continue
        make_parser().parse_args(
            add_missing_values(["1" if word == "N" else word for word in words])
        )


def test_the_slurm_script_is_one() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    text = SLURM.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^[^#\n]*?(expertmesh (?:node|up)[^;&\n]*)", text, re.M)
    assert len(commands) == 3
    for command in commands:
        shown = re.sub(r'"?\$\{?#?\w+(?:\[@\])?\}?(?::\d+)?"?', "1", command)
        make_parser().parse_args(shlex.split(shown)[1:])
