"""What one option of ``serve`` is, and how its text becomes a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_bytes(text: str) -> int:
    """``4096``, ``64M``, ``2GiB``: a number of bytes. Raises ``ValueError``."""
    digits = text.strip().removesuffix("iB").removesuffix("B")
    unit = digits[-1:].upper() if digits[-1:].isalpha() else ""
    number = digits.removesuffix(digits[-1:]) if unit else digits
    if unit not in _UNITS:
        raise ValueError(f"{text} is not a number of bytes")
    return int(float(number) * _UNITS[unit]) if unit else int(number)


def parse_switch(text: str) -> bool:
    """The value of an environment variable that stands for a flag. Raises ``ValueError``."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise ValueError(f"{text} is neither true nor false")
    return words[text.lower()]


def parse_micro_batches(text: str) -> str | int:
    """``auto``, or a number of micro-batches. Raises ``ValueError``."""
    return text if text == "auto" else int(text)


def parse_words(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOption:
    """One flag of ``serve``."""

    flag: str
    """With its dashes."""
    target: str
    """``section.field`` of ``ClusterConfig``; a bare name is for the launcher alone."""
    help: str
    """What the user reads, default included."""
    kind: Callable[[str], Any] = str
    """From text to value; raises ``ValueError``."""
    choices: tuple[str, ...] = ()
    """Allowed words."""
    is_switch: bool = False
    """A flag without value."""
    has_negation: bool = False
    """A flag without value that has a ``--no-`` form too."""

    @property
    def dest(self) -> str:
        """Attribute in argparse's result."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        """Name in the environment."""
        return f"EXPERTMESH_{self.dest.upper()}"


def option(flag: str, target: str, help: str, **more: Any) -> ServeOption:
    """An option; ``more`` are its other fields."""
    return ServeOption(flag=flag, target=target, help=help, **more)
