"""State of a grammar for one output: determines which tokens may come next.

The parser is llguidance. A ``GrammarState`` depends only on the grammar and the output tokens.
Computing a mask does not change the state; only ``advance`` does, which is called when a step
commits. So a repeated step, a preemption and a resubmission with the output so far all have the
same state. The mask of a step can be computed on another thread while the step computes its logits.

States of one compiled grammar share a lexer with a cache, which makes masks cheap. But if the lexer
reaches a limit or a bug, it fails for all these states. A state that fails therefore creates its
own lexer and replays its output; if it fails again, the output itself is the cause. The compiler
does not use the failed lexer for later requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.core.errors import RequestError
from workers.requests.request import Grammar, GrammarKind

_MAX_RENEWED_CHARS = 8192
"""Maximum length in characters of a grammar for a second compilation, which blocks the engine's
thread."""
_MAX_MESSAGE_CHARS = 300


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Mask of the tokens that may come next, according to a grammar."""

    allowed: Tensor
    """Whether each token may come next, [V] bool on the CPU."""
    must_end: bool
    """Whether the grammar permits only the end of the text."""


class MaskReader:
    """Reads token masks from llguidance parsers. Any thread may call it.

    Args:
        vocab_size: the model's vocabulary size.
        eos_token_ids: tokens that end the text.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = np.array(eos_token_ids, dtype=np.int64)

    def read(self, matcher: llguidance.LLMatcher) -> TokenMask:
        """Return the mask for a parser's state; all False if the parser has failed."""
        words = np.zeros(-(-self._vocab_size // 32), dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        bits = np.unpackbits(words.view(np.uint8), count=self._vocab_size, bitorder="little")
        allowed: NDArray[np.bool_] = bits.view(np.bool_)
        if matcher.is_error():
            allowed[:] = False
        count = int(np.count_nonzero(allowed))
        must_end = 0 < count <= len(self._eos) and bool(allowed[self._eos].sum() == count)
        return TokenMask(torch.from_numpy(allowed), must_end)


class GrammarState:
    """State of a grammar after the output of one choice of a request. Only the engine's thread
    calls its methods.

    Between ``prepare`` and the next ``mask`` or ``advance``, only the thread that computes the mask
    may use the parser.
    """

    def __init__(
        self, compiled: CompiledGrammar, matcher: llguidance.LLMatcher, output: Sequence[int]
    ) -> None:
        self._compiled = compiled
        self._matcher = matcher
        self._output = list(output)
        self._has_own_lexer = False
        self._prepared: Future[TokenMask] | None = None

    def prepare(self, pool: Executor) -> None:
        """Start to compute the next mask on a thread of ``pool``, unless already started."""
        if self._prepared is None:
            self._prepared = pool.submit(self._compute_mask)

    def mask(self) -> TokenMask:
        """Return the mask of the tokens that may come next. Does not change the state."""
        return self._compute_mask() if self._prepared is None else self._prepared.result()

    def _compute_mask(self) -> TokenMask:
        mask = self._compiled.masks.read(self._matcher)
        if self._matcher.is_error() and self._retry_with_own_lexer():
            mask = self._compiled.masks.read(self._matcher)
        return mask

    def advance(self, token: int) -> None:
        """Add an output token. Called only when the step commits."""
        if self._prepared is not None:
            self._prepared.result()
            self._prepared = None
        self._output.append(token)
        if not self._matcher.consume_token(token):
            self._retry_with_own_lexer()

    @property
    def is_complete(self) -> bool:
        """Whether the output matches the grammar and no further token is permitted."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """The parser's error message, shortened; None without an error."""
        return shorten(self._matcher.get_error()) if self._matcher.is_error() else None

    def _retry_with_own_lexer(self) -> bool:
        """Replay the output once with a separate lexer; return whether the parser works
        afterwards."""
        if self._has_own_lexer:
            return False
        self._has_own_lexer = True
        fresh = self._compiled.compile_again()
        if fresh is None:
            return False
        self._matcher = fresh
        return self._compiled.replay(fresh, self._output)


@dataclass(slots=True, eq=False)
class CompiledGrammar:
    """A compiled grammar, which creates parser states for outputs. ``GrammarCompiler`` makes it."""

    grammar: Grammar
    matcher: llguidance.LLMatcher
    """Parser in the state before any token."""
    masks: MaskReader
    make_matcher: Callable[[], llguidance.LLMatcher]
    """Function that compiles the grammar again, with a separate lexer."""
    has_failed: bool = False
    """Whether the lexer that all states of this grammar share has failed."""

    def start(self, output: Sequence[int] = ()) -> GrammarState:
        """Return the parser state after ``output``. Raises ``RequestError`` if the tokens do not
        match."""
        state = GrammarState(self, self.matcher.deep_copy(), output)
        if not self.replay(state._matcher, output) and not state._retry_with_own_lexer():
            message = "output_so_far does not follow the request's grammar"
            raise RequestError(message, "output_so_far")
        return state

    def compile_again(self) -> llguidance.LLMatcher | None:
        """Mark the shared lexer as failed, and return a parser with a separate lexer, or None if
        the grammar is too long to compile again."""
        self.has_failed = True
        return self.make_matcher() if len(self.grammar.text) <= _MAX_RENEWED_CHARS else None

    def replay(self, matcher: llguidance.LLMatcher, output: Sequence[int]) -> bool:
        """Add the tokens of an output to a parser; return whether all could be added.

        For a Lark grammar, a mask is computed before each token, as when the output was generated,
        because such a grammar may count tokens (``max_tokens``).
        """
        if self.grammar.kind is not GrammarKind.LARK:
            return not output or bool(matcher.consume_tokens(list(output)))
        for token in output:
            self.masks.read(matcher)
            if not matcher.consume_token(token):
                return False
        return True


def shorten(reason: str) -> str:
    """Shorten a parser's message, which may quote a whole grammar, to one line for clients."""
    reason = reason.replace("<non-verbose/>", "").partition("<backtrace>")[0]
    line = " ".join(reason.split())
    return line if len(line) <= _MAX_MESSAGE_CHARS else f"{line[:_MAX_MESSAGE_CHARS]}..."
