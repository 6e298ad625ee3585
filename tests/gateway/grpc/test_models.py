"""Two models in one gateway over gRPC: every method uses the model that the request names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import BACKEND, VOCAB_SIZE, other_tokenizer
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.stack import MODEL, OTHER_MODEL, Stack

TEXT = "hello world"
OTHER_IDS = list(other_tokenizer().encode(TEXT))


@pytest.fixture
def stub(pair: Stack) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(pair.grpc_target) as channel:
        yield InferenceStub(channel)


def test_the_models_are_listed_with_their_own_facts(stub: InferenceStub) -> None:
    models = stub.ListModels(pb.ListModelsRequest()).models
    assert [(m.id, m.root, m.parent, m.vocab_size) for m in models] == [
        (MODEL, MODEL, "", VOCAB_SIZE),
        (OTHER_MODEL, OTHER_MODEL, "", VOCAB_SIZE),
    ]
    for model in models:
        assert stub.GetModelInfo(pb.GetModelInfoRequest(model=model.id)) == model
    assert stub.GetModelInfo(pb.GetModelInfoRequest()) == models[0]


def test_texts_are_in_the_tokens_of_the_model(pair: Stack, stub: InferenceStub) -> None:
    said = list(other_tokenizer().encode("of another model"))
    other = pair.others[OTHER_MODEL].engine
    other.script = lambda request, choice: said
    request = request_of(model=OTHER_MODEL, text=TEXT, sampling_params={"max_tokens": 16})
    assert stub.Generate(request).choices[0].text == "of another model"
    chunks = list(stub.GenerateStream(request))
    assert "".join(chunk.text for chunk in chunks) == "of another model"
    assert [list(found.prompt) for found in other.requests] == [OTHER_IDS, OTHER_IDS]
    assert not pair.engine.requests


def test_tokens_are_those_of_the_model(stub: InferenceStub) -> None:
    for model, ids in (("", BACKEND.encode(TEXT).ids), (OTHER_MODEL, OTHER_IDS)):
        found = stub.Tokenize(pb.TokenizeRequest(model=model, prompt=TEXT))
        assert list(found.tokens) == ids
        back = stub.Detokenize(pb.DetokenizeRequest(model=model, tokens=ids))
        assert back.prompt == TEXT


def test_pooled_prompts_are_read_by_the_engine_of_the_model(
    pair: Stack, stub: InferenceStub
) -> None:
    request = pb.EmbedRequest(model=OTHER_MODEL)
    request.input.add().text = TEXT
    with pytest.raises(grpc.RpcError):  # the scripted engine has no vectors to return
        stub.Embed(request)
    assert list(pair.others[OTHER_MODEL].engine.requests[0].prompt) == OTHER_IDS
    assert not pair.engine.requests


@pytest.mark.parametrize(
    "call",
    [
        lambda stub: stub.Generate(pb.GenerateRequest(model="third", text="x")),
        lambda stub: list(stub.GenerateStream(pb.GenerateRequest(model="third", text="x"))),
        lambda stub: stub.Tokenize(pb.TokenizeRequest(model="third", prompt="x")),
        lambda stub: stub.Detokenize(pb.DetokenizeRequest(model="third", tokens=[1])),
        lambda stub: stub.GetModelInfo(pb.GetModelInfoRequest(model="third")),
    ],
)
def test_a_model_that_is_not_served_is_unknown(
    stub: InferenceStub, call: Callable[[Any], Any]
) -> None:
    code, text, _ = failure(lambda: call(stub))
    assert (code, text) == (grpc.StatusCode.NOT_FOUND, "the model 'third' does not exist")
