"""Objects in a folder that several gateways share."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.stalls import wait_until
from cluster.config.gateway import GatewaySection
from cluster.core.errors import ConfigError
from gateway.core.errors import StorageError, StorageFullError
from gateway.state.record import FORMAT, decode, encode
from gateway.state.store import ObjectKind, StateStore, open_store
from tests.harness.faulty_files import (
    FAULTS,
    FEW_FAULTS,
    Fault,
    FaultyFiles,
    FileCall,
    Killed,
    each_fault,
)
from tests.paths import ROOT

NOTES = ObjectKind("notes", "note")
RING = ObjectKind("rings", "ring", drops_oldest=True)
HEAD_BYTES = len(encode("note_" + "0" * 32, b"", 1e9, 1e9 + 60.0)) + 32


class Clock:
    """A time that tests set; files seem to be older by as much."""

    def __init__(self) -> None:
        self.began_s = self.now_s = 1_000_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def of_disk(self) -> float:
        return time.time() + self.now_s - self.began_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(folder: Path, clock: Clock | None = None, **limits: Any) -> StateStore:
    """A store of one gateway."""
    values = {"max_objects": 100, "max_bytes": 1 << 20, "ttl_s": 60.0, **limits}
    clock = clock or Clock()
    return StateStore(folder, clock=clock, disk_clock=clock.of_disk, **values)


def put(store: StateStore, kind: ObjectKind, content: bytes = b"x", tenant: str = "a") -> str:
    """The id of a new object."""
    object_id = store.new_id(kind)
    store.put(kind, tenant, object_id, content)
    return object_id


def content_of(store: StateStore, kind: ObjectKind, object_id: str, tenant: str = "a") -> Any:
    """What is stored; None without the object."""
    found = store.get(kind, tenant, object_id)
    return None if found is None else found.content


def files_in(folder: Path) -> list[Path]:
    """All files but the mark."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "state.json")


def test_what_is_stored_is_read_by_every_gateway(tmp_path: Path, clock: Clock) -> None:
    first, second = make(tmp_path / "state", clock), make(tmp_path / "state", clock)
    object_id = put(first, NOTES, b"one\ntwo\x00")
    assert content_of(second, NOTES, object_id) == b"one\ntwo\x00"
    second.put(NOTES, "a", object_id, b"three")
    assert content_of(first, NOTES, object_id) == b"three"
    assert first.list_ids(NOTES, "a") == [object_id]
    assert second.delete(NOTES, "a", object_id)
    assert content_of(first, NOTES, object_id) is None
    assert not first.delete(NOTES, "a", object_id)
    assert files_in(tmp_path) == []


def test_a_tenant_sees_its_own_objects_only(tmp_path: Path) -> None:
    store = make(tmp_path)
    object_id = put(store, NOTES, tenant="a")
    for other in ("b", "", "../a", "A", "a\x00b" * 100):
        assert content_of(store, NOTES, object_id, tenant=other) is None
        assert not store.delete(NOTES, other, object_id)
        assert store.list_ids(NOTES, other) == []
    assert content_of(store, NOTES, object_id, tenant="a") == b"x"
    assert content_of(store, RING, object_id) is None


@pytest.mark.parametrize(
    "object_id", ["", "note_", "../state.json", "note_" + "G" * 32, "note_" + "0" * 33, "note"]
)
def test_what_can_be_no_id_is_not_there(tmp_path: Path, object_id: str) -> None:
    store = make(tmp_path)
    assert store.get(NOTES, "a", object_id) is None
    assert not store.delete(NOTES, "a", object_id)


def test_ids_sort_by_time_and_are_not_guessed(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock)
    ids = []
    for _ in range(50):
        ids.append(store.new_id(NOTES))
        clock.now_s += 0.001
    assert ids == sorted(ids)
    assert len({one[-20:] for one in ids}) == 50


# ---- bounds ---------------------------------------------------------------------------------


def test_the_number_of_objects_is_bounded_by_tenant(tmp_path: Path) -> None:
    store = make(tmp_path, max_objects=2)
    first, _ = put(store, NOTES), put(store, NOTES)
    with pytest.raises(StorageFullError, match=r"stored 2 notes, the limit is 2"):
        put(store, NOTES)
    put(store, NOTES, tenant="b")
    put(store, RING)
    store.put(NOTES, "a", first, b"in its own place")
    store.delete(NOTES, "a", first)
    put(store, NOTES)


def test_the_bytes_of_objects_are_bounded(tmp_path: Path) -> None:
    store = make(tmp_path, max_bytes=4 * HEAD_BYTES)
    with pytest.raises(StorageFullError, match="above the limit of"):
        put(store, NOTES, b"x" * 5 * HEAD_BYTES)
    put(store, NOTES, b"x" * 2 * HEAD_BYTES)
    with pytest.raises(StorageFullError, match=r"more are above the limit"):
        put(store, NOTES, b"x" * HEAD_BYTES)
    assert len(files_in(tmp_path)) == 1


def test_files_that_are_being_written_count(tmp_path: Path, clock: Clock) -> None:
    """Also if the write takes longer than a count of the folder is used."""
    store = make(tmp_path, clock, max_objects=1)

    def pieces(error: Exception | None = None) -> Iterator[bytes]:
        clock.now_s += 2
        with pytest.raises(StorageFullError, match="has stored 1 notes"):
            store.put(NOTES, "t", store.new_id(NOTES), b"b")
        if error is not None:
            raise error
        yield b"a"

    with pytest.raises(ValueError, match="no"):
        store.put_pieces(NOTES, "t", store.new_id(NOTES), 1, pieces(ValueError("no")))
    written = store.new_id(NOTES)
    store.put_pieces(NOTES, "t", written, 1, pieces())
    assert store.delete(NOTES, "t", written)
    store.put(NOTES, "t", store.new_id(NOTES), b"c")


def test_the_oldest_make_room_where_the_kind_says_so(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock, max_objects=3)
    ids = []
    for _ in range(5):
        ids.append(put(store, RING))
        clock.now_s += 0.01
    assert store.list_ids(RING, "a") == ids[2:]
    large = make(tmp_path / "large", clock, max_bytes=3 * HEAD_BYTES)
    small = [put(large, RING) for _ in range(2)]
    kept = put(large, RING, b"x" * 2 * HEAD_BYTES)
    assert large.list_ids(RING, "a") == [kept]
    assert content_of(large, RING, small[0]) is None


def test_what_other_gateways_store_counts(tmp_path: Path, clock: Clock) -> None:
    first, second = (make(tmp_path, clock, max_objects=4) for _ in range(2))
    for store in (first, second, first, second):
        put(store, NOTES)
        clock.now_s += 2.0
    for store in (first, second):
        with pytest.raises(StorageFullError):
            put(store, NOTES)


def test_what_has_expired_does_not_count(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock, max_objects=1)
    put(store, NOTES)
    clock.now_s += 59.0
    with pytest.raises(StorageFullError):
        put(store, NOTES)
    clock.now_s += 1.0
    kept = put(store, NOTES)
    assert [path.name for path in files_in(tmp_path)] == [kept]


# ---- expiry ---------------------------------------------------------------------------------


def test_objects_expire_at_once_and_are_swept(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock)
    short, long = put(store, NOTES), store.new_id(NOTES)
    store.put(NOTES, "a", long, b"x", ttl_s=3600.0)
    clock.now_s += 59.0
    assert content_of(store, NOTES, short) == b"x"
    assert store.sweep() == 0
    clock.now_s += 1.0
    assert content_of(store, NOTES, short) is None
    assert store.list_ids(NOTES, "a") == [long]
    assert not store.delete(NOTES, "a", short)
    assert store.sweep() == 1
    assert [path.name for path in files_in(tmp_path)] == [long]
    clock.now_s += 3600.0
    assert store.sweep() == 1
    assert list((tmp_path / "notes").iterdir()) == []  # the tenant's folder has gone too
    put(store, NOTES)


def test_an_object_lives_as_long_as_its_file_says(tmp_path: Path, clock: Clock) -> None:
    """A copied folder has other modification times."""
    store = make(tmp_path, clock)
    object_id = put(store, NOTES)
    (file,) = files_in(tmp_path)
    os.utime(file, (1.0, 1.0))
    assert store.sweep() == 0
    assert content_of(store, NOTES, object_id) == b"x"


def test_what_a_killed_writer_left_is_swept(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock)
    left = tmp_path / "new" / "abandoned"
    left.write_bytes(b"half")
    clock.now_s += 60.0
    assert store.sweep() == 0
    clock.now_s += 3600.0
    assert store.sweep() == 1
    assert files_in(tmp_path) == []


# ---- damage and death -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw.replace(b"hello", b"jello"),
        lambda raw: b"",
        lambda raw: b"{}\n" + raw.partition(b"\n")[2],
        lambda raw: b"\xff\xfe" + raw,
        lambda raw: raw.replace(b'"format":1', b'"format":2'),
    ],
)
def test_a_damaged_object_is_not_returned(tmp_path: Path, damage: Any) -> None:
    store = make(tmp_path)
    object_id = put(store, NOTES, b"hello")
    (file,) = files_in(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StorageError):
        store.get(NOTES, "a", object_id)
    assert store.delete(NOTES, "a", object_id)
    assert store.get(NOTES, "a", object_id) is None


def test_a_file_in_another_one_s_place_is_not_returned(tmp_path: Path) -> None:
    store = make(tmp_path)
    mine, other = put(store, NOTES, b"1"), put(store, NOTES, b"2")
    folder = files_in(tmp_path)[0].parent
    (folder / mine).write_bytes((folder / other).read_bytes())
    with pytest.raises(StorageError, match="damaged"):
        store.get(NOTES, "a", mine)


def test_the_begin_of_an_object(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock)
    found = put(store, NOTES, b"abc" * 1000)
    assert store.read_prefix(NOTES, "a", found, 5) == b"abcab"
    assert store.read_prefix(NOTES, "b", found, 5) is None
    assert store.read_prefix(NOTES, "a", "../x", 5) is None
    (path,) = files_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.read_prefix(NOTES, "a", found, 5) == b"abcab"
    clock.now_s += 60.0
    assert store.read_prefix(NOTES, "a", found, 5) is None
    path.write_bytes(b"\xff\n")
    with pytest.raises(StorageError, match="damaged"):
        store.read_prefix(NOTES, "a", found, 5)


def test_records_are_what_they_were() -> None:
    raw = encode("note_1", b"a\nb", 1.5, 2.5)
    found = decode(raw, "note_1")
    assert (found.content, found.head.created_s, found.head.expires_s) == (b"a\nb", 1.5, 2.5)
    assert raw.startswith(f'{{"format":{FORMAT},'.encode())


WRITER = """
import sys
from pathlib import Path
from gateway.state.store import ObjectKind, StateStore
store = StateStore(Path(sys.argv[1]), max_objects=10**6, max_bytes=1 << 40, ttl_s=60.0)
kind, object_id = ObjectKind("notes", "note"), sys.argv[2]
print("ready", flush=True)
number = 0
while True:
    number += 1
    store.put(kind, "a", object_id, b"%d" % number * 50_000)
    store.put(kind, "a", store.new_id(kind), b"other")
"""


def test_a_killed_writer_leaves_whole_objects(tmp_path: Path) -> None:
    store = StateStore(tmp_path, max_objects=10**6, max_bytes=1 << 40, ttl_s=60.0)
    object_id = put(store, NOTES, b"0" * 50_000)
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), object_id],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        before = content_of(store, NOTES, object_id)
        changed = partial(lambda old: content_of(store, NOTES, object_id) != old, before)
        wait_until(changed, "a new version", 60.0)  # each reading is checked: it is a whole one
        writer.kill()
        writer.wait()
        writer.stdout.close()
        content = content_of(store, NOTES, object_id)
        assert content == content[: len(content) // 50_000] * 50_000
        for one in store.list_ids(NOTES, "a"):
            assert content_of(store, NOTES, one)
    put(store, NOTES)


def test_many_writers_of_one_folder(tmp_path: Path) -> None:
    clock = Clock()
    stores = [make(tmp_path, clock, max_objects=10**6) for _ in range(4)]
    ids: list[list[str]] = [[] for _ in stores]
    failures: list[Exception] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                ids[number].append(put(stores[number], NOTES, b"%d" % number))
                stores[number].sweep()
        except Exception as err:
            failures.append(err)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert stores[0].list_ids(NOTES, "a") == sorted(one for some in ids for one in some)
    for number, some in enumerate(ids):
        assert {content_of(stores[0], NOTES, one) for one in some} == {b"%d" % number}


# ---- disks that fail, and clocks that are wrong ----------------------------------------------

OLD, NEW = b"old " * 3000, b"new " * 5000


@pytest.mark.parametrize("kinds", [FEW_FAULTS, pytest.param(FAULTS, marks=pytest.mark.slow)])
def test_an_object_is_old_or_new_whatever_the_disk_does(
    tmp_path: Path, kinds: Sequence[Fault]
) -> None:
    ids = [f"note_{number:032x}" for number in range(2)]

    def prepare(folder: Path) -> None:
        make(folder).put(NOTES, "a", ids[0], OLD)

    for folder, fault in each_fault(tmp_path, prepare, kinds):
        num_before, is_done = len(files_in(folder)), [False, False]
        with FaultyFiles(folder, fault), contextlib.suppress(ConfigError, Killed):
            store = make(folder)
            for place, one in enumerate(ids):
                with contextlib.suppress(StorageError):
                    store.put(NOTES, "a", one, NEW)
                    is_done[place] = True
        if not (fault.lasts or fault.kind.startswith("kill")):
            assert len(files_in(folder)) in (num_before, num_before + 1), "drafts are removed"
        store = make(folder)
        allowed = (OLD, NEW), (None, NEW)
        for place, one in enumerate(ids):
            found = content_of(store, NOTES, one)
            assert found == NEW or (not is_done[place] and found in allowed[place]), fault
            store.put(NOTES, "a", one, NEW)
            assert content_of(store, NOTES, one) == NEW, fault


@pytest.mark.parametrize("kinds", [FEW_FAULTS, pytest.param(FAULTS, marks=pytest.mark.slow)])
def test_the_oldest_go_when_the_new_one_is_there(tmp_path: Path, kinds: Sequence[Fault]) -> None:
    ids = [f"ring_{number:032x}" for number in range(4)]

    def prepare(folder: Path) -> None:
        store = make(folder)
        for one in ids[:3]:
            store.put(RING, "a", one, OLD)

    for folder, fault in each_fault(tmp_path, prepare, kinds):
        with FaultyFiles(folder, fault), contextlib.suppress(ConfigError, StorageError, Killed):
            make(folder, max_objects=3).put(RING, "a", ids[3], NEW)
        store = make(folder, max_objects=3)
        if content_of(store, RING, ids[3]) is None:
            assert store.list_ids(RING, "a") == ids[:3], fault
        store.put(RING, "a", ids[3], NEW)
        assert store.list_ids(RING, "a") == ids[1:], fault


def test_a_put_that_fails_takes_no_room(tmp_path: Path) -> None:
    store = make(tmp_path, max_objects=1)
    with FaultyFiles(tmp_path, Fault(0, lasts=True)), pytest.raises(StorageError):
        put(store, NOTES)
    put(store, NOTES)


def test_a_full_disk_is_known_before_anything_is_written(tmp_path: Path) -> None:
    store, names = make(tmp_path, max_bytes=1 << 62), list[str]()
    with (
        FaultyFiles(tmp_path, on_call=lambda call: names.append(call.name)),
        pytest.raises(StorageFullError, match="nothing more can be stored: No space left"),
    ):
        store.put_pieces(NOTES, "a", store.new_id(NOTES), 1 << 60, [])
    assert "write" not in names


def test_pieces_make_one_object(tmp_path: Path) -> None:
    store = make(tmp_path)
    one, other = store.new_id(NOTES), store.new_id(NOTES)
    store.put_pieces(NOTES, "a", one, 6, iter([b"ab", b"", b"cdef"]))
    assert content_of(store, NOTES, one) == b"abcdef"
    with pytest.raises(StorageError, match="has 2 bytes, not 6"):
        store.put_pieces(NOTES, "a", other, 6, iter([b"ab"]))
    assert content_of(store, NOTES, other) is None
    assert len(files_in(tmp_path)) == 1


@pytest.mark.parametrize("ahead_s", [60.0, 1e6, 1e9])
def test_a_gateway_whose_clock_is_ahead_removes_nothing_early(
    tmp_path: Path, clock: Clock, ahead_s: float
) -> None:
    store = make(tmp_path, clock, max_objects=2)
    mine = put(store, NOTES)
    (tmp_path / "new" / "draft").write_bytes(b"of a writer")
    ahead = StateStore(
        tmp_path,
        max_objects=1,
        max_bytes=1 << 20,
        ttl_s=60.0,
        clock=lambda: clock() + ahead_s,
        disk_clock=clock.of_disk,
    )
    assert ahead.sweep() == 0
    with pytest.raises(StorageFullError):
        put(ahead, NOTES)
    assert content_of(store, NOTES, mine) == b"x"
    clock.now_s += 60.0
    assert ahead.sweep() == 1
    assert store.list_ids(NOTES, "a") == []


def test_the_clock_of_the_disk_is_that_of_its_files(tmp_path: Path) -> None:
    store = StateStore(tmp_path, max_objects=1, max_bytes=1 << 20, ttl_s=60.0, clock=lambda: 1e12)
    (tmp_path / "new" / "probe").touch()
    made_s = (tmp_path / "new" / "probe").stat().st_mtime
    assert 0.0 <= store.disk_time_s() - made_s < 3600.0


def test_one_object_that_cannot_be_read_stops_no_sweep(tmp_path: Path, clock: Clock) -> None:
    store = make(tmp_path, clock)
    bad = put(store, NOTES)
    clock.now_s += 0.01
    put(store, NOTES)
    clock.now_s += 61.0

    def fail(call: FileCall) -> None:
        if call.name == "open" and call.path.endswith(bad):
            raise OSError(errno.EIO, "Input/output error")

    with FaultyFiles(tmp_path, on_call=fail):
        assert store.sweep() == 1
    assert [path.name for path in files_in(tmp_path)] == [bad]


@pytest.mark.parametrize("is_kind", [False, True])
def test_one_folder_that_cannot_be_read_stops_no_sweep(
    tmp_path: Path, clock: Clock, is_kind: bool
) -> None:
    """Its objects stay; those of others, and what killed writers left, are removed."""
    store = make(tmp_path, clock)
    (path,) = tmp_path.glob(f"*/*/{put(store, NOTES, tenant='bad')}")
    for number in range(8):
        put(store, RING, tenant=str(number))
    (tmp_path / "new" / "left").touch()
    clock.now_s += 3700.0
    bad = str(path.parent.parent if is_kind else path.parent)

    def fail(call: FileCall) -> None:
        if call.path == bad and call.name in ("scandir", "listdir"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FaultyFiles(tmp_path, on_call=fail):
        assert store.sweep() == 9
    assert files_in(tmp_path) == [path]
    assert store.sweep() == 1


# ---- the folder -----------------------------------------------------------------------------


def test_the_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    store = make(tmp_path / "state")
    put(store, NOTES)
    for path in [tmp_path / "state", *(tmp_path / "state").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="contains other files") as caught:
        make(tmp_path)
    assert caught.value.field == "state_dir"
    assert files_in(tmp_path) == [tmp_path / "letter.txt"]


@pytest.mark.parametrize(
    ("mark", "rule"),
    [
        (b'{"state_format":2}', "contains objects of format 2, this release supports 1"),
        (b"{", "damaged"),
    ],
)
def test_a_folder_of_another_release_is_refused(tmp_path: Path, mark: bytes, rule: str) -> None:
    make(tmp_path)
    (tmp_path / "state.json").write_bytes(mark)
    with pytest.raises(ConfigError, match=rule):
        make(tmp_path)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        make(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be used"):
        make(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(28, StorageFullError, "nothing more can be stored"), (5, StorageError, "cannot be used")],
)
def test_errors_of_the_disk_have_no_paths(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[StorageError],
    message: str,
) -> None:
    store = make(tmp_path)

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(kind, match=message) as caught:
        put(store, NOTES)
    assert type(caught.value) is kind
    assert str(tmp_path) not in str(caught.value)
    assert files_in(tmp_path) == []


def test_without_a_folder_there_is_no_store(tmp_path: Path) -> None:
    assert open_store(GatewaySection()) is None
    found = open_store(GatewaySection(state_dir=str(tmp_path), state_max_objects=1))
    assert found is not None
    put(found, NOTES)
    with pytest.raises(StorageFullError):
        put(found, NOTES)


@pytest.mark.parametrize(
    "fields", [{"state_ttl_s": 0.5}, {"state_max_bytes": 0}, {"state_max_objects": 0}]
)
def test_wrong_limits_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        GatewaySection(**fields)
    assert caught.value.field in fields
