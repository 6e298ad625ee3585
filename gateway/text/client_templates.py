"""Renders chat templates that clients send, if the server allows them.

Each rendering runs in a new process, so that a template cannot affect later renderings.
The module ``render_template`` limits the CPU time and memory of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import QueueFullError, RequestError
from cluster.disk.threads import run_to_completion
from gateway.core.tool_use import ToolCallFormat
from gateway.text.render_template import CPU_LIMIT_S, PARAM

MAX_AT_ONCE = 2
MAX_WAITING = 16
"""Maximum number of requests whose chat templates are being rendered or wait for a process."""
_WALL_LIMIT_S = 20.0
_RETRY_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedTemplate:
    has_tools: bool
    tool_format: ToolCallFormat | None
    """Format of the model's tool calls; None if unknown. See ``ChatTemplate.tool_format``."""
    has_thinking: bool
    """Whether the model may write reasoning before its answer."""
    text: str | None
    """The rendered prompt; None if ``error`` is set."""
    error: RequestError | None = None
    """The template's error; None if ``text`` is set."""


class ClientTemplateRenderer:
    def __init__(self) -> None:
        self._process_slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._num_waiting = 0

    async def render(
        self,
        source: str,
        variables: Mapping[str, str],
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> RenderedTemplate:
        """Render a conversation with the client's chat template ``source`` in a new process.

        ``variables`` are special tokens by name; ``options`` are further arguments of
        ``ChatTemplate.render``. An error of the template about the conversation is in the result.

        Raises:
            RequestError: the template is invalid, or needs too much time or memory.
            QueueFullError: too many requests wait for a process.
        """
        if self._num_waiting >= MAX_WAITING:
            message = f"{MAX_WAITING} chat templates of clients are running or waiting"
            raise QueueFullError(message, _RETRY_S, "chat_templates")
        request = {
            "source": source,
            "variables": dict(variables),
            "messages": list(messages),
            "options": dict(options),
        }
        self._num_waiting += 1
        try:
            async with self._process_slots:
                # to completion, as a cancelled call's process would run on without a slot
                reply = await run_to_completion(asyncio.to_thread(_run_process, request))
        finally:
            self._num_waiting -= 1
        error = RequestError(reply["error"], reply["param"]) if "error" in reply else None
        if error is not None and "has_tools" not in reply:
            raise error
        form = reply["tool_format"]
        return RenderedTemplate(
            has_tools=reply["has_tools"],
            tool_format=None if form is None else ToolCallFormat[form],
            has_thinking=reply["has_thinking"],
            text=reply.get("text"),
            error=error,
        )


def _run_process(request: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "gateway.text.render_template"]
    path = os.pathsep.join(filter(None, sys.path))  # the only variable of the new environment
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            env={"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_WALL_LIMIT_S,
            check=True,
        )
    except subprocess.SubprocessError as err:
        message = f"{PARAM} needs more than {CPU_LIMIT_S} s, or too much memory"
        raise RequestError(message, PARAM) from err
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply
