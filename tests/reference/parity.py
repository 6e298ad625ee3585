"""How near the local engine is to transformers on a golden, and the limits that it must keep.

A golden is exact, so these differences are the engine's own rounding errors. Compiled kernels make
the same ones on every processor in float32. Those of torch depend on the matrix library and on the
processor, as do those of transformers, and a network may amplify them: a norm of what a recurrent
state gives has almost nothing to divide by in places. So torch may be off by twice the error that
transformers in float32 has on this machine, where that is more than the fixed limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from tests.reference.goldens import NUM_NEW_TOKENS, Golden
from workers.model.attention_batch import AttentionBatch, Recorder
from workers.model.layers import AttentionModel, Layer, LayerSteps, ModelInputs
from workers.requests.request import SamplingParams

GREEDY = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)


class RowRecorder:
    """``Recorder`` of one request served alone: rows of all its steps, one after the other."""

    def __init__(self, num_layers: int) -> None:
        self._hidden: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
        self._routers: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._calls = 0

    def hidden(self, state: Tensor) -> None:
        """See ``Recorder``."""
        self._hidden[self._calls % len(self._hidden)].append(state.clone())
        self._calls += 1

    def router(self, bank: int, logits: Tensor, ids: Tensor, weights: Tensor) -> None:
        """See ``Recorder``."""
        self._routers.setdefault(bank, []).append((logits.clone(), ids.clone(), weights.clone()))

    def attending(self, queries: Tensor, cache: Tensor, batch: AttentionBatch) -> None:
        """See ``Recorder``; not kept."""

    @property
    def hidden_states(self) -> Tensor:
        """[L + 1, rows, H] float32."""
        return torch.stack([torch.cat(states) for states in self._hidden]).float()

    def routers(self, banks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [L, rows, E], ids [L, rows, k] ascending, and their weights, of some banks."""
        joined = [
            [torch.cat(part) for part in zip(*self._routers[bank], strict=True)] for bank in banks
        ]
        logits, ids, weights = (torch.stack(part) for part in zip(*joined, strict=True))
        ids, order = ids.sort(-1)
        return logits.float(), ids, weights.gather(-1, order).float()


class RecordedLayer:
    """A layer that is run by itself, not with others in one native call."""

    def __init__(self, layer: Layer) -> None:
        self.forward = layer.forward


class RecordedModel(AttentionModel):
    """A model with a recorder in each forward pass."""

    def __init__(self, model: AttentionModel, recorder: Recorder) -> None:
        vars(self).update(vars(model))
        self.layers = [RecordedLayer(layer) for layer in model.layers]
        self._recorder = recorder

    def forward(self, inputs: ModelInputs, caches: Sequence[Tensor]) -> LayerSteps:
        assert inputs.attention.recorder is None, "nothing is inspected"
        attention = dataclasses.replace(inputs.attention, recorder=self._recorder)
        return super().forward(dataclasses.replace(inputs, attention=attention), caches)


def record(engine: LocalEngine, prompt: tuple[int, ...], params: SamplingParams) -> RowRecorder:
    """Serve one prompt and keep what the layers saw."""
    recorder, runner = RowRecorder(engine.config.num_layers), engine.engine.runner
    model = runner.model
    runner.model = RecordedModel(model, recorder)
    engine.generate([prompt], params)
    runner.model = model
    return recorder


def router_kinds(engine: LocalEngine) -> dict[str, list[int]]:
    """Banks of each kind by the golden's name for their routers."""
    kinds: dict[str, list[int]] = {}
    names = {"attention": "router_attn", "mlp": "router_mlp"}
    both = {bank.bank for bank in engine.banks} == set(names)
    for bank in engine.banks:
        kinds.setdefault(names[bank.bank] if both else "router", []).append(bank.index)
    return kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class Float32Parity:
    """Largest differences over all prompts and positions."""

    hidden: float
    """Hidden states."""
    logits: float
    """Logits of prompts."""
    routers: float
    """Router logits and the weights of chosen experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bfloat16Parity:
    """Logits of all prompt positions."""

    median: float
    """Median difference to the bfloat16 run of transformers."""
    median_exact: float
    """The same to its float64 run."""
    agreement: float
    """Share of the clear positions whose best token is that of the float64 run."""
    equal: float
    """Share of the logits that are those of the bfloat16 run, bit for bit."""


def check_float32(engine: LocalEngine, golden: Golden) -> Float32Parity:
    """Serve every prompt alone. Raises ``AssertionError`` beyond the limits, or for a token."""
    tensors, kinds = golden.tensors, router_kinds(engine)

    def limit(name: str, fixed: float) -> float:
        return fixed if engine.is_exact else max(fixed, 2 * golden.float32_error(name))

    hidden_worst, logits_worst, routers_worst = [0.0], [0.0], [0.0]
    for i, prompt in enumerate(golden.prompts):
        seen = record(engine, prompt, GREEDY)
        for kind, banks in kinds.items():
            logits, ids, weights = seen.routers(banks)
            assert torch.equal(ids, tensors[f"p{i}.{kind}_ids"]), f"{kind} ids of p{i}"
            for name, got in (("weights", weights), ("logits", logits)):
                want = tensors[f"p{i}.{kind}_{name}"]
                allowed = limit(f"{kind}_{name}", 1e-4)
                routers_worst.append(_difference(got, want, allowed, f"{kind} {name} of p{i}"))
        hidden = seen.hidden_states[:, : len(prompt)]
        want = tensors[f"p{i}.hidden_states"]
        allowed = limit("hidden_states", 1e-4)
        hidden_worst.append(_difference(hidden, want, allowed, f"hidden states of p{i}"))
        logits, want = engine.logits(hidden[-1]), tensors[f"p{i}.logits"]
        allowed = limit("logits", 5e-4)
        logits_worst.append(_difference(logits, want, allowed, f"logits of p{i}"))
        result = engine.generate([prompt], replace(GREEDY, logprobs=0))[0]
        assert result.token_ids == golden.greedy(i), f"greedy tokens of p{i}"
        drawn = torch.tensor([entry.logprob for entry in result.logprobs])
        allowed = limit("greedy_logprob", 5e-4)
        _difference(drawn, tensors[f"p{i}.greedy_logprob"], allowed, f"logprobs of p{i}")
    return Float32Parity(
        hidden=max(hidden_worst), logits=max(logits_worst), routers=max(routers_worst)
    )


def check_bfloat16(engine: LocalEngine, golden: Golden) -> Bfloat16Parity:
    """Score every prompt alone. Raises ``AssertionError`` beyond the limits."""
    ours, exact, theirs = [], [], []
    for i, prompt in enumerate(golden.prompts):
        seen = record(engine, prompt, SamplingParams(max_tokens=1, temperature=0.0))
        ours.append(engine.logits(seen.hidden_states[-1]).float())
        exact.append(golden.tensors[f"p{i}.logits"])
        theirs.append(golden.tensors[f"p{i}.logits_bf16"])
    got, want, want_bf16 = torch.cat(ours), torch.cat(exact), torch.cat(theirs)
    best = want.topk(2, -1).values
    is_clear = best[:, 0] - best[:, 1] > 2
    agrees = (got.argmax(-1) == want.argmax(-1))[is_clear]
    found = Bfloat16Parity(
        median=float((got - want_bf16).abs().median()),
        median_exact=float((got - want).abs().median()),
        agreement=float(agrees.float().mean()),
        equal=float((got == want_bf16).float().mean()),
    )
    assert found.median < 0.3
    assert found.median_exact < 0.5
    assert found.agreement > 0.9
    return found


def _difference(got: Tensor, want: Tensor, limit: float, what: str) -> float:
    assert got.shape == want.shape, what
    worst = (got - want).abs().max().item()
    assert worst <= limit, f"{what}: off by {worst:.1e}, allowed {limit:.0e}"
    return float(worst)
