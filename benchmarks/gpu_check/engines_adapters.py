"""Engines with several adapters in a batch on the device, against merged weights on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.checkpoints.adapters import RandomAdapter, put, random_adapter, target_shapes_of
from benchmarks.gpu_check.code_formats import MAIN
from benchmarks.gpu_check.engines import (
    MAX_MODEL_LEN,
    PLAIN,
    Differences,
    DType,
    Model,
    differences_on_cpu,
    equal,
    random_model,
)
from benchmarks.gpu_check.section import Place, Report
from benchmarks.harness.local_engine import Generated, LocalEngine, generated
from workers.quantization.formats import WeightFormat
from workers.requests.request import Request

_FAMILIES: Mapping[str, WeightFormat | None] = {
    "olmoe": None,
    "dots1": MAIN["int4"],
    "jetmoe": None,
    "deepseek_v3": None,
    "qwen3_next": None,
}
"""With the codes of their experts; None: none."""
_NEW_TOKENS = 12
_OWNERS = ("a", "", "b", "a", "b", "", "a", "b")
"""The adapter of each request; empty: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model and its adapters."""

    model: Model
    merged: Mapping[str, Model]
    """By adapter: the model with it in its weights; under "" the model itself."""
    adapters: Mapping[str, RandomAdapter]

    @property
    def owners(self) -> Sequence[str]:
        """Of each prompt."""
        return _OWNERS[: len(self.model.prompts)]

    def serve(self, engine: LocalEngine, place: Place) -> list[Generated]:
        """All requests at once, each with its adapter."""
        loaded = engine.engine.adapters
        for key, adapter in self.adapters.items():
            put(loaded, key, loaded.read(adapter.write(place.folder / key)))
        requests = [
            Request(request_id=f"r{i}", prompt=tuple(prompt), params=self.model.params, adapter=own)
            for i, (prompt, own) in enumerate(zip(self.model.prompts, self.owners, strict=True))
        ]
        outputs = engine.run(requests)
        return [generated(outputs[request.request_id, 0]) for request in requests]

    def merged_answers(self) -> list[Generated]:
        """Of a CPU in float32."""
        found: dict[int, Generated] = {}
        for key, model in self.merged.items():
            places = [i for i, own in enumerate(self.owners) if own == key]
            engine = LocalEngine(
                model.open(), dtype="float32", section=PLAIN, max_model_len=MAX_MODEL_LEN
            )
            answers = engine.generate([model.prompts[i] for i in places], model.params)
            found |= zip(places, answers, strict=True)
        return [found[i] for i in range(len(self.owners))]


def make_case(place: Place, family: str, form: WeightFormat | None) -> Case:
    """Two adapters of all modules that may have one."""
    model = _briefly(random_model(place, family, form=form))
    shapes = target_shapes_of(model.open().family)
    adapters = {
        "a": random_adapter(shapes, 1),
        "b": random_adapter(shapes, 2, rank=12, use_rslora=True),
    }
    merged = {"": model} | {
        key: _briefly(random_model(place, family, form=form, deltas=_deltas(adapter)))
        for key, adapter in adapters.items()
    }
    return Case(model=model, merged=merged, adapters=adapters)


def _briefly(model: Model) -> Model:
    """Adapters make choices less clear, and the comparison of a request ends at one of another."""
    return replace(model, new_tokens=_NEW_TOKENS)


def _deltas(adapter: RandomAdapter) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": adapter.delta(module) for module in adapter.modules}


def run(place: Place, report: Report) -> None:
    """Each family, both types."""
    for family, form in _FAMILIES.items():
        with report.part(family):
            _check(place, report, family, make_case(place, family, form))
    report.say(", ".join(_FAMILIES))


def _check(place: Place, report: Report, family: str, case: Case) -> None:
    exact = case.merged_answers()
    rounded = case.serve(case.model.engine("bfloat16", torch.device("cpu"), PLAIN), place)
    seen = differences_on_cpu(report, exact, rounded, f"{family} ")
    plain = case.model.engine("float32", torch.device("cpu"), PLAIN)
    others = plain.generate(case.model.prompts, case.model.params)
    answers = zip(case.owners, exact, others, strict=True)
    changed = {owner for owner, one, other in answers if one.token_ids != other.token_ids}
    report.check(changed >= case.adapters.keys(), f"{family}: an adapter changes nothing")
    known: dict[DType, Sequence[Generated]] = {"float32": exact, "bfloat16": rounded}
    for dtype, wanted in known.items():
        _compare(place, report, family, case, dtype, wanted, seen)
    report.value(f"{family} log-probabilities", seen.found)


def _compare(
    place: Place,
    report: Report,
    family: str,
    case: Case,
    dtype: DType,
    known: Sequence[Generated],
    seen: Differences,
) -> None:
    engine = case.model.engine(dtype, place.device, PLAIN)
    equal(report, f"{family} with adapters", dtype, case.serve(engine, place), known, seen)
    engine.engine.check_integrity()
