"""The toy's vocabulary, as texts, and its grammars.

Every token is two letters of ten, so that stop strings begin and end within tokens. A grammar is an
automaton over tokens: what may come next, and whether the output is complete, depends on all tokens
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.simulation.kernel import Kernel
from workers.requests.request import Grammar

LETTERS = "abcdefghij"
_STATES = 16
_CLASSES = 4
_COMPILE_S = 0.05
"""Longest time to compile a grammar."""


def token_text(token: int) -> str:
    return LETTERS[token % 10] + LETTERS[token // 10 % 10]


class ToyTokenizer:
    """In place of ``Tokenizer``."""

    is_byte_level = True
    chat_template = None
    file = None

    def is_special(self, token: int) -> bool:
        return False

    def token_bytes(self, token: int) -> bytes:
        return token_text(token).encode()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(token_text, ids))


class ToyGrammar:
    """In place of ``GrammarState``: a grammar along an output."""

    def __init__(self, text: str, output: Sequence[int] = ()) -> None:
        self._state = int(text)
        self.is_complete = False
        for token in output:
            assert self.allows(token), "the output so far does not follow the grammar"
            self.advance(token)

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        return token % _CLASSES == self._state % _CLASSES

    def advance(self, token: int) -> None:
        self._state = hash((self._state, token)) % _STATES
        self.is_complete = not self._state


class _Compiled:
    """In place of ``CompiledGrammar``."""

    def __init__(self, grammar: Grammar) -> None:
        self._text = grammar.text

    def start(self, output: Sequence[int] = ()) -> ToyGrammar:
        return ToyGrammar(self._text, output)


class ToyGrammars:
    """In place of ``GrammarCompiler``."""

    def __init__(self, *args: Any) -> None:
        self._known: dict[tuple[Grammar, str], _Compiled] = {}

    def prepare(self) -> None:
        """See ``GrammarCompiler``."""

    def cached(self, grammar: Grammar, owner: str = "") -> _Compiled | None:
        return self._known.get((grammar, owner))

    def compile(self, grammar: Grammar, owner: str = "") -> _Compiled:
        kernel = Kernel.current
        assert kernel is not None
        kernel.sleep(kernel.rng.random() * _COMPILE_S)
        return self._known.setdefault((grammar, owner), _Compiled(grammar))
