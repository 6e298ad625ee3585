"""Configuration of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.config.option_metadata import INTERNAL
from cluster.core.checks import check, check_choice, check_each, is_at_least_1

SpeculativeMethod = Literal["none", "ngram", "mtp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationSection:
    """Speculative decoding: how the next tokens are drafted, and how many at most."""

    speculative_method: SpeculativeMethod = "none"
    """Source of drafts: ``ngram`` takes the tokens that followed the same tokens earlier in the
    prompt or output, ``mtp`` the checkpoint's layer for multi-token prediction. Output tokens are
    equal to those of ``none``; drafts run only if that is faster."""
    num_speculative_tokens: int = 8
    """Maximum number of draft tokens of a sequence in a step; ``mtp`` drafts one."""
    ngram_min: int = field(default=2, metadata=INTERNAL)
    """Minimum number of last tokens whose earlier occurrence ``ngram`` needs for a draft."""
    ngram_max: int = field(default=5, metadata=INTERNAL)
    """Maximum number of last tokens that ``ngram`` compares; the longest match wins."""

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
        """Whether the model is loaded with its layer that predicts further tokens."""
        return self.speculative_method == "mtp"

    @property
    def max_draft_tokens(self) -> int:
        """Maximum number of draft tokens of a sequence in a step."""
        return 1 if self.has_predictor else self.num_speculative_tokens

    @property
    def max_draft_rows(self) -> int:
        """Number of decode rows of a step beyond ``max_num_seqs``, which only drafts use."""
        return self.num_speculative_tokens if self.is_on else 0
