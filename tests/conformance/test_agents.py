"""Coding agents, unchanged, with their own tools: an answer, and a command that they run.

They reach no server but this one, whose engine says what a model of use would say. A recorder notes
what they send, as for other clients.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from gateway.core.tool_use import ToolCallFormat
from tests.conformance.recorder import ERRORS, expecting, recording
from tests.gateway.fakes import BACKEND, EOS_ID, Script, saying, tiny_tokenizer
from tests.gateway.stack import MODEL, WAIT_S, Stack, running_stack
from tests.gateway.text.tool_formats.examples import written
from tests.harness.clients import node_modules, program
from workers.requests.request import Request

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LIMIT_S = 300.0
"""Longest run of an agent, on a machine that is busy with other work."""
QUESTION = "Which number is it?"
TEMPLATE = (
    "{% if tools %}[tools]{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content[-40:] }}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Shows the ends of messages: all that agents write is longer than the context of these models."""
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
COMMAND = "echo $((6 * 7))-it-is"
RESULT = "42-it-is"
CODEX = """
model = "{model}"
model_provider = "server"
web_search = "disabled"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.server]
name = "server"
base_url = "{url}/v1"
wire_api = "responses"
"""


@pytest.fixture
def full() -> Iterator[Stack]:
    """A gateway with one place, which is taken until its engine goes on."""
    section = GatewaySection(request_timeout_s=WAIT_S, max_queue=1)
    with running_stack(section, tiny_tokenizer(TEMPLATE)) as stack:
        stack.engine.script, stack.engine.is_paused = saying("hello"), True
        with ThreadPoolExecutor(1) as pool:
            body = {"prompt": "x", "max_tokens": 8}
            first = pool.submit(stack.http.post, "/v1/completions", json=body)
            stack.wait_for(lambda: bool(stack.engine.running), "the first request")
            yield stack
            stack.engine.is_paused = False
            assert first.result(WAIT_S).status_code == 200


@pytest.fixture(scope="module")
def scripted() -> Iterator[Stack]:
    """A gateway before an engine that says what a test wants."""
    section = GatewaySection(request_timeout_s=WAIT_S)
    with running_stack(section, tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


def calling(*calls: tuple[str, dict[str, Any]]) -> Script:
    """A model that calls one function after the other, and then repeats what the last returned."""
    tokenizer = tiny_tokenizer()

    def script(request: Request, choice: int) -> list[int]:
        prompt = tokenizer.decode(request.prompt, False)
        num_done = prompt.count("<tool_call>")
        said = prompt.rpartition("<|tool|>")[2].partition("<|")[0]
        if "[tools]" in prompt and num_done < len(calls):
            said = written(ToolCallFormat.HERMES, [calls[num_done]])
        return [*BACKEND.encode(said).ids, EOS_ID]

    return script


def run(words: list[str], folder: Path, more: dict[str, str]) -> str:
    """What an agent says, in an empty folder of its own; it must end well."""
    work = folder / "work"
    work.mkdir()
    done = subprocess.run(
        words,
        cwd=work,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **more},
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def claude_code(url: str, model: str, folder: Path) -> dict[str, Any]:
    """The result of a question to Claude Code."""
    program = node_modules() / "@anthropic-ai" / "claude-code" / "cli-wrapper.cjs"
    words = ["node", str(program), "--print", QUESTION, "--model", model]
    words += ["--output-format", "json", "--allowedTools", "Bash"]
    kinds = ("OPUS", "SONNET", "HAIKU")
    settings = {f"ANTHROPIC_DEFAULT_{kind}_MODEL": model for kind in kinds}
    settings |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "none"}
    settings |= {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "256", "DISABLE_AUTOUPDATER": "1"}
    settings |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    result: dict[str, Any] = json.loads(run(words, folder, settings).splitlines()[-1])
    return result


def codex(url: str, model: str, folder: Path) -> list[dict[str, Any]]:
    """What Codex tells of a question to it."""
    program = node_modules() / "@openai" / "codex" / "bin" / "codex.js"
    home = folder / "codex"
    home.mkdir()
    (home / "config.toml").write_text(CODEX.format(model=model, url=url))
    words = ["node", str(program), "exec", "--json", "--ephemeral", "--skip-git-repo-check"]
    words += ["--sandbox", "danger-full-access", QUESTION]
    output = run(words, folder, {"CODEX_HOME": str(home)})
    return [json.loads(line) for line in output.splitlines()]


def test_claude_code_runs_commands(scripted: Stack, tmp_path: Path) -> None:
    with scripted.as_new(), expecting(scripted.url, "claude_code") as recorder:
        find = ("ToolSearch", {"query": "select:CronList"})
        command = ("Bash", {"command": COMMAND, "description": "Asks."})
        scripted.engine.script = calling(find, ("CronList", {}), command)
        result = claude_code(recorder.url, MODEL, tmp_path)
        requests = list(scripted.engine.requests)
    assert (result["is_error"], result["num_turns"]) == (False, 4), result
    assert result["result"] == RESULT
    assert ERRORS not in recorder.features[MESSAGES]
    assert {request.session for request in requests} == {result["session_id"]}
    assert {request.cache_ttl_s for request in requests} <= {None, 300.0, 3600.0}
    assert requests[-1].cache_ttl_s is not None


def test_codex_runs_a_command(scripted: Stack, tmp_path: Path) -> None:
    with scripted.as_new(), expecting(scripted.url, "codex") as recorder:
        scripted.engine.script = calling(("exec_command", {"cmd": COMMAND}))
        events = codex(recorder.url, MODEL, tmp_path)
        requests = list(scripted.engine.requests)
    assert [event["type"] for event in events if event["type"].startswith("turn.")] == [
        "turn.started",
        "turn.completed",
    ], events
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    (ran,) = [item for item in items if item["type"] == "command_execution"]
    assert (ran["exit_code"], ran["aggregated_output"].strip()) == (0, RESULT)
    assert items[-1]["text"].strip().endswith(RESULT)
    assert ERRORS not in recorder.features[RESPONSES]
    assert {request.session for request in requests} == {events[0]["thread_id"]}


@pytest.mark.parametrize(
    ("client", "module", "path"),
    [("anthropic", "anthropic", MESSAGES), ("openai", "openai", RESPONSES)],
)
def test_clients_try_again_where_the_server_is_full(
    full: Stack, tmp_path: Path, client: str, module: str, path: str
) -> None:
    """As agents do it, which use these libraries: a refusal says when."""
    script = Path(__file__).parent / "clients" / "use_retries.py"
    words = [program("python", module), str(script)]
    with recording(full.url) as recorder, ThreadPoolExecutor(1) as pool:
        said = pool.submit(run, [*words, recorder.url, MODEL, client], tmp_path, {})
        full.wait_for(lambda: ERRORS in recorder.features.get(path, ()), "a refusal")
        full.engine.is_paused = False
        assert said.result(LIMIT_S).strip() == "hello"
