"""Folders of adapters: what is refused before any number is read, and how the rest is joined."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoints.adapters import (
    CONFIG,
    PREFIX,
    RandomAdapter,
    put,
    random_adapter,
    target_shapes,
)
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.config.lora import LoraSection
from cluster.core.errors import CheckpointError, ModelNotFoundError
from workers.lora.catalog import refusal_reason, targets_of, targets_without_weights
from workers.lora.folder import AdapterFolder, read_folder
from workers.lora.loaded import LoadedAdapters
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Request, SamplingParams

Q = f"{PREFIX}.model.layers.0.self_attn.q_proj"
DOWN, UP = torch.zeros(4, 32), torch.zeros(32, 4)
GOOD = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}


def read(checkpoint: Path, folder: Path, max_rank: int = 64) -> AdapterFolder:
    opened = Checkpoint(checkpoint)
    model = load_attention_model(opened, torch.float32, torch.device("cpu"))
    return read_folder(folder, targets_of(model.products), max_rank)


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    return RandomAdapter(config={**CONFIG, **config}, tensors=tensors).write(folder)


def at(module: str) -> dict[str, Tensor]:
    name = f"{PREFIX}.{module}"
    return {f"{name}.lora_A.weight": DOWN.clone(), f"{name}.lora_B.weight": UP.clone()}


def test_reads_what_is_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = read(tiny_checkpoint, write(tmp_path / "a", GOOD))
    assert len(found.modules[0].down) == 4
    assert [m.target.part.name for m in found.modules] == ["model.layers.0.self_attn.q_proj.weight"]
    assert found.modules[0].scale == 4.0


def test_digest_is_of_both_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = {**GOOD, f"{Q}.lora_A.weight": torch.ones(4, 32)}
    folders = [
        write(tmp_path / "a", GOOD),
        write(tmp_path / "b", GOOD, lora_alpha=3),
        write(tmp_path / "c", other),
        write(tmp_path / "d", GOOD),
    ]
    digests = [read(tiny_checkpoint, folder).digest for folder in folders]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (at("model.layers.0.mlp.experts.3.gate_proj"), "experts.3.gate_proj is of routed experts"),
        (at("model.layers.0.mlp.experts"), "mlp.experts is of routed experts"),
        (at("model.layers.0.mlp.gate"), "mlp.gate is a router"),
        (at("lm_head"), "lm_head is the model's head"),
        ({f"{PREFIX}.model.embed_tokens.lora_embedding_A": DOWN}, "is the embedding"),
        ({f"{PREFIX}.lm_head.weight": DOWN}, "lm_head is the model's head"),
        (at("model.layers.7.self_attn.q_proj"), "is no projection of attention"),
        ({f"{Q}.lora_magnitude_vector": DOWN}, "q_proj is changed in an unsupported way"),
        ({f"{Q}.lora_A.weight": DOWN}, "q_proj has no tensor lora_B.weight"),
        ({**GOOD, f"{Q}.lora_B.bias": UP.clone()}, "lora_B.bias is not supported"),
        ({f"{Q}.lora_A.weight": DOWN[:3], f"{Q}.lora_B.weight": UP}, "has shape [3, 32]"),
        ({**GOOD, f"{Q}.lora_B.weight": torch.zeros(16, 4)}, "require [32, 4]"),
        ({**GOOD, f"{Q}.lora_B.weight": UP.double()}, "has dtype F64"),
        ({**GOOD, f"{Q}.lora_B.weight": UP / 0}, "not finite"),
        ({}, "has no tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, tensors: dict[str, Tensor], words: str
) -> None:
    folder = write(tmp_path / "a", tensors, target_modules="all-linear")
    with pytest.raises(CheckpointError) as found:
        read(tiny_checkpoint, folder)
    assert words in str(found.value)


def test_tensors_must_be_among_the_targets(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", at("model.layers.0.self_attn.o_proj"))
    with pytest.raises(CheckpointError, match="o_proj has tensors, but is not among target_mod"):
        read(tiny_checkpoint, folder)


def test_rank_is_limited_before_anything_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", GOOD)
    with pytest.raises(CheckpointError, match=r"rank 4 must not exceed max_lora_rank \(3\)"):
        read(tiny_checkpoint, folder, max_rank=3)
    folder = write(tmp_path / "b", GOOD, rank_pattern={"v_proj": 9})
    assert read(tiny_checkpoint, folder, max_rank=4).modules


def test_pickles_are_never_opened(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", GOOD)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="there is no adapter_model"):
        read(tiny_checkpoint, folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        read(tiny_checkpoint, tmp_path / "missing")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"12345678" * 10,
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:8] + b"[" * (len(data) - 8),
        lambda data: (1 << 40).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"shape":[4,32]', b'"shape":[4,-1]'),
        lambda data: data.replace(b'"data_offsets":[0', b'"data_offsets":[9'),
    ],
    ids=["text", "empty", "short", "long", "deep", "length", "negative", "offsets"],
)
def test_damaged_files(
    tiny_checkpoint: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    file = write(tmp_path / "a", GOOD) / "adapter_model.safetensors"
    good = file.read_bytes()
    file.write_bytes(spoil(good))
    assert file.read_bytes() != good
    with pytest.raises(CheckpointError, match="truncated, damaged, or not a safetensors"):
        read(tiny_checkpoint, file.parent)


def test_what_is_no_file_is_not_opened(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", GOOD)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=f"there is no {name}"):
            read(tiny_checkpoint, folder)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="aaa cannot be read: File name too long"):
        read_folder(tmp_path / ("a" * 300), {}, max_rank=64)


def test_a_loop_of_links_is_no_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    model = load_attention_model(Checkpoint(tiny_checkpoint), torch.float32, torch.device("cpu"))
    adapters = LoadedAdapters(model, LoraSection(lora_roots=(str(tmp_path),)))
    adapters.check_place(loop)
    with pytest.raises(CheckpointError, match="loop: no such folder"):
        adapters.read(loop)


def test_an_adapter_of_the_text_part_fits_the_whole_model(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole = {k.replace(".model.layers", ".model.language_model.layers"): v for k, v in GOOD.items()}
    folder = write(tmp_path / "whole", whole)
    assert len(read(tiny_checkpoint, folder).modules) == 1
    with pytest.raises(CheckpointError, match="names a module twice"):
        read(tiny_checkpoint, write(tmp_path / "both", clones({**GOOD, **whole})))
    opened = Checkpoint(tiny_checkpoint)
    model = load_attention_model(opened, torch.float32, torch.device("cpu"))
    apart = {
        name.replace("model.", "model.language_model.", 1): target
        for name, target in targets_of(model.products).items()
    }
    assert len(read_folder(write(tmp_path / "text", GOOD), apart, 64).modules) == 1


@pytest.mark.parametrize("variant", ["jetmoe-tied", "deepseekv3-base", "qwen3next-base"])
def test_kinds_of_other_families(variant: str, golden: Callable[..., object]) -> None:
    path: Path = golden(variant).path  # type: ignore[attr-defined]
    opened = Checkpoint(path)
    model = load_attention_model(opened, torch.float32, torch.device("cpu"))
    found = targets_of(model.products).keys()
    assert found == target_shapes(path).keys()
    assert found == targets_without_weights(opened.family.attention_tensors()).keys()


def test_reasons() -> None:
    assert "routed experts" in refusal_reason("model.layers.0.self_attention.experts.input_linear")
    assert "router" in refusal_reason("model.layers.0.mlp.shared_expert_gate")
    assert "head by head" in refusal_reason("model.layers.0.self_attn.kv_b_proj")
    assert "no projection" in refusal_reason("model.layers.0.self_attn.rotary")
    assert "a norm" in refusal_reason("model.layers.0.input_layernorm")


def test_number_of_adapters_is_limited(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_attention_model(Checkpoint(tiny_checkpoint), torch.float32, torch.device("cpu"))
    adapters = LoadedAdapters(model, LoraSection(max_loras=1))
    folder = adapters.read(write(tmp_path / "a", GOOD))
    put(adapters, "one", folder)
    assert adapters.num_bytes == 4 * 4 * (32 + 64)
    with pytest.raises(CheckpointError, match=r"the maximum number \(max_loras\)"):
        put(adapters, "two", folder)
    adapters.remove("one")
    adapters.remove("one")
    put(adapters, "two", folder)
    assert "two" in adapters
    assert adapters.keys == ("two",)


def test_requests_with_an_unknown_adapter_are_refused(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint, section=EngineSection()).engine
    request = Request(
        request_id="r", prompt=(1, 2), params=SamplingParams(max_tokens=2), adapter="gone"
    )
    with pytest.raises(ModelNotFoundError, match="is no longer loaded"):
        engine.add_request(request)
    assert not engine.has_work


def test_running_requests_fail_with_their_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    local = LocalEngine(tiny_checkpoint)
    engine = local.engine
    adapter = random_adapter(target_shapes(tiny_checkpoint))
    put(engine.adapters, "a", engine.adapters.read(adapter.write(tmp_path / "a")))
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for name, key in (("one", "a"), ("other", "")):
        engine.add_request(Request(request_id=name, prompt=(1, 2), params=params, adapter=key))
    local.step()
    engine.requests.drop_adapter("a")
    (failed,) = [o for o in engine.poll() if o.error]
    assert (failed.request_id, failed.error_code) == ("one", "model_not_found")
    assert "a" not in engine.adapters
    assert "other" in engine.requests
    engine.check_integrity()
