"""Which file each tensor is from, where ``model.safetensors.index.json`` and the files disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.core.errors import CheckpointError
from tests.fakes import TINY_CONFIG, tiny_tensors
from tests.workers.model.loading.packers import pack_checkpoint
from tests.workers.quantization.configs import GPTQ
from workers.model.config import TensorPart
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint

HEAD = "lm_head.weight"
FIRST, OTHER = "model-00001-of-00002.safetensors", "head.safetensors"
"""The second one comes first in the order of names."""


def write(path: Path, files: Mapping[str, Mapping[str, Tensor]], index: Mapping[str, str]) -> Path:
    """A checkpoint with these files, and an index of tensors and files."""
    (path / "config.json").write_text(json.dumps(TINY_CONFIG))
    for name, tensors in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(index)}))
    return path


def head_of(path: Path) -> Tensor:
    checkpoint = Checkpoint(path)
    part = TensorPart(name=HEAD, shape=tuple(tiny_tensors()[HEAD].shape))
    return checkpoint.read_stacked((part,), torch.float32).view(part.part_shape)


@pytest.mark.parametrize("file", [FIRST, OTHER])
def test_the_index_says_which_copy_is_read(tmp_path: Path, file: str) -> None:
    tensors = tiny_tensors()
    copies = {FIRST: torch.zeros_like(tensors[HEAD]), OTHER: torch.zeros_like(tensors[HEAD])}
    copies[file] = tensors[HEAD]
    files = {
        FIRST: {**tensors, HEAD: copies[FIRST]},
        OTHER: {HEAD: copies[OTHER], "other": torch.zeros(1)},
    }
    index = {**dict.fromkeys(tensors, FIRST), HEAD: file, "other": OTHER}
    path = write(tmp_path, files, index)
    assert torch.equal(head_of(path), tensors[HEAD])
    check_checkpoint(path)


def test_a_copy_of_another_shape_is_not_the_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    files = {FIRST: {**tensors, HEAD: torch.zeros(2, 2)}, OTHER: {HEAD: tensors[HEAD]}}
    path = write(tmp_path, files, {**dict.fromkeys(tensors, FIRST), HEAD: OTHER})
    assert torch.equal(head_of(path), tensors[HEAD])


def test_another_choice_is_another_checkpoint(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    files = {FIRST: tensors, OTHER: {HEAD: tensors[HEAD], "other": torch.zeros(1)}}
    found = set()
    for file in (FIRST, OTHER):
        index = {**dict.fromkeys(tensors, FIRST), HEAD: file, "other": OTHER}
        found.add(Checkpoint(write(tmp_path, files, index)).checkpoint_id)
    assert len(found) == 2


def test_a_tensor_that_is_not_in_its_file_is_missing(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    path = write(
        tmp_path,
        {FIRST: tensors, OTHER: {"other": torch.zeros(1)}},
        {**dict.fromkeys(tensors, FIRST), HEAD: OTHER, "never.there": FIRST},
    )
    rule = rf"tensor {HEAD} .* is missing in .*index.json says that it is in {OTHER}"
    with pytest.raises(CheckpointError, match=rule):
        check_checkpoint(path)


def test_a_tensor_that_the_index_leaves_out_is_read_where_one_file_has_it(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    path = write(tmp_path, {FIRST: tensors}, dict.fromkeys(rest, FIRST))
    assert torch.equal(head_of(path), tensors[HEAD])


def test_of_two_copies_that_the_index_leaves_out_neither_is_read(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    rest = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    files = {FIRST: tensors, OTHER: {HEAD: tensors[HEAD], "other": torch.zeros(1)}}
    path = write(tmp_path, files, {**dict.fromkeys(rest, FIRST), "other": OTHER})
    rule = rf"tensor {HEAD} .*: it is in {OTHER} and {FIRST}, and .* does not say which"
    with pytest.raises(CheckpointError, match=rule):
        check_checkpoint(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    path = write(tmp_path, {FIRST: tensors}, {**dict.fromkeys(tensors, FIRST), HEAD: OTHER})
    with pytest.raises(CheckpointError, match=f"index.json names {OTHER}, which is not in"):
        check_checkpoint(path)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    path = write(tmp_path, {FIRST: tensors}, dict.fromkeys(tensors, "a" * 300))
    with pytest.raises(CheckpointError, match=r"index\.json names a+: File name too long"):
        check_checkpoint(path)


def test_a_file_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    path = write(tmp_path, {FIRST: tensors}, dict.fromkeys(tensors, FIRST))
    (path / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 200_000)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read: maximum recursion"):
        check_checkpoint(path)


def test_files_may_be_in_folders_of_the_checkpoint(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    files = {f"a/{FIRST}": {**tensors, HEAD: torch.zeros(2, 2)}, f"b/{FIRST}": tensors}
    found = set()
    for folder in "ab":
        index = {**dict.fromkeys(tensors, f"./a/{FIRST}"), HEAD: f"b/{FIRST}"}
        index["model.norm.weight"] = f"{folder}/{FIRST}"
        path = write(tmp_path, files, index)
        assert torch.equal(head_of(path), tensors[HEAD])
        check_checkpoint(path)
        found.add(Checkpoint(path).checkpoint_id)
    assert len(found) == 2


@pytest.mark.parametrize("prefix", ["../", "/", "a/../../", "a/../"])
def test_files_outside_the_checkpoint_are_refused(tmp_path: Path, prefix: str) -> None:
    tensors = tiny_tensors()
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_file(tensors, tmp_path / FIRST)
    name = f"{tmp_path}/{FIRST}" if prefix == "/" else f"{prefix}{FIRST}"
    write(path, {FIRST: tensors, f"a/{FIRST}": tensors}, dict.fromkeys(tensors, name))
    with pytest.raises(CheckpointError, match=r"index\.json names .*, which is not in the folder"):
        check_checkpoint(path)


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    files = {FIRST: tensors, OTHER: {HEAD: torch.zeros_like(tensors[HEAD])}}
    path = write(tmp_path, files, dict.fromkeys(tensors, FIRST))
    assert torch.equal(head_of(path), tensors[HEAD])


def test_a_matrix_in_two_layouts_is_refused(tmp_path: Path) -> None:
    """One of them is an old copy."""
    tensors = tiny_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    name = next(iter(pack_checkpoint(tmp_path, GPTQ)))
    old = {name: tensors[name], "other": torch.zeros(1)}
    (tmp_path / "model.safetensors").rename(tmp_path / FIRST)
    save_file(old, tmp_path / OTHER)
    index = {**dict.fromkeys(load_file(tmp_path / FIRST), FIRST), **dict.fromkeys(old, OTHER)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=rf"tensors {name} and .*qweight are the same matrix"):
        check_checkpoint(tmp_path)
