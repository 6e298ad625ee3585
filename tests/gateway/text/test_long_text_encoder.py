"""Long texts are tokenized in a process of its own, as they are here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from cluster.core.errors import RequestError, RequestFailedError
from gateway.offload.long_work import LongWork, copy_numbers
from gateway.text import encoding
from gateway.text.encoding import TextEncoder, check_num_tokens
from gateway.text.harmony.special_tokens import SPECIAL_TOKENS, HarmonyPrompt, SpecialToken
from gateway.text.long_text_encoder import LongTextEncoder
from gateway.text.tokenizer import Tokenizer, load_tokenizer
from tests.paths import DEMO

pytestmark = pytest.mark.heavy

FILE = DEMO / "tokenizer.json"
TEXT = "ROMEO: so it is, \u8a9e \U0001f600\n" * 2000


def tokenizer() -> Tokenizer:
    found = load_tokenizer(str(DEMO))
    assert found is not None
    return found


@asynccontextmanager
async def process() -> AsyncIterator[LongTextEncoder]:
    made = LongTextEncoder(FILE)
    try:
        yield made
    finally:
        await made.stop()


@pytest.mark.parametrize("kept", [slice(None), slice(5), slice(-7, None), slice(0)])
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_the_same(kept: slice, special: bool) -> None:
    async def encode() -> tuple[tuple[int, ...], int]:
        async with process() as texts:
            ids, count = await texts.encode(TEXT, special, kept)
            return tuple(ids), count

    expected = tokenizer().encode(TEXT, special)
    assert asyncio.run(encode()) == (expected[kept], len(expected))


def test_marks_stay_marks() -> None:
    text = HarmonyPrompt(
        [
            SpecialToken(next(iter(SPECIAL_TOKENS))),
            "so it is",
            SpecialToken(next(iter(SPECIAL_TOKENS))),
        ]
    )

    async def encode() -> tuple[int, ...]:
        async with process() as texts:
            return tuple((await texts.encode(text, False, slice(None)))[0])

    assert asyncio.run(encode()) == tokenizer().encode(text, False)


def test_a_call_that_is_cancelled_ends_the_process_and_the_next_one_starts_another() -> None:
    async def run() -> tuple[int | None, int]:
        async with process() as texts:
            await texts.encode("a", False, slice(None))
            first = texts._process
            assert first is not None
            call = asyncio.create_task(texts.encode("a " * 4_000_000, False, slice(None)))
            while texts._process is not None:  # the call has it
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            _, count = await texts.encode("a", False, slice(None))
            return await first.wait(), count

    code, count = asyncio.run(run())
    assert (code, count) == (-9, len(tokenizer().encode("a", False)))


@pytest.mark.parametrize("waits", [True, False])
def test_a_process_that_ended_is_replaced(waits: bool) -> None:
    """The system may end it for lack of memory, before or during a call."""

    async def run() -> list[int]:
        async with process() as texts:
            counts = [(await texts.encode("a", False, slice(None)))[1]]
            ended = texts._process
            assert ended is not None
            ended.kill()
            if waits:
                await ended.wait()
            else:
                with pytest.raises(RequestFailedError, match="ended"):
                    await texts.encode("a", False, slice(None))
            counts.append((await texts.encode("a", False, slice(None)))[1])
            return counts

    assert asyncio.run(run()) == [len(tokenizer().encode("a", False))] * 2


def test_stopping_after_the_process_ended() -> None:
    async def run() -> None:
        async with process() as texts:
            await texts.encode("a", False, slice(None))
            ended = texts._process
            assert ended is not None
            ended.kill()
            await ended.wait()

    asyncio.run(run())


def test_only_long_texts_go_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "LONG_CHARS", 1000)
    long: list[int] = []
    encode = LongTextEncoder.encode

    async def note(texts: LongTextEncoder, text: str, special: bool, kept: slice) -> object:
        long.append(len(text))
        return await encode(texts, text, special, kept)

    monkeypatch.setattr(LongTextEncoder, "encode", note)

    async def run() -> list[encoding.EncodedText]:
        work = LongWork()
        encoder = TextEncoder(tokenizer(), work)
        try:
            return await encoder.encode(["a" * 1000, TEXT, (1, 2, 3)], False, slice(2))
        finally:
            await encoder.stop()
            work.stop()

    found = asyncio.run(run())
    own = tokenizer()
    expected = [own.encode("a" * 1000, False), own.encode(TEXT, False), (1, 2, 3)]
    assert found == [(ids[:2], len(ids)) for ids in expected]
    assert long == [len(TEXT)]


def test_many_ids_are_taken_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million at once would hold the interpreter lock for 46 ms."""
    monkeypatch.setattr(encoding, "LONG_CHARS", 1000)
    taken: list[int] = []

    def note(ids: Sequence[int]) -> tuple[int, ...]:
        taken.append(len(ids))
        return copy_numbers(ids)

    monkeypatch.setattr(encoding, "copy_numbers", note)

    async def run() -> list[encoding.EncodedText]:
        work = LongWork()
        encoder = TextEncoder(tokenizer(), work)
        try:
            return await encoder.encode([TEXT], False, slice(None))
        finally:
            await encoder.stop()
            work.stop()

    (found,) = asyncio.run(run())
    assert taken == [found.num_tokens] == [len(found.ids)]


def test_too_many_tokens_are_refused_by_name() -> None:
    check_num_tokens("prompt", encoding.MAX_TOKENS)
    with pytest.raises(RequestError, match="prompt has 1048577 tokens, at most 1048576") as caught:
        check_num_tokens("prompt", encoding.MAX_TOKENS + 1)
    assert caught.value.param == "prompt"
