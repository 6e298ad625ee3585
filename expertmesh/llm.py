"""``LLM``: a model in this process, without Ray, ports or a cluster."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.config.cluster import ClusterConfig
from cluster.core.checks import check
from cluster.core.process import count_cpus
from cluster.launch.model_source import find_model
from expertmesh.calls import AsyncCalls, SyncCalls
from expertmesh.errors import APIError, make_error
from expertmesh.messages import generate_request, request_output
from expertmesh.stream import EmbeddedStream
from expertmesh.types import PlainPrompt, PoolingTask, Query, RequestOutput
from gateway.calls.answer import collect
from gateway.calls.gateway import Gateway, new_call_id
from gateway.calls.pooling import PoolingService, make_pooling_call
from gateway.calls.running_call import RunningCall
from gateway.cluster.view import AttentionEndpoint, ControllerCalls, SnapshotFollower
from gateway.core.errors import report_error
from gateway.core.field_checks import check_stream
from gateway.engines.engine_pool import EnginePool
from gateway.engines.router import RoutingPolicy
from gateway.grpc.convert import grpc_call
from gateway.grpc.format import GrpcFormat
from gateway.text.tokenizer import load_tokenizer
from workers.engine.embedded import EmbeddedEngine

logger = logging.getLogger(__name__)

_YEAR_S = 365 * 24 * 3600.0
_MANY = 1 << 20
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "model": ("dtype", "quantize", "quantize_layers", "max_model_len", "chat_template"),
    "workers": ("device", "kernels"),
    "engine": (
        *("kv_cache_bytes", "gpu_memory_utilization", "kv_cache_dtype", "max_num_seqs"),
        *("max_num_batched_tokens", "enable_prefix_caching", "deterministic", "enforce_eager"),
        "seed",
    ),
    "speculation": ("speculative_method", "num_speculative_tokens"),
    "lora": ("lora_modules", "max_loras", "max_lora_rank"),
    "gateway": ("max_n", "max_logprobs"),
}
"""Options of ``LLM`` by section of the configuration. ``num_threads`` is not in a section."""


class LLM(SyncCalls):
    """A model in this process: loads the weights and serves calls until ``close``.

    Args:
        model: folder of a checkpoint, a hub id, or None for the bundled checkpoint.
        num_threads: number of CPU threads; by default one per core.
        options: options of ``expertmesh serve`` under their Python names, such as ``dtype``,
            ``max_model_len``, ``device`` and ``quantize``; docs/how-to/python.md lists them.

    Raises:
        ConfigError: an option is unknown or invalid; nothing was loaded.
        CheckpointError: the checkpoint is missing, invalid or not supported.
    """

    def __init__(
        self, model: str | Path | None = None, *, num_threads: int | None = None, **options: Any
    ) -> None:
        rule = "must be an integer of at least 1"
        threads = count_cpus() if num_threads is None else num_threads
        check(isinstance(threads, int) and threads >= 1, "num_threads", num_threads, rule)
        config = _make_config(str(model), options)
        source = find_model(None if model is None else str(model), logger.info)
        section = replace(config.model, path=str(source.folder), served_model_name=source.name)
        config = replace(config, model=section)
        tokenizer = load_tokenizer(section.path, section.chat_template)
        engine_thread = ThreadPoolExecutor(1, "engine")
        try:
            engine = engine_thread.submit(_load, config, threads).result()
            make = partial(_EmbeddedTransport, config, engine, engine_thread, tokenizer)
            limit = max(128, 2 * config.engine.max_num_seqs)
            super().__init__(lambda: AsyncCalls(make(), limit=limit))
        except BaseException:
            engine_thread.shutdown()
            raise


def _make_config(model: str, options: Mapping[str, Any]) -> ClusterConfig:
    """Make the configuration from the options of ``LLM``. Raises ``ConfigError``."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": model, "served_model_name": model},
        "engine": {"max_waiting": _MANY},
        "gateway": {
            "max_queue": _MANY,
            "max_queue_wait_s": 0.0,
            "request_timeout_s": _YEAR_S,
            "routing_policy": "round-robin",
        },
    }
    known = {name: section for section, names in _OPTIONS.items() for name in names}
    for name, value in options.items():
        rule = f"is not an option of LLM; the options: num_threads, {', '.join(sorted(known))}"
        check(name in known, name, value, rule)
        sections.setdefault(known[name], {})[name] = value
    return ClusterConfig.from_dict(sections)


def _load(config: ClusterConfig, num_threads: int) -> EmbeddedEngine:
    device = config.workers.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = EmbeddedEngine(
        config.model.path,
        dtype=config.model.dtype,
        device=device,
        section=config.engine,
        speculation=config.speculation,
        lora=config.lora,
        max_model_len=config.model.max_model_len,
        num_threads=num_threads,
        kernels=config.workers.kernels,
        quantize=config.model.quantize,
        quantize_layers=config.model.quantize_layers,
    )
    for name, folder in config.lora.modules:
        engine.load_adapter(name, Path(folder))
    return engine


async def _find_no_controller() -> ControllerCalls:
    raise ConnectionError("a model in this process has no controller")


class _EmbeddedTransport:
    """``Transport`` to a gateway and an engine in this process, without network ports."""

    def __init__(
        self,
        config: ClusterConfig,
        engine: EmbeddedEngine,
        thread: ThreadPoolExecutor,
        tokenizer: Any,
    ) -> None:
        serving = {"state": "SERVING", "version": 0}
        cluster = SnapshotFollower(_find_no_controller, snapshot=serving)
        self._engines = EnginePool(
            "",
            "embedded",
            RoutingPolicy(config.gateway.routing_policy),
            connect=lambda endpoint: EmbeddedStream(endpoint, engine, thread),
        )
        self._thread = thread
        self._gateway = Gateway(config, tokenizer, cluster, self._engines, "embedded")
        self._reader = PoolingService(self._gateway)
        ready = [{"name": one, "key": one, "state": "READY"} for one, _ in config.lora.modules]
        self._gateway.model.adapters.follow({"adapters": ready})
        self._engines.update([AttentionEndpoint("engine", "", 0, "0")])

    async def generate(self, query: Query) -> RequestOutput:
        try:
            with await self._start(query) as running:
                choices = await collect(running)
                response = self._format(running).whole(choices, running.usage)
            return request_output(response, query)
        except Exception as err:
            raise self._error(err) from err

    async def stream(self, query: Query) -> AsyncGenerator[RequestOutput]:
        try:
            with await self._start(query, streams=True) as running:
                formatter = self._format(running)
                while deltas := await running.next():
                    for delta in deltas:
                        yield request_output(formatter.chunk(delta), query)
        except Exception as err:
            raise self._error(err) from err

    async def encode(
        self, prompt: PlainPrompt, task: PoolingTask, pooling: str | None, model: str | None
    ) -> list[float]:
        call = make_pooling_call(model=model)
        try:
            await self._wait_engine()
            if task == "classify":
                classes = await self._reader.classify([prompt], (), (), call)
                return list(classes.rows[0].probs)
            vectors = await self._reader.embed([prompt], pooling, call)
            return list(map(float, vectors.rows[0]))
        except Exception as err:
            raise self._error(err) from err

    async def close(self) -> None:
        await self._engines.stop()
        await self._gateway.close()
        self._thread.shutdown()
        del self._engines, self._gateway, self._reader  # they hold the weights

    async def _start(self, query: Query, streams: bool = False) -> RunningCall:
        await self._wait_engine()
        call = grpc_call(generate_request(query))
        if streams:
            check_stream(call)
        return await self._gateway.start(call, new_call_id(call.kind))

    async def _wait_engine(self) -> None:
        while not self._engines.clients:
            await self._engines.wait_change(1.0)

    def _format(self, running: RunningCall) -> GrpcFormat:
        return GrpcFormat(running, self._gateway.tokenizer, running.call_id)

    def _error(self, error: Exception) -> APIError:
        if isinstance(error, APIError):
            return error
        report = report_error(error)
        known = report.message, report.code, report.param, report.http_status
        return make_error(*known, report.retry_after_s)
