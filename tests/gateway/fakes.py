"""Stand-ins for what is behind the gateway: an engine with a script, a controller, a tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import math
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import grpc
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from cluster.controller.metrics import ControllerMetrics
from cluster.core.errors import (
    ConflictError,
    HandshakeError,
    ModelNotFoundError,
    RequestError,
    UnknownNameError,
)
from cluster.core.metric_families import PlainFamily
from cluster.core.release import RELEASE
from cluster.tracing.gateway_counts import GatewayCounts, GatewayRecord
from gateway.engines.submission import RequestStage
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import Tokenizer
from workers.requests.block_hash import KvEvents
from workers.requests.request import (
    FinishReason,
    PromptLogprobs,
    Queued,
    Request,
    SoloStage,
    SoloStep,
    StepOutput,
    Timings,
    TokenLogprob,
    TokenOutput,
)
from workers.requests.stream_handshake import WorkerHandshake
from workers.requests.wire import (
    FROM_ENGINE,
    METHOD,
    SERVICE,
    TO_ENGINE,
    Abort,
    EngineHello,
    FromEngine,
    KeepCopy,
    Pause,
    Paused,
    Ping,
    Prefetch,
    Prefetched,
)

Outgoing: TypeAlias = asyncio.Queue[FromEngine | None]
CLUSTER_TOKEN = "token of the test cluster"
MAX_MODEL_LEN = 512
EOS = "<|endoftext|>"
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("o", "r"), ("t", "h")]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE: 256 bytes, a few merges, and special tokens."""
    symbols = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, "<|user|>", "<|assistant|>", "<|system|>"])
    return tokenizer


def save_tiny_tokenizer(folder: Path) -> Path:
    """Write the files of the tokenizer with its chat template to a new folder; return it."""
    folder.mkdir()
    tiny_backend().save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_tokenizer(template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """The tokenizer of the tests."""
    chat = None if template is None else ChatTemplate(template, {"eos_token": EOS})
    return Tokenizer(tiny_backend(), chat)


BACKEND = tiny_backend()
VOCAB_SIZE = BACKEND.get_vocab_size() + 3
"""A few more than the tokenizer has, as checkpoints have."""
EOS_ID = BACKEND.get_vocab()[EOS]

TIMINGS = Timings(first_dispatch_s=0.001, first_token_s=0.002, finished_s=0.003, prefill_s=(0.001,))

Script = Callable[[Request, int], list[int]]


def counting_script(request: Request, choice: int) -> list[int]:
    """Tokens that depend on prompt, seed and choice: printable text without end."""
    letters = BACKEND.encode(" the world is a hello; other words follow, and more").ids
    start = sum(request.prompt) + request.params.seed + choice
    return [letters[(start + place) % len(letters)] for place in range(request.params.max_tokens)]


def saying(text: str | bytes, end: bool = True) -> Script:
    """A script that says ``text``, then eos (unless ``end`` is False)."""
    if isinstance(text, bytes):
        known = tiny_tokenizer()
        by_byte = {known.token_bytes(token): token for token in range(256)}
        ids = [by_byte[bytes([byte])] for byte in text]
    else:
        ids = list(BACKEND.encode(text).ids)
    return lambda request, choice: [*ids, EOS_ID] if end else ids


def other_tokenizer() -> Tokenizer:
    """The tokenizer of a second model: a token for each byte, with ids in the reverse order.

    It has as many tokens as ``tiny_tokenizer``, and the same special ones.
    """
    symbols = [*sorted(ByteLevel.alphabet(), reverse=True), *(f"zz{i}" for i in range(len(MERGES)))]
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, "<|user|>", "<|assistant|>", "<|system|>"])
    return Tokenizer(tokenizer, ChatTemplate(CHAT_TEMPLATE, {"eos_token": EOS}))


@dataclass
class ScriptedEngine:
    """An engine whose tokens come from a script, one step of all running choices at a time."""

    name: str = "attention-0"
    node: str = "host-a"
    release: str = RELEASE
    spoils: Literal["", "hello", "pong"] = ""
    script: Script = counting_script
    step_s: float = 0.0
    tokens_per_output: int = 1
    is_paused: bool = False
    pause_after: int | None = None
    error: tuple[str, str] | None = None
    error_timings: Timings | None = None
    requests: list[Request] = field(default_factory=list)
    aborts: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    to_pause: dict[str, int] = field(default_factory=dict)
    """Tokens that a request must have, by request id."""
    paused: set[str] = field(default_factory=set)
    running: dict[str, set[int]] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    solo_steps: list[SoloStep] = field(default_factory=list)
    repeat_outputs: bool = False
    num_cached_tokens: int = 0
    timings: Timings = TIMINGS
    answers_pings: bool = True
    prefetches: list[Request] = field(default_factory=list)
    answers_prefetches: bool = True
    answers_pauses: bool = True
    kv_block_size: int = 0
    keeps_copies: bool = False
    copies: list[KeepCopy] = field(default_factory=list)
    reports: Callable[[Request, RequestStage], bool] = lambda request, stage: True
    """Whether it reports that a request is at a stage."""
    num_streams: int = 0
    num_hellos: int = 0
    num_pings: int = 0
    address: str = ""
    _server: Any = None
    _end: tuple[grpc.StatusCode, str] = (grpc.StatusCode.ABORTED, "")
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _queues: list[Outgoing] = field(default_factory=list)

    async def start(self) -> None:
        """Serve on a free loopback port."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        stream = grpc.stream_stream_rpc_method_handler(self._stream)
        handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: stream})
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """End the server and every stream at once."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(0)

    async def close_streams(self) -> None:
        """As a worker that may not serve now."""
        self._end = (grpc.StatusCode.ABORTED, "this worker may not serve now")
        for queue in self._queues:
            queue.put_nowait(None)

    async def report_blocks(self, names: Sequence[bytes], num_free: int = 0) -> None:
        """Tell gateways that these blocks can be found here, by their short hashes."""
        events = KvEvents(number=0, is_whole=True, stored=tuple(names), num_free=num_free)
        for queue in self._queues:
            queue.put_nowait(events)

    async def offer_solo_step(self, request: Request) -> None:
        """As an engine that wants to run a suspect alone."""
        name, attempt = request.request_id, request.attempt
        await self.send(SoloStep(request_id=name, attempt=attempt, stage=SoloStage.OFFERED))

    async def send(self, message: FromEngine) -> None:
        """Send a message to all gateways."""
        for queue in self._queues:
            queue.put_nowait(message)

    async def reset_streams(self) -> None:
        """As a firewall that forgets the connections of a living worker."""
        self._end = (grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
        self.running.clear()
        self.stuck.clear()
        for queue in self._queues:
            queue.put_nowait(None)

    async def _stream(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        handshake = WorkerHandshake(CLUSTER_TOKEN, self.name, self.release)
        try:
            yield handshake.challenge(await anext(messages))
            hello = handshake.finish(await anext(messages), self._hello())
        except HandshakeError as err:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(err))
        queue: Outgoing = asyncio.Queue()
        self._queues.append(queue)
        self.num_streams += 1
        self.num_hellos += 1
        reader = asyncio.create_task(self._read(messages, queue))
        try:
            yield b"\xc1" if self.spoils == "hello" else hello
            while True:
                message = await queue.get()
                if message is None:
                    await context.abort(*self._end)
                    return
                is_spoilt = self.spoils == "pong" and isinstance(message, Ping)
                yield b"\xc1" if is_spoilt else FROM_ENGINE.encode(message)
        finally:
            self.num_streams -= 1
            reader.cancel()

    def _hello(self) -> EngineHello:
        return EngineHello(
            worker=self.name,
            generation=1,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(EOS_ID,),
            max_kv_tokens=4 * MAX_MODEL_LEN,
            dtype="float32",
            model_type="olmoe",
            hidden_size=8,
            num_layers=2,
            num_attention_layers=2,
            num_heads=2,
            kv_block_size=self.kv_block_size,
            keeps_copies=self.keeps_copies,
        )

    async def _read(self, messages: AsyncIterator[bytes], queue: Outgoing) -> None:
        async for data in messages:
            message = TO_ENGINE.decode(data)
            if isinstance(message, Ping):
                self.num_pings += 1
                if self.answers_pings:
                    queue.put_nowait(message)
            elif isinstance(message, SoloStep):
                self.solo_steps.append(message)
            elif isinstance(message, Prefetch):
                self.prefetches.append(message.request)
                if self.answers_prefetches:
                    name, attempt = message.request.request_id, message.request.attempt
                    queue.put_nowait(Prefetched(request_id=name, attempt=attempt))
            elif isinstance(message, KeepCopy):
                self.copies.append(message)
            elif isinstance(message, Pause):
                self._pause(message)
            elif isinstance(message, Abort):
                self._abort(message)
            elif isinstance(message, Request):
                request = message
                self.requests.append(request)
                if self.reports(request, RequestStage.QUEUED):
                    name, attempt = request.request_id, request.attempt
                    queue.put_nowait(Queued(request_id=name, attempt=attempt))
                open_choices = set(range(request.n)) - set(request.closed_choices)
                self.running[request.request_id] = open_choices
                self.paused.discard(request.request_id)
                if request.pauses:
                    so_far = min(map(len, request.output_so_far), default=0)
                    self.to_pause[request.request_id] = len(request.prompt) + so_far + 1
                task = asyncio.create_task(self._run(request, queue))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _pause(self, pause: Pause) -> None:
        self.pauses.append(pause)
        if pause.is_cancelled:
            self.paused.discard(pause.request_id)
        elif self.answers_pauses:
            self.to_pause[pause.request_id] = pause.num_tokens

    def _abort(self, abort: Abort) -> None:
        self.aborts.append((abort.request_id, abort.choices))
        open_choices = self.running.get(abort.request_id, set())
        open_choices.difference_update(abort.choices or tuple(open_choices))
        if not open_choices:
            self.running.pop(abort.request_id, None)

    async def _run(self, request: Request, queue: Outgoing) -> None:
        scripts = {choice: self.script(request, choice) for choice in range(request.n)}
        so_far = request.output_so_far or ((),) * request.n
        at, width = [len(ids) for ids in so_far], self.tokens_per_output
        num_steps, open_choices = 0, self.running[request.request_id]
        await self._wait_to_run_alone(request, queue)
        while open_choices and self.running.get(request.request_id) is open_choices:
            await asyncio.sleep(self.step_s)
            if not open_choices:
                break
            if num_steps == self.pause_after:
                self.stuck.add(request.request_id)
            length = len(request.prompt) + min(at[choice] for choice in open_choices)
            if length >= self.to_pause.get(request.request_id, sys.maxsize):
                del self.to_pause[request.request_id]
                self.paused.add(request.request_id)
                queue.put_nowait(Paused(request_id=request.request_id))
            is_paused = self.is_paused or request.request_id in self.paused
            if is_paused or num_steps == self.pause_after:
                await asyncio.sleep(0.01)
                continue
            outputs, num_steps = [], num_steps + 1
            for choice in sorted(open_choices):
                output = self._output(request, choice, scripts[choice], at[choice], width)
                at[choice] += width
                outputs.append(output)
                if output.finish_reason is not None:
                    open_choices.discard(choice)
            step = StepOutput(outputs=tuple(outputs))
            for _ in range(2 if self.repeat_outputs else 1):
                queue.put_nowait(step)
        if self.running.get(request.request_id) is open_choices:
            del self.running[request.request_id]

    async def _wait_to_run_alone(self, request: Request, queue: Outgoing) -> None:
        """As an engine does with a request that two workers died with."""
        if request.num_deaths >= 2 and self.reports(request, RequestStage.ALONE):
            name, attempt = request.request_id, request.attempt
            for stage in (SoloStage.OFFERED, SoloStage.CERTAIN):
                solo_step = SoloStep(request_id=name, attempt=attempt, stage=stage)
                queue.put_nowait(solo_step)
                while solo_step not in self.solo_steps:
                    await asyncio.sleep(0.002)

    def _output(
        self, request: Request, choice: int, script: list[int], index: int, width: int
    ) -> TokenOutput:
        params = request.params
        prompt_logprobs = None
        if index == 0 and choice == 0 and params.prompt_logprobs is not None:
            scores = (fake_logprob(token, params.prompt_logprobs) for token in request.prompt[1:])
            prompt_logprobs = PromptLogprobs.of((None, *scores))
        if self.error is not None:
            return TokenOutput(
                request_id=request.request_id,
                attempt=request.attempt,
                choice=choice,
                index=index,
                finish_reason=FinishReason.ERROR,
                error=self.error[0],
                error_code=self.error[1],
                timings=self.error_timings,
            )
        last = min(len(script), params.max_tokens)
        tokens: list[int] = []
        reason, stop = None, None
        for place in range(index, min(index + width, last)):
            tokens.append(script[place])
            is_end = script[place] == EOS_ID and not params.ignore_eos
            if place >= params.min_tokens and (is_end or script[place] in params.stop_token_ids):
                reason = FinishReason.STOP
                stop = None if is_end else script[place]
                break
        if reason is None and index + width >= last:
            reason = FinishReason.LENGTH
        logprobs = params.logprobs
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=choice,
            index=index,
            token_ids=tuple(tokens),
            logprobs=()
            if logprobs is None
            else tuple(fake_logprob(token, logprobs) for token in tokens),
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens + choice if index == 0 else None,
            finish_reason=reason,
            stop_token_id=stop,
            timings=self.timings if reason or index == 0 else None,
        )


def fake_logprob(token_id: int, wanted: int) -> TokenLogprob:
    """A log-probability that depends on the token; alternatives beside it; one of -inf."""
    others = tuple((token_id + k) % VOCAB_SIZE for k in range(wanted))
    values = tuple(-math.inf if 1 < k == wanted - 1 else -0.5 - k for k in range(wanted))
    return TokenLogprob(
        token_id=token_id,
        logprob=-(token_id % 7) / 4,
        rank=1,
        top_ids=others,
        top_logprobs=values,
    )


REBALANCE: Mapping[str, Any] = {
    "automatic": True,
    "possible": True,
    "reason": "",
    "phase": "",
    "last": None,
}
"""Of a snapshot."""


def controller_metrics() -> list[PlainFamily]:
    """What a controller has counted."""
    metrics = ControllerMetrics(())
    for _ in range(2):
        metrics.decided("applied")
    for _ in range(7):
        metrics.decided("skipped_gain")
    for stall_s in (0.01, 0.04):
        metrics.switched(stall_s)
    metrics.moved("rebalance", 1, 96, 0.25)
    metrics.moved("rebalance", 2, 4000, 1.0)
    metrics.moved("recovery", 1, 100, 0.25)
    for stall_s in (0.05, 0.3, 0.4):
        metrics.recovered(["expert"], stall_s)
    return metrics.to_plain()


class FakeController:
    """Answers as the controller does; ``change`` publishes a new snapshot."""

    def __init__(self, release: str = RELEASE, model: str = "tiny") -> None:
        self.state: dict[str, Any] = {
            "version": 1,
            "schema": 1,
            "release": release,
            "state": "STARTING",
            "error": None,
            "generation": 1,
            "placement_epoch": 3,
            "experts_complete": True,
            "late_workers": [],
            "model": {"name": model, "max_model_len": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE},
            "adapters": [],
            "workers": [],
            "gateway": [],
            "rebalance": REBALANCE,
            "metrics": controller_metrics(),
            "history": [{"generation": 1, "time": 0.0, "cause": "start", "effect": "SERVING"}],
        }
        self.known_operations: list[dict[str, Any]] = []
        self.drain_orders: list[dict[str, Any]] = []
        self.scale_orders: list[dict[str, Any]] = []
        self.pauses: list[tuple[int, float]] = []
        self.counts = GatewayCounts()
        self.error: Exception | None = None
        """Raised in place of the list of operations."""
        self._changed = asyncio.Event()

    def change(self, **values: Any) -> None:
        """Publish a new snapshot."""
        self.state = {**self.state, **values, "version": self.state["version"] + 1}
        self._changed.set()
        self._changed = asyncio.Event()

    async def call(self, call: str, *details: Any) -> Any:
        """``ControllerCalls`` without Ray."""
        return await getattr(self, call)(*details)

    async def snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """See ``Controller``."""
        return copy.deepcopy(self.state)

    async def wait_snapshot(
        self, known_version: int, timeout_s: float, *gateway: Any
    ) -> dict[str, Any]:
        """See ``Controller``."""
        if known_version == self.state["version"]:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return copy.deepcopy(self.state)

    async def load_adapter(self, order: dict[str, Any]) -> dict[str, Any]:
        """See ``ControllerActor``; folders are there whose path begins with ``/adapters``."""
        if not order["path"].startswith("/adapters"):
            raise RequestError("lora_path: no such folder", "lora_path")
        number = len(self.state["adapters"])
        key = f"{order['name']}@{number}"
        tenants = list(order.get("tenants", ()))
        found = {"name": order["name"], "key": key, "path": order["path"], "state": "READY"}
        found |= {"tenants": tenants}
        self.change(adapters=[*self.state["adapters"], found])
        return found

    async def unload_adapter(self, command: dict[str, Any]) -> dict[str, Any]:
        """See ``ControllerActor``."""
        name = command["name"]
        if name not in [a["name"] for a in self.state["adapters"]]:
            raise ModelNotFoundError(f"the adapter {name!r} does not exist", "lora_name")
        known = self.state["adapters"]
        self.change(
            adapters=[a | {"state": "UNLOADING"} if a["name"] == name else a for a in known]
        )
        return {"key": next(str(a["key"]) for a in known if a["name"] == name)}

    async def exchange_counts(
        self, records: dict[str, GatewayRecord], times: dict[str, float]
    ) -> dict[str, Any]:
        """See ``ControllerActor``."""
        return self.counts.exchange(records, times)

    async def streams_paused(self, generation: int, pause_s: float) -> None:
        """See ``Controller``."""
        self.pauses.append((generation, pause_s))

    async def placement(self) -> dict[str, Any]:
        """See ``Controller``."""
        bank = {
            "bank": "mlp",
            "layer": 0,
            "physical_to_logical": [[0, 1], [2, 3]],
            "load": [1, 2, 3, 4],
            "balancedness": {"predicted": 1.0, "achieved": None},
        }
        return {"schema": 1, "epoch": 3, "banks": [bank]}

    async def numbers(self) -> dict[str, Any]:
        """See ``Controller``."""
        return {"snapshot": await self.snapshot(True), "load": await self.load()}

    async def load(self) -> dict[str, Any]:
        """See ``Controller``."""
        both = {"predicted": 1.0, "achieved": 0.5}
        phases = {"prefill": both, "decode": {"predicted": 0.75, "achieved": None}}
        bank = {
            "bank": "mlp",
            "layer": 0,
            "counts": [1, 2, 3, 4],
            "load": [1, 2, 3, 4],
            "prefill": [1, 1, 1, 1],
            "decode": [0, 1, 2, 3],
            "window": [1, 0, 0, 0],
            "average": None,
            "slots": [[1, 2], [3, 4]],
            "watched": [2, 3],
            "watched_tokens": [3, 4],
            "rest_tokens": 3,
            "copies": [1, 1, 1, 2],
            "at_risk": 3,
            "balancedness": both,
            "phases": phases,
        }
        return {
            "schema": 1,
            "model": self.state["model"]["name"],
            "top_k": 2,
            "tokens": 5,
            "epoch": 3,
            "window_tokens": 1,
            "average_tokens": 0,
            "balancedness": both,
            "phases": phases,
            "workers": ["expert-0", "expert-1"],
            "banks": [bank],
        }

    async def log(self, process: str, after: int) -> dict[str, Any]:
        """See ``Controller``."""
        if process != "expert-0":
            raise UnknownNameError(f"no worker {process!r} runs")
        return {"number": 2, "lines": ["one", "two"][after:]}

    async def begin(self, kind: str, command: dict[str, Any]) -> dict[str, Any]:
        """See ``ControllerActor``."""
        found: dict[str, Any] = await getattr(self, kind)(command)
        return found

    async def drain(self, order: dict[str, Any]) -> dict[str, Any]:
        """See ``Controller``; takes every order but for a worker called ``last``."""
        self.drain_orders.append(order)
        if order["worker"] == "last":
            raise ConflictError("last is the last attention worker")
        operation = fake_operation(f"drain-1.{len(self.drain_orders)}", order["worker"])
        self.known_operations.append(operation)
        return operation

    async def scale(self, order: dict[str, Any]) -> dict[str, Any]:
        """See ``Controller``; takes every order but for more than 8 expert workers."""
        if (order["expert"] or 0) > 8:
            raise RequestError("expert (9) must not exceed the 8 experts of a bank", "expert")
        self.scale_orders.append(order)
        operation = {
            **fake_operation("scale-1.1", "2 attention and 3 expert workers"),
            "kind": "scale",
            "result": {"added": ["attention-1"], "experts_copied": 2},
        }
        self.known_operations.append(operation)
        return operation

    async def rebalance(self, order: dict[str, Any]) -> dict[str, Any]:
        """See ``Controller``; a dry run, or a conflict."""
        if not order["dry_run"]:
            raise ConflictError("rebalancing is not possible: there are no spare expert slots")
        operation = {
            **fake_operation("rebalance-1.1", "experts"),
            "kind": "rebalance",
            "state": "SUCCEEDED",
            "result": {"dry_run": True, "action": "move", "slots_to_move": 5, "gain_s": 2.5},
        }
        self.known_operations.append(operation)
        return operation

    async def operation(self, operation_id: str) -> dict[str, Any]:
        """See ``Controller``."""
        for operation in self.known_operations:
            if operation["id"] == operation_id:
                return operation
        raise UnknownNameError(f"there is no operation {operation_id!r}")

    async def operations(self) -> list[dict[str, Any]]:
        """See ``Controller``."""
        if self.error is not None:
            raise self.error
        return self.known_operations

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """See ``Controller``."""
        operation = await self.operation(operation_id)
        operation["state"] = "CANCELLED"
        return operation


def fake_operation(operation_id: str, target: str) -> dict[str, Any]:
    """A drain that runs, as the controller reports it."""
    return {
        "id": operation_id,
        "kind": "drain",
        "target": target,
        "state": "RUNNING",
        "phase": "move requests to other workers",
        "progress": 0.4,
        "message": "",
        "started": 12.5,
        "ended": 0.0,
        "generation": 0,
        "result": {"requests_moved": 3},
    }


def attention_entry(
    engine: ScriptedEngine, rank: int = 0, state: str = "SERVING"
) -> dict[str, Any]:
    """A snapshot's entry of an attention worker."""
    return {
        "name": engine.name,
        "role": "attention",
        "rank": rank,
        "node": engine.node,
        "pid": 100 + rank,
        "state": "SERVING",
        "engine_address": engine.address,
        "kv_blocks_free": 10,
        "kv_blocks_total": 10,
        "kv_usage": 0.0,
        "stats": {
            "num_requests_running": 1.0,
            "num_preemptions_total": 2.0,
            "bad name": 1.0,
            'num_requests_waiting_by_reason{reason="capacity"}': 3.0,
            'num_requests_waiting_by_reason{reason="deferred"}': 1.0,
            'iteration_tokens_total_bucket{le="8"}': 4.0,
            'iteration_tokens_total_bucket{le="+Inf"}': 5.0,
            "iteration_tokens_total_count": 5.0,
            "iteration_tokens_total_sum": 77.0,
            "prefix_cache_queries_total": 50.0,
            "prefix_cache_hits_total": 20.0,
            "prompt_tokens_cached_total": 16.0,
        },
    }


def expert_entry(rank: int) -> dict[str, Any]:
    """A snapshot's entry of an expert worker."""
    return {
        "name": f"expert-{rank}",
        "role": "expert",
        "rank": rank,
        "node": "host-b",
        "pid": 200 + rank,
        "state": "SERVING",
        "engine_address": "",
        "slots": 32,
        "stats": {"expert_worker_tokens_total": 7.0},
    }
