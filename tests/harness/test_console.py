from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.console import Shell, Shown, check_page, is_shown, shown_in

LIMIT_S = 60.0


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, os.environ)
    yield shell
    shell.close()


def test_commands_have_their_lines_and_their_output() -> None:
    block = "# words\n$ one\n$ two \\\n>   --more\na\n\nb\n"
    assert list(shown_in(block)) == [Shown("one", ""), Shown("two \\\n  --more", "a\n\nb")]


@pytest.mark.parametrize(
    ("expected", "found", "is_it"),
    [
        ("PID  NAME\n...  a", "PID NAME\n31  a\n\n", True),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a", "a\nb", False),
        ("", "a", False),
        ("3 workers", "4 workers", False),
    ],
)
def test_dots_stand_for_any_text(expected: str, found: str, is_it: bool) -> None:
    assert is_shown(expected, found) is is_it


def test_a_shell_remembers(shell: Shell) -> None:
    assert shell.run("export word=hello; mkdir a; cd a", LIMIT_S) == (0, "")
    assert shell.run("printf '%s' $word; pwd >&2; cat", LIMIT_S)[1].endswith("/a\n")
    assert shell.run("false", LIMIT_S) == (1, "")


def test_a_command_that_does_not_end_is_named(shell: Shell) -> None:
    with pytest.raises(AssertionError, match="no end of: echo begun; sleep 60\nbegun"):
        shell.run("echo begun; sleep 60", 0.5)


def test_a_page_shows_what_its_commands_print(shell: Shell, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```console\n$ x=7\n```\n\nThen\n\n```console\n$ echo $x is\n7 ...\n```\n"
    )
    check_page(page, shell, LIMIT_S)
    page.write_text(page.read_text().replace("7 ...", "8 ..."))
    with pytest.raises(AssertionError, match=r"line 9: \$ echo \$x is\n--- the page shows\n8"):
        check_page(page, shell, LIMIT_S)
    page.write_text("```console\n$ false\n```\n")
    with pytest.raises(AssertionError, match="ended with 1"):
        check_page(page, shell, LIMIT_S)
