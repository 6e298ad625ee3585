"""Calls that read prompts without generating text: embeddings, classification, scores.

These calls pass through ``Gateway.start`` as any other call. A score is the sum or mean of the
natural log-probabilities of tokens, each given all tokens before it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import RequestError
from gateway.calls.choices import PromptResults
from gateway.calls.gateway import Gateway
from gateway.calls.prompts import PromptMaker
from gateway.calls.validate import check_context, check_prompts
from gateway.core.call import CallKind, GenerateCall
from gateway.core.delta import Usage
from gateway.core.field_checks import RANGES, check_batch, check_cache_salt, check_range, require
from gateway.core.model import ModelFacts
from workers.requests.classifier import pooled_position
from workers.requests.inspection import IGNORED_LABEL, InspectionParams, NamedArray, Pooling
from workers.requests.request import Request

MAX_JOINED_TOKENS = 4 * 1024 * 1024
"""Maximum number of tokens of all prompts that a call makes by joining texts, for example a query
with each of its documents."""
PromptInput = str | tuple[int, ...]
"""One prompt: a text or token ids."""
Row = TypeVar("Row")
Mask = tuple[int, ...]
"""Attention mask of a prompt, one number per token: 1 keeps the token, 0 removes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassResult:
    label: str
    """Name of the most probable class; the first of equally probable ones."""
    probs: tuple[float, ...]
    """Probability of each class: softmax of ``logits``, or sigmoid for multi-label classifiers."""
    logits: tuple[float, ...]
    """Logit of each class; for a language model, log-probability of each label after the prompt."""
    num_classes: int


@dataclass(frozen=True, slots=True)
class PoolingResults(Generic[Row]):
    """Results of an embedding, classification or score call, one row per prompt."""

    rows: tuple[Row, ...]
    usage: Usage


def make_pooling_call(**given: Any) -> GenerateCall:
    """Make a call that generates no text. ``given`` are fields such as model and priority."""
    return GenerateCall(kind=CallKind.COMPLETION, token_ids_only=True, **given)


class PoolingService:
    """Serves embeddings, classification and scores through a gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def embed(
        self, prompts: Sequence[PromptInput], pooling: str | None, call: GenerateCall
    ) -> PoolingResults[NDArray[np.float32]]:
        """Return the embedding of each prompt, [hidden_size], not normalized.

        ``pooling`` is ``last`` (default for None) or ``mean``. Raises the errors of
        ``Gateway.start``.
        """
        kinds = {kind.value: kind for kind in Pooling}
        wanted = pooling or Pooling.LAST.value
        require(wanted in kinds, "pooling", f"({wanted[:32]!r}) must be last or mean")
        inspection = InspectionParams(embedding=kinds[wanted])

        async def make(facts: ModelFacts, prompt_maker: PromptMaker) -> list[Request]:
            ids = await self._ids(prompts, facts, prompt_maker, call, "input")
            return [Request(prompt=one, inspection=inspection) for one in ids]

        found, usage = await self.read(make, "embd", "input", call)
        return PoolingResults(tuple(as_numpy(one.arrays[0]) for one in found), usage)

    async def classify(
        self,
        prompts: Sequence[PromptInput],
        labels: Sequence[str],
        masks: Sequence[Mask],
        call: GenerateCall,
    ) -> PoolingResults[ClassResult]:
        """Classify each prompt, with the classes of the model or, for a language model, ``labels``.

        ``masks`` has an attention mask per prompt, or is empty. Raises the errors of
        ``Gateway.start``.
        """
        names: tuple[str, ...] = ()
        is_multi = False

        async def make(facts: ModelFacts, prompt_maker: PromptMaker) -> list[Request]:
            nonlocal names, is_multi
            ids = await self._ids(prompts, facts, prompt_maker, call, "input")
            size = sum(map(len, ids))
            ids = await self._gateway.long_work.run(size, keep_unmasked, ids, masks, facts)
            names = facts.labels or tuple(labels)
            is_multi = facts.problem_type == "multi_label_classification"
            if facts.labels:
                require(not labels, "labels", "must not be set: the model has its own")
                check_classifier_batch(len(ids), facts)
                return [Request(prompt=one) for one in ids]  # returns the logits of the classifier
            return await self._label_prompts(ids, labels, facts, prompt_maker)

        found, usage = await self.read(make, "cls", "input", call)
        if labels:  # language model: results has one entry per prompt and label
            sums = [float(np.nansum(as_numpy(one.arrays[0]), dtype=np.float64)) for one in found]
            logits = [tuple(sums[i : i + len(names)]) for i in range(0, len(sums), len(names))]
        else:
            logits = [one.class_logits for one in found]
        return PoolingResults(tuple(_class_row(names, one, is_multi) for one in logits), usage)

    async def score(
        self,
        queries: Sequence[PromptInput],
        documents: Sequence[PromptInput],
        call: GenerateCall,
        names: tuple[str, str] = ("queries", "documents"),
    ) -> PoolingResults[float]:
        """Return the mean log-probability of each document's tokens after its query.

        A single query serves all documents. ``names`` are the client's names of the two fields, for
        error messages. Raises the errors of ``Gateway.start``.
        """
        name, other = names
        require(
            len(queries) in (1, len(documents)),
            name,
            f"({len(queries)}) must be one, or as many as {other} ({len(documents)})",
        )

        async def make(facts: ModelFacts, prompt_maker: PromptMaker) -> list[Request]:
            before = await self._ids(queries, facts, prompt_maker, call, name)
            behind = await self._ids(documents, facts, prompt_maker, call, other, special=False)
            if len(before) == 1:
                before *= len(behind)
            pairs = list(zip(before, behind, strict=True))

            def join() -> list[Request]:
                return [scored_prompt(*pair, name) for pair in pairs]

            size = sum(len(first) + len(second) for first, second in pairs)
            _check_total(f"{name} and {other}", size, name)
            return await self._gateway.long_work.run(size, join)

        found, usage = await self.read(make, "score", other, call)
        rows = [as_numpy(one.arrays[0]) for one in found]
        return PoolingResults(
            tuple(float(np.nanmean(row, dtype=np.float64)) for row in rows), usage
        )

    def model_name(self, name: str | None) -> str:
        """Return the model name for a response to a request that names ``name``."""
        return name or self._gateway.serving(None).model.name

    async def _label_prompts(
        self,
        ids: Sequence[tuple[int, ...]],
        labels: Sequence[str],
        facts: ModelFacts,
        prompt_maker: PromptMaker,
    ) -> list[Request]:
        if not labels:
            message = "labels is required: the model has no classes"
            raise RequestError(message, "labels", "missing_required_parameter")
        most = self._gateway.limits.max_choices
        if (count := len(ids) * len(labels)) > most:
            raise RequestError(f"prompts times labels ({count}) must be at most {most}", "labels")
        tokens = await prompt_maker.make_ids(labels, facts, False, "labels")
        require(all(tokens), "labels", "must not contain an empty text")

        def join() -> list[Request]:
            return [scored_prompt(one, label, "input") for one in ids for label in tokens]

        size = len(tokens) * sum(map(len, ids)) + len(ids) * sum(map(len, tokens))
        _check_total("prompts and labels", size, "labels")
        return await self._gateway.long_work.run(size, join)

    async def _ids(
        self,
        prompts: Sequence[PromptInput],
        facts: ModelFacts,
        prompt_maker: PromptMaker,
        call: GenerateCall,
        field: str,
        special: bool = True,
    ) -> list[tuple[int, ...]]:
        """Return the token ids of each prompt. Raises ``RequestError`` for an empty prompt."""
        check_batch(field, len(prompts), self._gateway.limits.max_batch_prompts)
        special = special and call.add_special_tokens is not False
        ids = await prompt_maker.make_ids(prompts, facts, special, field)
        size = sum(map(len, ids))
        await self._gateway.long_work.run(size, check_prompts, field, ids, facts)
        return ids

    async def read(
        self,
        make: Callable[[ModelFacts, PromptMaker], Awaitable[list[Request]]],
        prefix: str,
        field: str,
        call: GenerateCall,
    ) -> tuple[list[PromptResults], Usage]:
        """Run the requests that ``make`` returns; return results by prompt, and the usage.

        ``prefix`` begins the call id; ``field`` is the client's name of the prompts, for error
        messages. Raises the errors of ``Gateway.start``.
        """
        check_range("priority", call.priority, RANGES["priority"])
        check_cache_salt(call.cache_salt)

        async def make_checked(
            facts: ModelFacts, prompt_maker: PromptMaker
        ) -> tuple[GenerateCall, list[Request]]:
            requests = await make(facts, prompt_maker)
            most = self._gateway.limits.max_queue
            if len(requests) > most:
                message = f"the call needs {len(requests)} requests, max_queue is {most}"
                raise RequestError(message, field)
            for request in requests:
                check_context(len(request.prompt), 0, facts, field)
            return call, requests

        call_id = f"{prefix}-{uuid.uuid4().hex}"
        with await self._gateway.start(call, call_id, make_checked) as running:
            found = await running.read()
            return found, running.usage


def _check_total(what: str, num_tokens: int, field: str) -> None:
    """Raise ``RequestError`` if ``num_tokens`` exceeds ``MAX_JOINED_TOKENS``."""
    if num_tokens > MAX_JOINED_TOKENS:
        rule = f"have {num_tokens} tokens when joined"
        message = f"{what} {rule}, at most {MAX_JOINED_TOKENS} are allowed"
        raise RequestError(message, field)


def scored_prompt(before: tuple[int, ...], behind: tuple[int, ...], field: str) -> Request:
    """Make a request for the log-probabilities of the tokens ``behind``, given ``before``.

    Raises ``RequestError`` if ``before``, the client's ``field``, is empty.
    """
    if not before:
        raise RequestError(f"{field} must not be empty", field)
    labels = (IGNORED_LABEL,) * len(before) + behind
    return Request(prompt=before + behind, inspection=InspectionParams(labels=labels))


def keep_unmasked(
    ids: Sequence[tuple[int, ...]], masks: Sequence[Mask], facts: ModelFacts
) -> list[tuple[int, ...]]:
    """Remove the tokens of each prompt that its mask excludes. Raises ``RequestError``.

    Without masks, prompts stay whole. For a classifier, the mask must keep the last token that is
    not the pad token, because the classifier reads it.
    """
    check_rows("attention_mask", masks, len(ids))
    if not masks:
        return list(ids)
    return [_kept(one, mask, facts) for one, mask in zip(ids, masks, strict=True)]


def check_rows(field: str, rows: Sequence[object], num_prompts: int) -> None:
    """Raise ``RequestError`` unless ``rows`` is empty or has one entry per prompt."""
    rule = f"has {len(rows)} entries for {num_prompts} prompts"
    require(len(rows) in (0, num_prompts), field, rule)


def apply_mask(ids: tuple[int, ...], mask: Mask) -> tuple[int, ...]:
    """Return the tokens that a mask keeps. Raises ``RequestError`` for an invalid mask."""
    field = "attention_mask"
    require(len(mask) == len(ids), field, f"has {len(mask)} numbers for {len(ids)} tokens")
    require(set(mask) <= {0, 1}, field, "must contain only 0 and 1")
    require(any(mask), field, "must not exclude all tokens")
    return tuple(token for token, keep in zip(ids, mask, strict=True) if keep)


def _kept(ids: tuple[int, ...], mask: Mask, facts: ModelFacts) -> tuple[int, ...]:
    kept = apply_mask(ids, mask)
    if facts.labels:
        place = classified_token(ids, mask, facts)
        return apply_mask(ids[: place + 1], mask[: place + 1])
    return kept


def classified_token(ids: tuple[int, ...], mask: Mask, facts: ModelFacts) -> int:
    """Return the position of the token that a classifier reads.

    Raises ``RequestError`` if ``mask`` excludes the token.
    """
    field, place = "attention_mask", pooled_position(ids, facts.pad_token_id)
    note = f"token {place}, which the classifier reads"
    require(bool(mask[place]), field, f"must not exclude {note}")
    return place


def check_classifier_batch(num_prompts: int, facts: ModelFacts) -> None:
    """Raise ``RequestError`` for several prompts if the classifier has no pad token."""
    rule = f"has {num_prompts} prompts, there must be one: the model has no pad token"
    require(num_prompts == 1 or facts.pad_token_id is not None, "input", rule)


def as_numpy(array: NamedArray) -> NDArray[Any]:
    """Convert an array from an engine to numpy, as int32 or float32."""
    kind = "<i4" if array.dtype == "int32" else "<f4"
    return np.frombuffer(array.data, dtype=kind).reshape(array.shape)


def _class_row(names: Sequence[str], logits: tuple[float, ...], is_multi: bool) -> ClassResult:
    if is_multi:
        probs = [1 / (1 + math.exp(-max(value, -700.0))) for value in logits]
    else:
        weights = [math.exp(value - max(logits)) for value in logits]
        probs = [weight / sum(weights) for weight in weights]
    best = max(range(len(logits)), key=lambda i: logits[i])
    return ClassResult(
        label=names[best], probs=tuple(probs), logits=logits, num_classes=len(logits)
    )
