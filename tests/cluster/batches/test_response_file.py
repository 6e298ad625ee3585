"""``cluster.batches.response_file``."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.batches.response_file import InUseError, ResponseFile
from cluster.core.errors import ConflictError
from tests.cluster.batches.files import read_lines, write_lines
from tests.harness.faulty_files import Fault, FaultyFiles, FileCall, Killed, each_fault


def answer(custom_id: str, status: int = 200) -> dict[str, Any]:
    response = {"status_code": status, "body": {"x": "ü"}}
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response}


def test_answers_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with ResponseFile(path) as file:
        file.append("a", answer("a"))
        file.append("b", answer("b", 400))
        assert (file.answered_ids, file.num_failed) == ({"a", "b"}, 1)
    with ResponseFile(path) as file:
        assert (file.answered_ids, file.num_failed) == ({"a", "b"}, 1)
        file.append("c", answer("c"))
    assert read_lines(path) == [answer("a"), answer("b", 400), answer("c")]


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_part_of_a_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = write_lines(tmp_path / "out", [answer("a"), answer("b")])
    os.truncate(path, path.stat().st_size - cut)
    with ResponseFile(path) as file:
        assert file.answered_ids == {"a"}
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
        ResponseFile(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", ["notes", '{"custom_id": "a", "url": "/v1/completions"}', "{"])
def test_other_files_without_an_end_are_left_alone(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "out"
    path.write_text(wrong + "x")
    with pytest.raises(ConflictError, match="out: line 1 is no answer"):
        ResponseFile(path)
    assert path.read_text() == wrong + "x"


def test_zeros_at_the_end_are_cut_off(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "out", [answer("a"), answer("b")])
    whole = path.stat().st_size
    os.truncate(path, whole - 5)
    os.truncate(path, whole + 100)
    with ResponseFile(path) as file:
        assert file.answered_ids == {"a"}


def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    found = {**answer("a"), "error": "\ud800"}
    with ResponseFile(tmp_path / "out") as file:
        file.append("a", found)
        size = file.num_bytes
    assert read_lines(tmp_path / "out") == [found]
    assert size == (tmp_path / "out").stat().st_size


def test_one_process_has_the_file(tmp_path: Path) -> None:
    with ResponseFile(tmp_path / "out"), pytest.raises(InUseError, match="by another process"):
        ResponseFile(tmp_path / "out")
    ResponseFile(tmp_path / "out").close()


# ---- disks that fail, and kills --------------------------------------------------------------

IDS = ["a", "b", "c", "d"]


def whole_answers(path: Path) -> list[str]:
    """The requests that a file answers; every line is one whole answer."""
    return [one["custom_id"] for one in read_lines(path)] if path.exists() else []


def finish(path: Path) -> None:
    """What the next process does: it answers the rest."""
    with ResponseFile(path, is_private=True) as file:
        for one in IDS:
            if one not in file.answered_ids:
                file.append(one, answer(one))
    found = whole_answers(path)
    assert sorted(found) == IDS


@pytest.mark.parametrize("is_private", [True, False])
def test_no_answer_is_lost_and_none_is_torn(tmp_path: Path, is_private: bool) -> None:
    for folder, fault in each_fault(tmp_path):
        path, added, synced = folder / "out", list[str](), list[str]()
        with (
            FaultyFiles(folder, fault),
            contextlib.suppress(OSError, Killed),
            ResponseFile(path, is_private=is_private) as file,
        ):
            for one in IDS[:-1]:
                with contextlib.suppress(OSError):
                    file.append(one, answer(one))
                    added.append(one)
                    file.sync()
                    synced = list(added)
        if fault.kind.startswith("kill"):
            with ResponseFile(path, is_private=is_private) as file:
                assert file.answered_ids >= set(synced), fault
        elif not fault.lasts:
            assert whole_answers(path) == added, fault
        finish(path)


def test_a_file_takes_answers_again_when_there_is_room(tmp_path: Path) -> None:
    for folder, fault in each_fault(tmp_path):
        refused = []
        with (
            FaultyFiles(folder, fault) as files,
            contextlib.suppress(OSError, Killed),
            ResponseFile(folder / "out") as file,
        ):
            for one in IDS:
                try:
                    file.append(one, answer(one))
                except OSError:
                    refused.append(one)
            files.heal()
            for one in refused:
                file.append(one, answer(one))
            file.sync()
            assert sorted(whole_answers(folder / "out")) == IDS, fault


DAMAGED = [
    ([answer("a")], '{"id": "batch_req_x", "cus', [answer("b")]),  # half a line before a whole one
    ([answer("a")], "\0\0\0\0", [answer("b")]),
    ([], "\xff\xfe rubbish\n", [answer("a"), answer("b")]),
    ([answer("a")], '{"id": "batch_req_x"}\n' + json.dumps(answer("a")) + "\n", [answer("b")]),
    ([answer("a")], "[" * 100_000 + "\n\n{}\n", [answer("b")]),
]


def write_damaged(path: Path, before: list[Any], damage: str, after: list[Any]) -> None:
    texts = ["".join(json.dumps(one) + "\n" for one in some) for some in (before, after)]
    path.write_bytes(damage.encode("latin-1").join(text.encode() for text in texts))


@pytest.mark.parametrize(("before", "damage", "after"), DAMAGED)
def test_damage_costs_no_answer_but_its_own(
    tmp_path: Path, before: list[Any], damage: str, after: list[Any]
) -> None:
    path = tmp_path / "out"
    write_damaged(path, before, damage, after)
    with ResponseFile(path, is_private=True) as file:
        assert file.answered_ids == {"a", "b"}
        assert read_lines(path) == [answer("a"), answer("b")]
        assert file.num_bytes == path.stat().st_size
        with pytest.raises(InUseError):
            ResponseFile(path, is_private=True)
        file.append("c", answer("c"))
    assert whole_answers(path) == ["a", "b", "c"]
    assert list(tmp_path.iterdir()) == [path]


def test_half_an_answer_before_a_whole_one_is_damage_in_any_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_damaged(path, *DAMAGED[0])
    with ResponseFile(path) as file:
        assert file.answered_ids == {"a", "b"}
    assert whole_answers(path) == ["a", "b"]


@pytest.mark.parametrize(("before", "damage", "after"), DAMAGED[:3:2])
def test_a_repair_that_fails_loses_nothing(
    tmp_path: Path, before: list[Any], damage: str, after: list[Any]
) -> None:
    def prepare(folder: Path) -> None:
        write_damaged(folder / "out", before, damage, after)

    for folder, fault in each_fault(tmp_path, prepare):
        with FaultyFiles(folder, fault), contextlib.suppress(OSError, Killed):
            ResponseFile(folder / "out", is_private=True).close()
        with ResponseFile(folder / "out", is_private=True) as file:
            assert file.answered_ids == {"a", "b"}, fault
        finish(folder / "out")


def test_what_a_failed_sync_may_have_lost_is_written_again(tmp_path: Path) -> None:
    path, numbers = tmp_path / "out", list[int]()

    def fail_once(call: FileCall) -> None:
        numbers.extend([1] if call.name in ("write", "fsync") else [])
        if call.name == "fsync" and numbers.count(1) == 3:
            os.truncate(path, 0)  # the disk has lost what was not synced
            raise OSError(errno.EIO, "Input/output error")

    with ResponseFile(path) as file, FaultyFiles(tmp_path, on_call=fail_once):
        file.append("a", answer("a"))
        file.append("b", answer("b"))
        with pytest.raises(OSError, match="Input/output"):
            file.sync()
        file.append("c", answer("c"))
        file.sync()
    assert whole_answers(path) == ["a", "b", "c"]


def test_room_is_checked_before_anything_is_spent(tmp_path: Path) -> None:
    with ResponseFile(tmp_path / "out") as file:
        file.append("a", answer("a"))
        file.check_disk_space()
        assert file.num_bytes == (tmp_path / "out").stat().st_size
        with FaultyFiles(tmp_path, Fault(0, lasts=True)), pytest.raises(OSError, match="No space"):
            file.check_disk_space()
    assert whole_answers(tmp_path / "out") == ["a"]


def test_a_file_that_was_removed_before_it_was_locked_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def remove(call: FileCall) -> None:
        if call.name == "fstat":
            path.unlink()

    with FaultyFiles(tmp_path, on_call=remove), pytest.raises(InUseError):
        ResponseFile(path)
