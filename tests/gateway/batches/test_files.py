"""``/v1/files``."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from gateway.core.tuning import GatewayTuning
from gateway.http.middleware import PIECE_BYTES
from gateway.state.reader import StoredReader
from gateway.state.store import StateStore
from tests.gateway.batches.client import get, headers_of, upload
from tests.gateway.batches.conftest import KEYS
from tests.gateway.stack import Stack, running_stack

SLOW_UPLOAD = (
    b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
)
"""The rest does not come."""


def test_a_file_is_stored_listed_read_and_removed(keeper: Stack) -> None:
    content = bytes(range(256)) * 5000
    made = upload(keeper, content)
    assert made["object"] == "file"
    assert (made["bytes"], made["filename"], made["purpose"]) == (1_280_000, "in.jsonl", "batch")
    assert made["expires_at"] - made["created_at"] == 30 * 24 * 3600
    path = f"/v1/files/{made['id']}"
    assert get(keeper, path) == made
    assert keeper.http.get(f"{path}/content").content == content
    assert get(keeper, "/v1/files")["data"] == [made]
    assert get(keeper, "/v1/files?purpose=batch_output")["data"] == []
    removed = keeper.http.delete(path).json()
    assert removed == {"id": made["id"], "object": "file", "deleted": True}
    for answer in (keeper.http.get(path), keeper.http.delete(path)):
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == f"there is no file {made['id']!r}"


def test_a_download_is_in_memory_one_piece_at_a_time(
    keeper: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next piece is read when the client has taken those before."""
    content = bytes(range(256)) * 80_000
    made = upload(keeper, content)
    sizes: list[int] = []
    read = StoredReader.read

    def note(reader: StoredReader, num_bytes: int) -> bytes:
        piece = read(reader, num_bytes)
        sizes.append(len(piece))
        return piece

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the whole file was read")

    monkeypatch.setattr(StoredReader, "read", note)
    monkeypatch.setattr(StateStore, "get", refuse)
    with keeper.http.stream("GET", f"/v1/files/{made['id']}/content") as answer:
        assert answer.headers["content-length"] == str(len(content))
        pieces = answer.iter_raw()
        found = bytearray(next(pieces))
        assert sum(sizes) < len(content), "not all before the client read on"
        for piece in pieces:
            found += piece
    assert found == content
    assert max(sizes) == PIECE_BYTES


def test_a_damaged_file_is_not_sent_whole(keeper: Stack, tmp_path: Path) -> None:
    made = upload(keeper, b"a" * 1_000_000)
    (file,) = (tmp_path / "state" / "files").glob("*/*")
    file.write_bytes(file.read_bytes()[:-1] + b"b")
    with pytest.raises(httpx.RemoteProtocolError):
        keeper.http.get(f"/v1/files/{made['id']}/content")


def test_a_file_may_have_a_shorter_life(keeper: Stack) -> None:
    form = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    made = upload(keeper, b"x", **form)
    assert made["expires_at"] - made["created_at"] == 3600


def test_pages(keeper: Stack) -> None:
    ids = [upload(keeper, b"x")["id"] for _ in range(5)]
    first = get(keeper, "/v1/files?limit=2")
    assert [one["id"] for one in first["data"]] == [ids[4], ids[3]]
    assert (first["has_more"], first["last_id"]) == (True, ids[3])
    last = get(keeper, f"/v1/files?limit=3&after={ids[3]}")
    assert [one["id"] for one in last["data"]] == [ids[2], ids[1], ids[0]]
    assert last["has_more"] is False
    assert [one["id"] for one in get(keeper, "/v1/files?order=asc")["data"]] == ids


@pytest.mark.parametrize(
    ("form", "files", "param"),
    [
        ({}, {"file": b"x"}, "purpose"),
        ({"purpose": "assistants"}, {"file": b"x"}, "purpose"),
        ({"purpose": "batch", "file": "text"}, {"other": b"x"}, "file"),
        ({"purpose": ["batch", "batch"]}, {"file": b"x"}, "purpose"),
        ({f"{number}": "x" for number in range(9)}, {"file": b"x"}, "body"),
        (
            {"purpose": "batch", "expires_after[seconds]": "1"},
            {"file": b"x"},
            "expires_after[anchor]",
        ),
        (
            {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "1",
            },
            {"file": b"x"},
            "expires_after[seconds]",
        ),
    ],
)
def test_a_wrong_form_is_refused(
    keeper: Stack, form: dict[str, Any], files: dict[str, Any], param: str
) -> None:
    answer = keeper.http.post("/v1/files", data=form, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_other_bodies_are_refused(keeper: Stack) -> None:
    answer = keeper.http.post("/v1/files", json={"purpose": "batch"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-type")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ny'
    long = b"--x\r\nA: " + b"y" * 5000 + b"\r\n\r\n--x--"
    for content in (b"", b"rubbish", b"--x\r\n\r\ny\r\n--x--", part, long):
        answer = keeper.http.post("/v1/files", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body"), content
    answer = keeper.http.post(
        "/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-type")


def test_a_file_has_a_limit(keeper: Stack) -> None:
    with running_stack(
        keeper.config.gateway, serving=False, tuning=GatewayTuning(max_file_bytes=1000)
    ) as stack:
        answer = stack.http.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": b"x" * 1000}
        )
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]


def hasty_upload(stack: Stack) -> int:
    """The status of an upload that waits for little time."""
    return stack.http.post(
        "/v1/files",
        data={"purpose": "batch"},
        files={"file": b"x"},
        headers={"x-request-timeout-ms": "50"},
    ).status_code


def test_few_files_are_stored_at_a_time(keeper: Stack) -> None:
    with running_stack(
        keeper.config.gateway, serving=False, tuning=GatewayTuning(max_uploads=1)
    ) as stack:
        address = stack.http.base_url.host, stack.http.base_url.port
        with socket.create_connection(address) as first:
            first.sendall(SLOW_UPLOAD)
            stack.wait_for(lambda: hasty_upload(stack) == 504, "the first upload to be read")
        assert upload(stack, b"x")["bytes"] == 1


def test_files_are_of_their_key(keyed: Stack) -> None:
    mine, others = KEYS
    made = upload(keyed, b"x", mine)
    path = f"/v1/files/{made['id']}"
    assert get(keyed, path, mine) == made
    assert get(keyed, "/v1/files", others)["data"] == []
    for method, suffix in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = keyed.http.request(method, path + suffix, headers=headers_of(others))
        assert answer.status_code == 404
    assert keyed.http.get(path).status_code == 401


def test_without_a_folder_they_are_refused_by_name(stack: Stack) -> None:
    for method, path, what in (
        ("POST", "/v1/files", "files"),
        ("GET", "/v1/files", "files"),
        ("GET", "/v1/files/file_1/content", "files"),
        ("DELETE", "/v1/files/file_1", "files"),
        ("POST", "/v1/batches", "batches"),
        ("GET", "/v1/batches/batch_1", "batches"),
        ("POST", "/v1/batches/batch_1/cancel", "batches"),
    ):
        error = stack.http.request(method, path).json()["error"]
        assert error["param"] == what
        assert error["code"] == "unsupported_parameter"
        assert error["message"].endswith("the server was started without --state-dir")
