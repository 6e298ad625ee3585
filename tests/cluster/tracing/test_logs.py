"""Log records: their form, their context, and the newest lines in memory."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from cluster.tracing import logs


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, context = logging.getLogger(), dict(vars(logs.CONTEXT))
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for package in logs.PACKAGES:
        logging.getLogger(package).setLevel(logging.NOTSET)
    vars(logs.CONTEXT).update(context)


def set_up(form: logs.LogForm) -> io.StringIO:
    stream = io.StringIO()
    logs.set_up("expert-0", form, stream)
    logs.CONTEXT.generation = 3
    logs.CONTEXT.request_id = lambda: "req-1"
    return stream


def test_json_has_the_request_and_the_generation() -> None:
    stream = set_up("json")
    logging.getLogger("gateway.app").info("it ended", extra={"status": 200, "ttft_ms": 1.5})
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert found.pop("ts") > 1e9
    assert found == {
        "level": "INFO",
        "process": "expert-0",
        "logger": "gateway.app",
        "generation": 3,
        "request_id": "req-1",
        "message": "it ended",
        "status": 200,
        "ttft_ms": 1.5,
    }


def test_text_is_a_line_for_people() -> None:
    stream = set_up("text")
    logging.getLogger("workers.x").warning("lost %s", "attention-0", extra={"cause": "killed"})
    words = stream.getvalue().split()
    at = datetime.fromisoformat(words[0])
    assert at.utcoffset() is not None
    assert abs(at - datetime.now(UTC)) < timedelta(minutes=10)
    assert words[1:4] == ["WARNING", "expert-0", "g3"]
    assert words[4:] == ["req-1", "lost", "attention-0", "cause=killed"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_comes_with_its_traceback(form: logs.LogForm) -> None:
    stream = set_up(form)
    try:
        raise ValueError("a reason")
    except ValueError:
        logging.getLogger("cluster").exception("it failed")
    assert "Traceback" in stream.getvalue()
    assert "a reason" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 1 or form == "text"


def test_of_other_libraries_only_warnings_are_kept() -> None:
    stream = set_up("text")
    logging.getLogger("other.library").info("chatter")
    logging.getLogger("cluster.x").debug("detail")
    logging.getLogger("other.library").warning("a problem")
    assert len(stream.getvalue().splitlines()) == 1


def test_libraries_with_handlers_of_their_own_get_our_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = logging.getLogger("other.serving")
    library.propagate = False
    library.setLevel(logging.INFO)
    library.addHandler(logging.StreamHandler())
    stream = set_up("json")
    logs.format_library_logs("other.serving")
    library.info("started")
    library.warning("a problem")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "a problem"
    assert capsys.readouterr().err == ""


def test_set_up_twice_writes_once() -> None:
    first, second = set_up("text"), set_up("text")
    logging.getLogger("cluster").info("once")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_the_newest_lines_are_read_on_from_where_one_was() -> None:
    recent = logs.RecentLines(size=3)
    for number in range(5):
        recent.emit(logging.makeLogRecord({"msg": f"{number}", "levelno": logging.INFO}))
    assert recent.since(0) == (5, ["2", "3", "4"])
    assert recent.since(4) == (5, ["4"])
    assert recent.since(5) == (5, [])
    assert recent.since(0, at_most=1) == (5, ["4"])
    assert recent.since(99) == (5, []), "of another life of the process"


@pytest.mark.parametrize("form", [logs.TextFormatter, logs.JsonFormatter])
def test_a_name_that_is_no_text_is_shown_by_its_bytes(form: type[logging.Formatter]) -> None:
    """Of a handler alone: pytest's own would put the name into its report."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    recent = logs.RecentLines(stream=out)
    recent.setFormatter(form())
    recent.emit(logging.makeLogRecord({"msg": "file \udcff.kv is broken", "levelname": "WARNING"}))
    recent.flush()
    number, (line,) = recent.since(0)
    assert number == 1
    assert r"file \udcff.kv is broken" in line
    assert out.buffer.getvalue().decode() == f"{line}\n"


def test_a_full_disk_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    logs.set_up("expert-0", "text", Full())
    number, _ = logs.RECENT_LINES.since(0)
    logging.getLogger("cluster").info("a line")
    assert logs.RECENT_LINES.since(number)[1][0].endswith("a line")
