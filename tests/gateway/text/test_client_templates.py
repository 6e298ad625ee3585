"""Chat templates of clients run in a process of their own, with limits."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from cluster.core.errors import QueueFullError, RequestError
from gateway.core.tool_use import ToolCallFormat
from gateway.text import client_templates
from gateway.text.client_templates import (
    MAX_AT_ONCE,
    MAX_WAITING,
    ClientTemplateRenderer,
    RenderedTemplate,
)

pytestmark = pytest.mark.heavy

USER = [{"role": "user", "content": "hi"}]
LOOP = "{% for i in range(99999) %}"
FOREVER = f"{LOOP}{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}{{% endfor %}}"
GROW = "{% set x.y = [x.y, 'a' * 16000000 ~ i] %}{% endfor %}"
HUGE = "{% set x = namespace(y=[]) %}" + LOOP + GROW


def render(source: str, **options: Any) -> RenderedTemplate:
    return asyncio.run(ClientTemplateRenderer().render(source, {"eos_token": "<e>"}, USER, options))


def test_it_sees_what_the_model_s_own_sees() -> None:
    source = "{{ messages[0].content }}{{ word }}{{ eos_token }}"
    answer = render(source, variables={"word": "!"}, add_generation_prompt=False)
    assert answer == RenderedTemplate(
        has_tools=False, tool_format=None, has_thinking=False, text="hi!<e>"
    )


def test_its_form_of_tools_is_found() -> None:
    answer = render("{% if tools %}<tool_call>{% endif %}", tools=[{"type": "function"}])
    assert (answer.has_tools, answer.tool_format) == (True, ToolCallFormat.HERMES)
    assert answer.text == "<tool_call>"


@pytest.mark.parametrize("source", [FOREVER, HUGE], ids=["time", "memory"])
def test_what_needs_too_much_ends(source: str) -> None:
    with pytest.raises(RequestError, match="too much memory") as caught:
        render(source)
    assert caught.value.param == "chat_template"


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid"):
        render("{% if %}")


def test_what_refuses_the_conversation_says_so() -> None:
    error = render("{{ raise_exception('no') }}").error
    assert error is not None
    assert error.param == "chat_template"
    assert str(error) == "chat_template does not fit the messages: no"


def test_a_prompt_that_is_no_unicode_is_refused() -> None:
    error = render(r"{{ '\ud800' }}").error
    assert error is not None
    assert error.param == "chat_template"
    assert "surrogates" in str(error)
    error = render(r"{{ raise_exception('\ud800') }}").error
    assert str(error) == "chat_template does not fit the messages: ?"


def test_a_template_sees_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "of the server")
    error = render("{{ cycler.__init__.__globals__.os.environ }}").error
    assert error is not None
    assert "unsafe" in str(error)


def test_few_may_wait() -> None:
    async def ask_too_many() -> list[RenderedTemplate | BaseException]:
        templates = ClientTemplateRenderer()
        calls = [templates.render("x", {}, USER, {}) for _ in range(MAX_WAITING + 1)]
        return await asyncio.gather(*calls, return_exceptions=True)

    *answered, refused = asyncio.run(ask_too_many())
    assert all(isinstance(one, RenderedTemplate) for one in answered)
    assert isinstance(refused, QueueFullError)


def test_processes_of_cancelled_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that leave at once cannot start more processes than others."""
    running: list[None] = []
    most, lock = [0], threading.Lock()

    def run(request: object) -> dict[str, Any]:
        with lock:
            running.append(None)
            most[0] = max(most[0], len(running))
        time.sleep(0.05)
        with lock:
            running.pop()
        return {"error": "no", "param": "chat_template"}

    monkeypatch.setattr(client_templates, "_run_process", run)

    async def cancel_many() -> None:
        templates = ClientTemplateRenderer()
        calls = []
        for _ in range(3 * MAX_AT_ONCE):
            calls.append(asyncio.create_task(templates.render("x", {}, USER, {})))
            await asyncio.sleep(0.002)
            calls[-1].cancel()
        await asyncio.wait(calls)

    asyncio.run(cancel_many())
    assert most[0] <= MAX_AT_ONCE
