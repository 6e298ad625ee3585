"""Reading checkpoints: slices, dtypes, progress, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.harness.local_engine import LocalEngine
from cluster.core.errors import CheckpointError, ConfigError
from tests.fakes import TINY_CONFIG, tiny_tensors, write_tiny_checkpoint
from workers.experts.slots import ExpertSlots
from workers.model.config import TensorPart
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint
from workers.model.loading.config_file import read_config, resolve_dtype

CPU = torch.device("cpu")


def write(path: Path, changes: Mapping[str, Any]) -> Path:
    """A tiny checkpoint with another config."""
    write_tiny_checkpoint(path, {**TINY_CONFIG, **changes}, tiny_tensors())
    return path


def read_part(checkpoint: Checkpoint, part: TensorPart, dtype: torch.dtype) -> torch.Tensor:
    return checkpoint.read_stacked((part,), dtype).view(part.part_shape)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_by_name_and_never_opened(tmp_path: Path, name: str) -> None:
    write(tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    (tmp_path / name).chmod(0)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle.*convert"):
        Checkpoint(tmp_path)


def test_reads_whole_tensors_and_slices(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.float32).view(4, 3, 2)
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, {**tiny_tensors(), "x": values})
    checkpoint = Checkpoint(tmp_path)
    whole = TensorPart(name="x", shape=(4, 3, 2))
    assert torch.equal(read_part(checkpoint, whole, torch.float32), values)
    part = TensorPart(name="x", shape=(4, 3, 2), index=2)
    assert checkpoint.num_bytes(part) == 24
    assert torch.equal(read_part(checkpoint, part, torch.float32), values[2])
    assert torch.equal(read_part(checkpoint, part, torch.bfloat16), values[2].bfloat16())
    stacked = checkpoint.read_stacked([part, part], torch.float32)
    assert torch.equal(stacked, torch.cat((values[2], values[2])))


def test_parts_that_follow_each_other_are_borrowed_from_the_file(tmp_path: Path) -> None:
    """``save_file`` writes tensors of one type in the order of their names."""
    values = {name: torch.randn(3, 2) for name in ("x.a", "x.b", "x.c")}
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, {**tiny_tensors(), **values})
    checkpoint = Checkpoint(tmp_path)
    a, b, c = (TensorPart(name=name, shape=(3, 2)) for name in values)
    borrowed = checkpoint.borrow([a, b], torch.float32)
    assert torch.equal(borrowed, torch.cat((values["x.a"], values["x.b"])))
    assert checkpoint.loaded_bytes == borrowed.nbytes
    assert checkpoint.borrow([a, b], torch.float32).data_ptr() == borrowed.data_ptr()
    copied = checkpoint.borrow([a, c], torch.float32)
    assert torch.equal(copied, torch.cat((values["x.a"], values["x.c"])))
    converted = torch.empty(3, 2, dtype=torch.bfloat16)
    assert checkpoint.borrow([b], torch.bfloat16, converted) is converted
    assert torch.equal(converted, values["x.b"].bfloat16())
    checkpoint.files.close()
    assert torch.equal(borrowed[3:], values["x.b"])  # mapped as long as it is used


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_converted_while_reading(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = {name: t.to(stored) for name, t in tiny_tensors().items()}
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, tensors)
    checkpoint = Checkpoint(tmp_path)
    check_checkpoint(tmp_path)
    for part in checkpoint.family.attention_tensors():
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(read_part(checkpoint, part, dtype), tensors[part.name].to(dtype))


def test_progress_counts_to_the_total_of_what_is_loaded(tiny_checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    checkpoint = Checkpoint(tiny_checkpoint, lambda loaded, total: calls.append((loaded, total)))
    load_attention_model(checkpoint, torch.float32, CPU)
    summary = check_checkpoint(tiny_checkpoint)
    assert calls[-1] == (summary.attention_bytes, summary.attention_bytes)
    assert [loaded for loaded, _ in calls] == sorted(loaded for loaded, _ in calls)
    slots = ExpertSlots(checkpoint.family.banks, 8, torch.float32, CPU)
    slots.load_all(checkpoint)
    total = summary.attention_bytes + summary.expert_bytes
    assert calls[-1] == (total, total)
    assert total == sum(t.numel() * 4 for t in tiny_tensors().values())


def test_shards_and_index(tmp_path: Path, tiny_checkpoint: Path) -> None:
    names = sorted(tiny_tensors())
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (tmp_path / "config.json").write_text(json.dumps(dict(TINY_CONFIG)))
    for file, owned in parts.items():
        save_file({n: tiny_tensors()[n] for n in owned}, tmp_path / file)
    index = {"weight_map": {n: file for file, owned in parts.items() for n in owned}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    check_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(names)
    assert checkpoint.checkpoint_id != Checkpoint(tiny_checkpoint).checkpoint_id
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is not in the folder"):
        Checkpoint(tmp_path)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="elsewhere"):
        Checkpoint(tmp_path)


def test_id_depends_on_config_and_headers(tmp_path: Path, tiny_checkpoint: Path) -> None:
    first = Checkpoint(tiny_checkpoint).checkpoint_id
    write_tiny_checkpoint(tmp_path / "same")
    assert Checkpoint(tmp_path / "same").checkpoint_id == first
    assert Checkpoint(write(tmp_path / "other", {"rope_theta": 5.0})).checkpoint_id != first


def test_weights_that_are_replaced_in_place_are_another_checkpoint(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    old = Checkpoint(tmp_path)
    part = next(old.family.attention_tensors())
    old.read_stacked([part], torch.float32)
    old.files.close()
    write_tiny_checkpoint(tmp_path, tensors=tiny_tensors(seed=1))
    with pytest.raises(CheckpointError, match="checkpoint: its data changed"):
        old.another().read_stacked([part], torch.float32)
    assert Checkpoint(tmp_path).checkpoint_id != old.checkpoint_id


def test_a_file_that_was_written_again_is_not_read_on(tmp_path: Path) -> None:
    """The samples cannot show every change."""
    write_tiny_checkpoint(tmp_path)
    old = Checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(CheckpointError, match="checkpoint: its data changed"):
        old.read_stacked([next(old.family.attention_tensors())], torch.float32)
    assert Checkpoint(tmp_path).checkpoint_id == old.checkpoint_id


@pytest.mark.parametrize("sets_back", [False, True])
def test_a_file_that_is_written_while_it_is_read_is_found(tmp_path: Path, sets_back: bool) -> None:
    """A mapped file shows what is written into it later, also by a copy that keeps the time."""
    write_tiny_checkpoint(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read_stacked([next(checkpoint.family.attention_tensors())], torch.float32)
    checkpoint.files.confirm()
    file = tmp_path / "model.safetensors"
    modified_ns = file.stat().st_mtime_ns if sets_back else 0
    with file.open("r+b") as data:
        data.seek(-4, os.SEEK_END)
        data.write(b"\0\0\0\0")
    os.utime(file, ns=(0, modified_ns))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.files.confirm()


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Checkpoint(tmp_path).config.eos_token_ids == (2, 7)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", [2, None], {}, 2.5, True])
def test_eos_ids_that_are_no_ids(tmp_path: Path, name: str, value: object) -> None:
    ids = {"config.json": 2, "generation_config.json": 2, name: value}
    for file, each in ids.items():
        (tmp_path / file).write_text(json.dumps({"eos_token_id": each}))
    with pytest.raises(CheckpointError, match=rf"^{name}: eos_token_id .* must be a token id"):
        read_config(tmp_path)


def test_dtype_setting(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = Checkpoint(tiny_checkpoint).config
    assert resolve_dtype("auto", config) is torch.float32
    assert resolve_dtype("bfloat16", config) is torch.bfloat16
    half = Checkpoint(write(tmp_path / "half", {"torch_dtype": "float16"})).config
    assert resolve_dtype("auto", half) is torch.float32
    odd = Checkpoint(write(tmp_path / "odd", {"torch_dtype": "float64"})).config
    with pytest.raises(ConfigError, match=r"dtype \(float64\) must be one of"):
        resolve_dtype("auto", odd)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        check_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        check_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(TINY_CONFIG)))
    with pytest.raises(CheckpointError, match=r"there is no model\.safetensors"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ("[1]", "must hold a JSON")])
def test_damaged_config(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1000])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    write_tiny_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated, damaged"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [2]}}',
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes) -> None:
    write_tiny_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated, damaged"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight",
    ],
)
def test_missing_or_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = tiny_tensors()
    shape = list(tensors[name].shape)
    del tensors[name]
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, tensors)
    with pytest.raises(CheckpointError, match=f"tensor {name} .* is missing"):
        check_checkpoint(tmp_path)
    wrong = [shape[0] + 1, *shape[1:]]
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, {**tensors, name: torch.zeros(wrong)})
    with pytest.raises(CheckpointError) as found:
        check_checkpoint(tmp_path)
    assert str(found.value) == (
        f"tensor {name} has shape {wrong} on disk, the config asks for {shape}"
    )
    with pytest.raises(CheckpointError, match="has shape"):
        LocalEngine(tmp_path)


def test_tensor_that_is_not_floating(tmp_path: Path) -> None:
    name = "model.norm.weight"
    tensors = {**tiny_tensors(), name: torch.ones(32, dtype=torch.int64)}
    write_tiny_checkpoint(tmp_path, TINY_CONFIG, tensors)
    with pytest.raises(CheckpointError, match=f"tensor {name} has dtype I64, supported are F32"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "llama"},
            "model_type 'llama' is not supported: it is not deepseek_v2, deepseek_v3, dots1, "
            "ernie4_5_moe, flex_olmo, glm4_moe, glm4_moe_lite, gpt_oss, jetmoe, kimi_k2, "
            "minimax_m2, mixtral, olmoe, qwen3_5_moe, qwen3_5_moe_text, qwen3_moe, qwen3_next",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "swish"}, "hidden_act 'swish' is not supported: it is not silu, gelu"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 64}, "sliding_window 64 is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_experts 8"),
        ({"hidden_size": "32"}, "hidden_size '32' must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size 0 must be a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps -1 must be a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf must be a positive number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 must be at most 4096"),
        ({"num_experts": 10**9}, "num_experts 1000000000 must be at most 65536"),
    ],
)
def test_config_that_cannot_be_served(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_checkpoint(write(tmp_path, changes))


def test_unknown_keys_that_change_nothing_are_ignored(tmp_path: Path) -> None:
    path = write(tmp_path, {"attention_dropout": 0.1, "use_cache": False, "sliding_window": None})
    check_checkpoint(path)


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["lm_head.weight"]
    write_tiny_checkpoint(tmp_path, {**TINY_CONFIG, "tie_word_embeddings": True}, tensors)
    check_checkpoint(tmp_path)
