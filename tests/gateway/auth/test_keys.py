"""Keys, key files and what a key may use, without a server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from cluster.config.api_keys import hash_key
from cluster.config.gateway import GatewaySection
from cluster.core.errors import (
    AuthenticationError,
    ConfigError,
    KeyLimitError,
    PermissionDeniedError,
)
from gateway.auth.auth import KeyRing, make_key_rings
from gateway.auth.key_file import KeyEntry, KeyFile, KeyLimits, plain_entries, read_key_file
from gateway.auth.key_limits import KeyUsage

HEX = hashlib.sha256(b"three").hexdigest()
KEYS = [
    {"name": "team-a", "key": "one", "requests_per_minute": 2, "max_concurrent": 1},
    {"name": "team-b", "sha256": HEX, "tokens_per_minute": 100.5},
    {"key": "two"},
]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def write(path: Path, text: str) -> str:
    """Replaced as a whole, as an operator should."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
    return str(path)


def refused(ring: KeyRing, key: str) -> bool:
    asyncio.run(ring.read_changes())
    try:
        ring.check(f"Bearer {key}")
    except AuthenticationError:
        return True
    return False


def test_a_key_file_is_lines_or_yaml_or_json(tmp_path: Path) -> None:
    lines = read_key_file(write(tmp_path / "lines", f"# people\none\n\n  sha256:{HEX}  \n"))
    assert lines == plain_entries(["one", "three"])
    document = {"keys": KEYS}
    as_json = read_key_file(write(tmp_path / "json", json.dumps(document)))
    as_yaml = read_key_file(
        write(
            tmp_path / "yaml",
            "keys:\n- {name: team-a, key: one, requests_per_minute: 2, max_concurrent: 1}\n"
            f"- {{name: team-b, sha256: {HEX.upper()}, tokens_per_minute: 100.5}}\n- key: two\n",
        )
    )
    assert as_json == as_yaml
    assert [entry.name for entry in as_json] == ["team-a", "team-b", ""]
    assert as_json[0].limits == KeyLimits(requests_per_minute=2, max_concurrent=1)
    assert as_json[1].digest.hex() == HEX
    assert read_key_file(write(tmp_path / "bare", json.dumps(KEYS))) == as_json


def test_a_key_may_be_for_some_models(tmp_path: Path) -> None:
    keys = "keys: [{key: a, models: [small, sql]}, {key: b, models: null}, {key: c}]"
    found = read_key_file(write(tmp_path / "keys", keys))
    assert [entry.models for entry in found] == [("small", "sql"), (), ()]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("s3cret with spaces", "without spaces"),
        ("s3cret\ns3cret", "same key twice"),
        ("keys: [s3cret]", "list 'keys' of mappings"),
        ("keys: [{key: s3cret", "neither YAML nor JSON"),
        ("keys: [{key: s3cret, limit: 3}]", "key 1: limit is not a known field"),
        ("keys: [{name: a}]", "key 1 (a): one of key and sha256 is required"),
        (f"keys: [{{key: s3cret, sha256: {HEX}}}]", "one of key and sha256"),
        ("keys: [{sha256: s3cret}]", "64 hex digits"),
        ("keys: [{key: s3cret, max_concurrent: 0}]", "max_concurrent must be a number above 0"),
        ("keys: [{key: s3cret, weight: -1}]", "weight must be a number above 0"),
        ("keys: [{key: s3cret, weight: 1.0e-7}]", "weight must be from 1e-06 to 1e+06"),
        ("keys: [{key: s3cret, weight: 1000001}]", "weight must be from 1e-06 to 1e+06"),
        ("keys: [{key: s3cret, max_concurrent: 1.5}]", "max_concurrent must be a number above 0"),
        ("keys: [{key: s3cret, tokens_per_minute: .inf}]", "tokens_per_minute must be a number"),
        ("keys: [{key: s3cret, tokens_per_minute: .nan}]", "tokens_per_minute must be a number"),
        (f"keys: [{{key: s3cret, weight: {10**400}}}]", "weight must be a number above 0"),
        ("keys: [{key: s3cret, requests_per_minute: yes}]", "requests_per_minute must be a number"),
        ("keys: [{key: s3cret, models: small}]", "key 1: models must be a list of names"),
        ("keys: [{key: s3cret, models: []}]", "key 1: models must be a list of names"),
        ("keys: [{key: s3cret, models: [small, 2]}]", "key 1: models must be a list of names"),
        ("keys: [{key: s3cret, models: [small, '']}]", "key 1: models must be a list of names"),
        ("keys: [{key: s3cret, models: {small: 1}}]", "key 1: models must be a list of names"),
        ("keys: [{key: 12345}]", "printable ASCII"),
        ("keys: [{name: a, key: s3cret}, {name: a, key: b}]", "same name twice"),
        ("keys: !!python/object/apply:os.system ['true']", "neither YAML nor JSON"),
        ("keys: [{key: !!bool s3cret}]", "neither YAML nor JSON"),
        ("keys: [{key: !!timestamp s3cret}]", "neither YAML nor JSON"),
    ],
)
def test_a_wrong_key_file_is_refused_without_showing_keys(
    tmp_path: Path, text: str, rule: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_key_file(write(tmp_path / "keys", text), "api_key_file")
    assert rule in str(caught.value)
    assert str(caught.value).startswith(f"api_key_file ({tmp_path}/keys)")
    assert "s3cret" not in str(caught.value)


def test_a_key_file_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    ring = KeyRing(file=KeyFile(write(path, "one")), clock=clock)
    assert not refused(ring, "one")
    write(path, "two-two\nthree")
    clock.now_s += 1.5
    assert refused(ring, "one")
    assert not refused(ring, "two-two")
    with caplog.at_level(logging.INFO):
        write(path, "keys: [{key: two-two")  # half of it
        clock.now_s += 1.5
        assert not refused(ring, "two-two"), "the former keys stay in force"
        path.unlink()
        clock.now_s += 1.5
        assert not refused(ring, "three")
    assert "neither YAML nor JSON" in caplog.text
    assert "cannot be read" in caplog.text
    assert "two-two" not in caplog.text
    write(path, "")
    clock.now_s += 1.5
    assert refused(ring, "three"), "without keys nobody comes in"
    with pytest.raises(AuthenticationError):
        ring.check(None)


def test_a_link_that_is_moved_on_is_a_change(tmp_path: Path) -> None:
    for name in ("old", "new"):  # as Kubernetes mounts a secret
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"{name}")
    (tmp_path / "data").symlink_to("old")
    clock = Clock()
    ring = KeyRing(file=KeyFile(str(tmp_path / "data" / "keys")), clock=clock)
    assert not refused(ring, "old")
    (tmp_path / "next").symlink_to("new")
    os.replace(tmp_path / "next", tmp_path / "data")
    clock.now_s += 1.5
    assert refused(ring, "old")
    assert not refused(ring, "new")


def test_a_digest_is_no_key() -> None:
    ring = KeyRing(["secret"])
    assert not refused(ring, "secret")
    assert refused(ring, hash_key("secret"))
    assert refused(KeyRing([hash_key("secret")]), hash_key("secret"))


@pytest.mark.parametrize("num_keys", [1, 1000])
def test_a_key_is_found_by_its_digest_and_compared_in_constant_time(
    num_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = KeyRing(["first", *(f"key-{number}" for number in range(1, num_keys))])
    for key, is_known in (("first", True), ("fir", False), ("", False)):
        compared.clear()
        assert refused(ring, key) is not is_known
        assert len(compared) == (1 if key else 0), "as many for a known key as for a wrong one"
        assert all(len(one) == len(other) == 32 for one, other in compared)


def test_a_large_file_is_read_beside_the_loop(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    may_end = threading.Event()
    may_end.set()

    def read(name: str, setting: str) -> tuple[KeyEntry, ...]:
        assert may_end.wait(60.0)
        return read_key_file(name, setting)

    file = KeyFile(write(path, "one"), read=read, limit_s=0.0)
    ring = KeyRing(file=file, clock=clock)

    async def work() -> None:
        may_end.clear()
        write(path, "two-two")
        clock.now_s += 1.5
        for _ in range(3):
            await ring.read_changes()  # returns at once
            clock.now_s += 1.5
            assert ring.check("Bearer one") is not None, "the former keys are in force"
        may_end.set()
        while file.entries.keys() == {hashlib.sha256(b"one").digest()}:
            await asyncio.sleep(0)
        await ring.read_changes()
        with pytest.raises(AuthenticationError):
            ring.check("Bearer one")
        assert ring.check("Bearer two-two") is not None

    asyncio.run(work())


def test_requests_of_a_key_are_limited_by_the_minute() -> None:
    limits = KeyLimits(requests_per_minute=3)
    account = KeyUsage(KeyEntry(digest=b"a"), limits, 0.0)
    for _ in range(3):
        account.enter(0.0)
    with pytest.raises(KeyLimitError, match="3 requests per minute") as caught:
        account.enter(5.0)
    assert caught.value.retry_after_s == pytest.approx(15.0)
    assert account.num_running == 3, "a refused request is not counted"
    account.enter(20.1)
    with pytest.raises(KeyLimitError):
        account.enter(20.2)


def test_a_slow_rate_still_lets_requests_through() -> None:
    account = KeyUsage(KeyEntry(digest=b"a"), KeyLimits(requests_per_minute=0.5), 0.0)
    account.enter(0.0)
    with pytest.raises(KeyLimitError) as caught:
        account.enter(1.0)
    account.enter(1.0 + caught.value.retry_after_s + 0.001)


def test_requests_at_once_are_limited() -> None:
    account = KeyUsage(KeyEntry(digest=b"a"), KeyLimits(max_concurrent=2), 0.0)
    account.enter(0.0)
    account.enter(0.0)
    with pytest.raises(KeyLimitError, match="at most 2"):
        account.enter(0.0)
    account.leave(0.0)
    account.enter(0.0)


def test_the_retry_time_of_a_busy_key_follows_its_requests() -> None:
    """Two at a time, of 20 s each, one beginning 10 s after the other: one ends every 10 s."""
    account = KeyUsage(KeyEntry(digest=b"a"), KeyLimits(max_concurrent=2), 0.0)
    account.enter(0.0)
    account.enter(10.0)
    with pytest.raises(KeyLimitError) as caught:
        account.enter(15.0)
    assert caught.value.retry_after_s == 1.0  # none has ended
    for now_s in range(20, 1000, 10):
        account.leave(float(now_s))
        account.enter(float(now_s))
    with pytest.raises(KeyLimitError) as caught:
        account.enter(990.0)
    assert caught.value.retry_after_s == pytest.approx(10.0, rel=0.01)


def test_tokens_are_paid_for_when_they_are_known() -> None:
    account = KeyUsage(KeyEntry(digest=b"a"), KeyLimits(tokens_per_minute=60), 0.0)
    account.check_tokens(0.0)
    account.spend_tokens(90, 0.0)
    with pytest.raises(KeyLimitError, match="60 tokens per minute") as caught:
        account.check_tokens(1.0)
    assert caught.value.retry_after_s == pytest.approx(30.0)
    account.check_tokens(31.1)


def test_a_changed_file_keeps_what_was_used(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()

    def text(limit: int) -> str:
        return json.dumps({"keys": [{"key": "one", "requests_per_minute": limit}]})

    ring = KeyRing(file=KeyFile(write(path, text(1))), clock=clock)
    ring.enter("Bearer one")
    write(path, text(1) + "\n")
    clock.now_s += 1.5
    asyncio.run(ring.read_changes())
    with pytest.raises(KeyLimitError):
        ring.enter("Bearer one")
    write(path, text(2))
    clock.now_s += 1.5
    asyncio.run(ring.read_changes())
    ring.enter("Bearer one")


def test_own_limits_come_before_the_common_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "keys", json.dumps({"keys": KEYS}))
    public, _ = make_key_rings(GatewaySection(api_key_file=file, key_max_concurrent=2))
    public.enter("Bearer one")
    with pytest.raises(KeyLimitError, match="at most 1"):
        public.enter("Bearer one")
    public.enter("Bearer two")
    public.enter("Bearer two")
    with pytest.raises(KeyLimitError, match="at most 2"):
        public.enter("Bearer two")


def test_an_admin_key_opens_all_and_another_key_not_the_admin_ports() -> None:
    section = GatewaySection(api_keys=("user",), admin_keys=("root",), key_requests_per_minute=1)
    public, admin = make_key_rings(section)
    assert admin.check("Bearer root") is not None
    with pytest.raises(PermissionDeniedError):
        admin.check("Bearer user")
    for wrong in ("Bearer nobody", None):
        with pytest.raises(AuthenticationError):
            admin.check(wrong)
    for _ in range(3):
        public.enter("Bearer root")  # without the limits of others
    public.enter("Bearer user")
    with pytest.raises(KeyLimitError):
        public.enter("Bearer user")


def test_without_admin_keys_the_others_guard_the_admin_ports() -> None:
    public, admin = make_key_rings(GatewaySection(api_keys=("user",)))
    assert admin.check("Bearer user") is public.check("Bearer user") is not None
    public, admin = make_key_rings(GatewaySection(admin_keys=("root",)))
    assert public.is_open
    assert not admin.is_open


def test_tenants_are_names_or_digests() -> None:
    named, plain = KeyEntry(digest=b"\1", name="team"), KeyEntry(digest=b"\1")
    assert (named.tenant, plain.tenant) == ("team", "01")
