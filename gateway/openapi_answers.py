"""Schemas of what the HTTP routes answer. Objects are closed: a test fails on a field not here."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_BOOLEAN: Schema = {"type": "boolean"}
_FREE: Schema = {"type": "object"}
_LOGPROB: Schema = {"type": "number", "minimum": -9999.0, "maximum": 0.0}


def ref(name: str) -> Schema:
    """A schema of the document's components."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


_IDS = _list(_COUNT)
_PROMPT_LOGPROBS = _or_null(
    _list(_or_null(_map(_object({"logprob": _LOGPROB, "rank": _COUNT, "decoded_token": STRING}))))
)
_FINISH: Schema = {
    "finish_reason": _one_of("stop", "length", "tool_calls"),
    "stop_reason": _or_null({"anyOf": [STRING, _COUNT]}),
}
_FINISH_OR_NOT: Schema = {**_FINISH, "finish_reason": _or_null(_FINISH["finish_reason"])}
_HEAD: Schema = {
    "id": STRING,
    "created": INTEGER,
    "model": STRING,
    "system_fingerprint": STRING,
}
_CACHED: Schema = {"prompt_tokens_details": _object({"cached_tokens": _COUNT})}
_TOP = _object({"token": STRING, "logprob": _LOGPROB, "bytes": _list(_COUNT)})


def _answer_list(rows: Schema) -> Schema:
    head = {"id": STRING, "created": INTEGER, "model": STRING}
    return _object(
        {**head, "object": _one_of("list"), "data": _list(rows), "usage": ref("ReadingUsage")}
    )


def _model() -> Schema:
    return _object(
        {
            "id": STRING,
            "object": _one_of("model"),
            "created": INTEGER,
            "owned_by": _one_of("expertmesh"),
            "root": STRING,
            "parent": {"type": "null"},
            "max_model_len": _or_null(_COUNT),
            "embedding_pooling": _list(_one_of("last", "mean")),
        }
    )


def _completion_choice(finish: Schema) -> Schema:
    logprobs = _object(
        {
            "text_offset": _list(_COUNT),
            "token_logprobs": _list(_or_null(_LOGPROB)),
            "tokens": _list(STRING),
            "top_logprobs": _list(_or_null(_map(_LOGPROB))),
        }
    )
    return _object(
        {"index": _COUNT, "text": STRING, "logprobs": _or_null(logprobs), **finish},
        {
            "token_ids": _IDS,
            "prompt_token_ids": _or_null(_IDS),
            "prompt_logprobs": _PROMPT_LOGPROBS,
        },
    )


def _chat_choice(told: Schema, finish: Schema, optional: Schema) -> Schema:
    entry = _object(
        {
            "token": STRING,
            "logprob": _LOGPROB,
            "bytes": _list(_COUNT),
            "top_logprobs": _list(_TOP),
        }
    )
    logprobs = _or_null(_object({"content": _list(entry)}))
    return _object(
        {"index": _COUNT, **told, "logprobs": logprobs, **finish}, {"token_ids": _IDS, **optional}
    )


def _message() -> Schema:
    function = _object({"name": STRING, "arguments": STRING})
    call = _object({"id": STRING, "type": _one_of("function"), "function": function})
    return _object(
        {"role": _one_of("assistant"), "content": _or_null(STRING), "refusal": {"type": "null"}},
        {"tool_calls": _list(call)},
    )


def _delta() -> Schema:
    function = _object({"arguments": STRING}, {"name": STRING})
    call = _object(
        {"index": _COUNT, "function": function}, {"id": STRING, "type": _one_of("function")}
    )
    role = _one_of("assistant")
    return _object({}, {"role": role, "content": STRING, "tool_calls": _list(call)})


def _answer(name: str, choice: Schema, optional: Schema | None = None) -> Schema:
    told = {**_HEAD, "object": _one_of(name), "choices": _list(choice), "usage": ref("Usage")}
    return _object(told, optional)


def _chunk(name: str, choice: Schema, optional: Schema | None = None) -> Schema:
    """One event of a stream; the last one may tell of an error instead."""
    told = {**_HEAD, "object": _one_of(name), "choices": _list(choice)}
    whole = _object(told, {"usage": ref("Usage"), **(optional or {})})
    return {"anyOf": [whole, ref("Error")]}


def _inspection() -> Schema:
    bank = {"bank": STRING, "layer": _COUNT}
    numbers: Schema = {"type": "array"}  # nested as docs/outputs.md says
    row = _object(
        {"index": _COUNT, "num_tokens": _COUNT},
        {
            "logits": numbers,
            "logprobs": _list(_or_null(_LOGPROB)),
            "hidden_states": numbers,
            "attentions": numbers,
            "router_logits": _list(_object({**bank, "logits": numbers})),
            "routes": _list({"type": "object", "required": ["bank", "layer"]}),
        },
    )
    return _object(
        {
            "id": STRING,
            "object": _one_of("inspection"),
            "model": STRING,
            "data": _list(row),
            "loss": _or_null(NUMBER),
            "usage": ref("ReadingUsage"),
        },
        {"aux_loss": _map(NUMBER)},
    )


def _error() -> Schema:
    return _object(
        {
            "error": _object(
                {
                    "message": STRING,
                    "type": STRING,
                    "param": _or_null(STRING),
                    "code": _or_null(STRING),
                }
            )
        }
    )


def answer_schemas() -> dict[str, Schema]:
    """Every answer by its name in the document's components."""
    tokens = {"prompt_tokens": _COUNT, "total_tokens": _COUNT}
    of_prompt = {"prompt_token_ids": _IDS, "prompt_logprobs": _PROMPT_LOGPROBS}
    classification = _object(
        {
            "index": _COUNT,
            "label": STRING,
            "probs": _list(NUMBER),
            "logits": _list(NUMBER),
            "num_classes": _COUNT,
        }
    )
    vector = {"anyOf": [_list(NUMBER), STRING]}
    embedding = _object({"object": _one_of("embedding"), "index": _COUNT, "embedding": vector})
    score = _object({"object": _one_of("score"), "index": _COUNT, "score": NUMBER})
    return {
        "Error": _error(),
        "Usage": _object({**tokens, "completion_tokens": _COUNT}, _CACHED),
        "ReadingUsage": _object(tokens, _CACHED),
        "Model": _model(),
        "ModelList": _object({"object": _one_of("list"), "data": _list(ref("Model"))}),
        "Completion": _answer("text_completion", _completion_choice(_FINISH)),
        "CompletionChunk": _chunk("text_completion", _completion_choice(_FINISH_OR_NOT)),
        "ChatCompletion": _answer(
            "chat.completion",
            _chat_choice({"message": _message()}, _FINISH, {"prompt_token_ids": _IDS}),
            of_prompt,
        ),
        "ChatCompletionChunk": _chunk(
            "chat.completion.chunk",
            _chat_choice({"delta": _delta()}, _FINISH_OR_NOT, {}),
            of_prompt,
        ),
        "Tokens": _object(
            {
                "count": _COUNT,
                "max_model_len": _or_null(_COUNT),
                "tokens": _IDS,
                "token_strs": _or_null(_list(STRING)),
            }
        ),
        "Text": _object({"prompt": STRING}),
        "Embeddings": _answer_list(embedding),
        "Classifications": _answer_list(classification),
        "Scores": _answer_list(score),
        "Inspection": _inspection(),
        "Readiness": _object({"ready": _BOOLEAN, "reasons": _list(STRING)}),
        "Version": _object(
            {
                "version": STRING,
                "ray": _or_null(STRING),
                "torch": _or_null(STRING),
                "model": STRING,
                "placement_epoch": _COUNT,
            }
        ),
        "ClusterView": {
            "type": "object",
            "properties": {"schema": {"type": "integer", "const": 1}},
            "required": ["schema"],
        },
    }
