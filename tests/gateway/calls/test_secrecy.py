"""No log has a prompt or a key, whatever is wrong with a request."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import grpc
import httpx
import pytest

from cluster.config.gateway import GatewaySection
from gateway.text.tokenizer import Tokenizer
from protos.inference_pb2 import ListModelsRequest
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import tiny_backend
from tests.gateway.grpc.test_grpc import request_of
from tests.gateway.stack import Stack, running_stack

MARK = "xyzzy-marker"
KEY = "key-xyzzy-marker"
BODIES = [
    {"prompt": f"tell {MARK}", "max_tokens": 2},
    {"prompt": f"tell {MARK}", "max_tokens": -1},
    {"prompt": f"tell {MARK} " * 5000},
    {"prompt": "x", "stop": [MARK], "max_tokens": 2, "stream": True},
    {"prompt": "x", "response_format": {"type": MARK}},
    {"prompt": "x", "structured_outputs": {"regex": f"({MARK}"}},
    {"prompt": [MARK, {MARK: MARK}]},
    {"messages": [{"role": "user", "content": MARK}], "max_tokens": 2},
    {"messages": [{"role": MARK, "content": MARK}]},
    {"messages": [{"role": "user", "content": MARK}], "chat_template": MARK},
    {"input": MARK},
    {"text_1": MARK, "text_2": MARK},
    {"token_ids": MARK},
]
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/embeddings"),
    *("/classify", "/score", "/v1/inspect"),
)


def ask_everything(http: httpx.Client, grpc_target: str, key: str) -> None:
    """Good and bad requests with the mark in prompts, and keys in all places."""
    headers = {"authorization": f"Bearer {key}"}
    wrong = {"authorization": f"Bearer {key}-wrong", "api-key": f"{key}-wrong"}
    for path in PATHS:
        for body in BODIES:
            http.post(path, json=body, headers=headers)
        http.post(path, content=f'{{"prompt": "{MARK}"', headers=headers)
        http.post(path, json=BODIES[0], headers=wrong)
    with grpc.insecure_channel(grpc_target) as channel:
        stub = InferenceStub(channel)
        given = (("authorization", f"Bearer {key}"),)
        for text in (MARK, MARK * 9000):
            message = request_of(text=text, sampling_params={"max_tokens": 2})
            for metadata in (given, (("authorization", f"Bearer {key}-wrong"),)):
                try:
                    stub.Generate(message, metadata=metadata)
                    list(stub.GenerateStream(message, metadata=metadata))
                except grpc.RpcError:
                    continue
        raw = channel.unary_unary("/expertmesh.v1.Inference/Generate", bytes, bytes)
        with pytest.raises(grpc.RpcError):
            raw(b"\xff" + MARK.encode(), metadata=given)
        assert stub.ListModels(ListModelsRequest(), metadata=given).models


class BrokenTokenizer(Tokenizer):
    """A bug that meets a prompt."""

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        raise ZeroDivisionError(f"about {text}")


@pytest.fixture
def keyed() -> Iterator[Stack]:
    with running_stack(GatewaySection(api_keys=(KEY,))) as stack:
        yield stack


def test_logs_have_neither_prompts_nor_keys(keyed: Stack, caplog: pytest.LogCaptureFixture) -> None:
    # gRPC logs a server while it frees it: a kept record then has freed memory
    caplog.set_level(logging.INFO, "grpc._cython.cygrpc")
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("gateway.test").info("logs are seen")
        ask_everything(keyed.http, keyed.grpc_target, KEY)
    assert "logs are seen" in caplog.text
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert [r.getMessage() for r in ours if MARK in r.getMessage()] == []
    assert [r for r in ours if r.exc_info and MARK in str(r.exc_info)] == []


def test_a_bug_shows_its_request_id_only(caplog: pytest.LogCaptureFixture) -> None:
    with running_stack(tokenizer=BrokenTokenizer(tiny_backend())) as stack:
        headers = {"x-request-id": "the-id"}
        answer = stack.http.post("/v1/completions", json=BODIES[0], headers=headers)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error in request the-id"
    assert "the-id" in caplog.text
