"""``cluster.batches.requests``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.batches.requests import BatchLimits, LineError, RequestFile
from cluster.core.errors import RequestError
from tests.cluster.batches.files import line, write_lines


def test_requests_come_in_order_and_empty_lines_are_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [line("b"), "", line("ä"), line("c", method="POST")])
    found = RequestFile.check(path)
    assert len(found) == 3
    assert found.ids == {"ä", "b", "c"}
    assert [one.custom_id for one in found.requests()] == ["b", "ä", "c"]
    first = next(found.requests())
    assert (first.url, first.body) == ("/v1/completions", {"prompt": "b", "max_tokens": 4})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"custom_id": "\\ud800"}', "line 2 is not JSON"),
        ('{"custom_id": NaN}', "line 2 is not JSON"),
        ('{"custom_id": -1e999}', "line 2 is not JSON"),
        ("[" * 140 + "]" * 140, "line 2 is nested too deeply: at most 128 levels"),
        ([], "line 2 must be an object"),
        (line(custom_id=""), "line 2: custom_id must be a text of 1 to 512 characters"),
        ({**line(), "custom_id": 7}, "line 2: custom_id must be a text of 1 to 512 characters"),
        (line("x" * 513), "line 2: custom_id must be a text of 1 to 512 characters"),
        (line("first"), "line 2: custom_id 'first' came before"),
        (line(method="GET"), "line 2: method ('GET') must be POST"),
        (line(url="/v1/models"), "line 2: url ('/v1/models') must be one of /v1/chat"),
        (line(body="text"), "line 2: body must be an object"),
        (line(body={"stream": True}), "line 2: body.stream must be false"),
        (line(params={}), "line 2: params is not one of body, custom_id, method, url"),
        (line("c", body={"prompt": "x" * 300}), "line 2 has more than 300 bytes"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, wrong: Any, message: str) -> None:
    path = write_lines(tmp_path / "in", [line("first"), wrong])
    limits = BatchLimits(max_line_bytes=2000 if "512" in message else 300)
    with pytest.raises(RequestError) as caught:
        RequestFile.check(path, limits)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, LineError)
    assert caught.value.line == 2
    assert pickle.loads(pickle.dumps(caught.value)).line == 2


def test_a_line_without_bottom_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", ["[" * 200_000])
    with pytest.raises(RequestError, match="line 1 is nested too deeply"):
        RequestFile.check(path)


def test_bounds_of_a_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", [line("a"), line("b"), line("c")])
    with pytest.raises(RequestError, match="line 3 is beyond the limit of 2 requests"):
        RequestFile.check(path, BatchLimits(max_requests=2))
    with pytest.raises(RequestError, match="the file has no request"):
        RequestFile.check(write_lines(tmp_path / "empty", [""]))
