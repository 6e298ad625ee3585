"""gRPC's poller thread, which all event loops of a process share."""

from __future__ import annotations

import grpc.aio


def keep_grpc_poller() -> None:
    """Keep gRPC's poller running until the process ends. Call this on an event loop.

    gRPC stops the poller when the last channel, call or server of the process is deleted. The event
    loop that deletes it then joins the poller's thread, which can block the loop forever. Source:
    pull request 40989 of grpc/grpc; a comment in its issue 22365 describes this remedy.
    """
    getattr(grpc.aio, "init_grpc_aio")()  # noqa: B009 (its stubs lack it)
