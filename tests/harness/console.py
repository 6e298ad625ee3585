"""The ``console`` blocks of a page, run as they are shown and compared with what they show.

    $ command     a command; all commands of a page run in one shell, and end with 0
    > more        the next line of the command above
    output        what the command prints, standard error included

In the output ``...`` stands for any text, that of several lines too, and all widths of a gap in a
line are equal: columns are as wide as what is in them. Blank lines at the end do not count.
"""

from __future__ import annotations

import doctest
import os
import re
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

LANGUAGE = "console"
_CHECKER = doctest.OutputChecker()


@dataclass(frozen=True, slots=True)
class Shown:
    """A command of a page."""

    command: str
    """With its further lines."""
    output: str
    """With ``...`` for what differs."""


def shown_in(block: str) -> Iterator[Shown]:
    """The commands of a block, in order."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, *lines = part.splitlines()
        while lines and lines[0].startswith("> "):
            command += "\n" + lines.pop(0).removeprefix("> ")
        yield Shown(command, "\n".join(lines))


def is_shown(expected: str, found: str) -> bool:
    """Whether a page shows what a command printed."""
    return _CHECKER.check_output(_even(expected), _even(found), doctest.ELLIPSIS)


def _even(text: str) -> str:
    lines = (re.sub(r"[ \t]+", " ", line).rstrip() for line in text.splitlines())
    return "\n".join(lines).rstrip("\n") + "\n"


class Shell:
    """One bash; its commands read nothing."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, limit_s: float) -> tuple[int, str]:
        """Exit code and output. Raises ``AssertionError`` when the limit passes or bash ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        mark = uuid.uuid4().hex
        whole = f"{{ {command}\n}} < /dev/null\nprintf '\\n%s %d\\n' {mark} $?\n"
        self._process.stdin.write(whole)
        self._process.stdin.flush()
        timer = threading.Timer(limit_s, self._kill)
        timer.start()
        lines: list[str] = []
        for line in self._process.stdout:
            if line.startswith(mark):
                timer.cancel()
                return int(line.split()[1]), "".join(lines).removesuffix("\n")
            lines.append(line)
        timer.cancel()
        raise AssertionError(f"no end of: {command}\n{''.join(lines)}")

    def close(self) -> None:
        """End bash and what it runs in the foreground."""
        self._kill()
        with self._process:  # closes its pipes
            pass

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def check_page(page: Path, shell: Shell, limit_s: float) -> None:
    """Run all commands of a page. Raises ``AssertionError`` with line, command and output."""

    def evaluate(example: Example) -> None:
        for shown in shown_in(example.parsed):
            status, output = shell.run(shown.command, limit_s)
            where = f"{page.name}, block at line {example.line}: $ {shown.command}"
            assert status == 0, f"{where}\nended with {status}:\n{output}"
            assert is_shown(shown.output, output), (
                f"{where}\n--- the page shows\n{shown.output}\n--- it printed\n{output}"
            )

    parser = CodeBlockParser(LANGUAGE, evaluate)
    examples = list(
        Sybil([parser], path=str(page.parent), pattern=page.name).parse(page).examples()
    )
    assert examples, f"{page.name} has no {LANGUAGE} blocks"
    for example in examples:
        example.evaluate()
