"""``Client`` and ``AsyncClient`` against a gateway with a scripted engine."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from benchmarks.harness.stalls import wait_until
from cluster.config.gateway import GatewaySection
from expertmesh import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Client,
    InternalServerError,
    NotFoundError,
    RateLimitError,
    SamplingParams,
)
from expertmesh.loop_thread import LoopThread
from expertmesh.options import ClientOptions
from gateway.core.tuning import GatewayTuning
from tests.gateway.stack import Stack, running_stack
from tests.harness.certificates import Certificates

pytestmark = pytest.mark.heavy

KEY = "secret"
PARAMS = SamplingParams(max_tokens=4, seed=1)
PROTOCOLS = ("http", "grpc")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(GatewaySection(api_keys=(KEY,), request_timeout_s=60.0)) as stack:
        yield stack


@asynccontextmanager
async def serving(
    answer: Callable[[web.Request], Awaitable[web.Response]],
) -> AsyncIterator[str]:
    """URL of a server that answers completions with ``answer``."""
    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def url_of(stack: Stack, protocol: str) -> str:
    return stack.url if protocol == "http" else f"grpc://{stack.grpc_target}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_both_protocols_return_the_same_outputs(stack: Stack, protocol: str) -> None:
    with Client(stack.url, api_key=KEY) as other:
        expected = other.generate(["ab", "c"], PARAMS)
    with Client(url_of(stack, protocol), api_key=KEY) as client:
        found = client.generate(["ab", "c"], PARAMS)
        pieces = list(client.generate_stream("ab", PARAMS))
    assert [r.outputs for r in found] == [r.outputs for r in expected]
    assert [r.prompt_token_ids for r in found] == [r.prompt_token_ids for r in expected]
    assert "".join(p.outputs[0].text for p in pieces) == found[0].outputs[0].text
    assert pieces[-1].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_async_client_runs_on_the_callers_loop(stack: Stack, protocol: str) -> None:
    async def call() -> tuple[str, str]:
        async with AsyncClient(url_of(stack, protocol), api_key=KEY) as client:
            (whole,) = await client.generate("ab", PARAMS)
            pieces = [p.outputs[0].text async for p in client.generate_stream("ab", PARAMS)]
        return whole.outputs[0].text, "".join(pieces)

    whole, pieces = asyncio.run(call())
    assert whole == pieces


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_errors_are_typed(stack: Stack, protocol: str) -> None:
    url = url_of(stack, protocol)
    with Client(url, api_key=KEY) as client:
        with pytest.raises(BadRequestError, match="top_p") as caught:
            client.generate("ab", SamplingParams(top_p=3))
        assert (caught.value.code, caught.value.param) == ("invalid_value", "top_p")
        with pytest.raises(BadRequestError, match="top_p"):
            list(client.generate_stream("ab", SamplingParams(top_p=3)))
    with Client(url, api_key="wrong") as client, pytest.raises(AuthenticationError) as refused:
        client.generate("ab")
    assert refused.value.code == "invalid_api_key"
    with Client(url, api_key=KEY, model="other") as client, pytest.raises(NotFoundError) as lost:
        client.generate("ab")
    assert (lost.value.code, lost.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_ends_at_its_time_limit(stack: Stack, protocol: str) -> None:
    with stack.as_new():
        stack.engine.is_paused = True
        client = Client(url_of(stack, protocol), api_key=KEY, timeout_s=0.3)
        with client, pytest.raises(APITimeoutError):
            client.generate("ab", PARAMS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stream_ends_at_the_time_limit_of_the_server(protocol: str) -> None:
    with running_stack(GatewaySection(request_timeout_s=1.0)) as stack:
        stack.engine.step_s = 0.2
        with Client(url_of(stack, protocol)) as client:
            pieces = client.generate_stream("ab", SamplingParams(max_tokens=100))
            assert next(pieces).outputs
            with pytest.raises(APITimeoutError) as caught:
                list(pieces)
    assert caught.value.code == "deadline_exceeded"


@pytest.mark.parametrize("is_mutual", [False, True], ids=["tls", "mutual"])
def test_clients_speak_tls(tmp_path: Path, is_mutual: bool) -> None:
    files = Certificates.make(tmp_path)
    own = ClientOptions(client_cert=files.client_cert, client_key=files.client_key)
    with running_stack(files.section(mutual=is_mutual)) as stack:
        for url in (stack.url, f"grpcs://{stack.grpc_target}"):
            with Client(url, **(own | ClientOptions(ca_cert=files.server_ca))) as client:
                assert client.generate("ab", PARAMS)[0].finished
            options = [own, own | ClientOptions(ca_cert=files.client_ca)]
            if is_mutual:
                options.append(ClientOptions(ca_cert=files.server_ca))
            for one in options:
                with Client(url, **one) as client, pytest.raises(APIConnectionError):
                    client.generate("ab", PARAMS)


def test_files_of_tls_are_checked(tmp_path: Path) -> None:
    for scheme in ("http", "grpc"):
        missing = ClientOptions(ca_cert=tmp_path / "missing")
        with pytest.raises(FileNotFoundError, match="missing"):
            Client(f"{scheme}s://host:1", **missing)
        with pytest.raises(ValueError, match="must be https:// or grpcs:// with TLS options"):
            Client(f"{scheme}://host:1", **missing)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="timeout is not an option; the options: api_key, model"):
        Client(timeout=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("scheme", PROTOCOLS)
def test_a_server_that_is_not_there_is_named(scheme: str) -> None:
    client = Client(f"{scheme}://127.0.0.1:9", timeout_s=20)
    with client, pytest.raises(APIConnectionError, match=r"127\.0\.0\.1:9"):
        client.generate("ab")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_a_url_must_be_of_a_known_protocol(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Client(url)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arguments_of_a_wrong_type_are_refused_before_they_are_sent(
    stack: Stack, protocol: str
) -> None:
    wrong: Any = 1.5
    with Client(url_of(stack, protocol), api_key=KEY) as client:
        for prompts in ({"text": "a"}, [[1, "a"]], [wrong], wrong):
            with pytest.raises(ValueError, match=r"prompts \(.*\) must be texts or token ids"):
                client.generate(prompts)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"sampling_params \(.*\) must be one"):
            client.generate(["a"], [wrong])
        with pytest.raises(ValueError, match=r"messages \(.*\) must be dicts"):
            client.chat(["Hello"])  # type: ignore[arg-type]


def test_a_base_url_may_end_as_that_of_openai(stack: Stack) -> None:
    with Client(f"{stack.url}/v1/", api_key=KEY) as client:
        assert client.generate("a", PARAMS)


@pytest.mark.parametrize("timeout_s", [0, -1, None, "60", float("nan")])
@pytest.mark.parametrize("scheme", PROTOCOLS)
def test_a_time_limit_must_be_positive(scheme: str, timeout_s: Any) -> None:
    with pytest.raises(ValueError, match=rf"timeout_s \({timeout_s}\) must be a number above 0"):
        Client(f"{scheme}://host:1", timeout_s=timeout_s)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_time_limit_may_be_infinite(stack: Stack, protocol: str) -> None:
    with Client(url_of(stack, protocol), api_key=KEY, timeout_s=float("inf")) as client:
        assert client.generate("ab", PARAMS)[0].finished


def test_invalid_files_of_tls_are_refused(tmp_path: Path) -> None:
    files, empty, text = Certificates.make(tmp_path), tmp_path / "empty", tmp_path / "ca.pem"
    empty.touch()
    text.write_text("no certificate")
    for scheme in ("https", "grpcs"):
        with pytest.raises(
            ValueError, match=r"client_key \(key.pem\) must be given with client_cert"
        ):
            Client(f"{scheme}://host:1", client_key="key.pem")
        with pytest.raises(OSError, match=r"PEM|SSL"):
            Client(f"{scheme}://host:1", client_cert=files.client_cert)
        with pytest.raises(OSError, match="certificate"):
            Client(f"{scheme}://host:1", ca_cert=empty)
        with pytest.raises(OSError, match=r"certificate|PEM|SSL"):
            Client(f"{scheme}://host:1", ca_cert=str(text))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("content", [5, [{"type": "image_url", "image_url": {"url": "x"}}]])
def test_content_that_is_not_text_is_refused(stack: Stack, protocol: str, content: Any) -> None:
    client = Client(url_of(stack, protocol), api_key=KEY)
    with client, pytest.raises(BadRequestError, match="content") as caught:
        client.chat([{"role": "user", "content": content}], PARAMS)
    assert caught.value.param == "messages[0].content"


def test_content_that_is_not_unicode_is_refused(stack: Stack) -> None:
    client = Client(url_of(stack, "grpc"), api_key=KEY)
    with client, pytest.raises(BadRequestError, match=r"content .*surrogates") as caught:
        client.chat([{"role": "user", "content": "a\ud800"}], PARAMS)
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_text_is_not_a_list_of_choices(stack: Stack, protocol: str) -> None:
    params = SamplingParams(structured_outputs={"choice": "yes"})
    client = Client(url_of(stack, protocol), api_key=KEY)
    with client, pytest.raises(BadRequestError, match="structured_outputs"):
        client.generate("ab", params)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lists_of_parameters_may_be_none(stack: Stack, protocol: str) -> None:
    none: Any = dict.fromkeys(("stop", "stop_token_ids", "bad_words"))
    with Client(url_of(stack, protocol), api_key=KEY) as client:
        found = client.generate("ab", SamplingParams(max_tokens=4, seed=1, **none))
        assert found[0].outputs == client.generate("ab", PARAMS)[0].outputs


def test_events_of_a_stream_may_be_long() -> None:
    ids = [100_000] * 500_000
    event = {"id": "x", "choices": [{"index": 0, "text": "a", "prompt_token_ids": ids}]}

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=f"data: {web.json_response(event).text}\n\ndata: [DONE]\n\n")

    async def call() -> list[int]:
        async with serving(answer) as url, AsyncClient(url) as client:
            return [len(one.prompt_token_ids) async for one in client.generate_stream("a")]

    assert asyncio.run(call()) == [len(ids)]


def test_errors_that_end_a_stream_are_typed() -> None:
    kinds = {
        "queue_full": RateLimitError,
        "invalid_value": BadRequestError,
        "model_not_found": NotFoundError,
        "deadline_exceeded": APITimeoutError,
        "internal_error": InternalServerError,
    }
    tuning = GatewayTuning(ping_after_s=0.05)  # the stream begins before the engine replies
    with running_stack(tuning=tuning) as stack, Client(stack.url) as client:
        stack.engine.step_s = 0.3
        for code, kind in kinds.items():
            stack.engine.error = ("the reason", code)
            with pytest.raises(kind, match="the reason") as caught:
                list(client.generate_stream("ab", PARAMS))
            assert caught.value.code == code


def test_a_stream_may_outlive_its_client(stack: Stack) -> None:
    with Client(stack.url, api_key=KEY) as client:
        pieces: Any = client.generate_stream("ab", SamplingParams(max_tokens=50))
        assert next(pieces).outputs
    pieces.close()


def test_the_thread_of_a_loop_may_collect_a_stream(stack: Stack) -> None:
    with Client(stack.url, api_key=KEY) as client:
        cycle: list[Any] = [client.generate_stream("ab", SamplingParams(max_tokens=50))]
        assert next(cycle[0]).outputs
        cycle.append(cycle)
        del cycle
        collected = threading.Event()
        loop = client._thread.loop
        loop.call_soon_threadsafe(gc.collect)
        loop.call_soon_threadsafe(collected.set)
        assert collected.wait(20), "the loop waits for itself"


def test_an_exception_of_a_signal_handler_cancels_the_call() -> None:
    thread, ended = LoopThread(), threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    def interrupt(*_: object) -> None:
        raise ArithmeticError

    before = signal.signal(signal.SIGUSR1, interrupt)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(ArithmeticError):
            thread.run(wait())
        assert ended.wait(20)
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.close()


def test_a_loop_that_does_not_end_names_its_tasks_and_stacks() -> None:
    thread, release = LoopThread(0.5), threading.Event()

    async def ignore_the_end() -> None:
        await asyncio.to_thread(release.wait)  # its thread runs on after the cancellation

    asyncio.run_coroutine_threadsafe(ignore_the_end(), thread.loop)
    try:
        thread.run(asyncio.sleep(0.01))
        with pytest.raises(TimeoutError, match=r"did not end\n(.|\n)*shutdown_default_executor"):
            thread.close()
    finally:
        release.set()


def test_a_call_during_the_close_of_a_loop_ends() -> None:
    thread, release = LoopThread(20), threading.Event()

    async def keep_a_thread() -> None:
        asyncio.get_running_loop().run_in_executor(None, release.wait)

    thread.run(keep_a_thread())
    closing = threading.Thread(target=thread.close)
    closing.start()
    try:
        wait_until(thread._stop.is_set, "the end of the loop's main task")
        with pytest.raises(APIConnectionError, match="the client is closed"):
            thread.run(asyncio.sleep(600))
    finally:
        release.set()
        closing.join()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_sequence_of_a_parameter_is_sent_as_a_list(stack: Stack, protocol: str) -> None:
    given = SamplingParams(max_tokens=4, seed=1, stop={"no"}, allowed_token_ids=range(256))  # type: ignore[arg-type]
    plain = SamplingParams(max_tokens=4, seed=1, stop=["no"], allowed_token_ids=list(range(256)))
    with Client(url_of(stack, protocol), api_key=KEY) as client:
        assert client.generate("ab", given)[0].outputs == client.generate("ab", plain)[0].outputs


def test_arguments_without_an_effect_are_refused() -> None:
    wrong: Any = 5
    with Client() as client:
        for call in (client.generate, client.encode, client.embed):
            with pytest.raises(ValueError, match=r"lora_request \(5\) must be the name"):
                call("a", lora_request=wrong)
        with pytest.raises(ValueError, match=r"lora_request \(5\) must be the name"):
            client.chat([{"role": "user", "content": "a"}], lora_request=wrong)
        with pytest.raises(ValueError, match=r"pooling \(mean\) must be None with .* classify"):
            client.encode("a", pooling_task="classify", pooling="mean")
    with pytest.raises(ValueError, match=r"base_url \(.*\) must have no path with grpc://"):
        Client("grpc://127.0.0.1:1/prefix")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_close_ends_the_calls_of_other_threads(stack: Stack, protocol: str) -> None:
    found: list[BaseException] = []
    client = Client(url_of(stack, protocol), api_key=KEY)

    def call() -> None:
        try:
            client.generate("ab", PARAMS)
        except BaseException as err:
            found.append(err)

    with stack.as_new():
        stack.engine.is_paused = True
        thread = threading.Thread(target=call)
        thread.start()
        wait_until(lambda: stack.engine.running, "a running request")
        client.close()
        thread.join(20)
    assert [type(one) for one in found] == [APIConnectionError]
    with pytest.raises(APIConnectionError, match="the client is closed"):
        client.generate("ab", PARAMS)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "3", "retry-after-ms": "2500"}, 2.5),
        ({"retry-after": "Fri, 27 Nov 2026 08:00:00 GMT"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("body", ["busy", '{"error": {"message": "busy"}}'])
def test_an_error_says_when_to_retry(
    headers: dict[str, str], expected: float | None, body: str
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=429, text=body, headers=headers)

    async def call() -> float | None:
        async with serving(answer) as url, AsyncClient(url) as client:
            with pytest.raises(RateLimitError) as caught:
                await client.generate("a")
        return caught.value.retry_after_s

    assert asyncio.run(call()) == expected
