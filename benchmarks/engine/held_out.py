"""The part of the corpus that was not used to train the bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.demo_model.corpus import EOS, split_corpus
from benchmarks.demo_model.served_load import HELDOUT_FRACTION
from cluster.launch.model_source import bundled_checkpoint

CORPUS = Path(__file__).parents[1] / "data" / "tinyshakespeare.txt"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text as tokens of the bundled model."""

    ids: Sequence[int]
    eos: int
    """The token before each document in training."""
    num_bytes: int
    """Bytes of the text in UTF-8."""

    def parts(self, num_tokens: int) -> list[Sequence[int]]:
        """Return the text in parts of equal length; the last one may be shorter."""
        starts = range(0, len(self.ids), num_tokens)
        return [self.ids[start : start + num_tokens] for start in starts]

    def windows(self, num_tokens: int) -> list[list[int]]:
        """Return prompts that score each token of the text once."""
        return [[self.eos, *part] for part in self.parts(num_tokens)]


def held_out_text() -> str:
    """The whole text."""
    _, text = split_corpus(CORPUS.read_text(encoding="utf-8"), HELDOUT_FRACTION)
    return text


def held_out(max_tokens: int | None = None) -> HeldOut:
    """Return the first tokens of the held-out text; None for all."""
    tokenizer = bundled_tokenizer()
    ids = tokenizer.encode(held_out_text()).ids[:max_tokens]
    return HeldOut(ids, tokenizer.encode(EOS).ids[0], len(tokenizer.decode(ids).encode()))


def bundled_tokenizer() -> Tokenizer:
    """Return the tokenizer of the bundled model."""
    return Tokenizer.from_file(str(bundled_checkpoint() / "tokenizer.json"))
