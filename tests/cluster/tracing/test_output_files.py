"""The files behind a process's output, as Ray opens them: they are rotated, and a full disk ends
nothing.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tracing.output_files import LIMIT_VARIABLE, _start_new_file
from tests.harness.faulty_files import FaultyFiles, Killed, each_fault
from tests.paths import ROOT

LIMIT = 4000
_OPEN = """
import logging, os, sys
from cluster.tracing import logs
name = f"{folder}/worker-ab-01-{os.getpid()}"
files = [os.open(name + end, os.O_WRONLY | os.O_CREAT, 0o644) for end in (".out", ".err")]
"""
_FILES = _OPEN + "[os.dup2(file, i) for i, file in enumerate(files, 1)]\n"
_PIPES = _OPEN + "[os.dup2(os.pipe()[1], i) for i in (1, 2)]\n"
"""As Ray does where it is to rotate them: its thread, which has the files, is left out."""
_LOG = """
logs.set_up("expert-0")
for number in range(100):
    logging.getLogger("workers").info("line %d %s", number, "x" * 60)
os.write(2, b"the end")
os.kill(os.getpid(), 9)
"""


def run(folder: Path, code: str, limit: str = str(LIMIT)) -> dict[str, str]:
    """What a process leaves in its files, by the ends of their names."""
    child = subprocess.run(
        [sys.executable, "-c", f"folder = {str(folder)!r}\n{code}"],
        cwd=ROOT,
        env={**os.environ, LIMIT_VARIABLE: limit},
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    assert child.returncode == -9, child.stderr
    found = sorted(folder.iterdir())
    return {"".join(path.suffixes): path.read_text() for path in found}


@pytest.mark.parametrize("streams", [_FILES, _PIPES])
def test_two_files_of_a_bounded_size_have_the_newest_lines(tmp_path: Path, streams: str) -> None:
    found = run(tmp_path, streams + _LOG)
    assert found.keys() == {".out", ".err", ".1.err"}
    assert found[".out"] == ""
    assert all(len(text) < LIMIT + 200 for text in found.values())
    text = found[".1.err"] + found[".err"]
    *lines, end = text.splitlines()
    assert end == "the end", "what is written last is not lost with the process"
    assert [int(line.split("line ")[1].split()[0]) for line in lines][-40:] == list(range(60, 100))


def test_streams_that_are_not_of_ray_are_left_alone(tmp_path: Path) -> None:
    code = "import os, sys\nfrom cluster.tracing import logs\nlogs.set_up('x')\n"
    code += "assert logs.OUTPUT.folder is None\nos.kill(os.getpid(), 9)"
    assert run(tmp_path, code) == {}


@pytest.mark.parametrize("block", [".1.err", ".err.new"])
def test_where_no_file_can_begin_the_old_ones_stay(tmp_path: Path, block: str) -> None:
    """A folder with the name of a file that is to come stands for a full disk."""
    before = "open(name + '.1.err', 'w').write('older') if '.1.err' != BLOCK else None\n"
    code = f"BLOCK = {block!r}\n{_FILES}os.mkdir(name + BLOCK)\n{before}{_LOG}"
    with pytest.raises(IsADirectoryError):
        run(tmp_path, code)
    texts = {p.name.partition(".")[2]: p.read_text() for p in tmp_path.iterdir() if p.is_file()}
    assert texts.pop("err").count("line ") == 100
    assert texts == {"out": "", **({"1.err": "older"} if block != ".1.err" else {})}


def test_a_rotation_that_fails_leaves_the_stream_at_its_path(tmp_path: Path) -> None:
    def prepare(folder: Path) -> None:
        (folder / "log").write_text("newest\n")
        (folder / "log.1").write_text("older\n")

    for folder, fault in each_fault(tmp_path, prepare):
        path, stream = folder / "log", os.open(folder / "log", os.O_WRONLY | os.O_APPEND)
        try:
            with FaultyFiles(folder, fault), contextlib.suppress(OSError, Killed):
                _start_new_file((stream,), path)
            os.write(stream, b"end\n")
        finally:
            os.close(stream)
        texts = [one.read_text() for one in folder.iterdir()]
        assert any("newest\n" in text for text in texts), fault
        if fault.kind == "error" and not fault.lasts:
            assert path.read_text().endswith("end\n"), fault


@pytest.mark.parametrize("limit", ["0", "-1", "16MB"])
def test_limits_are_read_as_ray_does(tmp_path: Path, limit: str) -> None:
    """Below 1 is no limit; what is no number counts as unset, and 16 MiB are not written here."""
    found = run(tmp_path, _FILES + _LOG, limit)
    assert found.keys() == {".out", ".err"}
    assert found[".err"].count("line ") == 100


def test_a_link_in_place_of_a_new_file_is_not_followed(tmp_path: Path) -> None:
    """Everybody may write to a folder of Ray's in /tmp."""
    target, folder = tmp_path / "target", tmp_path / "logs"
    target.write_text("of another user")
    folder.mkdir()
    found = run(folder, f"{_FILES}os.symlink({str(target)!r}, name + '.err.new')\n{_LOG}")
    assert found.keys() == {".out", ".err", ".1.err"}
    assert target.read_text() == "of another user"


@pytest.mark.parametrize("close", ["os.close(1)", "os.close(2)", "os.close(1); os.close(2)"])
def test_a_process_without_a_stream_logs_on(tmp_path: Path, close: str) -> None:
    code = f"import os\nfrom cluster.tracing import logs\n{close}\nlogs.set_up('x')\n"
    code += "import logging\nlogging.getLogger('workers').info('x')\n"
    code += "assert len(logs.RECENT_LINES.since(0)[1]) == 1\nos.kill(os.getpid(), 9)"
    assert run(tmp_path, code) == {}


def test_a_line_is_written_although_the_other_stream_was_closed(tmp_path: Path) -> None:
    found = run(tmp_path, _FILES + _LOG.replace("\nfor", "\nos.close(1)\nfor"), "0x")
    assert found[".err"].count("line ") == 100


def test_a_process_whose_standard_error_is_on_a_full_disk_goes_on() -> None:
    code = """
import faulthandler, logging, threading, warnings
from cluster.tracing import logs
logs.set_up("expert-0")
logging.getLogger("workers").info("a line")
logging.getLogger("other").error("and one of a library", exc_info=ValueError("x"))
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
faulthandler.dump_traceback()
print(len(logs.RECENT_LINES.since(0)[1]))
"""
    with Path("/dev/full").open("wb") as full:
        child = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=full, timeout=60
        )
    assert child.stdout == b"2\n"
    assert child.returncode in (0, 120), "120: Python could not write the rest at its end"


_ONE_FILE = """
import logging, os, sys
from pathlib import Path
from cluster.tracing import logs
path = Path(folder) / "mine.log"
file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
[os.dup2(file, stream) for stream in (1, 2)]
logs.set_up("launcher")
logs.OUTPUT.add_file(path)
logs.OUTPUT.add_file(Path(folder) / "other.log")
"""


def test_a_file_of_ours_for_both_streams_is_rotated(tmp_path: Path) -> None:
    found = run(tmp_path, _ONE_FILE + _LOG.replace("os.write(2", "os.write(1"))
    assert found.keys() == {".log", ".log.1"}
    assert all(len(text) < LIMIT + 200 for text in found.values())
    assert found[".log"].endswith("the end"), "standard output follows"
    assert found[".log.1"].count("line") > 10


def test_a_file_is_left_alone_that_one_stream_alone_writes(tmp_path: Path) -> None:
    code = _ONE_FILE.replace("in (1, 2)", "in (2,)")
    assert run(tmp_path, code + _LOG).keys() == {".log"}
