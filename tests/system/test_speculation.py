"""Drafts in clusters: the tokens of every layout are those of transformers, and clients see no more
than that several come at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel, write
from benchmarks.harness.local_engine import LocalEngine, generated
from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, make_config, serving
from cluster.config.cluster import ClusterConfig
from cluster.config.speculation import SpeculationSection
from tests.harness.fault_rows import SMALL, play, quiet_config
from tests.harness.golden_clusters import check_greedy, colocated_config, float32_config
from tests.reference.goldens import Golden
from workers.requests.request import Request, SamplingParams
from workers.speculation.acceptance import Acceptance

NGRAM = SpeculationSection(
    speculative_method="ngram", num_speculative_tokens=4, ngram_min=1, ngram_max=3
)
MTP = SpeculationSection(speculative_method="mtp")
TEXT = (11, 12, 13, 14, 15, 16, 17) * 6
AnyGolden = Callable[[str], Golden]


@pytest.fixture(autouse=True)
def _every_guess_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs on this machine, and however often guesses are wrong."""
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)


def with_drafts(config: ClusterConfig, speculation: SpeculationSection = NGRAM) -> ClusterConfig:
    return replace(config, speculation=speculation)


def total(cluster: ServingCluster, name: str) -> float:
    """A number of all workers."""
    return sum(float(w["stats"].get(name, 0)) for w in cluster.snapshot(fresh=True)["workers"])


@pytest.mark.parametrize(
    ("layout", "num_micro_batches"), [((1, 2), 1), ((2, 2), 2), ((2,), 1), ((3,), 1)]
)
def test_float32_tokens_in_every_layout(
    golden: AnyGolden, layout: tuple[int, ...], num_micro_batches: int
) -> None:
    """Also steps in which ranks have different numbers of drafts, or none."""
    expected = golden("olmoe-norm-gqa-clip")
    engine: dict[str, object] = {"num_micro_batches": num_micro_batches}
    if len(layout) == 2:
        config = float32_config(expected, *layout, engine=engine)
    else:
        config = colocated_config(expected, *layout, engine=engine)
    with serving(ThreadCluster(with_drafts(config))) as cluster:
        for _ in range(2):  # the second time with a prefix hit
            check_greedy(cluster, expected)
        assert total(cluster, "spec_decode_num_accepted_tokens_total") > 0


@pytest.mark.parametrize("variant", ["jetmoe-tied", "dots1-swa", "glm4moe-base", "deepseekv3-base"])
def test_families_with_other_layers(golden: AnyGolden, variant: str) -> None:
    expected = golden(variant)
    with serving(ThreadCluster(with_drafts(float32_config(expected, 1, 2)))) as cluster:
        check_greedy(cluster, expected)
        assert total(cluster, "spec_decode_num_draft_tokens_total") > 0


@pytest.mark.parametrize(
    ("layout", "num_micro_batches", "family"),
    [
        ((1, 2), 1, "glm4_moe"),
        ((2, 2), 2, "deepseek_v3"),
        ((2,), 1, "deepseek_v3"),
        ((3,), 2, "glm4_moe"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((1, 2), 1, "deepseek_v3"),
                ((2, 2), 2, "glm4_moe"),
                ((2,), 1, "glm4_moe"),
                ((3,), 2, "deepseek_v3"),
            )
        ),
    ],
)
def test_predictions_in_every_layout(
    tmp_path: Path, family: str, layout: tuple[int, ...], num_micro_batches: int
) -> None:
    """The predictor's bank is exchanged when tokens are drawn, by ranks without rows, too."""
    path = write(random_checkpoint(family), tmp_path / "model")
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    requests = [
        Request(request_id=f"{i}", prompt=TEXT[i : 3 * i + 5], params=params) for i in range(7)
    ]
    expected = LocalEngine(path, dtype="float32").run(requests)
    mode = "disaggregated" if len(layout) == 2 else "colocated"
    config = make_config(
        path,
        layout[0],
        layout[-1],
        dtype="float32",
        workers={"mode": mode},
        engine={"num_micro_batches": num_micro_batches, "max_num_batched_tokens": 64},
    )
    with serving(ThreadCluster(with_drafts(config, MTP))) as cluster:
        for _ in range(2):
            results = cluster.answers(requests)
            for (name, _), outputs in expected.items():
                assert tuple(results[name].tokens[0]) == generated(outputs).token_ids
        assert total(cluster, "spec_decode_num_draft_tokens_total") > 0
        load = cluster.call("load")
    assert [bank["layer"] for bank in load["banks"]][-1] == random_checkpoint(family).layers
    assert len({sum(bank["decode"]) for bank in load["banks"]}) == 1


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_predictions_with_adapters(tmp_path: Path, family: str) -> None:
    """The predictor reads the hidden states of rows with adapters; guesses change no token."""
    path = write(random_checkpoint(family), tmp_path / "model")
    folder = random_adapter(target_shapes(path)).write(tmp_path / "sql")
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    plain = make_config(path, 1, 2, dtype="float32")
    found = []
    for config in (plain, with_drafts(plain, MTP)):
        with serving(ThreadCluster(config)) as cluster:
            key = cluster.call("begin", "load_adapter", {"name": "sql", "path": str(folder)})["key"]
            requests = [
                Request(request_id=f"{i}{adapter}", prompt=prompt, params=params, adapter=adapter)
                for i, prompt in enumerate(TEXT[i : 3 * i + 5] for i in range(7))
                for adapter in ("", key)
            ]
            results = cluster.answers(requests)
            num_drafts = total(cluster, "spec_decode_num_draft_tokens_total")
            found.append([results[request.request_id].tokens for request in requests])
    assert num_drafts > 0
    assert found[0] == found[1]
    assert found[0][::2] != found[0][1::2]


def random_checkpoint(family: str) -> RandomModel:
    return replace(TINY, family=family, prediction_layers=1)


def test_clients_see_the_answers_of_a_server_without_drafts() -> None:
    """Streams of every kind, and their texts, logprobs, stop strings and ends."""
    with serving(ThreadCluster(with_drafts(quiet_config(2, 1)))) as cluster:
        play(cluster, SMALL, random.Random(1), lambda: None)
        assert total(cluster, "spec_decode_num_accepted_tokens_total") > 0


def test_expert_load_has_the_rows_of_drafts(golden: AnyGolden) -> None:
    """Rejected ones, too: each row of a step chooses its experts in every bank."""
    expected = golden("olmoe-base")
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)
    request = Request(request_id="r", prompt=TEXT, params=params)
    config = with_drafts(float32_config(expected, 1, 2))
    with serving(ThreadCluster(config)) as cluster:
        cluster.answers([request])
        drafted = total(cluster, "spec_decode_num_draft_tokens_total")
        rejected = drafted - total(cluster, "spec_decode_num_accepted_tokens_total")
        load = cluster.call("load")
    assert rejected > 0
    decode_rows = 23 + rejected
    assert load["tokens"] == len(TEXT) + decode_rows
    for bank in load["banks"]:
        assert sum(bank["decode"]) / decode_rows == sum(bank["prefill"]) / len(TEXT)
