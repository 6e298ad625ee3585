"""Embeddings, classes, scores and inspections of a real server, over HTTP and gRPC."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.harness.local_engine import LocalEngine
from benchmarks.harness.server import WAIT_S, Served
from cluster.launch.model_source import bundled_checkpoint
from gateway.calls.inspect import OUTPUTS
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.system.test_pooling_served import chunks_by_name, inputs
from workers.requests.inspection import InspectionParams, Pooling

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("unharmed")]

IDS = [7, 300, 41, 9, 512, 88, 23]


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    """The same model in this process."""
    return LocalEngine(bundled_checkpoint(), dtype="float32")


def answer(server: Served, path: str, **fields: Any) -> dict[str, Any]:
    response = server.client.post(path, json=fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def test_embeddings(server: Served, stub: InferenceStub, local: LocalEngine) -> None:
    want = local.inspect([IDS], InspectionParams(embedding=Pooling.MEAN))[0]["embedding"].numpy()
    body = answer(server, "/v1/embeddings", input=IDS, pooling="mean")
    assert np.abs(np.array(body["data"][0]["embedding"]) - want).max() < 1e-4
    message = stub.Embed(pb.EmbedRequest(input=inputs(IDS), pooling="mean"), timeout=WAIT_S)
    assert np.abs(np.array(message.data[0].values) - want).max() < 1e-4


def test_scores_and_labels(server: Served, stub: InferenceStub, local: LocalEngine) -> None:
    logits = local.inspect([IDS], InspectionParams(logits=tuple(range(len(IDS)))))[0]["logits"]
    logprobs = logits.log_softmax(-1)
    want = [logprobs[i, IDS[i + 1]].item() for i in (4, 5)]
    body = answer(server, "/score", queries=IDS[:5], documents=IDS[5:])
    assert body["data"][0]["score"] == pytest.approx(sum(want) / 2, abs=1e-4)
    asked = pb.ScoreRequest(queries=inputs(IDS[:5]), documents=inputs(IDS[5:]))
    assert stub.Score(asked, timeout=WAIT_S).data[0].score == pytest.approx(sum(want) / 2, abs=1e-4)
    labels = [" my lord", " sir"]
    (row,) = answer(server, "/classify", input="Ay,", labels=labels)["data"]
    (same,) = stub.Classify(
        pb.ClassifyRequest(input=inputs("Ay,"), labels=labels), timeout=WAIT_S
    ).data
    assert same.label == row["label"] == labels[int(np.argmax(row["logits"]))]
    assert list(same.logits) == pytest.approx(row["logits"], abs=1e-4)


def test_inspections(server: Served, stub: InferenceStub, local: LocalEngine) -> None:
    body = answer(server, "/v1/inspect", token_ids=IDS, outputs=list(OUTPUTS))
    (row,) = body["data"]
    request = pb.InspectRequest(token_ids=[types_pb2.TokenIds(ids=IDS)], outputs=OUTPUTS)
    chunks = list(stub.Inspect(request, timeout=WAIT_S))
    arrays = chunks_by_name(chunks)
    names = ("logits", "hidden_states", "attentions")
    wanted = InspectionParams(
        logits=tuple(range(len(IDS))), labels=tuple(IDS), hidden_states=True, attentions=True
    )
    want = local.inspect([IDS], wanted)[0]
    for name in names:
        assert np.allclose(np.array(row[name]), want[name].numpy(), atol=5e-4), name
        assert np.allclose(arrays[0, name], want[name].numpy(), atol=5e-4), name
    loss = -want["logprobs"][1:].mean().item()
    assert body["loss"] == pytest.approx(loss, abs=1e-4)
    assert chunks[-1].summary.loss == pytest.approx(loss, abs=1e-4)
    assert dict(chunks[-1].summary.aux_loss) == pytest.approx(body["aux_loss"], abs=1e-4)
    assert {bank["layer"] for bank in row["routes"]} == set(range(local.config.num_layers))


def test_what_is_too_large_is_refused_with_its_size(server: Served) -> None:
    """No part of the request reaches a worker."""
    before = server.wait_idle()["prompt_tokens_total"]
    asked = {"token_ids": [IDS * 500], "outputs": ["hidden_states", "logits"]}
    response = server.client.post("/v1/inspect", json=asked)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "outputs")
    assert "bytes, at most" in error["message"]
    assert server.wait_idle()["prompt_tokens_total"] == before
