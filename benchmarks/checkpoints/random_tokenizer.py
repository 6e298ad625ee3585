"""A tokenizer for random checkpoints of any vocabulary: every token has a text of its own."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_NUM_BYTES = 256


def token_texts(vocab_size: int) -> list[str]:
    """Text of each token as ``tokenizer.json`` has it: all bytes, then " t256", " t257" and so on.

    Byte-level, as in GPT-2: a space is written as U+0120. Needs more tokens than there are bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == _NUM_BYTES < vocab_size
    return [*alphabet, *(f"\u0120t{number}" for number in range(_NUM_BYTES, vocab_size))]


def write(folder: Path, vocab_size: int) -> None:
    """Add the tokenizer's files to a checkpoint."""
    vocabulary = {text: number for number, text in enumerate(token_texts(vocab_size))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1 << 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
