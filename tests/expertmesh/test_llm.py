"""``LLM``: a model in this process."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import expertmesh.llm
from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from cluster.core.errors import CheckpointError, ConfigError, QueueFullError
from cluster.launch.model_source import bundled_checkpoint
from expertmesh import (
    LLM,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
    RequestOutput,
    SamplingParams,
)
from expertmesh.types import ChatOptions, Message, Prompt, Query
from gateway.calls.gateway import Gateway
from tests.reference.goldens import MAX_MODEL_LEN, Golden, load_golden
from tests.reference.parity import GREEDY as GOLDEN_GREEDY
from workers.engine.embedded import EmbeddedEngine

pytestmark = pytest.mark.heavy

GREEDY = SamplingParams(temperature=0, max_tokens=12)
MESSAGE: Message = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled checkpoint."""
    with LLM(dtype="float32", num_threads=1) as llm:
        yield llm


@pytest.mark.parametrize("variant", ["olmoe-norm-gqa-clip", "dots1-groups"])
def test_tokens_equal_the_golden_ones(golden: Callable[[str], Golden], variant: str) -> None:
    expected = golden(variant)
    params = SamplingParams(temperature=0, max_tokens=GOLDEN_GREEDY.max_tokens, ignore_eos=True)
    with LLM(expected.path, dtype="float32", max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        results = llm.generate(expected.prompts, params)
    for i, result in enumerate(results):
        assert tuple(result.outputs[0].token_ids) == tuple(expected.greedy(i))
        assert result.prompt_token_ids == list(expected.prompts[i])
        assert result.prompt is None


def test_a_stream_adds_up_to_the_whole_output(llm: LLM) -> None:
    (whole,) = llm.generate("ROMEO:", GREEDY)
    pieces = list(llm.generate_stream("ROMEO:", GREEDY))
    assert whole.prompt == "ROMEO:"
    assert "".join(p.outputs[0].text for p in pieces) == whole.outputs[0].text != ""
    assert [t for p in pieces for t in p.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert pieces[0].prompt_token_ids == whole.prompt_token_ids
    assert [p.outputs[0].finish_reason for p in pieces][-1] == whole.outputs[0].finish_reason
    assert whole.outputs[0].finish_reason == "length"


def test_a_stream_that_is_left_ends_its_request(llm: LLM) -> None:
    for _ in llm.generate_stream("ROMEO:", SamplingParams(max_tokens=400, ignore_eos=True)):
        break
    assert llm.generate("ROMEO:", GREEDY)[0].finished


def test_text_and_token_ids_and_several_prompts_give_the_same(llm: LLM) -> None:
    texts: list[Prompt] = ["ROMEO:", {"prompt": "JULIET:"}]
    first, second = llm.generate(texts, GREEDY)
    prompts: list[Prompt] = [first.prompt_token_ids, {"prompt_token_ids": second.prompt_token_ids}]
    again = llm.generate(prompts, [GREEDY, GREEDY])
    assert [r.outputs for r in again] == [first.outputs, second.outputs]


def test_logprobs_have_the_sampled_token_and_alternatives(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    (result,) = llm.generate("ROMEO:", params)
    (output,) = result.outputs
    assert output.logprobs is not None
    own = [one[token] for token, one in zip(output.token_ids, output.logprobs, strict=True)]
    assert [one.rank for one in own] == [1, 1, 1, 1]
    assert {len(one) for one in output.logprobs} == {2}
    assert output.cumulative_logprob == pytest.approx(math.fsum(one.logprob for one in own))
    assert "".join(str(one.decoded_token) for one in own) == output.text
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert result.prompt_token_ids[1] in (result.prompt_logprobs[1] or {})


def test_stop_strings_end_the_output_and_are_named(llm: LLM) -> None:
    (whole,) = llm.generate("ROMEO:", GREEDY)
    stop = whole.outputs[0].text[4:7]
    (ended,) = llm.generate("ROMEO:", SamplingParams(temperature=0, max_tokens=12, stop=stop))
    assert whole.outputs[0].text.split(stop)[0] == ended.outputs[0].text
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", stop)


def test_seeds_and_n(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=7, max_tokens=8)
    (first,), (second,) = llm.generate("ROMEO:", params), llm.generate("ROMEO:", params)
    assert first.outputs == second.outputs
    assert [output.index for output in first.outputs] == [0, 1]
    assert first.outputs[0].token_ids != first.outputs[1].token_ids


def test_a_chat_is_rendered_by_the_template(llm: LLM) -> None:
    messages = [MESSAGE]
    parts: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    first, second = llm.chat([messages, parts], GREEDY)
    assert first.outputs == second.outputs
    assert first.prompt_token_ids == second.prompt_token_ids
    text = "".join(p.outputs[0].text for p in llm.chat_stream(messages, GREEDY))
    assert text == first.outputs[0].text


def test_embeddings_are_by_prompt(llm: LLM) -> None:
    first, second = llm.embed(["ROMEO:", "JULIET:"])
    assert len(first.outputs.embedding) == len(second.outputs.embedding) > 0
    assert first.outputs.embedding != second.outputs.embedding
    (mean,) = llm.embed("ROMEO:", pooling="mean")
    assert mean.outputs.embedding != first.outputs.embedding


def test_encode_returns_the_vector_of_embed(llm: LLM) -> None:
    (encoded,), (embedded,) = llm.encode("ROMEO:"), llm.embed("ROMEO:")
    assert encoded.outputs.data == embedded.outputs.embedding
    with pytest.raises(BadRequestError, match="the model has no classes"):
        llm.encode("ROMEO:", pooling_task="classify")
    with pytest.raises(ValueError, match=r"pooling_task \(score\) must be embed or classify"):
        llm.encode("ROMEO:", pooling_task="score")  # type: ignore[arg-type]


def test_encode_returns_the_probabilities_of_a_classifier() -> None:
    expected = load_golden("jetmoe-seqcls")
    with LLM(expected.path, dtype="float32", num_threads=1) as llm:
        (result,) = llm.encode([7, 8, 9], pooling_task="classify")
        again = llm.encode([[7, 8, 9]] * 2, pooling_task="classify")
    assert len(result.outputs.data) == 3
    assert math.fsum(result.outputs.data) == pytest.approx(1)
    assert [one.outputs.data for one in again] == [result.outputs.data] * 2


def test_a_call_names_its_adapter(llm: LLM, tmp_path: Path) -> None:
    checkpoint = bundled_checkpoint()
    folder = random_adapter(target_shapes(checkpoint), 1).write(tmp_path / "a")
    (plain,) = llm.generate("ROMEO:", GREEDY)
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1}
    with LLM(checkpoint, lora_modules=(f"own={folder}",), **options) as adapted:
        first, second = adapted.generate(["ROMEO:", "JULIET:"], GREEDY, lora_request="own")
        assert adapted.generate("ROMEO:", GREEDY)[0].outputs == plain.outputs
        pieces = adapted.generate_stream("ROMEO:", GREEDY, lora_request="own")
        assert "".join(piece.outputs[0].text for piece in pieces) == first.outputs[0].text
        assert adapted.chat([MESSAGE], GREEDY) != adapted.chat(
            [MESSAGE], GREEDY, lora_request="own"
        )
        assert adapted.embed("ROMEO:") != adapted.embed("ROMEO:", lora_request="own")
        with pytest.raises(NotFoundError, match="'other' does not exist"):
            adapted.generate("ROMEO:", lora_request="other")
    assert plain.outputs[0].logprobs is None
    assert first.outputs != plain.outputs
    assert second.outputs != first.outputs


def test_streams_of_chats_have_the_options_of_chats(llm: LLM) -> None:
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    messages: list[Message] = [MESSAGE, {"role": "assistant", "content": "ROMEO:"}]
    (whole,) = llm.chat(messages, GREEDY, **options)
    pieces = list(llm.chat_stream(messages, GREEDY, **options))
    assert pieces[0].prompt_token_ids == whole.prompt_token_ids
    assert whole.prompt_token_ids != llm.chat(messages, GREEDY)[0].prompt_token_ids
    with pytest.raises(TypeError, match="tools is not an option; the options: add_generation"):
        llm.chat(messages, tools=[])  # type: ignore[call-arg]


def test_structured_output_follows_its_choices(llm: LLM) -> None:
    params = SamplingParams(structured_outputs={"choice": ["yes", "no"]})
    assert llm.generate("ROMEO:", params)[0].outputs[0].text in ("yes", "no")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_p": 3}, "top_p"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
)
def test_an_invalid_parameter_is_named(llm: LLM, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError, match=param) as caught:
        llm.generate("ROMEO:", SamplingParams(**fields))
    assert caught.value.status == 400
    assert str(caught.value.param).startswith(param)


def test_parameters_must_be_one_or_one_per_prompt(llm: LLM) -> None:
    wrong: Any = ([GREEDY], {"temperature": 0, "top_p": 1}, [GREEDY, None])
    for params in wrong:
        with pytest.raises(ValueError, match=r"sampling_params \(.*must be one SamplingParams, or"):
            llm.generate(["a", "b"], params)


@pytest.mark.parametrize("prompts", [None, 5, [None], {"text": "a"}, [["a", "b"]], [[1.5]]])
def test_a_prompt_must_be_a_text_or_token_ids(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts \(.*\) must be texts or token ids"):
        llm.generate(prompts, GREEDY)


def test_arrays_are_token_ids(llm: LLM) -> None:
    (expected,) = llm.generate([3, 4], GREEDY)
    ids: Any = np.array([3, 4])
    for prompts in (ids, [ids]):
        (found,) = llm.generate(prompts, GREEDY)
        assert found.outputs == expected.outputs
        assert [type(one) for one in found.prompt_token_ids] == [int, int]


@pytest.mark.parametrize(
    "messages", ["Hello", ["Hello"], [["Hello"]], [MESSAGE, "Hello"], MESSAGE, None, [None]]
)
def test_messages_must_be_dicts(llm: LLM, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"messages \(.*\) must be dicts"):
        llm.chat(messages, GREEDY)


def test_an_unexpected_error_of_a_request_ends_only_this_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(EmbeddedEngine, "add_request", refuse)
        with pytest.raises(InternalServerError, match="no memory"):
            llm.generate("ROMEO:", GREEDY)
    assert llm.generate("ROMEO:", GREEDY)[0].finished


def test_a_refused_request_names_the_time_of_a_retry(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise QueueFullError("the queue is full", 2.5)

    monkeypatch.setattr(Gateway, "start", refuse)
    with pytest.raises(RateLimitError, match="the queue is full") as caught:
        llm.generate("ROMEO:", GREEDY)
    assert caught.value.retry_after_s == 2.5


def test_close_frees_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[weakref.ref[EmbeddedEngine]] = []
    describe = EmbeddedEngine.describe

    def note(engine: EmbeddedEngine, name: str) -> Any:
        engines.append(weakref.ref(engine))
        return describe(engine, name)

    monkeypatch.setattr(EmbeddedEngine, "describe", note)
    llm = LLM(dtype="float32", num_threads=1)
    assert llm.generate("ROMEO:", GREEDY)[0].finished
    llm.close()
    gc.collect()
    assert [engine() for engine in engines] == [None]


def test_a_failed_start_ends_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no gateway")

    monkeypatch.setattr(expertmesh.llm, "Gateway", fail)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="no gateway"):
        LLM(dtype="float32", num_threads=1)
    assert set(threading.enumerate()) <= before


def test_all_sequences_of_a_step_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    running, is_full = 0, asyncio.Event()

    async def generate(_: object, query: Query) -> RequestOutput:
        nonlocal running
        running += 1
        if running == 200:
            is_full.set()
        await asyncio.wait_for(is_full.wait(), 10)
        return RequestOutput("", None, [], [])

    monkeypatch.setattr(expertmesh.llm._EmbeddedTransport, "generate", generate)
    with LLM(dtype="float32", num_threads=1, max_num_seqs=200) as llm:
        assert len(llm.generate(["a"] * 200)) == 200


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_num_seq": 8}, r"max_num_seq \(8\) is not an option of LLM"),
        ({"max_num_seqs": 0}, r"max_num_seqs \(0\) must be at least 1"),
        ({"max_num_seqs": "many"}, r"max_num_seqs \(many\) has the wrong type"),
        ({"ngram_min": 2}, r"ngram_min \(2\) is not an option of LLM"),
        ({"dtype": "float16"}, r"dtype \(float16\) must be one of"),
        ({"num_threads": 0}, r"num_threads \(0\) must be"),
    ],
)
def test_an_invalid_option_is_named_before_anything_is_loaded(
    options: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(expertmesh.llm, "find_model", load)
    with pytest.raises(ConfigError, match=text):
        LLM(**options)


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        LLM("/no/such/folder")
