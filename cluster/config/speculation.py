"""The configuration's section for speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.config.option_metadata import INTERNAL
from cluster.core.checks import check, check_choice, check_each, is_at_least_1

SpeculativeMethod = Literal["none", "ngram", "mtp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationSection:
    """Whether steps run guesses at the next tokens, which are kept where they are right."""

    speculative_method: SpeculativeMethod = "none"
    """``ngram`` guesses that a text goes on as after the same tokens earlier in prompt or output,
    ``mtp`` with the layer of the checkpoint that predicts further tokens. Tokens are those of
    ``none``; rows of guesses are run only where that is faster."""
    num_speculative_tokens: int = 8
    """Guessed tokens of a sequence in a step, at most; ``mtp`` guesses one."""
    ngram_min: int = field(default=2, metadata=INTERNAL)
    """Last tokens that must have stood together before for ``ngram`` to guess, at least."""
    ngram_max: int = field(default=5, metadata=INTERNAL)
    """Last tokens that ``ngram`` compares: of several places it takes the one where most agree."""

    def __post_init__(self) -> None:
        check_choice("speculative_method", self.speculative_method, SpeculativeMethod)
        check_each(self, "num_speculative_tokens ngram_min", is_at_least_1, "must be at least 1")
        rule = f"must be at least ngram_min ({self.ngram_min})"
        check(self.ngram_max >= self.ngram_min, "ngram_max", self.ngram_max, rule)

    @property
    def is_on(self) -> bool:
        return self.speculative_method != "none"

    @property
    def has_predictor(self) -> bool:
        """The model is loaded with its layer that predicts further tokens."""
        return self.speculative_method == "mtp"

    @property
    def max_draft_tokens(self) -> int:
        """Guessed tokens of a sequence in a step, at most."""
        return 1 if self.has_predictor else self.num_speculative_tokens

    @property
    def max_draft_rows(self) -> int:
        """Decode rows of a step beyond one for each of ``max_num_seqs`` sequences."""
        return self.num_speculative_tokens if self.is_on else 0
