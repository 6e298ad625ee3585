"""The Dockerfile's instructions, and their build without a container engine.

``Build`` does what ``docker build`` does with ARG, ENV, WORKDIR, COPY and RUN, in a folder that
stands for the image's root, with a virtual environment in place of the base image's Python.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_STEP_LIMIT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, continued lines joined."""

    name: str
    """RUN, COPY, ..."""
    text: str
    """The rest."""

    @property
    def json_words(self) -> list[str]:
        """Words of a CMD in JSON form."""
        return [str(word) for word in json.loads(self.text)]


def read(path: Path) -> list[Instruction]:
    """Instructions of a Dockerfile."""
    lines = [x for x in path.read_text().splitlines() if x.strip() and not x.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines()]


def stages(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Instructions by stage, each begins with its FROM; the arguments before the first are apart,
    at index 0."""
    found: list[list[Instruction]] = [[]]
    for instruction in instructions:
        if instruction.name == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found


def arguments(instructions: list[Instruction]) -> dict[str, str]:
    """ARGs with their defaults."""
    pairs = (i.text.partition("=") for i in instructions if i.name == "ARG")
    return {name: value for name, _, value in pairs}


def environment(stage: list[Instruction]) -> dict[str, str]:
    """Variables that a stage's ENVs set."""
    words = (word for i in stage if i.name == "ENV" for word in shlex.split(i.text))
    return dict(word.split("=", 1) for word in words)


def context(root: Path) -> list[Path]:
    """Files that ``docker build`` would send, by ``.dockerignore``: the last fitting rule wins."""
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [x.strip() for x in lines if x.strip() and not x.startswith("#")]
    return sorted(p for p in _files(root) if not is_ignored(p.relative_to(root), rules))


def _files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in (".git", ".venv")]
        yield from (Path(folder, name) for name in files)


def is_ignored(path: Path, rules: list[str]) -> bool:
    ignored = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        if any(_fits(str(part), pattern) for part in (path, *path.parents[:-1])):
            ignored = not rule.startswith("!")
    return ignored


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.rpartition("/")[2], pattern[3:])
    return path.count("/") == pattern.count("/") and fnmatch.fnmatch(path, pattern)


@dataclass(slots=True)
class Build:
    """A build of all stages in ``root``; ``context`` is a folder with nothing but the context."""

    root: Path
    context: Path
    base: Mapping[str, str]
    """Environment of the base image: PATH and the like."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Build arguments."""

    def run(self, instructions: list[Instruction]) -> Path:
        """All stages; the root folder of the last. Raises ``CalledProcessError``."""
        roots: dict[str, Path] = {}
        stage = self.root
        for number, steps in enumerate(stages(instructions)[1:]):
            stage = self.root / f"stage-{number}"
            if " AS " in steps[0].text:
                roots[steps[0].text.rpartition(" AS ")[2]] = stage
            self._stage(steps[1:], stage, roots)
        return stage

    def _stage(self, steps: list[Instruction], stage: Path, roots: Mapping[str, Path]) -> None:
        environment = {**self.base, "HOME": str(stage / "home" / "ray")}
        folder = stage
        for step in steps:
            match step.name:
                case "WORKDIR":
                    folder = stage / step.text.lstrip("/")
                    folder.mkdir(parents=True, exist_ok=True)
                case "ARG":
                    name, _, default = step.text.partition("=")
                    environment[name] = self.arguments.get(name, default)
                case "ENV":
                    environment |= dict(w.split("=", 1) for w in shlex.split(step.text))
                case "COPY":
                    self._copy(step.text, folder, roots)
                case "RUN":
                    command = ["sh", "-ec", step.text]
                    subprocess.run(
                        command, cwd=folder, env=environment, check=True, timeout=_STEP_LIMIT_S
                    )

    def _copy(self, text: str, folder: Path, roots: Mapping[str, Path]) -> None:
        words = shlex.split(text)
        options = {w.split("=")[0]: w.split("=")[1] for w in words if w.startswith("--")}
        *sources, target = [w for w in words if not w.startswith("--")]
        stage = roots[options["--from"]] if "--from" in options else None
        for source in sources:
            path = stage / source.lstrip("/") if stage else self.context / source
            where = folder / target
            if path.is_dir():
                shutil.copytree(path, where, dirs_exist_ok=True)
            else:
                shutil.copy(path, where / path.name if target.endswith("/") else where)
