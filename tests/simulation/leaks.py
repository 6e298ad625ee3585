"""What must be back where it was before the first request, once the last one is over.

A request that ends, fails, moves, or is lost with its worker or gateway leaves nothing behind: no
block is held, no place is taken, and no table names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any

from workers.process.roles.attention import AttentionRole

if TYPE_CHECKING:
    from tests.simulation.gateways import SimGateway
    from tests.simulation.world import World
    from workers.engine.engine import Engine

QUIET_S = 30.0
"""Virtual time without a request after which nothing may be left."""


def leaks(world: World) -> list[str]:
    """What is left, by worker and gateway; empty when all is well."""
    found = []
    names = {g.name for g in world.gateways if not g.process.is_dead}
    for worker in world.ray.actors.workers.values():
        if not worker.args.member.runs_attention:
            continue
        role = worker.worker.roles.attention
        left = ["no engine"] if role is None else [*_left_at_worker(role), *_streams(role, names)]
        found += [f"{worker.name} has {what}" for what in left]
    if world.state is not None:
        found += _named("open files of stored objects", [*world.state.handles])
    if world.kv_disk is not None:
        owners = Counter(process.name for process in world.kv_disk.handles.values())
        found += [f"{name} has {n} open files of blocks" for name, n in owners.items() if n > 1]
    for gateway in world.gateways:
        if not gateway.process.is_dead:
            found += [f"{gateway.name} has {what}" for what in _left_at_gateway(gateway)]
    return found


def _left_at_worker(role: AttentionRole) -> Iterator[str]:
    yield from _left_in_engine(role.engine)
    yield from _named("owners", role.outputs.owners)
    yield from _named("requests on their way", role.intake._requests)
    parts: list[Any] = [role.intake.compilations, *role.intake._sources]
    for waiting in parts:
        yield from _named(f"jobs of {type(waiting).__name__}", list(waiting._all_jobs()))
    if role.copy_receiver is not None and (
        count := role.copy_receiver.stats()["session_copies_waiting"]
    ):
        yield f"{count:g} copies that wait"
    if role.tiers is not None and not role.tiers.copies.is_idle:
        yield "turns that are copied"


def _streams(role: AttentionRole, living: Set[str]) -> Iterator[str]:
    """Streams of gateways that have died; each has one to a living gateway at most."""
    streams = [name.partition("#")[0] for name in role._stream._streams._streams]
    yield from _named("dead streams", [*(Counter(streams) - Counter(living))])


def _left_in_engine(engine: Engine) -> Iterator[str]:
    stats, scheduler, requests = engine.stats(), engine._scheduler, engine.requests
    isolation, paused = requests.isolation, requests._paused
    if held := stats["kv_blocks_total"] - stats["kv_blocks_free"]:
        yield f"{held:g} blocks that are held"
    if taken := engine._section.max_num_seqs - len(scheduler.tables._free):
        yield f"{taken} seats that are taken"
    yield from _named("requests", requests._active)
    yield from _named("searches", requests._searches._groups)
    yield from _named("loans", engine.kv_store.tables)
    yield from _named("adapters in use", requests.adapters_in_use)
    yield from _named("sequences", [*scheduler.queues.running, *scheduler.queues.waiting])
    yield from _named("waits for blocks", [*scheduler.kv_waits._waiting])
    yield from _named("requests to ask about", scheduler.kv_waits._untried)
    yield from _named("suspects", {**isolation._deaths, **isolation._hit})
    yield from _named("offers to run alone", [*filter(None, [isolation._solo])])
    yield from _named("paused requests", [*paused.request_ids, *paused._token_limits])
    yield from _named("sequences that are sampled", engine._step_sampler._processors)
    if engine._speculator is not None:
        yield from _named("sequences with drafts", engine._speculator._guesses)
    if engine.has_work:
        yield "work"
    try:
        engine.check_integrity()
    except AssertionError as err:
        yield f"wrong counts: {err}"


def _left_at_gateway(gateway: SimGateway) -> Iterator[str]:
    product = gateway._gateway
    pool, admission = product.engines, product.admission.admission
    yield from _named("running calls", product.running._names)
    if admission is not None and (admission.num_requests or admission.num_seats):
        yield f"{admission.num_requests} requests, {admission.num_seats} places admitted"
    if admission is not None and (admission.num_tokens or len(admission._queues)):
        yield f"{admission.num_tokens} tokens admitted, of {[*admission._queues._totals]}"
    yield from _named("submissions without a worker", pool.assignments.waiting)
    yield from _named("accused submissions", pool.disconnects.suspects)
    yield from _named("moves", pool.moves._moves)
    yield from _named(
        "drained workers with requests", [q for q in pool.moves._waiting.values() if q]
    )
    for client in pool.workers.clients.values():
        yield from _named(f"submissions at {client.worker}", client.submissions)
        if client.load.queued_tokens or client.load.num_decoding:
            load = client.load
            yield f"{load.queued_tokens} tokens, {load.num_decoding} decodes at {client.worker}"


def _named(what: str, left: object) -> Iterator[str]:
    """A container that should be empty."""
    names = [str(getattr(one, "request", one))[:120] for one in left]  # type: ignore[attr-defined]
    if names:
        yield f"{len(names)} {what}: {', '.join(names[:3])}"
