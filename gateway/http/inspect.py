"""``POST /v1/inspect``: its body, and its answer."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any

from gateway.generation.answer import clamp_logprob
from gateway.generation.inspect import Inspected, InspectFields
from gateway.generation.pooling import as_numpy
from gateway.http.convert import mask_list
from gateway.http.openai_format import pooling_usage
from gateway.http.schema import CallBody, Items
from workers.requests.inspection import NamedArray


class InspectBody(CallBody):
    """``POST /v1/inspect``."""

    token_ids: Items[int] | Items[Items[int]]
    outputs: Items[str]
    attention_mask: Items[int] | Items[Items[int]] | None = None
    logits_to_keep: int | Items[int] | None = None
    labels: Items[int] | Items[float] | Items[Items[int]] | Items[Items[float]] | None = None


def inspect_fields(body: InspectBody) -> InspectFields:
    keep = body.logits_to_keep
    prompts = mask_list(body.token_ids) or ((),)
    return InspectFields(
        token_ids=prompts,
        outputs=tuple(body.outputs),
        masks=mask_list(body.attention_mask),
        logits_to_keep=tuple(keep) if isinstance(keep, list) else keep,
        labels=label_rows(body.labels or (), prompts),
    )


def label_rows(
    labels: Sequence[float] | Sequence[Sequence[float]], prompts: Sequence[Sequence[int]]
) -> tuple[tuple[float, ...], ...]:
    """Labels by prompt. One list of numbers is that of one prompt, or has one for each."""
    rows = tuple(tuple(one) for one in labels if isinstance(one, Sequence))
    if rows or not labels:
        return rows
    flat = tuple(one for one in labels if isinstance(one, int | float))
    return (flat,) if len(prompts) == 1 else tuple((one,) for one in flat)


def inspect_answer(found: Inspected, model: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "id": f"insp-{uuid.uuid4().hex}",
        "object": "inspection",
        "model": model,
        "data": [
            {"index": index, "num_tokens": count, **_row(arrays)}
            for index, (arrays, count) in enumerate(zip(found.rows, found.num_tokens, strict=True))
        ],
        "loss": found.loss,
        "usage": pooling_usage(found.usage),
    }
    return answer | ({"aux_loss": dict(found.aux_loss)} if found.aux_loss else {})


def _row(arrays: Sequence[NamedArray]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    routes: dict[str, dict[str, Any]] = {}
    for array in arrays:
        kind, _, bank = array.name.partition(":")
        values = as_numpy(array).tolist()
        if kind == "logprobs":
            row[kind] = [None if math.isnan(value) else clamp_logprob(value) for value in values]
        elif kind == "router_logits":
            row.setdefault(kind, []).append({**_bank(bank), "logits": values})
        elif bank:
            routes.setdefault(bank, _bank(bank))[kind] = values
        else:
            row[kind] = values
    return row | ({"routes": list(routes.values())} if routes else {})


def _bank(name: str) -> dict[str, Any]:
    bank, _, layer = name.rpartition(":")
    return {"bank": bank, "layer": int(layer)}
