"""Tables of docs/reference/conformance.md, made of the code and of what clients were seen to send.

``python -m tests.conformance.table`` writes them into the document.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from gateway.anthropic.schema import CountTokensBody, MessagesBody
from gateway.anthropic.unsupported import UNBUILT as UNBUILT_MESSAGES
from gateway.batches.batches import BatchBody
from gateway.http.pooling import ClassifyBody, EmbeddingsBody, InspectBody, ScoreBody
from gateway.http.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from gateway.http.unsupported import UNBUILT
from gateway.protocols import ENDPOINTS
from gateway.responses.schema import ResponseBody
from gateway.responses.unsupported import MOVED
from gateway.responses.unsupported import UNBUILT as UNBUILT_RESPONSES
from tests.conformance.open_responses import CASES
from tests.paths import ROOT

DOCUMENT = ROOT / "docs" / "reference" / "conformance.md"
SENT_BY_CLIENTS = Path(__file__).parent / "clients" / "fields.json"
"""Fields by client and route; ``test_clients.py`` compares it with what they send."""
BEGIN, END = "<!-- begin: tables -->", "<!-- end: tables -->"
NO_EFFECT = ("user", "metadata", "store", "service_tier")
"""Known fields that most endpoints take without effect, as they do all unknown fields."""
_OF_POOLING = frozenset(UNBUILT["pooling"])
_OF_MESSAGES = frozenset(UNBUILT_MESSAGES)
_COLUMNS: dict[str, tuple[type[BaseModel], frozenset[str]]] = {
    "completions": (CompletionBody, frozenset({*UNBUILT["completion"], "chat_template"})),
    "chat": (ChatBody, frozenset({*UNBUILT["chat"], "echo"})),
    "responses": (ResponseBody, frozenset({*UNBUILT_RESPONSES, *MOVED})),
    "messages": (MessagesBody, _OF_MESSAGES),
    "count_tokens": (CountTokensBody, _OF_MESSAGES),
    "batches": (BatchBody, frozenset()),
    "embeddings": (EmbeddingsBody, _OF_POOLING),
    "classify": (ClassifyBody, _OF_POOLING),
    "score": (ScoreBody, _OF_POOLING),
    "inspect": (InspectBody, _OF_POOLING),
    "tokenize": (TokenizeBody, frozenset(UNBUILT["tokenize"])),
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
    lines = [_row("test", "asks for", "result"), _row("---", "---", "---")]
    for case in CASES:
        result = f"{case.result}: {case.because}" if case.because else case.result
        lines.append(_row(f"`{case.name}`", case.asks, result))
    return "\n".join(lines)


def client_table() -> str:
    """Which client sends which fields where."""
    sent: dict[str, dict[str, list[str]]] = json.loads(SENT_BY_CLIENTS.read_text())
    lines = [_row("endpoint", "client", "fields that it sends"), _row("---", "---", "---")]
    for path in dict.fromkeys(endpoint.path for endpoint in ENDPOINTS):
        for client, routes in sent.items():
            found = routes.get(path)
            if found is not None:
                fields = ", ".join(f"`{name}`" for name in found) or "(none)"
                lines.append(_row(f"`{path}`", client, fields))
    return "\n".join(lines)


def fields_of(body: type[BaseModel]) -> set[str]:
    """Names of a body's fields as clients write them."""
    return {field.alias or name for name, field in body.model_fields.items()}


def rendered() -> str:
    """The document with its tables as they must be."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = f"### Fields\n\n{parameter_table()}\n\n### Clients\n\n{client_table()}"
    tables += f"\n\n### Open Responses\n\n{open_responses_table()}"
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(), encoding="utf-8")
