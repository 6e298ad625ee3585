"""Cached prefixes belong to one load of one adapter."""

from __future__ import annotations

from pathlib import Path

from benchmarks.checkpoints.adapters import put, random_adapter, target_shapes
from benchmarks.harness.local_engine import LocalEngine
from workers.requests.request import Request, SamplingParams

PROMPT = tuple(range(3, 43))


def test_prefixes_are_shared_with_the_same_adapter_alone(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    local = LocalEngine(tiny_checkpoint)
    shapes = target_shapes(tiny_checkpoint)

    def load(key: str, seed: int) -> None:
        folder = random_adapter(shapes, seed).write(tmp_path / key)
        put(local.engine.adapters, key, local.engine.adapters.read(folder))

    def serve(key: str) -> tuple[int | None, tuple[int, ...]]:
        request = Request(
            request_id=f"r{key}",
            prompt=PROMPT,
            params=SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
            adapter=key,
        )
        outputs = local.run([request])[request.request_id, 0]
        return outputs[0].num_cached_tokens, tuple(t for o in outputs for t in o.token_ids)

    load("a@1", 1)
    load("b@2", 2)
    first = {key: serve(key) for key in ("", "a@1", "b@2")}
    assert [cached for cached, _ in first.values()] == [0, 0, 0]
    assert len({tokens for _, tokens in first.values()}) == 3
    for key, (_, tokens) in first.items():
        assert serve(key) == (32, tokens)
    local.engine.requests.drop_adapter("a@1")
    load("a@3", 3)  # another one under the same name
    cached, tokens = serve("a@3")
    assert cached == 0
    assert tokens != first["a@1"][1]
