"""Beam search over HTTP and gRPC, and in every layout: the beams of transformers on goldens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from benchmarks.harness.serving_cluster import ThreadCluster, serving
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import WAIT_S, Stack, complete
from tests.harness.golden_clusters import colocated_config, float32_config
from tests.harness.served_stack import stack_over
from tests.harness.tiers import quick_values
from tests.reference.beams import (
    CLEAR_MARGIN,
    SCORE_TOLERANCE,
    BeamCase,
    FoundBeams,
    a_few_cases,
    check_beams,
    transformers_beams,
)
from tests.reference.goldens import MAX_MODEL_LEN, Golden

Clear = list[tuple[BeamCase, FoundBeams]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "apart": {},
    "no prefix cache": {"engine": {"enable_prefix_caching": False, "max_num_seqs": 3}},
    "deterministic": {"engine": {"deterministic": "on", "num_micro_batches": 2}},
}


@pytest.fixture(scope="module")
def clear(golden: Callable[[str], Golden]) -> Clear:
    cases = a_few_cases(golden("olmoe-base"))
    found = transformers_beams(golden("olmoe-base"), cases)
    return [pair for pair in zip(cases, found, strict=True) if pair[1].margin > CLEAR_MARGIN]


@pytest.fixture(scope="module", params=LAYOUTS)
def stack(golden: Callable[[str], Golden], request: pytest.FixtureRequest) -> Iterator[Stack]:
    options = {"max_model_len": MAX_MODEL_LEN, **LAYOUTS[request.param]}
    with stack_over(golden("olmoe-base").path, **options) as stack:
        yield stack


def over_http(stack: Stack, case: BeamCase) -> list[tuple[list[int], float]]:
    answer = complete(
        stack,
        prompt=case.prompt,
        use_beam_search=True,
        n=case.num_beams,
        max_tokens=case.max_new_tokens,
        min_tokens=case.min_new_tokens,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        stop_token_ids=case.eos_token_id,
        ignore_eos=True,
        return_token_ids=True,
        include_stop_str_in_output=True,
    )
    return [(choice["token_ids"], choice["beam_score"]) for choice in answer["choices"]]


def over_grpc(stub: InferenceStub, case: BeamCase) -> list[tuple[list[int], float]]:
    sampling = types_pb2.SamplingParams(
        use_beam_search=True,
        n=case.num_beams,
        max_tokens=case.max_new_tokens,
        min_tokens=case.min_new_tokens,
        length_penalty=case.length_penalty,
        early_stopping=str(case.early_stopping).lower(),
        stop_token_ids=case.eos_token_id,
        ignore_eos=True,
        include_stop_str_in_output=True,
    )
    ids = types_pb2.TokenIds(ids=case.prompt)
    request = pb.GenerateRequest(token_ids=ids, sampling_params=sampling)
    request.output_options.token_ids_only = True
    answer = stub.Generate(request, timeout=WAIT_S)
    return [(list(choice.token_ids), choice.beam_score) for choice in answer.choices]


def check(found: FoundBeams, choices: list[tuple[list[int], float]]) -> None:
    assert [ids for ids, _ in choices] == found.beams
    if found.scores:
        assert [s for _, s in choices] == pytest.approx(found.scores, abs=SCORE_TOLERANCE)


def test_both_protocols_have_the_beams_of_transformers(stack: Stack, clear: Clear) -> None:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        for case, found in clear:
            check(found, over_http(stack, case))
            check(found, over_grpc(stub, case))


@pytest.mark.parametrize(
    ("layout", "combine_mode"), quick_values(["2 and 3", "colocated"], ["sum", "per_slot"])
)
def test_several_workers_have_the_beams_of_transformers(
    golden: Callable[[str], Golden], clear: Clear, layout: str, combine_mode: str
) -> None:
    olmoe, engine = golden("olmoe-base"), dict[str, object](combine_mode=combine_mode)
    is_apart = layout == "2 and 3"
    config = (
        float32_config(olmoe, 2, 3, engine=engine)
        if is_apart
        else colocated_config(olmoe, 2, engine=engine)
    )
    requests = [case.request(f"{turn}-{i}") for turn in "ab" for i, (case, _) in enumerate(clear)]
    with serving(ThreadCluster(config)) as cluster:
        results = cluster.answers(requests)
        for request, (case, found) in zip(requests, [*clear, *clear], strict=True):
            outputs = results[request.request_id].outputs
            check_beams(case, found, sorted(outputs, key=lambda output: output.choice))
        assert cluster.blocks_in_use() == 0
