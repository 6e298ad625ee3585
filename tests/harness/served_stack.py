"""A gateway over a cluster: real codecs, real workers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.serving_cluster import ServingCluster, ThreadCluster, make_config, serving
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from gateway.text.tokenizer import Tokenizer
from tests.gateway.fakes import CLUSTER_TOKEN, attention_entry
from tests.gateway.stack import Stack, running_stack


@contextlib.contextmanager
def stack_over(
    checkpoint: Path,
    tokenizer: Tokenizer | None = None,
    start: Callable[[ClusterConfig], ServingCluster] = ThreadCluster,
    section: GatewaySection | None = None,
    **options: Any,
) -> Iterator[Stack]:
    """A cluster of one attention and two expert workers, and a gateway before it.

    ``options`` are those of ``make_config``; float32 unless they say otherwise.
    """
    config = make_config(checkpoint, **{"dtype": "float32", **options})
    cluster = start(dataclasses.replace(config, cluster_token=CLUSTER_TOKEN))
    running = running_stack(section, tokenizer, has_tokenizer=tokenizer is not None, serving=False)
    with serving(cluster), running as stack:
        address = cluster.worker("attention-0")["engine_address"]
        entry = {**attention_entry(stack.engine), "engine_address": address}
        stack.call(lambda: stack.controller.change(state="SERVING", workers=[entry]))
        stack.wait_for(lambda: not stack.gateway.readiness.not_ready_reasons(), "readiness")
        yield stack
