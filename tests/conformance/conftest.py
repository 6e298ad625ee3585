"""One real model behind one gateway, in threads, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from cluster.config.gateway import GatewaySection
from gateway.text.tokenizer import load_tokenizer
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import WAIT_S, Stack
from tests.harness.served_stack import stack_over
from tests.paths import DEMO

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The bundled model's chat template, with tools as Qwen's have them."""


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The bundled model with tools; the same request has the same tokens whenever it is sent."""
    tokenizer = load_tokenizer(str(DEMO), TOOL_TEMPLATE)
    folder = tmp_path_factory.mktemp("state") / "state"
    section = GatewaySection(state_dir=str(folder), request_timeout_s=WAIT_S)
    with stack_over(DEMO, tokenizer, section=section, engine={"deterministic": "on"}) as stack:
        yield stack


@pytest.fixture(scope="package")
def stub(stack: Stack) -> Iterator[InferenceStub]:
    """Its gRPC client."""
    with grpc.insecure_channel(stack.grpc_target) as channel:
        yield InferenceStub(channel)
