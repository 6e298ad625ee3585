"""Compiles the grammars of requests.

The gateway limits the size of a grammar (``gateway/text/tool_formats/structured.py``). llguidance
counts its own work in compilations and masks, and fails beyond a limit, so no grammar runs
indefinitely. ``workers/process/intake/grammar_compilations.py`` calls the compiler outside the
engine's thread.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import llguidance

from cluster.core.errors import RequestError, UnsupportedParameterError
from workers.requests.request import Grammar, GrammarKind, GrammarPart
from workers.sampling.grammar import CompiledGrammar, MaskReader, shorten

CACHED_GRAMMARS = 64
"""Number of compiled grammars that a worker caches; the least recently used are evicted."""
_MAX_ITEMS_A_STEP = 50_000
"""Maximum number of parser items per mask. A hostile grammar reaches it at most once, in up to 0.2
s."""
_MAX_ITEMS_IN_ROW = 8_000
"""Maximum number of parser items at one position; an object with 600 optional properties has
2400."""
_MAX_LEXER_STATES = 30_000
"""Maximum number of lexer states, which all outputs of a grammar share. 30,000 states take 3 MB."""
_MAX_FIRST_MASK_S = 0.1
"""Maximum CPU time of a grammar's first mask, in seconds; 0.01 s is already unusual."""
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Line appended to Lark grammars: the model chooses tokens even where only one text is possible.
With ``%ignore``, llguidance 1.9 otherwise never finds the end of such a text, as in
``start: "x" " y"`` and ``%ignore / +/``."""
_OPTIONS = "x-guidance"
"""Key of a JSON schema under which options for llguidance are."""
_KNOWN_OPTIONS = ("whitespace_flexible", "coerce_one_of", "lenient")
"""Options of llguidance that clients may set in a schema. Custom separators are not among them,
because separators with blanks cause endless searches."""
_WHITE_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,32}"
"""Regular expression for white space in JSON text, unless the schema specifies it: a few blanks, or
a new line."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary and caches them. Any thread may call it.

    Args:
        folder: the checkpoint's folder. ``prepare`` or the first compilation reads its
            ``tokenizer.json``.
        vocab_size: the model's vocabulary size.
        eos_token_ids: tokens that end the text.
        cache_size: see ``CACHED_GRAMMARS``.
        max_lexer_states: maximum number of states of a grammar's lexer.
    """

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        cache_size: int = CACHED_GRAMMARS,
        max_lexer_states: int = _MAX_LEXER_STATES,
    ) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._cache_size = cache_size
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=_MAX_ITEMS_IN_ROW,
            step_max_items=_MAX_ITEMS_A_STEP,
            max_lexer_states=max_lexer_states,
            verbose_errors=False,
        )
        self._cache: OrderedDict[tuple[str, Grammar], CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._masks = MaskReader(vocab_size, self._eos)

    def prepare(self) -> None:
        """Read the tokenizer, which blocks all threads for 0.2 s if it has 50,000 tokens.

        If the tokenizer cannot be used, do not raise an error; ``compile`` raises it later.
        """
        with contextlib.suppress(UnsupportedParameterError):
            self._load_tokenizer("structured_outputs")

    def cached(self, grammar: Grammar, owner: str = "") -> CompiledGrammar | None:
        """Return a compiled grammar of this owner from the cache; None if there is none or its
        lexer has failed.

        ``owner`` is the ``cache_salt`` of a request: compile times must not reveal the grammars of
        other tenants.
        """
        with self._lock:
            known = self._cache.get((owner, grammar))
            if known is None or known.has_failed:
                return None
            self._cache.move_to_end((owner, grammar))
            return known

    def compile(self, grammar: Grammar, owner: str = "") -> CompiledGrammar:
        """Compile a grammar, or return it from the cache. May take long, but does not block other
        threads.

        ``owner``: the ``cache_salt`` of the request; a compiled grammar is reused only for its
        owner.

        Raises:
            RequestError: the grammar is invalid, can never be matched, or is too complex.
            UnsupportedParameterError: this model's tokenizer cannot be used for grammars.
        """
        if known := self.cached(grammar, owner):
            return known
        compiled = self._compile(grammar)
        with self._lock:
            self._cache[owner, grammar] = compiled
            self._cache.move_to_end((owner, grammar))
            while len(self._cache) > self._cache_size:
                self._evict()
        return compiled

    def _evict(self) -> None:
        """Evict the least recently used grammar of the owner with the most grammars."""
        counts = Counter(owner for owner, _ in self._cache)
        largest = max(counts.values())
        oldest = next(key for key in self._cache if counts[key[0]] == largest)
        del self._cache[oldest]

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            return self._compile_text(grammar, grammar.text)
        except RequestError:
            weaker = self._with_fallbacks(grammar)
            if weaker == grammar.text:
                raise
        return self._compile_text(grammar, weaker)

    def _compile_text(self, grammar: Grammar, text: str) -> CompiledGrammar:
        """Compile ``text`` in place of the text of ``grammar``."""
        tokenizer = self._load_tokenizer(grammar.field)
        try:
            source = _to_source(grammar.kind, text)
        except ValueError as err:
            raise _refuse(grammar, str(err)) from err
        make = partial(llguidance.LLMatcher, tokenizer, source, log_level=0, limits=self._limits)
        matcher = make()
        if matcher.is_error():
            raise _refuse(grammar, matcher.get_error())
        self._try_first_mask(grammar, matcher)
        return CompiledGrammar(grammar, matcher, self._masks, make)

    def _with_fallbacks(self, grammar: Grammar) -> str:
        """Return the text of a failed grammar, with fallbacks for the parts that do not compile.

        If each part compiles alone, all parts get their fallbacks.

        Raises:
            RequestError: a part without a fallback does not compile.
        """
        lines = grammar.text.split("\n")
        line_numbers = {line.partition(":")[0]: number for number, line in enumerate(lines)}
        failing = [
            part
            for part in grammar.parts
            if not self._compiles(part, lines[line_numbers[part.rule]])
        ]
        for part in failing or grammar.parts:
            if part.fallback is not None:
                lines[line_numbers[part.rule]] = f"{part.rule}: {part.fallback}"
        return "\n".join(lines)

    def _compiles(self, part: GrammarPart, line: str) -> bool:
        """Whether a part of a grammar, with its rule ``line``, compiles alone. Raises
        ``RequestError`` if it does not and has no fallback."""
        alone = Grammar(kind=GrammarKind.LARK, text="", field=part.label)
        try:
            self._compile_text(alone, f"start: {part.rule}\n{line}\n")
        except RequestError:
            if part.fallback is None:
                raise
            return False
        return True

    def _try_first_mask(self, grammar: Grammar, matcher: llguidance.LLMatcher) -> None:
        """Compute the first mask; raise ``RequestError`` if no output can match or masks would take
        too long."""
        probe = matcher.deep_copy()
        started_s = time.thread_time()
        mask = self._masks.read(probe)
        if probe.is_error() or not bool(mask.allowed.any()):
            raise _refuse(grammar, probe.get_error() or "no token can start it")
        if time.thread_time() - started_s > _MAX_FIRST_MASK_S:
            raise _refuse(grammar, "finding the tokens that can start it takes too much work")

    def _load_tokenizer(self, field: str) -> llguidance.LLTokenizer:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = self._read_tokenizer(field)
            return self._tokenizer

    def _read_tokenizer(self, field: str) -> llguidance.LLTokenizer:
        try:
            text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
        except OSError as err:
            message = f"{field} is not supported: the model has no tokenizer"
            raise UnsupportedParameterError(message, field) from err
        try:
            return llguidance.LLTokenizer(
                text, n_vocab=self._vocab_size, eos_token=list(self._eos) or None
            )
        except ValueError as err:
            message = f"{field} is not supported with this model's tokenizer: {shorten(str(err))}"
            raise UnsupportedParameterError(message, field) from err


def _to_source(kind: GrammarKind, text: str) -> str:
    """Convert a grammar's text to llguidance's source format. Raises ``ValueError`` if it is
    invalid."""
    matcher = llguidance.LLMatcher
    if kind is GrammarKind.JSON_SCHEMA:
        return _json_source(text)
    if kind is GrammarKind.REGEX:
        return matcher.grammar_from_regex(text)
    if kind is GrammarKind.CHOICE:
        quoted = (json.dumps(choice) for choice in json.loads(text))
        return matcher.grammar_from_lark("start: " + " | ".join(quoted))
    return matcher.grammar_from_lark(text + _NO_FORCING)


def _json_source(schema: str) -> str:
    """Return llguidance's source for a JSON schema, with limited white space, which a small model
    may otherwise repeat forever.

    Raises ``ValueError`` for options that clients may not set.
    """
    value = json.loads(schema)
    options = value.pop(_OPTIONS, None) or {}
    if not isinstance(options, dict) or not all(
        key in _KNOWN_OPTIONS and isinstance(on, bool) for key, on in options.items()
    ):
        raise ValueError(f"{_OPTIONS} may hold {', '.join(_KNOWN_OPTIONS)}, each true or false")
    if "whitespace_flexible" not in options:
        options["whitespace_pattern"] = _WHITE_SPACE
    text = json.dumps({**value, _OPTIONS: options}, ensure_ascii=False)
    return llguidance.LLMatcher.grammar_from_json_schema(text)


def _refuse(grammar: Grammar, reason: str) -> RequestError:
    field = grammar.field
    return RequestError(f"{field} cannot be used as a grammar: {shorten(reason)}", field)
