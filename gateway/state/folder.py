"""Creates and checks the state folder: its format file and its subfolders."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cluster.core.checks import check
from cluster.core.errors import ConfigError
from cluster.disk.files import new_file
from gateway.state.files import write_atomically
from gateway.state.record import FORMAT

_FORMAT_FILE = "state.json"
NEW, WORK = "new", "work"
"""Names of the subfolders for temporary files and for unfinished work."""


class _FolderFormat(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``state.json``."""

    state_format: int


def check_folder(folder: Path) -> None:
    """Raise ``ConfigError`` if ``open_folder`` would, without creating anything."""
    with _as_config_error(folder):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if nearest == folder:
            _check_content(folder)
        with tempfile.TemporaryFile(dir=nearest):
            pass  # the folder is writable


def open_folder(folder: Path) -> None:
    """Create or check a state folder. Raises ``ConfigError``."""
    with _as_config_error(folder):
        _open(folder)


@contextlib.contextmanager
def _as_config_error(folder: Path) -> Iterator[None]:
    """Convert access errors and damage of the folder to ``ConfigError``."""
    try:
        yield
    except (OSError, msgspec.MsgspecError) as err:
        reason = getattr(err, "strerror", None) or "state.json is damaged"
        raise ConfigError("state_dir", str(folder), f"cannot be used: {reason}") from err


def _open(folder: Path) -> None:
    if folder.exists():
        _check_content(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark = folder / _FORMAT_FILE
    for name in (NEW, WORK):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    if not mark.exists():
        write_atomically(
            folder / NEW, mark, msgspec.json.encode(_FolderFormat(state_format=FORMAT))
        )
    _check_content(folder)
    probe = folder / NEW / secrets.token_hex(16)
    with new_file(probe):
        pass  # the folder is writable
    probe.unlink()


def _check_content(folder: Path) -> None:
    """Raise ``ConfigError`` for a folder with other files or with objects of another format."""
    mark = folder / _FORMAT_FILE
    if not mark.exists():
        others = {*os.listdir(folder)} - {NEW, WORK}
        # state.json may exist now: another gateway may have just created it
        rule = "contains other files: use an empty or a new folder"
        check(not others or mark.exists(), "state_dir", str(folder), rule)
        return
    found = msgspec.json.decode(mark.read_bytes(), type=_FolderFormat).state_format
    rule = f"contains objects of format {found}, this release supports {FORMAT}"
    check(found == FORMAT, "state_dir", str(folder), rule)
