"""Adapters: all workers that run attention have the same ones, whatever happens to whom."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.lora import LoraSection
from cluster.controller.adapters import LOAD_LIMIT_S, RETRY_S, UNUSED_S, AdapterLoadCommand
from cluster.controller.failover import ReportCollector
from cluster.core.codec import to_plain
from cluster.core.errors import ConflictError, ModelNotFoundError, RequestError
from cluster.core.frames import (
    AdaptersKept,
    ControllerSnapshot,
    Heartbeat,
    KeepAdapters,
    NewGeneration,
    Register,
    WorkerReady,
    WorkerReport,
)
from tests.cluster.controller.fakes_cluster import CONFIG, FakeCluster, slots_of
from tests.cluster.controller.test_failover import restored

SQL = AdapterLoadCommand(name="sql", path="/adapters/sql")
ROOTS = ("/adapters", "/a")


def config(*modules: str, max_loras: int = 3, roots: tuple[str, ...] = ROOTS) -> ClusterConfig:
    lora = LoraSection(lora_modules=modules, max_loras=max_loras, lora_roots=roots)
    return dataclasses.replace(CONFIG, lora=lora)


def cluster(*modules: str, num_attention: int = 2) -> FakeCluster:
    return FakeCluster(num_attention, 2, config=config(*modules))


def serving(num_attention: int = 2) -> FakeCluster:
    found = cluster(num_attention=num_attention)
    found.serve()
    return found


def asked(found: FakeCluster, worker: str) -> list[str]:
    """Names of the adapters that a worker is to have, by the newest order."""
    order = found.link.last(worker, KeepAdapters)
    return [] if order is None else [adapter.name for adapter in order.adapters]


def answer(found: FakeCluster, worker: str, digest: str = "same", **errors: str) -> None:
    """A worker carries out the newest order; ``errors`` by name of the adapter."""
    order = found.link.last(worker, KeepAdapters)
    assert order is not None
    failed = {a.key: errors[a.name] for a in order.adapters if a.name in errors}
    digests = {a.key: digest for a in order.adapters if a.key not in failed}
    found.send(worker, AdaptersKept(number=order.number, digests=digests, errors=failed))


def load(found: FakeCluster, order: AdapterLoadCommand = SQL) -> str:
    return found.controller.adapters.load(order, found.now)


def states(found: FakeCluster) -> dict[str, str]:
    return {a["name"]: a["state"] for a in found.controller.snapshot()["adapters"]}


def lacking(found: FakeCluster) -> dict[str, list[str]]:
    """Workers without it, by name of the adapter."""
    return {a["name"]: a["lacking"] for a in found.controller.snapshot()["adapters"]}


def shown(found: FakeCluster, worker: str) -> str:
    """A worker's state as gateways see it."""
    workers = found.controller.snapshot()["workers"]
    return next(str(w["state"]) for w in workers if w["name"] == worker)


def test_requests_may_name_it_once_all_have_it() -> None:
    found = serving()
    key = load(found)
    assert asked(found, "attention-0") == asked(found, "attention-1") == ["sql"]
    assert found.link.last("expert-0", KeepAdapters) is None
    answer(found, "attention-0")
    assert states(found) == {"sql": "LOADING"}
    assert not found.controller.adapters.is_settled(key)
    version = found.known.version
    answer(found, "attention-1")
    assert states(found) == {"sql": "READY"}
    assert found.controller.adapters.is_settled(key)
    assert found.controller.adapters.error(key) == ""
    assert found.known.version > version


@pytest.mark.parametrize("first", ["attention-0", "attention-1"])
def test_one_that_cannot_load_it_ends_the_load(first: str) -> None:
    found = serving()
    key = load(found)
    (second,) = {"attention-0", "attention-1"} - {first}
    answer(found, first)
    answer(found, second, sql="rank 128 must not exceed max_lora_rank (64)")
    assert states(found) == {}
    assert found.controller.adapters.is_settled(key)
    assert found.controller.adapters.error(key) == (
        f"{second} cannot load the adapter sql: rank 128 must not exceed max_lora_rank (64)"
    )
    assert asked(found, first) == asked(found, second) == []


def test_files_must_be_the_same_everywhere() -> None:
    found = serving()
    key = load(found)
    answer(found, "attention-0", digest="one")
    answer(found, "attention-1", digest="other")
    assert "differ from those that other workers have read" in found.controller.adapters.error(key)


def test_a_load_without_an_answer_ends() -> None:
    found = serving()
    key = load(found)
    answer(found, "attention-0")
    for _ in range(int(LOAD_LIMIT_S)):
        found.beat_all()
        found.tick(1.0)
    found.beat_all()
    found.tick(1.0)
    words = "/adapters/sql: no reply of attention-1 within 120 s"
    assert found.controller.adapters.error(key) == words


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("", "/a", "lora_name ('') must be"),
        ("a b", "/a", "lora_name ('a b') must be"),
        ("demo", "/a", "lora_name (demo) is the name of the model"),
        ("sql", "/a", "lora_name (sql) is loaded already"),
        ("other", "relative", "lora_path ('relative') must be an absolute path"),
        ("other", "/a\0b", "must be an absolute path"),
        ("other", "/" + 2000 * "a", "of at most 1024 characters"),
        ("other", "/etc", "lora_path ('/etc') must be in a folder of --lora-roots"),
        ("other", "/adapters/../etc", "must be in a folder of --lora-roots, without '..'"),
        ("other", "/adapters-of-others/x", "without '..' (/adapters, /a)"),
    ],
)
def test_orders_that_are_refused(name: str, path: str, words: str) -> None:
    found = serving(1)
    load(found)
    with pytest.raises(RequestError) as error:
        load(found, AdapterLoadCommand(name=name, path=path))
    assert words in str(error.value)
    assert states(found) == {"sql": "LOADING"}


def test_number_is_limited() -> None:
    found = serving(1)
    for number in range(3):
        load(found, AdapterLoadCommand(name=f"a{number}", path="/a"))
    with pytest.raises(ConflictError, match=r"at most 3 \(max_loras\) adapters may be loaded: a0"):
        load(found)


def test_unloaded_ones_are_freed_when_nobody_uses_them() -> None:
    found = serving()
    key = load(found)
    answer(found, "attention-0")
    answer(found, "attention-1")
    assert found.controller.adapters.unload("sql", found.now) == key
    assert states(found) == {"sql": "UNLOADING"}
    for _ in range(10):
        found.beat_all("attention-1")
        generation = found.known.generation.number
        beat = Heartbeat(
            progress=1, idle=True, generation=generation, running=True, epoch=1, adapters=(key,)
        )
        found.send("attention-1", beat)
        found.tick(1.0)
    assert states(found) == {"sql": "UNLOADING"}
    assert asked(found, "attention-0") == ["sql"]
    found.beat_all()
    found.tick(UNUSED_S - 3.5)
    assert states(found) == {"sql": "UNLOADING"}
    for _ in range(4):
        found.beat_all()
        found.tick(1.0)
    assert states(found) == {}
    assert asked(found, "attention-0") == []


def test_unknown_ones_are_not_unloaded() -> None:
    found = serving(1)
    with pytest.raises(ModelNotFoundError, match="the adapter 'sql' does not exist"):
        found.controller.adapters.unload("sql", found.now)
    load(found)
    with pytest.raises(ConflictError, match="the adapter sql is LOADING"):
        found.controller.adapters.unload("sql", found.now)


def test_a_name_may_be_loaded_again_while_the_old_one_is_in_use() -> None:
    found = serving(1)
    first = load(found)
    answer(found, "attention-0")
    found.controller.adapters.unload("sql", found.now)
    second = load(found)
    assert first != second
    assert asked(found, "attention-0") == ["sql", "sql"]


def test_new_workers_join_with_all_adapters() -> None:
    found = serving()
    load(found)
    answer(found, "attention-0")
    answer(found, "attention-1", digest="same")
    found.disconnect("attention-1")
    found.join_all(5)
    found.beat_all()
    found.tick(1.0)
    (new,) = found.started()
    found.register(new)
    order = found.link.last(new, KeepAdapters)
    assert order is not None
    assert [a.digest for a in order.adapters] == ["same"]
    found.send(new, WorkerReady())
    assert found.link.last(new, NewGeneration) is None
    version = found.known.version
    assert shown(found, new) == "LOADING", "a request with the adapter would end there"
    answer(found, new)
    assert found.link.last(new, NewGeneration) is not None
    assert shown(found, new) in ("READY", "SERVING")
    assert found.known.version > version, "gateways get to know"
    found.join_all(9)
    assert found.state == "SERVING"


def test_workers_that_load_weights_meanwhile_get_them_too() -> None:
    found = serving()
    found.disconnect("attention-1")
    found.join_all(5)
    found.beat_all()
    found.tick(1.0)
    (new,) = found.started()
    found.register(new)
    load(found)
    answer(found, "attention-0")
    assert states(found) == {"sql": "READY"}
    found.send(new, WorkerReady())
    assert found.link.last(new, NewGeneration) is None
    version = found.known.version
    assert shown(found, new) == "LOADING", "a request with the adapter would end there"
    answer(found, new)
    assert found.link.last(new, NewGeneration) is not None
    assert shown(found, new) in ("READY", "SERVING")
    assert found.known.version > version, "gateways get to know"


@pytest.mark.parametrize(
    ("modules", "roots", "path", "is_allowed"),
    [
        ((), (), "/adapters/new", False),
        (("sql=/adapters/sql",), (), "/adapters/new", True),
        (("sql=/adapters/sql",), (), "/adapters/sql", True),
        (("sql=/adapters/sql",), ("/more",), "/adapters/sql", True),
        (("sql=/adapters/sql",), ("/more",), "/adapters/new", False),
        (("sql=/sql",), (), "/etc", False),
        ((), ("/",), "/etc", True),
    ],
)
def test_adapters_are_loaded_from_folders_that_were_named(
    modules: tuple[str, ...], roots: tuple[str, ...], path: str, is_allowed: bool
) -> None:
    found = FakeCluster(1, 2, config=config(*modules, roots=roots))
    found.load_all()
    if modules:
        answer(found, "attention-0")
    found.join_all()
    order = AdapterLoadCommand(name="new", path=path)
    if is_allowed:
        assert load(found, order).startswith("new@")
    else:
        with pytest.raises(RequestError, match="must be in a folder of --lora-roots"):
            load(found, order)


def test_an_adapter_may_belong_to_keys() -> None:
    keys = GatewaySection(api_keys=("sha256:" + 64 * "0",))
    found = FakeCluster(1, 2, config=dataclasses.replace(config(), gateway=keys))
    found.serve()
    load(found, AdapterLoadCommand(name="sql", path="/adapters/sql", tenants=("acme",)))
    assert found.controller.snapshot()["adapters"][0]["tenants"] == ["acme"]
    kept = to_plain(found.known.memory())["adapters"]
    assert kept[0]["adapter"]["tenants"] == ["acme"]
    with pytest.raises(RequestError, match=r"tenants \(1 of them\) must be at most 64 names"):
        load(found, AdapterLoadCommand(name="more", path="/adapters/sql", tenants=("",)))


def test_without_keys_an_adapter_belongs_to_no_key() -> None:
    with pytest.raises(RequestError, match="without keys there are no tenants"):
        load(serving(1), AdapterLoadCommand(name="sql", path="/adapters/sql", tenants=("acme",)))


def lose_and_replace(found: FakeCluster) -> str:
    """The second attention worker is lost; the name of the one that takes its place."""
    found.disconnect("attention-1")
    found.join_all(5)
    found.beat_all()
    found.tick(1.0)
    (new,) = found.started()
    found.bring_up(new)
    return new


def test_a_new_worker_that_cannot_load_an_adapter_serves_without_it() -> None:
    """Requests that name it go to the others."""
    found = serving()
    load(found)
    answer(found, "attention-0")
    answer(found, "attention-1")
    new = lose_and_replace(found)
    answer(found, new, sql="no such folder")
    assert states(found) == {"sql": "READY"}
    assert found.link.last(new, NewGeneration) is not None
    assert lacking(found) == {"sql": [new]}
    memory = to_plain(found.known.memory())["adapters"]
    assert [kept["lacking"] for kept in memory] == [[new]]
    causes = [entry["cause"] for entry in found.controller.snapshot()["history"]]
    words = f"{new} cannot load the adapter sql: no such folder"
    assert causes.count(words) == 1
    problem = f"{new} serves without the adapter sql, which it could not load"
    assert found.controller.snapshot()["problems"] == [problem]
    found.join_all(9)
    before = found.link.last(new, KeepAdapters)
    for _ in range(int(RETRY_S) + 1):
        found.beat_all()
        found.tick(1.0)
    again = found.link.last(new, KeepAdapters)
    assert before is not None
    assert again is not None
    assert again.number > before.number, "it tries again"
    answer(found, new, sql="no such folder")
    causes = [entry["cause"] for entry in found.controller.snapshot()["history"]]
    assert causes.count(words) == 1, "it is said once"
    answer(found, new)
    assert lacking(found) == {"sql": []}
    assert found.controller.snapshot()["problems"] == []


def test_a_new_worker_does_not_end_a_load_that_the_others_carry_out() -> None:
    found = serving()
    load(found)
    new = lose_and_replace(found)
    answer(found, "attention-0")
    answer(found, new, sql="no such folder")
    assert states(found) == {"sql": "READY"}
    assert lacking(found) == {"sql": [new]}


def unload(found: FakeCluster) -> str:
    key = load(found)
    answer(found, "attention-0")
    answer(found, "attention-1")
    found.controller.adapters.unload("sql", found.now)
    return key


def wait_unused(found: FakeCluster) -> None:
    for _ in range(2 * int(UNUSED_S)):
        found.beat_all()
        found.tick(1.0)


def test_it_is_not_freed_while_a_request_waits_for_it_at_a_gateway() -> None:
    found = serving()
    key, uses = unload(found), found.controller.adapters.uses
    uses.report("gateway-1", found.known.version, ())
    uses.report("gateway-2", found.known.version, (key,))
    wait_unused(found)
    assert states(found) == {"sql": "UNLOADING"}
    uses.report("gateway-2", found.known.version, ())
    wait_unused(found)
    assert states(found) == {}


@pytest.mark.parametrize("leaves", [False, True])
def test_it_is_not_freed_before_every_gateway_knows_that_it_is_unloaded(leaves: bool) -> None:
    found = serving()
    uses = found.controller.adapters.uses
    uses.report("gateway-1", found.known.version, ())
    unload(found)
    wait_unused(found)
    assert states(found) == {"sql": "UNLOADING"}
    if leaves:
        uses.leave("gateway-1")
    else:
        uses.report("gateway-1", found.known.version, ())
    wait_unused(found)
    assert states(found) == {}


def test_a_worker_that_loads_it_at_another_try_lacks_it_no_more() -> None:
    found = serving()
    load(found)
    answer(found, "attention-0")
    answer(found, "attention-1")
    answer(found, "attention-1", sql="a disk that does not answer")
    assert lacking(found) == {"sql": ["attention-1"]}
    version = found.known.version
    answer(found, "attention-1")
    assert lacking(found) == {"sql": []}
    assert found.known.version > version


def test_new_workers_that_do_not_load_them_are_lost() -> None:
    found = serving()
    load(found)
    answer(found, "attention-0")
    answer(found, "attention-1")
    found.disconnect("attention-1")
    found.join_all(5)
    found.beat_all()
    found.tick(1.0)
    (new,) = found.started()
    found.bring_up(new)
    for _ in range(int(LOAD_LIMIT_S) + 2):
        found.beat_all()
        found.tick(1.0)
    assert found.known.workers[new].is_lost
    assert "has not loaded its adapters" in found.known.workers[new].reason


def test_a_start_waits_for_its_adapters() -> None:
    found = cluster("sql=/adapters/sql", "chat=/adapters/chat")
    found.load_all()
    assert found.state == "STARTING"
    assert asked(found, "attention-1") == ["sql", "chat"]
    answer(found, "attention-0")
    assert not found.known.generation.number
    answer(found, "attention-1")
    found.join_all()
    assert found.state == "SERVING"
    assert states(found) == {"sql": "READY", "chat": "READY"}


def test_a_start_fails_with_an_adapter() -> None:
    found = cluster("sql=/adapters/sql")
    found.load_all()
    answer(found, "attention-0", sql="there is no adapter_config.json in the folder")
    assert found.known.error == (
        "attention-0: the adapter sql cannot be loaded: there is no adapter_config.json in the "
        "folder"
    )


def test_a_restarted_controller_knows_them() -> None:
    found = serving(1)
    load(found)
    answer(found, "attention-0")
    load(found, AdapterLoadCommand(name="new", path="/adapters/new"))
    snapshot = found.link.last("attention-0", ControllerSnapshot)
    order = found.link.last("attention-0", NewGeneration)
    assert snapshot is not None
    assert order is not None
    assert to_plain(found.known.memory())["adapters"] == snapshot.memory["adapters"]
    names = [m.name for m in found.members]
    collector = ReportCollector(names, 0.0, limit_s=10.0, confirm_s=0.2)
    for member in order.generation.members:
        report = WorkerReport(
            generation=order.generation,
            placement=order.placement,
            running=True,
            highest_step=40,
            highest_epoch=1,
            memory=snapshot.memory,
        )
        report = WorkerReport(
            **{f: getattr(report, f) for f in report.__struct_fields__ if f != "slots"},
            slots=slots_of(report, member.name),
        )
        for frame in (Register(member=member), WorkerReady(), report):
            collector.frame(member.name, frame, 0.1)
    collected = collector.result()
    assert collected is not None
    controller, link = restored(collected)
    keep = link.last("attention-0", KeepAdapters)
    assert keep is not None
    assert [(a.name, a.digest) for a in keep.adapters] == [("sql", "same"), ("new", "")]
    assert keep.number > order.generation.number
    digests = {a.key: "same" for a in keep.adapters}
    answered = AdaptersKept(number=keep.number, digests=digests)
    controller.frame("attention-0", answered, 2.0)
    found_states = {a["name"]: a["state"] for a in controller.snapshot()["adapters"]}
    assert found_states == {"sql": "READY", "new": "READY"}


def test_clusters_without_adapters_order_none() -> None:
    found = serving()
    assert found.link.last("attention-0", KeepAdapters) is None
    assert found.controller.snapshot()["adapters"] == []
