"""Accepted drafts of n-gram lookup on text: ``python -m benchmarks.engine.acceptance``.

Drafts with the defaults of `--speculative-method ngram`, for text from the 5% of the bundled
model's corpus that was not used in training. The model generates 128 tokens after each passage of
192 tokens (*continued*), and after each passage with its first 64 tokens repeated at the end
(*repeated*). The model is too small to copy from its prompt. Two more kinds of text are therefore
edits of the prompt, not outputs of the model: the passage with other names of speakers, and every
other line of it. Each text is then replayed with the drafts that the engine would choose at a fixed
price: the probability of being right above which a guess gets a row. The engine assumes a price of
0.3 until it has timed steps; 0.02 is the lowest price, for steps in which more rows take no longer.
No number depends on the machine's speed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.engine.held_out import HeldOut, bundled_tokenizer, held_out, held_out_text
from benchmarks.engine.kv_accuracy import num_equal
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.results import table
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.launch.model_source import bundled_checkpoint
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.speculation.speculator import Speculator

PASSAGE_TOKENS = 192
AGAIN_TOKENS = 64
NEW_TOKENS = 128
SPEECHES = 8
"""Speeches in a passage that is edited."""
NGRAM = SpeculationSection(speculative_method="ngram")


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its output."""

    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(frozen=True, slots=True)
class Found:
    """Results of all texts of a kind."""

    num_tokens: int
    """Number of tokens without the first one of each text, which belongs to the prefill."""
    num_steps: int
    num_drafted: int
    num_accepted: int


def drawn(prompts: Sequence[Sequence[int]], temperature: float) -> list[Text]:
    """Outputs of the bundled model, without drafts, as drafts change no token."""
    engine = LocalEngine(bundled_checkpoint(), section=EngineSection(max_num_seqs=32))
    each = [
        SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    results = engine.generate(prompts, each)
    return [Text(p, result.token_ids) for p, result in zip(prompts, results, strict=True)]


def begun_again(passage: Sequence[int]) -> Sequence[int]:
    """The passage followed by its first tokens."""
    return [*passage, *passage[:AGAIN_TOKENS]]


def edited(edit: Callable[[str], str], max_passages: int | None) -> Iterator[Text]:
    """Yield prompts of a passage and an end of text, with the edited passage as output."""
    tokenizer, eos = bundled_tokenizer(), held_out(1).eos
    speeches = held_out_text().split("\n\n")
    passages = ["\n\n".join(speeches[i : i + SPEECHES]) for i in range(0, len(speeches), SPEECHES)]
    for passage in passages[:max_passages]:
        yield Text([*tokenizer.encode(passage).ids, eos], tokenizer.encode(edit(passage)).ids)


def with_other_speakers(passage: str) -> str:
    """Replace the name of each speaker by the next name in the alphabet.

    >>> with_other_speakers("ANTONIO:\\nGo sleep.\\n\\nALONSO:\\nWhat?")
    'ALONSO:\\nGo sleep.\\n\\nANTONIO:\\nWhat?'
    """
    speeches = [speech.partition(":\n") for speech in passage.split("\n\n")]
    names = sorted({name for name, colon, _ in speeches if colon})
    others = dict(zip(names, (*names[1:], *names[:1]), strict=True))
    return "\n\n".join(
        f"{others.get(name, name) if colon else name}{colon}{words}"
        for name, colon, words in speeches
    )


def every_other_line(passage: str) -> str:
    """Keep the first, third, fifth line and so on, without empty lines."""
    return "\n".join([line for line in passage.split("\n") if line][::2])


def speculator_of(price: float, eos: int) -> Speculator:
    """Return a speculator with the assumed price of a row (0.3), or with the lowest price."""
    speculator = Speculator(NGRAM, sys.maxsize, (eos,))
    if price < 0.3:
        for rows in (1, 1 + NGRAM.num_speculative_tokens) * 25:
            speculator.observe_step(rows, 0, 1.0)  # equal times with more rows
    speculator.plan_step(1)
    assert math.isclose(speculator.stats()["spec_decode_row_price"], price)
    return speculator


def replay(texts: Sequence[Text], price: float, eos: int) -> Found:
    """Decode given texts in order."""
    speculator, num_tokens, num_steps = speculator_of(price, eos), 0, 0
    for text in texts:
        params = SamplingParams(max_tokens=len(text.output), ignore_eos=True)
        request = Request(request_id="", prompt=tuple(text.prompt), params=params)
        sequence = SequenceState(request, 0, 0, math.inf, output=list(text.output[:1]))
        while left := text.output[len(sequence.output) :]:
            drafts = speculator.draft(sequence)
            tokens = left[: 1 + num_equal(drafts, left[: len(drafts)])]
            sequence.output += tokens
            speculator.commit(sequence, drafts, tokens)
            num_tokens, num_steps = num_tokens + len(tokens), num_steps + 1
        speculator.forget(sequence)
    stats = speculator.stats()
    return Found(
        num_tokens=num_tokens,
        num_steps=num_steps,
        num_drafted=int(stats["spec_decode_num_draft_tokens_total"]),
        num_accepted=int(stats["spec_decode_num_accepted_tokens_total"]),
    )


def texts_of(source: HeldOut, max_passages: int | None) -> Iterator[tuple[str, list[Text]]]:
    """Yield all kinds of text with their labels."""
    whole = [part for part in source.parts(PASSAGE_TOKENS) if len(part) == PASSAGE_TOKENS]
    free = whole[:max_passages]
    again = [begun_again(passage) for passage in free]
    for name, prompts in (("continued passage", free), ("repeated passage", again)):
        for temperature in (0.0, 1.0):
            how = f"temperature {temperature:.0f}" if temperature else "greedy"
            yield f"{name}, {how}", drawn(prompts, temperature)
    yield "edit: other names of speakers", list(edited(with_other_speakers, max_passages))
    yield "edit: every other line", list(edited(every_other_line, max_passages))


def section(quick: bool) -> str:
    """Return the Markdown section."""
    source = held_out()
    rows = []
    for name, texts in texts_of(source, 3 if quick else None):
        for price in (0.3, 0.02):
            found = replay(texts, price, source.eos)
            drafted, accepted = found.num_drafted, found.num_accepted
            rows.append(
                [
                    *(name, f"{price}", f"{found.num_tokens:,}"),
                    f"{drafted / found.num_tokens:.2f}",
                    f"{accepted / drafted:.0%}" if drafted else "",
                    f"{found.num_tokens / found.num_steps:.2f}",
                ]
            )
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    head = ["text", "price of a row", "tokens", "draft tokens per output token", "accepted"]
    head += ["tokens in a step"]
    return f"## Acceptance of n-gram drafts\n\n{about}\n\n{table(head, rows)}"


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
