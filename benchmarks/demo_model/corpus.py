"""Text side of the demo: the tokenizer, the chat template and the stream of training documents."""

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD = "<|pad|>"
EOS = "<|eos|>"
SPECIAL_TOKENS = (PAD, EOS, "<|system|>", "<|user|>", "<|assistant|>")
"""Token ids 0, 1, 2, ... in this order."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|eos|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

PIECE_TOKENS = 4096

SYSTEM_PROMPT = "Answer as a character of the play."
"""What a system turn holds in training, so that its token is not an untrained one."""


def split_corpus(text: str, heldout_fraction: float) -> tuple[str, str]:
    """Cut the tail off as held-out text. Returns (training text, held-out text)."""
    cut = round(len(text) * (1 - heldout_fraction))
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `text`. All 256 bytes are tokens, so any UTF-8 round trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def training_documents(text: str, chat_fraction: float, rng: random.Random) -> Iterator[str]:
    """Yield `text` once, in order, as documents of some speeches that each end with EOS.

    Most documents are long stretches of plain text; `chat_fraction` of them are short and laid out
    as a conversation, exactly as CHAT_TEMPLATE would render it.
    """
    speeches = [speech for speech in text.split("\n\n") if speech.strip()]
    position = 0
    while position < len(speeches):
        is_chat = rng.random() < chat_fraction
        length = rng.randint(2, 8) if is_chat else rng.randint(10, 60)
        document = speeches[position : position + length]
        position += length
        yield _chat_document(document, rng) if is_chat else "\n\n".join(document) + EOS


def _chat_document(speeches: list[str], rng: random.Random) -> str:
    """Render speeches as alternating user and assistant turns."""
    turns = [("system", SYSTEM_PROMPT)] if rng.random() < 0.3 else []
    for index, speech in enumerate(speeches):
        if index % 2:
            turns.append(("assistant", speech.strip()))
            continue
        # People rarely type a speaker's name, so half of the user turns go without it.
        name, _, words = speech.strip().partition("\n")
        turns.append(("user", words if words and rng.random() < 0.5 else f"{name}\n{words}"))
    return "".join(f"<|{role}|>{content.strip()}{EOS}" for role, content in turns)


def encode_epoch(
    tokenizer: Tokenizer, text: str, *, chat_fraction: float, bpe_dropout: float, rng: random.Random
) -> list[int]:
    """Token ids of one pass over `text`, cut into documents and merged into tokens anew.

    The ids come in pieces of PIECE_TOKENS, of random phase and in random order. With BPE dropout
    each pass spells the words in other tokens, which delays overfitting.
    Source: Provilkov et al., "BPE-Dropout: Simple and Effective Subword Regularization", 2020.
    """
    documents = list(training_documents(text, chat_fraction, rng))
    tokenizer.model.dropout = bpe_dropout or None
    ids = [token for encoding in tokenizer.encode_batch(documents) for token in encoding.ids]
    tokenizer.model.dropout = None
    starts = list(range(rng.randrange(PIECE_TOKENS), len(ids), PIECE_TOKENS))
    rng.shuffle(starts)
    return [token for start in starts for token in ids[start : start + PIECE_TOKENS]]
