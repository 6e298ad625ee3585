"""A program that renders one chat template of a client in a separate process.

Jinja's sandbox protects Python objects but does not stop endless loops or texts, so the process has
limits on CPU time and memory. It reads a JSON object from standard input (``source``,
``variables``, ``messages``, ``options``) and writes a JSON object: ``has_tools``, ``tool_format``,
``has_thinking``, and ``text`` or ``error`` with ``param``. ``client_templates`` starts the program.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from cluster.core.errors import CheckpointError, RequestError
from gateway.text.chat_template import ChatTemplate

CPU_LIMIT_S = 3
"""CPU time limit in seconds to render a client's template, including the start of Python."""
MEMORY_LIMIT_BYTES = 1024**3
MAX_TEXT_CHARS = 16 * 1024 * 1024
"""Maximum length of a rendered prompt in characters."""
PARAM = "chat_template"
"""Name of the request field that contains the client's chat template."""


def render_request(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template = ChatTemplate(request["source"], request["variables"], PARAM)
    except CheckpointError as err:
        return {"error": f"{PARAM}: {err}", "param": PARAM}
    form = template.tool_format
    facts = {
        "has_tools": template.has_tools,
        "tool_format": None if form is None else form.name,
        "has_thinking": template.has_thinking,
    }
    try:
        text = template.render(request["messages"], **request["options"])
    except RequestError as err:
        message = str(err).encode(errors="replace").decode()  # without lone surrogates
        return {**facts, "error": message, "param": err.param}
    if len(text) > MAX_TEXT_CHARS:
        return {**facts, "error": f"{PARAM} makes too long a prompt", "param": PARAM}
    try:
        text.encode()
    except UnicodeEncodeError:
        return {**facts, "error": f"{PARAM} makes a prompt with lone surrogates", "param": PARAM}
    return {**facts, "text": text}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(render_request(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
