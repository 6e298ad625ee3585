"""Log files that are read while they grow and are rotated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.cluster.followed_files import FollowedFile
from cluster.cli.cluster.logs import follow_files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "worker.err"


@pytest.fixture
def file(path: Path) -> Iterator[FollowedFile]:
    with FollowedFile(path) as file:
        yield file


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_text_is_read_as_it_comes(path: Path, file: FollowedFile) -> None:
    written = iter([b"later\n", b"", b"last\n"])
    append(path, b"before\n")
    assert file.read() == "before\n"
    found = follow_files([file], lambda seconds: append(path, next(written)))
    assert list(itertools.islice(found, 2)) == ["later\n", "last\n"]


@pytest.mark.parametrize("data", [b"\xff\xfe\n", b"a\r\nb\r\n", "\u00e9\n".encode()])
def test_bytes_are_counted_not_characters(path: Path, file: FollowedFile, data: bytes) -> None:
    append(path, data)
    assert file.read() == data.decode(errors="replace")
    assert file.read() == ""
    append(path, b"more\n")
    assert file.read() == "more\n"


def test_a_character_that_is_written_in_two_parts_is_whole(path: Path, file: FollowedFile) -> None:
    append(path, b"a\xc3")
    assert file.read() == "a"
    append(path, b"\xa9")
    assert file.read() == "\u00e9"


def test_the_rest_of_a_rotated_file_comes_before_the_new_one(
    path: Path, file: FollowedFile
) -> None:
    append(path, b"one\n")
    assert file.read() == "one\n"
    append(path, b"two\n")
    path.rename(path.with_name("worker.1.err"))
    assert file.read() == "two\n", "the new one is about to come"
    append(path, b"a line that is longer than all before\n")
    assert file.read() == "a line that is longer than all before\n"


def test_a_file_that_was_emptied_is_read_from_its_beginning(path: Path, file: FollowedFile) -> None:
    append(path, b"a long line\n")
    assert file.read() == "a long line\n"
    path.write_bytes(b"new\n")
    assert file.read() == "new\n"


def test_a_file_that_is_not_there_has_no_text(file: FollowedFile) -> None:
    assert file.read() == ""
