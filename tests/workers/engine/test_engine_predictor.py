"""Drafts of the layer that predicts the token after the next: what it computes, and that no token
depends on it."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.harness.local_engine import LocalEngine, block_bytes
from cluster.config.cluster import EngineSection
from cluster.config.speculation import SpeculationSection
from cluster.core.errors import CheckpointError, PeerLostError
from tests.fakes import FailingDispatcher
from tests.harness.tiers import quick_rows
from tests.workers.engine.test_engine import load_of
from tests.workers.engine.test_engine import tokens as tokens_of
from tests.workers.engine.test_engine_speculation import plain, prompts, spec
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint
from workers.requests.inspection import InspectionParams
from workers.requests.request import Request, SamplingParams, TokenOutput
from workers.requests.sequence import SequenceState
from workers.speculation.acceptance import Acceptance
from workers.speculation.speculator import Speculator

pytestmark = pytest.mark.heavy

MTP = SpeculationSection(speculative_method="mtp")
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SAMPLED = [
    structs.replace(GREEDY, temperature=0.9, seed=5, logprobs=2),
    structs.replace(GREEDY, temperature=0.8, seed=6, top_p=0.9, repetition_penalty=1.3),
    structs.replace(GREEDY, temperature=0.7, seed=7, frequency_penalty=0.4),
    GREEDY,
]
FAMILIES = ("glm4_moe", "deepseek_v3", "glm4_moe_lite")


@pytest.fixture(autouse=True)
def _every_guess_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acceptance, "num_worthwhile", lambda self, price, most: most)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a family, with a predictor."""
    family = str(request.param)
    sizes = replace(TINY, family=family, prediction_layers=1)
    return write(sizes, tmp_path_factory.mktemp(family))


def engine_of(path: Path, **options: Any) -> LocalEngine:
    checkpoint = Checkpoint(path, has_predictor=True)
    return LocalEngine(checkpoint, dtype="float32", speculation=MTP, **options)


@pytest.mark.parametrize("num_micro_batches", quick_rows({2}, [1, 2]))
def test_tokens_are_those_without(model: Path, num_micro_batches: int) -> None:
    texts = prompts(4)
    without = LocalEngine(model, dtype="float32")
    for section in (
        EngineSection(),
        EngineSection(max_num_batched_tokens=8, max_num_seqs=8, block_size_tokens=4),
    ):
        engine = engine_of(model, section=section, num_micro_batches=num_micro_batches)
        for params in (GREEDY, SAMPLED):
            expected = plain(without.generate(texts, params))
            for _ in range(2):  # the second time with a prefix hit
                assert plain(engine.generate(texts, params)) == expected
        assert spec(engine, "draft_tokens") > 0
        assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_torch_computes_the_same(model: Path) -> None:
    texts, section = prompts(3), EngineSection(deterministic="on")
    without = LocalEngine(model, dtype="float32", section=section, kernels="torch")
    engine = engine_of(model, section=section, kernels="torch")
    assert plain(engine.generate(texts, GREEDY)) == plain(without.generate(texts, GREEDY))
    assert spec(engine, "draft_tokens") > 0


def test_preemption_and_lost_steps_change_nothing(model: Path) -> None:
    texts = prompts(4)
    expected = LocalEngine(model, dtype="float32").generate(texts, SAMPLED)
    probe = engine_of(model)
    assert probe.engine.cache.block_shape[0] == TINY.layers + 1
    each = block_bytes(probe.config, 4, torch.float32)
    section = EngineSection(
        kv_cache_bytes=each * 26, block_size_tokens=4, max_num_seqs=8, max_num_batched_tokens=24
    )
    engine = engine_of(model, section=section, wrap=FailingDispatcher)
    failing = engine.dispatcher
    assert isinstance(failing, FailingDispatcher)
    rng = random.Random(3)
    outputs: dict[str, list[TokenOutput]] = {f"{i}": [] for i in range(4)}
    for name, text, params in zip(outputs, texts, SAMPLED, strict=True):
        engine.engine.add_request(Request(request_id=name, prompt=text, params=params))
    while engine.engine.has_work:
        failing.fail_at = rng.choice((None, None, *range(5)))
        try:
            for output in engine.step():
                outputs[output.request_id].append(output)
        except PeerLostError:
            pass
        engine.engine.check_integrity()
    assert failing.num_failures > 5
    assert engine.engine.stats()["num_preemptions_total"] > 0
    assert [tokens_of(found) for found in outputs.values()] == [r.token_ids for r in expected]


def test_its_experts_have_a_load_of_their_own(model: Path) -> None:
    """Every row of a step is one of its rows, too."""
    engine = engine_of(model)
    engine.generate(prompts(3), GREEDY)
    load = load_of(engine)
    assert [layer for _, layer in load][-1] == TINY.layers
    assert len({counts.sum() for counts in load.values()}) == 1
    report = engine.engine.load.report()
    assert report.rows * TINY.top_k == next(iter(load.values())).sum()


def test_inspections_do_not_see_it(model: Path) -> None:
    wanted = InspectionParams(attentions=True, hidden_states=True, router_logits=True)
    text = prompts(1)[0][:12]
    found, expected = (
        engine.inspect([text], wanted)[0]
        for engine in (engine_of(model), LocalEngine(model, dtype="float32"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def chain(model: Path, out: Path) -> Path:
    """The same model without attention and experts, whose predictor looks at the token alone: it
    expects what the model does.
    """
    shutil.copytree(model, out)
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
            if name.endswith("eh_proj.weight"):
                tensor.zero_()
                tensor[:, : len(tensor)] = torch.eye(len(tensor))
        save_file(tensors, shard, metadata={"format": "pt"})
    return out


def test_right_predictions_halve_the_steps(model: Path, tmp_path: Path) -> None:
    path = chain(model, tmp_path / "chain")
    texts = prompts(2)
    without, engine = LocalEngine(path, dtype="float32"), engine_of(path)
    assert plain(engine.generate(texts, GREEDY)) == plain(without.generate(texts, GREEDY))
    assert spec(engine, "accepted_tokens") == spec(engine, "draft_tokens") > 20
    steps = [e.engine.stats()["steps_total"] for e in (engine, without)]
    assert steps[0] <= steps[1] / 2 + 2


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_predictions_are_those_of_the_plain_formula(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(replace(TINY, family=family, prediction_layers=1), tmp_path / "model")
    predicted: dict[int, int] = {}

    def note(self: Speculator, sequence: SequenceState, token: int) -> None:
        predicted[sequence.num_tokens] = token

    monkeypatch.setattr(Speculator, "note_prediction", note)
    (text,) = prompts(1)
    (result,) = engine_of(path).generate([text], GREEDY)
    expected = _predicted(path, (*text, *result.token_ids))
    assert len(predicted) == 24
    assert predicted == {length: expected[length - 2] for length in predicted}


def _predicted(path: Path, tokens: tuple[int, ...]) -> list[int]:
    """By position i, what is expected behind token i + 1. transformers computes the layers."""
    import transformers

    config = json.loads((path / "config.json").read_text())
    number = config["num_hidden_layers"]
    twin = path.parent / "twin"
    shutil.copytree(path, twin)
    (twin / "config.json").write_text(json.dumps(config | {"num_hidden_layers": number + 1}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        twin, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    weights: dict[str, Tensor] = {}
    for shard in path.glob("*.safetensors"):
        weights |= load_file(shard)

    def own(name: str) -> Tensor:
        return weights[f"model.layers.{number}.{name}.weight"].float()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        eps = config["rms_norm_eps"]
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    seen: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def look(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(kwargs))
        seen.append(args[0] if args else calls[-1].pop("hidden_states"))

    layer = model.model.layers[number]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        hook = layer.register_forward_pre_hook(look, with_kwargs=True)
        model(ids[:, :-1], use_cache=False)
        hook.remove()
        hidden = norm(seen[0], weights["model.norm.weight"].float())
        embedded = model.get_input_embeddings()(ids[:, 1:])
        joined = torch.cat([norm(embedded, own("enorm")), norm(hidden, own("hnorm"))], -1)
        found = layer(
            joined @ own("eh_proj").T, **{k: v for k, v in calls[0].items() if k != "hidden_states"}
        )
        found = found[0] if isinstance(found, tuple) else found
        logits = model.lm_head(norm(found, own("shared_head.norm")))
    best: list[int] = logits[0].argmax(-1).tolist()
    return best


def test_checkpoints_without_such_a_layer_are_refused_by_name(tmp_path: Path) -> None:
    for family, message in (
        ("olmoe", "model_type olmoe has no layer for speculative_method mtp"),
        ("glm4_moe", "num_nextn_predict_layers must be at least 1 for speculative_method mtp"),
    ):
        path = write(replace(TINY, family=family), tmp_path / family)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint(path, has_predictor=True)


def test_check_of_a_checkpoint_reads_its_tensors(model: Path) -> None:
    whole, less = check_checkpoint(model, has_predictor=True), check_checkpoint(model)
    assert len(whole.family.banks) == len(less.family.banks) + 1
    assert whole.attention_bytes > less.attention_bytes
    assert whole.expert_bytes > less.expert_bytes
    assert whole.family.config.kv_vectors_per_token > less.family.config.kv_vectors_per_token
