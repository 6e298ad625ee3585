"""Samples the cluster every two seconds for the history of the dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from cluster.core.errors import ExpertMeshError
from cluster.tracing.gateway_counts import GatewayRecord
from gateway.calls.gateway import Gateway
from gateway.observability.samples import PERIOD_S, SAMPLED

logger = logging.getLogger(__name__)

now_s = time.time


class Sampler:
    """Adds samples to ``gateway.status.samples``.

    Errors are logged, not raised: only the first error until a sample succeeds again.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._controller_times: dict[
            str, float
        ] = {}  # times of the records that the controller has got
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def sample(self) -> None:
        """Take a sample, with the previous stats if the controller does not respond."""
        gateway, model = self._gateway, self._gateway.shared.models.default
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(model.numbers.refresh(), PERIOD_S / 2)
        families = model.metrics.own_samples(SAMPLED)
        view = model.cluster
        gateway.status.samples.add(now_s(), families, view.snapshot, view.known_load)
        await self._share()

    async def _share(self) -> None:
        """Send the counts of this gateway to the controller, and receive the counts of others."""
        gateway, counts = self._gateway, self._gateway.counts
        controller = gateway.shared.models.default.cluster
        samples = gateway.status.samples.after(counts.times().get(gateway.name, 0.0))
        if samples:
            summary = gateway.status.summary()
            record = GatewayRecord(
                time=samples[-1]["time"],
                created=summary["created"],
                totals=summary["totals"],
                samples=samples,
            )
            counts.merge({gateway.name: record})
        with contextlib.suppress(ExpertMeshError):  # the controller does not respond
            there = await controller.call(
                "exchange_counts",
                counts.newer_than(self._controller_times),
                counts.times(),
                limit_s=PERIOD_S / 2,
            )
            counts.merge(there["records"])
            self._controller_times = there["times"]

    async def _run(self) -> None:
        is_well = True
        while True:
            try:
                await self.sample()
                is_well = True
            except Exception:
                if is_well:  # log once, not every two seconds
                    logger.exception("could not take a sample")
                is_well = False
            await asyncio.sleep(PERIOD_S - time.time() % PERIOD_S)  # all replicas at the same time
