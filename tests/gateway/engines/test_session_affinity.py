"""Where the last request of a session went."""

from __future__ import annotations

from gateway.engines import session_affinity
from gateway.engines.session_affinity import SessionAffinity
from workers.requests.request import Request, SamplingParams


def of(session: str, tenant: str = "") -> Request:
    return Request(
        request_id="r", prompt=(1,), params=SamplingParams(), session=session, tenant=tenant
    )


def test_the_last_worker_of_a_session_is_known() -> None:
    homes = SessionAffinity()
    assert homes.get(of("s")) == ""
    homes.put(of("s"), "a")
    homes.put(of("t"), "b")
    homes.put(of("s"), "c")
    assert (homes.get(of("s")), homes.get(of("t"))) == ("c", "b")


def test_requests_without_a_session_have_no_home() -> None:
    homes = SessionAffinity()
    homes.put(of(""), "a")
    assert homes.get(of("")) == ""


def test_tenants_do_not_share_sessions() -> None:
    homes = SessionAffinity()
    homes.put(of("s", "A"), "a")
    homes.put(of("s", "B"), "b")
    assert (homes.get(of("s", "A")), homes.get(of("s", "B")), homes.get(of("s"))) == ("a", "b", "")


def test_a_tenant_with_many_sessions_loses_its_oldest_and_no_one_elses() -> None:
    homes = SessionAffinity()
    homes.put(of("s", "B"), "b")
    homes.put(of("first", "A"), "a")
    homes.put(of("second", "A"), "a")
    homes.put(of("first", "A"), "a")
    for number in range(session_affinity.MAX_SESSIONS - 1):
        homes.put(of(str(number), "A"), "a")
    assert homes.get(of("second", "A")) == ""
    assert homes.get(of("first", "A")) == "a"
    assert homes.get(of("s", "B")) == "b"
