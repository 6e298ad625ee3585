"""``cluster.batches.answers``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.batches.answers import AnswerFile, InUseError
from cluster.core.errors import ConflictError
from tests.cluster.batches.files import read_lines, write_lines


def answer(custom_id: str, status: int = 200) -> dict[str, Any]:
    response = {"status_code": status, "body": {"x": "ü"}}
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response}


def test_answers_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with AnswerFile(path) as file:
        file.append("a", answer("a"))
        file.append("b", answer("b", 400))
        assert (file.done, file.num_failed) == ({"a", "b"}, 1)
    with AnswerFile(path) as file:
        assert (file.done, file.num_failed) == ({"a", "b"}, 1)
        file.append("c", answer("c"))
    assert read_lines(path) == [answer("a"), answer("b", 400), answer("c")]


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_part_of_a_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = write_lines(tmp_path / "out", [answer("a"), answer("b")])
    os.truncate(path, path.stat().st_size - cut)
    with AnswerFile(path) as file:
        assert file.done == {"a"}
        file.append("b", answer("b"))
    assert read_lines(path) == [answer("a"), answer("b")]


@pytest.mark.parametrize(
    "wrong",
    ["{", "[]", '{"custom_id": 1}', '{"custom_id": "b"}', json.dumps(answer("a")), ""],
)
def test_other_files_are_left_alone(tmp_path: Path, wrong: str) -> None:
    path = write_lines(tmp_path / "out", [answer("a"), wrong, answer("c")])
    before = path.read_bytes()
    with pytest.raises(ConflictError, match="out: line 2 "):
        AnswerFile(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", ["notes", '{"custom_id": "a", "url": "/v1/completions"}', "{"])
def test_other_files_without_an_end_are_left_alone(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "out"
    path.write_text(wrong + "x")
    with pytest.raises(ConflictError, match="out: line 1 is no answer"):
        AnswerFile(path)
    assert path.read_text() == wrong + "x"


def test_zeros_at_the_end_are_cut_off(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out", [answer("a"), answer("b")])
    whole = path.stat().st_size
    os.truncate(path, whole - 5)
    os.truncate(path, whole + 100)
    with AnswerFile(path) as file:
        assert file.done == {"a"}


def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    found = {**answer("a"), "error": "\ud800"}
    with AnswerFile(tmp_path / "out") as file:
        file.append("a", found)
        size = file.num_bytes
    assert read_lines(tmp_path / "out") == [found]
    assert size == (tmp_path / "out").stat().st_size


def test_one_process_has_the_file(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out"), pytest.raises(InUseError, match="by another process"):
        AnswerFile(tmp_path / "out")
    AnswerFile(tmp_path / "out").close()
