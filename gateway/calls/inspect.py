"""Inspection: returns internal arrays of the model for prompts, after a check of their size."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import RequestError
from gateway.calls.gateway import Gateway
from gateway.calls.losses import aux_loss, classification_loss
from gateway.calls.pooling import (
    Mask,
    PoolingService,
    apply_mask,
    as_numpy,
    check_classifier_batch,
    check_rows,
    classified_token,
)
from gateway.calls.prompts import PromptMaker
from gateway.calls.validate import check_prompts
from gateway.core.call import GenerateCall
from gateway.core.delta import Usage
from gateway.core.field_checks import check_batch, require
from gateway.core.model import ModelFacts
from workers.requests.inspection import (
    IGNORED_LABEL,
    InspectionParams,
    ModelShape,
    NamedArray,
    check_inspection,
    num_bytes,
)
from workers.requests.request import Request

OUTPUTS = (
    "logits",
    "logprobs",
    "hidden_states",
    "router_logits",
    "routes",
    "attentions",
    "loss",
    "aux_loss",
)
MAX_CALL_BYTES = 64 * 1024 * 1024
"""Maximum total size in bytes of the arrays of one inspection."""
MAX_JSON_BYTES = 8 * 1024 * 1024
"""Maximum total size in bytes of the arrays in a JSON response, whose text is six times as long."""
MAX_LABEL = 1e30
"""Maximum absolute value of a label, so that its square in a regression loss is finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectFields:
    token_ids: tuple[tuple[int, ...], ...]
    outputs: tuple[str, ...]
    masks: tuple[Mask, ...] = ()
    """Attention masks, one per prompt (1 keeps a token, 0 removes it); empty to keep all tokens."""
    logits_to_keep: int | tuple[int, ...] | None = None
    """Positions whose logits are returned: the last N (0 or None: all), or ascending positions."""
    labels: tuple[tuple[float, ...], ...] = ()
    """Labels for the loss, one row per prompt; empty if not given.

    A row has a label per token for a language model, and classes or numbers for a classifier.
    """

    def wants(self, *names: str) -> bool:
        """Return whether the client requests at least one of these outputs."""
        return any(name in self.outputs for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectionResult:
    rows: tuple[tuple[NamedArray, ...], ...]
    """Requested arrays of the model for each prompt, such as logits or hidden states."""
    num_tokens: tuple[int, ...]
    """Number of tokens of each prompt that the model read."""
    loss: float | None
    """Mean loss over all labels except -100; None if there are none, or if not requested."""
    aux_loss: Mapping[str, float]
    """Auxiliary (load balancing) loss by its definition, such as ``transformers_5``.

    Empty if not requested.
    """
    usage: Usage


class InspectionService:
    """Serves inspections (internal arrays of the model for prompts) through a gateway.

    The results of all concurrent inspections of the gateway share one memory limit.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._pooling = PoolingService(gateway)
        self._long_work = gateway.long_work
        self._max_prompts = gateway.limits.max_batch_prompts
        self._memory = gateway.inspection_memory

    @contextlib.asynccontextmanager
    async def inspect(
        self, fields: InspectFields, wanted: GenerateCall, most_bytes: int
    ) -> AsyncIterator[InspectionResult]:
        """Run an inspection of at most ``most_bytes``, with the model and priority of ``wanted``.

        The results count for the shared memory limit until the ``async with`` block ends. Raises
        the errors of ``Gateway.start``.
        """
        _check_outputs(fields)
        check_batch("token_ids", len(fields.token_ids), self._max_prompts)
        held = 0
        made: tuple[ModelFacts, list[Request]] | None = None

        async def make(facts: ModelFacts, prompt_maker: PromptMaker) -> list[Request]:
            nonlocal held, made
            assert facts.shape is not None, "reported with the other facts"
            num_values = sum(map(len, (*fields.token_ids, *fields.labels)))
            requests, size = await self._long_work.run(
                num_values, _sized_prompts, fields, facts, most_bytes
            )
            self._memory.hold(size)
            held, made = size, (facts, requests)
            return requests

        try:
            found, usage = await self._pooling.read(make, "insp", "token_ids", wanted)
            assert made is not None, "made before it is read"
            yield _inspected(fields, *made, [one.arrays for one in found], usage)
        finally:
            self._memory.release(held)


def _sized_prompts(
    fields: InspectFields, facts: ModelFacts, most_bytes: int
) -> tuple[list[Request], int]:
    """Check the prompts of an inspection; return their requests and the bytes of all arrays.

    Raises ``RequestError`` for invalid fields, and above ``most_bytes``.
    """
    requests = make_prompts(fields, facts)
    assert facts.shape is not None, "reported with the other facts"
    return requests, _total_size(requests, facts.shape, most_bytes)


def make_prompts(fields: InspectFields, facts: ModelFacts) -> list[Request]:
    """Check the fields of an inspection; return one request per prompt. Raises ``RequestError``."""
    prompts = fields.token_ids
    check_prompts("token_ids", prompts, facts)
    check_rows("attention_mask", fields.masks, len(prompts))
    check_rows("labels", fields.labels, len(prompts))
    is_small = all(abs(label) <= MAX_LABEL for row in fields.labels for label in row)
    require(is_small, "labels", f"must be at most {MAX_LABEL:g} in size")
    if facts.labels:
        if fields.wants("logits", "loss"):
            check_classifier_batch(len(prompts), facts)
        if fields.wants("logprobs"):
            raise RequestError("outputs must not have logprobs for a classifier", "outputs")
        require(fields.logits_to_keep is None, "logits_to_keep", "is not for classifiers")
        has_labels = bool(fields.labels) or not fields.wants("loss")
        require(has_labels, "labels", "is required for the loss of a classifier")
        if fields.wants("loss"):  # checks the labels, with zeros for logits
            logits = np.zeros((len(prompts), len(facts.labels)), dtype=np.float32)
            classification_loss(logits, fields.labels, facts.problem_type)
    masks = fields.masks or tuple((1,) * len(ids) for ids in prompts)
    return [_prompt(fields, i, ids, masks[i], facts) for i, ids in enumerate(prompts)]


def _prompt(
    fields: InspectFields, index: int, ids: tuple[int, ...], mask: Mask, facts: ModelFacts
) -> Request:
    kept = apply_mask(ids, mask)
    places: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    if facts.labels:
        place = classified_token(ids, mask, facts)
        if fields.wants("logits", "loss"):
            places = (sum(mask[:place]),)
    else:
        if fields.wants("logprobs", "loss"):
            labels = _labels(fields.labels[index], mask) if fields.labels else kept
        if fields.wants("logits"):
            places = _positions(fields.logits_to_keep, len(kept))
    inspection = InspectionParams(
        logits=places,
        labels=labels,
        hidden_states=fields.wants("hidden_states"),
        router_logits=fields.wants("router_logits"),
        routes=fields.wants("routes"),
        attentions=fields.wants("attentions"),
        aux=fields.wants("aux_loss"),
    )
    return Request(prompt=kept, inspection=inspection)


def _labels(labels: tuple[float, ...], mask: Mask) -> tuple[int, ...]:
    field = "labels"
    require(len(labels) == len(mask), field, f"has {len(labels)} entries for {len(mask)} tokens")
    whole = [int(label) for label in labels]
    require(whole == list(labels), field, f"must be token ids or {IGNORED_LABEL}")
    hidden = [label for label, keep in zip(whole, mask, strict=True) if not keep]
    rule = f"must be {IGNORED_LABEL} where attention_mask is 0"
    require(set(hidden) <= {IGNORED_LABEL}, field, rule)
    return tuple(label for label, keep in zip(whole, mask, strict=True) if keep)


def _positions(wanted: int | tuple[int, ...] | None, length: int) -> tuple[int, ...]:
    field = "logits_to_keep"
    if isinstance(wanted, tuple):
        is_ascending = all(a < b for a, b in pairwise(wanted))
        require(bool(wanted) and is_ascending, field, "must be ascending positions")
        return wanted
    count = wanted or 0
    require(count >= 0, field, f"({count}) must not be negative")
    return tuple(range(max(length - count, 0) if count else 0, length))


def _check_outputs(fields: InspectFields) -> None:
    names = ", ".join(OUTPUTS)
    require(len(fields.outputs) > 0, "outputs", f"must not be empty: {names}")
    unknown = next((name for name in fields.outputs if name not in OUTPUTS), None)
    require(unknown is None, "outputs", f"has {str(unknown)[:32]!r}, known outputs: {names}")


def _total_size(requests: Sequence[Request], shape: ModelShape, most: int) -> int:
    """Return the bytes of the arrays of all prompts. Raises ``RequestError`` above ``most``."""
    size = 0
    for request in requests:
        assert request.inspection is not None, "made by _prompt"
        check_inspection(request.inspection, len(request.prompt), shape)
        size += num_bytes(request.inspection, len(request.prompt), shape)
    require(size <= most, "outputs", f"need {size} bytes, at most {most} are allowed")
    return size


def _inspected(
    fields: InspectFields,
    facts: ModelFacts,
    requests: Sequence[Request],
    found: Sequence[Sequence[NamedArray]],
    usage: Usage,
) -> InspectionResult:
    rows = [{array.name: array for array in arrays} for arrays in found]
    lengths = tuple(len(request.prompt) for request in requests)
    assert facts.shape is not None, "reported with the other facts"
    return InspectionResult(
        rows=tuple(tuple(a for a in arrays if _is_wanted(fields, a)) for arrays in found),
        num_tokens=lengths,
        loss=_loss(fields, facts, rows) if fields.wants("loss") else None,
        aux_loss=(
            aux_loss([_aux_sums(row) for row in rows], lengths, facts.shape.banks)
            if fields.wants("aux_loss")
            else {}
        ),
        usage=usage,
    )


def _is_wanted(fields: InspectFields, array: NamedArray) -> bool:
    """Return whether the client requested an array; if not, it only serves to compute a loss."""
    kind = array.name.partition(":")[0]
    return kind != "aux" and (kind not in ("logits", "logprobs") or fields.wants(kind))


def _aux_sums(row: Mapping[str, NamedArray]) -> dict[str, NDArray[np.float32]]:
    prefix = "aux:"
    return {n.removeprefix(prefix): as_numpy(a) for n, a in row.items() if n.startswith(prefix)}


def _loss(
    fields: InspectFields, facts: ModelFacts, rows: Sequence[Mapping[str, NamedArray]]
) -> float | None:
    if facts.labels:
        logits = np.concatenate([as_numpy(row["logits"]) for row in rows])
        return classification_loss(logits, fields.labels, facts.problem_type)
    values = np.concatenate([as_numpy(row["logprobs"]) for row in rows]).astype(np.float64)
    counted = values[~np.isnan(values)]
    return float(-counted.mean()) if len(counted) else None
