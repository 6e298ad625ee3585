"""``cluster.batches.answers``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.batches.answers import AnswerFile
from cluster.core.errors import ConflictError
from tests.cluster.batches.files import read_lines, write_lines


def answer(custom_id: str, status: int = 200) -> dict[str, Any]:
    return {"custom_id": custom_id, "response": {"status_code": status, "body": {"x": "ü"}}}


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


def test_one_process_has_the_file(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "out"), pytest.raises(ConflictError, match="by another process"):
        AnswerFile(tmp_path / "out")
    AnswerFile(tmp_path / "out").close()
