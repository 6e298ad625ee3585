"""What the status says of disks that are nearly full."""

from __future__ import annotations

from msgspec.structs import replace

from cluster.controller.host_disks import describe_low
from cluster.core.frames import Heartbeat, LowDisk
from tests.cluster.controller.fakes_cluster import FakeCluster

HEARTBEAT = Heartbeat(progress=1, idle=True, generation=1, running=True)


def test_a_folder_that_several_workers_report_is_named_once() -> None:
    found = [("b", LowDisk(folder="/logs", free_bytes=9 << 20))]
    found += [("a", LowDisk(folder="/logs", free_bytes=n << 20)) for n in (5, 3, 4)]
    assert describe_low(found) == [
        "the disk of /logs on a is nearly full: 3 MiB are free",
        "the disk of /logs on b is nearly full: 9 MiB are free",
    ]


def test_the_status_has_what_workers_and_the_controller_report_last() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    version = cluster.known.version
    low = LowDisk(folder="/logs", free_bytes=3 << 20)
    cluster.send("expert-0", replace(HEARTBEAT, low_disks=(low,)))
    cluster.known.update_low_disks((LowDisk(folder="/logs", free_bytes=2),))
    assert cluster.known.version > version, "gateways learn of it"
    assert cluster.controller.snapshot()["problems"] == [
        "the disk of /logs on  is nearly full: 3 MiB are free",
        "the disk of /logs on head is nearly full: 0 MiB are free",
    ]
    cluster.send("expert-0", HEARTBEAT)
    cluster.known.update_low_disks(())
    assert cluster.controller.snapshot()["problems"] == []


def test_a_gateways_host_is_named_until_the_gateway_says_otherwise() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    low = (LowDisk(folder="/logs", free_bytes=3 << 20),)
    cluster.known.update_low_disks(low, "10.0.0.9", "gateway-7")
    cluster.known.update_low_disks(())
    said = ["the disk of /logs on 10.0.0.9 is nearly full: 3 MiB are free"]
    assert cluster.controller.snapshot()["problems"] == said
    version = cluster.known.version
    cluster.known.update_low_disks((), "10.0.0.9", "gateway-7")
    assert cluster.known.version > version
    assert cluster.controller.snapshot()["problems"] == []


def test_gateways_do_not_hear_of_each_file_that_is_written() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()

    def report(free_bytes: int) -> None:
        low = LowDisk(folder="/logs", free_bytes=free_bytes)
        cluster.send("expert-0", replace(HEARTBEAT, low_disks=(low,)))
        cluster.known.update_low_disks((low,))

    report(5 << 20)
    version = cluster.known.version
    report(3 << 20)
    assert cluster.known.version == version
    assert all("3 MiB" in problem for problem in cluster.controller.snapshot()["problems"])
