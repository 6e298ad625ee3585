"""Tables of docs/reference/conformance.md, made of the code and of what clients were seen to send.

``python -m tests.conformance.table`` writes them into the document.
"""

from __future__ import annotations

import json

from pydantic import BaseModel

from gateway.anthropic.schema import CountTokensBody, MessagesBody
from gateway.anthropic.unsupported import UNSUPPORTED as UNBUILT_MESSAGES
from gateway.batches.batches import BatchBody
from gateway.http.pooling import ClassifyBody, EmbeddingsBody, InspectBody, ScoreBody
from gateway.http.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from gateway.http.unsupported import UNSUPPORTED
from gateway.protocols import ENDPOINTS
from gateway.responses.schema import ResponseBody
from gateway.responses.unsupported import RENAMED_FIELDS
from gateway.responses.unsupported import UNSUPPORTED as UNBUILT_RESPONSES
from tests.conformance.open_responses import CASES
from tests.conformance.recorder import FEATURES, SENT_BY_CLIENTS
from tests.paths import ROOT

DOCUMENT = ROOT / "docs" / "reference" / "conformance.md"
BEGIN, END = "<!-- begin: tables -->", "<!-- end: tables -->"
NO_EFFECT = ("user", "metadata", "store", "service_tier", "client_metadata")
"""Known fields that most endpoints take without effect, as they do all unknown fields."""
CLIENTS: dict[str, tuple[str, ...]] = {
    "anthropic": ("anthropic",),
    "claude_code": ("@anthropic-ai/claude-code (npm)",),
    "codex": ("@openai/codex (npm)",),
    "curl": (),
    "guidellm": ("guidellm",),
    "langchain": ("langchain-openai",),
    "litellm": ("litellm",),
    "lm_eval": ("lm-eval",),
    "locust": ("locust",),
    "messages": ("langchain-anthropic", "litellm"),
    "npm_anthropic": ("@anthropic-ai/sdk (npm)", "ai (npm)", "@ai-sdk/anthropic (npm)"),
    "npm_packages": ("ai (npm)", "@ai-sdk/openai-compatible (npm)", "openai (npm)"),
    "openai": ("openai",),
    "openai_responses": ("openai",),
}
"""Packages of each client."""
PROTOCOLS = {
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1/responses": "Responses",
    "/v1/messages": "Messages",
    "/v1/embeddings": "embeddings",
}
_OF_POOLING = frozenset(UNSUPPORTED["pooling"])
_OF_MESSAGES = frozenset(UNBUILT_MESSAGES)
_COLUMNS: dict[str, tuple[type[BaseModel], frozenset[str]]] = {
    "completions": (CompletionBody, frozenset({*UNSUPPORTED["completion"], "chat_template"})),
    "chat": (ChatBody, frozenset({*UNSUPPORTED["chat"], "echo"})),
    "responses": (ResponseBody, frozenset({*UNBUILT_RESPONSES, *RENAMED_FIELDS})),
    "messages": (MessagesBody, _OF_MESSAGES),
    "count_tokens": (CountTokensBody, _OF_MESSAGES),
    "batches": (BatchBody, frozenset()),
    "embeddings": (EmbeddingsBody, _OF_POOLING),
    "classify": (ClassifyBody, _OF_POOLING),
    "score": (ScoreBody, _OF_POOLING),
    "inspect": (InspectBody, _OF_POOLING),
    "tokenize": (TokenizeBody, frozenset(UNSUPPORTED["tokenize"])),
    "detokenize": (DetokenizeBody, frozenset()),
}


def parameter_table() -> str:
    """What becomes of each known field at each endpoint."""
    taken = {name: fields_of(body) for name, (body, _) in _COLUMNS.items()}
    names = sorted({field for column in taken.values() for field in column} - set(NO_EFFECT))
    refused = sorted({f for _, fields in _COLUMNS.values() for f in fields} - set(names))
    lines = [_row("field", *_COLUMNS), _row(*["---"] * (len(_COLUMNS) + 1))]
    for field in (*names, *refused):
        cells = (
            "yes" if field in taken[name] else "400" if field in no else ""
            for name, (_, no) in _COLUMNS.items()
        )
        lines.append(_row(f"`{field}`", *cells))
    for field in NO_EFFECT:
        cells = ("yes" if field in taken[name] else "no effect" for name in _COLUMNS)
        lines.append(_row(f"`{field}`", *cells))
    return "\n".join(lines)


def open_responses_table() -> str:
    """What becomes of each test of the public suite."""
    lines = [_row("test", "requires", "result"), _row("---", "---", "---")]
    for case in CASES:
        result = f"{case.result}: {case.because}" if case.because else case.result
        lines.append(_row(f"`{case.name}`", case.asks, result))
    return "\n".join(lines)


def protocol_table() -> str:
    """What each client was seen to use of each protocol."""
    head = ("client", "versions", "protocol", *FEATURES)
    lines = [_row(*head), _row(*["---"] * len(head))]
    known = versions()
    for client, routes in sent_by_clients().items():
        packages = CLIENTS[client]
        names = ", ".join(packages) or client
        pinned = ", ".join(known[package] for package in packages) or "of the machine"
        for path, protocol in PROTOCOLS.items():
            if (seen := routes.get(path)) is not None:
                cells = ("yes" if name in seen["features"] else "" for name in FEATURES)
                lines.append(_row(names, pinned, protocol, *cells))
    return "\n".join(lines)


def client_table() -> str:
    """Which client sends which fields where."""
    lines = [_row("endpoint", "client", "fields that it sends"), _row("---", "---", "---")]
    for path in dict.fromkeys(endpoint.path for endpoint in ENDPOINTS):
        for client, routes in sent_by_clients().items():
            if (seen := routes.get(path)) is not None:
                fields = ", ".join(f"`{name}`" for name in seen["fields"]) or "(none)"
                lines.append(_row(f"`{path}`", client, fields))
    return "\n".join(lines)


def sent_by_clients() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Fields and features by client and route, as the recorder wrote them."""
    found: dict[str, dict[str, dict[str, list[str]]]] = json.loads(SENT_BY_CLIENTS.read_text())
    return found


def versions() -> dict[str, str]:
    """Versions of the clients' packages."""
    folder = SENT_BY_CLIENTS.parent
    lines = (folder / "constraints.txt").read_text().split()
    of_npm = json.loads((folder / "package.json").read_text())["dependencies"]
    pairs = (line.partition("==") for line in lines if "==" in line)
    of_pip = {name: version for name, _, version in pairs}
    return {**of_pip, **{f"{name} (npm)": version for name, version in of_npm.items()}}


def fields_of(body: type[BaseModel]) -> set[str]:
    """Names of a body's fields as clients write them."""
    return {field.alias or name for name, field in body.model_fields.items()}


def rendered() -> str:
    """The document with its tables as they must be."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = {
        "Protocols and clients": protocol_table(),
        "Open Responses": open_responses_table(),
        "Fields": parameter_table(),
        "Fields that clients send": client_table(),
    }
    text = "\n\n".join(f"### {title}\n\n{table}" for title, table in tables.items())
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(), encoding="utf-8")
