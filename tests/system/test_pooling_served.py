"""Embeddings, classification and scores end to end: real workers, HTTP against gRPC."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import torch

from benchmarks.harness.local_engine import LocalEngine
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from gateway.calls.inspect import OUTPUTS
from gateway.grpc.pooling import PIECE_BYTES
from gateway.text.tokenizer import load_tokenizer
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import MODEL, Stack, post
from tests.harness.served_stack import stack_over
from tests.paths import DEMO
from tests.reference.goldens import load_golden
from workers.requests.inspection import InspectionParams, Pooling

_LOADED = load_tokenizer(str(DEMO))
assert _LOADED is not None
TOKENIZER = _LOADED
TEXTS = ["Who is there?", "Speak, and be silent then."]
IDS = [list(TOKENIZER.encode(text, True)) for text in TEXTS]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with stack_over(DEMO, TOKENIZER, engine={"deterministic": "on"}) as stack:
        yield stack


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    return LocalEngine(DEMO, dtype="float32")


@pytest.fixture(scope="module")
def stub(stack: Stack) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        yield InferenceStub(channel)


def answer(stack: Stack, path: str, **fields: Any) -> dict[str, Any]:
    """The body of a call that must succeed."""
    response = post(stack, path, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def inputs(*prompts: str | list[int]) -> list[pb.Input]:
    return [
        pb.Input(text=one)
        if isinstance(one, str)
        else pb.Input(token_ids=types_pb2.TokenIds(ids=one))
        for one in prompts
    ]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings(stack: Stack, stub: InferenceStub, local: LocalEngine, pooling: str) -> None:
    found = local.inspect(IDS, InspectionParams(embedding=Pooling(pooling)))
    want = np.stack([arrays["embedding"].numpy() for arrays in found])
    body = answer(stack, "/v1/embeddings", input=TEXTS, pooling=pooling)
    got = np.array([row["embedding"] for row in body["data"]], dtype=np.float32)
    assert np.abs(got - want).max() < 1e-4
    assert [row["index"] for row in body["data"]] == [0, 1]
    count = sum(map(len, IDS))
    assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (count, count)
    ids = answer(stack, "/v1/embeddings", input=IDS, pooling=pooling, encoding_format="base64")
    raw = [base64.b64decode(row["embedding"]) for row in ids["data"]]
    assert np.abs(np.array([np.frombuffer(one, "<f4") for one in raw]) - want).max() < 1e-4
    message = stub.Embed(pb.EmbedRequest(input=inputs(TEXTS[0], IDS[1]), pooling=pooling))
    assert np.abs(np.array([row.values for row in message.data]) - want).max() < 1e-4
    assert message.usage.prompt_tokens == count


def test_models_name_the_kinds_of_embeddings(stack: Stack) -> None:
    (model,) = stack.http.get("/v1/models").json()["data"]
    assert model["embedding_pooling"] == ["last", "mean"]
    default = answer(stack, "/v1/embeddings", input=IDS[0])["data"][0]["embedding"]
    last = answer(stack, "/v1/embeddings", input=IDS[0], pooling="last")["data"][0]["embedding"]
    assert default == pytest.approx(last, abs=1e-4)


def test_the_openai_client_reads_embeddings(stack: Stack, local: LocalEngine) -> None:
    """It asks for base64, and decodes it itself."""
    client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)
    got = client.embeddings.create(model=MODEL, input=TEXTS[0])
    want = local.inspect(IDS[:1], InspectionParams(embedding=Pooling.LAST))[0]["embedding"]
    assert np.abs(np.array(got.data[0].embedding) - want.numpy()).max() < 1e-4


def test_score_is_the_mean_log_probability_of_the_document(
    stack: Stack, stub: InferenceStub, local: LocalEngine
) -> None:
    documents = [" My lord.", " lord My"]
    tokens = [list(TOKENIZER.encode(text, False)) for text in documents]
    want = []
    for document in tokens:
        ids = [*IDS[0], *document]
        logits = local.inspect([ids], InspectionParams(logits=tuple(range(len(ids)))))[0]["logits"]
        places = range(len(IDS[0]) - 1, len(ids) - 1)
        values = [
            logits[p].log_softmax(-1)[t].item() for p, t in zip(places, document, strict=True)
        ]
        want.append(sum(values) / len(values))
    body = answer(stack, "/v1/score", queries=TEXTS[0], documents=documents)
    assert [row["score"] for row in body["data"]] == pytest.approx(want, abs=1e-4)
    assert want[0] > want[1]
    pairs = answer(stack, "/score", text_1=[IDS[0], IDS[0]], text_2=tokens)
    assert [row["score"] for row in pairs["data"]] == pytest.approx(want, abs=1e-4)
    message = stub.Score(
        pb.ScoreRequest(queries=inputs(TEXTS[0]), documents=inputs(*documents)), timeout=240
    )
    assert [row.score for row in message.data] == pytest.approx(want, abs=1e-4)


def test_trailing_metadata_has_the_usage(stub: InferenceStub) -> None:
    prompts = inputs(*TEXTS)
    calls: list[tuple[Any, Any]] = [
        (stub.Embed, pb.EmbedRequest(input=prompts)),
        (stub.Score, pb.ScoreRequest(queries=prompts[:1], documents=prompts[1:])),
        (stub.Classify, pb.ClassifyRequest(input=prompts, labels=[" Ay.", " No."])),
    ]
    for procedure, request in calls:
        message, call = procedure.with_call(request, timeout=240)
        reported = dict(call.trailing_metadata())
        assert int(reported["x-prompt-tokens"]) == message.usage.prompt_tokens > 0
        assert reported["x-completion-tokens"] == "0"
    ids = [types_pb2.TokenIds(ids=IDS[0])]
    stream = stub.Inspect(pb.InspectRequest(token_ids=ids, outputs=["loss"]), timeout=240)
    assert list(stream)[-1].summary.usage.prompt_tokens == len(IDS[0])
    assert dict(stream.trailing_metadata())["x-prompt-tokens"] == str(len(IDS[0]))


def test_a_language_model_chooses_the_most_probable_label(
    stack: Stack, stub: InferenceStub
) -> None:
    labels = [" lord My", " My lord.", "\n"]
    tokens = [len(TOKENIZER.encode(label, False)) for label in labels]
    means = answer(stack, "/score", queries=TEXTS[0], documents=labels)["data"]
    want = [row["score"] * count for row, count in zip(means, tokens, strict=True)]
    (row,) = answer(stack, "/classify", input=TEXTS[0], labels=labels)["data"]
    assert row["logits"] == pytest.approx(want, abs=1e-3)
    probs = torch.tensor(want, dtype=torch.float64).softmax(-1).tolist()
    assert row["probs"] == pytest.approx(probs, abs=1e-3)
    assert row["label"] == labels[int(np.argmax(want))]
    message = stub.Classify(pb.ClassifyRequest(input=inputs(TEXTS[0]), labels=labels))
    (same,) = message.data
    assert (same.label, same.num_classes) == (row["label"], row["num_classes"])
    assert list(same.logits) == pytest.approx(want, abs=1e-3)


def chunks_by_name(chunks: list[pb.InspectChunk]) -> dict[tuple[int, str], np.ndarray[Any, Any]]:
    """Whole arrays by prompt and name. Pieces must come in order, the summary last."""
    data: dict[tuple[int, str], bytes] = {}
    shapes: dict[tuple[int, str], tuple[str, list[int]]] = {}
    for chunk in chunks[:-1]:
        key = (chunk.piece.index, chunk.piece.name)
        assert chunk.piece.offset == len(data.get(key, b""))
        data[key] = data.get(key, b"") + chunk.piece.data
        shapes[key] = (chunk.piece.dtype, list(chunk.piece.shape))
    assert chunks[-1].WhichOneof("content") == "summary"
    return {
        key: np.frombuffer(raw, shapes[key][0]).reshape(shapes[key][1]) for key, raw in data.items()
    }


ALL = [*OUTPUTS]


def test_a_prompt_of_embeddings(stack: Stack, stub: InferenceStub) -> None:
    """The first of the hidden states are the embeddings."""
    tokens = types_pb2.TokenIds(ids=IDS[1])
    chunks = list(stub.Inspect(pb.InspectRequest(token_ids=[tokens], outputs=["hidden_states"])))
    rows = chunks_by_name(chunks)[0, "hidden_states"][0]
    params = types_pb2.SamplingParams(max_tokens=12, temperature=0.0)
    given = types_pb2.Embeddings(shape=rows.shape, data=rows.tobytes())
    want = stub.Generate(pb.GenerateRequest(token_ids=tokens, sampling_params=params))
    got = stub.Generate(pb.GenerateRequest(embeddings=given, sampling_params=params))
    assert got.choices[0].token_ids == want.choices[0].token_ids
    assert got.choices[0].text == want.choices[0].text
    assert got.usage.prompt_tokens == len(IDS[1])
    narrow = types_pb2.Embeddings(shape=[len(IDS[1]) * 2, rows.shape[1] // 2], data=rows.tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(embeddings=narrow, sampling_params=params))
    assert f"the model needs {rows.shape[1]}" in str(caught.value)


def test_inspect_gives_everything_the_same_by_both_codecs() -> None:
    expected = load_golden("jetmoe-tied")
    tensors = expected.tensors
    ids, mask = tensors["batch.input_ids"], tensors["batch.attention_mask"]
    with stack_over(expected.path) as stack, grpc.insecure_channel(stack.grpc_target) as channel:
        body = answer(
            stack,
            "/v1/inspect",
            token_ids=ids.tolist(),
            attention_mask=mask.tolist(),
            outputs=ALL,
        )
        request = pb.InspectRequest(
            token_ids=[types_pb2.TokenIds(ids=row) for row in ids.tolist()],
            attention_mask=[pb.AttentionMask(mask=row) for row in mask.tolist()],
            outputs=ALL,
        )
        chunks = list(InferenceStub(channel).Inspect(request, timeout=240))
    for i, (row, keep) in enumerate(zip(body["data"], mask.bool(), strict=True)):
        assert row["num_tokens"] == keep.sum()
        logits = torch.tensor(row["logits"])
        assert (logits - tensors["batch.logits"][i][keep]).abs().max() < 5e-4
        assert row["logprobs"][0] is None
        assert [r["layer"] for r in row["routes"]] == [0, 0, 1, 1, 2, 2]
        assert {r["bank"] for r in row["router_logits"]} == {"attention", "mlp"}
        assert len(row["hidden_states"]) == len(row["attentions"]) + 1 == 4
    assert body["aux_loss"]["transformers_5"] == pytest.approx(
        tensors["batch.aux_loss"].item(), abs=1e-4
    )
    assert body["aux_loss"]["transformers_4"] == pytest.approx(
        tensors["batch.aux_loss_v4"].item(), abs=1e-4
    )
    labels = ids.masked_fill(~mask.bool(), -100)
    want = torch.nn.functional.cross_entropy(
        tensors["batch.logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert body["loss"] == pytest.approx(want.item(), abs=1e-4)
    summary = chunks[-1].summary
    assert summary.loss == pytest.approx(body["loss"], abs=1e-4)
    assert dict(summary.aux_loss) == pytest.approx(body["aux_loss"], abs=1e-4)
    assert summary.usage.prompt_tokens == mask.sum()
    arrays = chunks_by_name(chunks)
    for i, row in enumerate(body["data"]):
        for name in ("logits", "hidden_states", "attentions"):
            # Two calls may be batched in two ways, so their sums differ in the last bits.
            assert np.allclose(arrays[i, name], np.array(row[name]), rtol=1e-4, atol=5e-4), name
        for route in row["routes"]:
            name = f"{route['bank']}:{route['layer']}"
            assert arrays[i, f"topk_ids:{name}"].tolist() == route["topk_ids"]


def test_inspect_keeps_logits_and_labels_as_asked(stack: Stack, local: LocalEngine) -> None:
    ids = IDS[1]
    whole = local.inspect([ids], InspectionParams(logits=tuple(range(len(ids)))))[0]["logits"]
    for keep, places in ((2, [len(ids) - 2, len(ids) - 1]), ([0, 3], [0, 3]), (0, range(len(ids)))):
        (row,) = answer(
            stack, "/v1/inspect", token_ids=ids, outputs=["logits"], logits_to_keep=keep
        )["data"]
        assert (torch.tensor(row["logits"]) - whole[list(places)]).abs().max() < 1e-3
    labels = [-100, -100, 7, 9, *[-100] * (len(ids) - 4)]
    body = answer(stack, "/v1/inspect", token_ids=ids, outputs=["loss", "logprobs"], labels=labels)
    reported = body["data"][0]["logprobs"]
    assert [i for i, value in enumerate(reported) if value is not None] == [2, 3]
    want = [whole[1].log_softmax(-1)[7].item(), whole[2].log_softmax(-1)[9].item()]
    assert reported[2:4] == pytest.approx(want, abs=1e-3)
    assert body["loss"] == pytest.approx(-sum(want) / 2, abs=1e-3)
    none = answer(stack, "/v1/inspect", token_ids=ids, outputs=["loss"], labels=[-100] * len(ids))
    assert none["loss"] is None


def test_the_command_prints_what_it_is_asked_for(
    stack: Stack, local: LocalEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> int:
        return main(["--url", stack.url, "--timeout", "60", "inspect", *words])

    ids = IDS[1]
    joined = ",".join(map(str, ids))
    assert run("--ids", joined, "--json", "--output", "logits") == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    want = local.inspect([ids], InspectionParams(logits=tuple(range(len(ids)))))[0]["logits"]
    assert (document["schema"], document["token_ids"]) == (1, ids)
    assert (torch.tensor(document["data"][0]["logits"]) - want).abs().max() < 1e-3
    assert run("--ids", joined, "--bank", "mlp:3") == ExitCode.OK
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].endswith("EXPERTS OF mlp:3")
    assert [line.split()[1] for line in shown.out.splitlines()[1:]] == list(map(str, ids))
    assert shown.err.startswith("loss ")
    assert run("--ids", joined, "--bank", "mlp:9") == ExitCode.REFUSED
    assert "--bank mlp:9 is not one of mlp:0, mlp:1" in capsys.readouterr().err
    assert run("--ids", "5,99999") == ExitCode.REFUSED
    assert "token_ids" in capsys.readouterr().err
    assert run() == ExitCode.USAGE
    assert run("a text", "--output", "logits") == ExitCode.USAGE


def test_large_results_come_in_pieces(stack: Stack, stub: InferenceStub) -> None:
    ids = [(7 * i) % 200 + 3 for i in range(1000)]
    request = pb.InspectRequest(token_ids=[types_pb2.TokenIds(ids=ids)], outputs=["hidden_states"])
    chunks = list(stub.Inspect(request, timeout=240))
    assert len(chunks) > 2
    assert all(len(chunk.piece.data) <= PIECE_BYTES for chunk in chunks)
    states = chunks_by_name(chunks)[0, "hidden_states"]
    assert states.shape[1] == 1000
    assert np.isfinite(states).all()


def test_a_classifiers_logits_and_losses() -> None:
    expected = load_golden("jetmoe-seqcls")
    ids = expected.tensors["right_padded.input_ids"]
    want = expected.tensors["right_padded.logits"]
    with stack_over(expected.path) as stack:
        body = answer(
            stack,
            "/v1/inspect",
            token_ids=ids.tolist(),
            outputs=["logits", "loss", "hidden_states"],
            labels=[0, -100, 2, 1],
        )
        got = torch.tensor([row["logits"][0] for row in body["data"]])
        assert (got - want).abs().max() < 5e-4
        assert len(body["data"][0]["hidden_states"][0]) == ids.shape[1]
        loss = torch.nn.functional.cross_entropy(want, torch.tensor([0, -100, 2, 1]))
        assert body["loss"] == pytest.approx(loss.item(), abs=1e-3)
        wrong = post(
            stack, "/v1/inspect", token_ids=ids.tolist(), outputs=["loss"], labels=[0, 1, 2, 3]
        )
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "labels")


def test_a_classifier_with_padding() -> None:
    expected = load_golden("jetmoe-seqcls")
    tensors, names = expected.tensors, ("negative", "neutral", "positive")
    with stack_over(expected.path) as stack, grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        for batch in ("right_padded", "left_padded", "right_padded_no_mask", "pad_as_text"):
            ids = tensors[f"{batch}.input_ids"].tolist()
            mask = tensors.get(f"{batch}.attention_mask")
            fields: dict[str, Any] = {} if mask is None else {"attention_mask": mask.tolist()}
            rows = answer(stack, "/classify", input=ids, **fields)["data"]
            want = tensors[f"{batch}.logits"]
            assert (torch.tensor([row["logits"] for row in rows]) - want).abs().max() < 5e-4
            assert [row["label"] for row in rows] == [names[i] for i in want.argmax(-1)]
            probs = torch.tensor([row["probs"] for row in rows])
            assert (probs - want.softmax(-1)).abs().max() < 1e-3
            masks = [pb.AttentionMask(mask=row) for row in fields.get("attention_mask", ())]
            message = stub.Classify(pb.ClassifyRequest(input=inputs(*ids), attention_mask=masks))
            for row, other in zip(message.data, rows, strict=True):  # in other steps: rounding
                assert list(row.logits) == pytest.approx(other["logits"], abs=1e-4)
        hidden = post(stack, "/classify", input=[5, 6], attention_mask=[1, 0])
        assert (hidden.status_code, hidden.json()["error"]["param"]) == (400, "attention_mask")
        assert "must not exclude token 1" in hidden.json()["error"]["message"]
        given = post(stack, "/classify", input=[5, 6], labels=["a"])
        assert (given.status_code, given.json()["error"]["param"]) == (400, "labels")
        drawn = post(stack, "/v1/completions", prompt=[5, 6])
        assert (drawn.status_code, drawn.json()["error"]["param"]) == (400, "max_tokens")


def test_a_classifier_without_a_pad_token_takes_one_prompt() -> None:
    expected = load_golden("jetmoe-seqcls-nopad")
    with stack_over(expected.path) as stack:
        ids = list(expected.prompt(3))
        (row,) = answer(stack, "/classify", input=ids)["data"]
        assert row["logits"] == pytest.approx(expected.tensors["p3.logits"].tolist(), abs=5e-4)
        several = post(stack, "/classify", input=[ids, ids])
        assert several.status_code == 400
        assert "there must be one: the model has no pad token" in several.json()["error"]["message"]
