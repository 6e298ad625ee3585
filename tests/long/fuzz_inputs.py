"""Inputs for fuzzing: what is right, and how it is spoilt. Deterministic for a seed.

Two kinds of change: bytes without regard to their meaning (flips, cuts, copies, lengths at their
limits), and JSON as a tree (a value becomes another kind, a key is lost, a list grows). Libraries
for this either guide by coverage within one process, or have not been maintained for years; a
server beyond a socket needs little more than this.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from google.protobuf import json_format

from protos import inference_pb2 as pb

MAX_TOKENS = 2
"""New tokens that a request may ask for: few, as the parsers are under test, not the sampler."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.5, -1e308, 1e308),
    *("", "a", "\u0000", "\ud7ff", "é" * 50, "x" * 5000, "-1", "NaN", "../../etc/passwd", "%s%n"),
    *([], {}, [[]], [None], [1, "a"], {"a": {"b": [1]}}, [0] * 300, "\U0001f600", "{{ 7*7 }}"),
)
"""What a value may become."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Integers at the edges of their kinds."""
_CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
_SAMPLING = {
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "n": 2,
    "stop": ["a", "b"],
    "stop_token_ids": [3],
    "logit_bias": {"5": 1.5},
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "ignore_eos": True,
    "priority": 1,
    "cache_salt": "s",
}
BODIES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "/v1/completions": (
        {"prompt": "hello", "logprobs": 2, "echo": True, **_SAMPLING},
        {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": "a", "max_tokens": 2, "response_format": {"type": "json_object"}},
        {"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": "[ab]{1,2}"}},
        {"prompt": "a", "max_tokens": 2, "allowed_token_ids": [1, 2], "bad_words": ["x"]},
    ),
    "/v1/chat/completions": (
        {"messages": _CHAT, "logprobs": True, "top_logprobs": 2, **_SAMPLING},
        {"messages": _CHAT, "max_tokens": 2, "stream": True, "chat_template_kwargs": {"a": 1}},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "max_tokens": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}},
            },
        },
    ),
    "/tokenize": ({"prompt": "hello", "return_token_strs": True}, {"messages": _CHAT}),
    "/detokenize": ({"tokens": [1, 2, 3]},),
    "/v1/embeddings": ({"input": ["a", "b"], "encoding_format": "base64"},),
    "/classify": ({"input": "a", "labels": ["x", "y"]},),
    "/score": ({"text_1": "a", "text_2": ["b", "c"]},),
    "/v1/inspect": ({"token_ids": [1, 2], "outputs": ["logits"], "logits_to_keep": 1},),
}
"""Good HTTP bodies by path."""
MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "Generate": (
        json_format.ParseDict(
            {"text": "hello", "sampling_params": {"max_tokens": 2, "temperature": 0.5}},
            pb.GenerateRequest(),
        ),
        json_format.ParseDict(
            {"token_ids": {"ids": [1, 2, 3]}, "sampling_params": {"max_tokens": 2, "n": 2}},
            pb.GenerateRequest(),
        ),
    ),
    "Tokenize": (pb.TokenizeRequest(prompt="hello", return_token_strs=True),),
    "Detokenize": (pb.DetokenizeRequest(tokens=[1, 2, 3]),),
    "GetModelInfo": (pb.GetModelInfoRequest(model="m"),),
    "ListModels": (pb.ListModelsRequest(),),
    "Embed": (json_format.ParseDict({"input": [{"text": "a"}]}, pb.EmbedRequest()),),
    "Classify": (
        json_format.ParseDict({"input": [{"text": "a"}], "labels": ["x"]}, pb.ClassifyRequest()),
    ),
    "Score": (
        json_format.ParseDict(
            {"queries": [{"text": "a"}], "documents": [{"text": "b"}]}, pb.ScoreRequest()
        ),
    ),
    "Inspect": (
        json_format.ParseDict(
            {"token_ids": [{"ids": [1, 2]}], "outputs": ["logits"]}, pb.InspectRequest()
        ),
    ),
}
"""Good gRPC messages by procedure of ``Inference``."""


class Mutator:
    """Spoils inputs.

    Args:
        seed: the same one gives the same inputs.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def spoil(self, data: bytes) -> bytes:
        """One to four changes of bytes."""
        for _ in range(self.random.randint(1, 4)):
            data = self.random.choice(_CHANGES)(self.random, data)
        return data

    def body(self, path: str) -> bytes:
        """A body that was good: spoilt as a tree, as bytes, or both."""
        tree = json.loads(json.dumps(self.random.choice(BODIES[path])))
        way = self.random.randrange(4)
        if way:
            for _ in range(self.random.randint(1, 3)):
                tree = self._spoil_tree(tree)
        raw = json.dumps(tree, ensure_ascii=self.random.random() < 0.5).encode(
            errors="surrogatepass"
        )
        return _bounded(self.spoil(raw) if way in (0, 1) else raw)

    def message(self, method: str) -> bytes:
        """The bytes of a message that was good."""
        good = self.random.choice(MESSAGES[method])
        raw = self.spoil(good.SerializeToString() or b"\x0a\x01a")
        if method != "Generate":
            return raw
        request = pb.GenerateRequest()
        try:
            request.ParseFromString(raw)
        except Exception:  # not a message any more: as it is
            return raw
        if not 0 <= request.sampling_params.max_tokens <= 8 or not request.HasField(
            "sampling_params"
        ):
            request.sampling_params.max_tokens = MAX_TOKENS
        return request.SerializeToString()

    def _spoil_tree(self, tree: Any) -> Any:
        """The tree with one place changed."""
        places = list(islice(_places(tree), 500))
        if not places:
            return copy.deepcopy(self.random.choice(VALUES))
        parent, key = self.random.choice(places)
        match self.random.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[str(key) + self.random.choice("_ X")] = parent.pop(key)
            case 2:
                value = parent[key]
                for _ in range(self.random.choice((1, 3, 70))):
                    value = [value]
                parent[key] = value
            case 3 if isinstance(parent[key], list) and len(parent[key]) < 20:
                parent[key] = parent[key] * self.random.choice((2, 20))
            case _:
                parent[key] = copy.deepcopy(self.random.choice(VALUES))
        return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree: what holds it, and its key there."""
    if not isinstance(tree, dict | list):
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _bounded(raw: bytes) -> bytes:
    """What can still be read as a request asks for few tokens."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    if not isinstance(tree, dict) or not tree.keys() & {"prompt", "messages", "max_tokens"}:
        return raw
    asked = [tree.get(name) for name in ("max_tokens", "max_completion_tokens")]
    if all(value is None for value in asked) or any(
        isinstance(value, int) and not isinstance(value, bool) and 8 < value < 2**31
        for value in asked
    ):
        tree.pop("max_completion_tokens", None)
        tree["max_tokens"] = MAX_TOKENS
        return json.dumps(tree).encode()
    return raw


def _place(source: random.Random, data: bytes) -> int:
    return source.randrange(len(data) + 1)


def _flip(source: random.Random, data: bytes) -> bytes:
    place = _place(source, data)
    return data[:place] + bytes([source.randrange(256)]) + data[place + 1 :]


def _cut(source: random.Random, data: bytes) -> bytes:
    return data[: _place(source, data)]


def _lose(source: random.Random, data: bytes) -> bytes:
    place = _place(source, data)
    return data[:place] + data[place + source.randint(1, 16) :]


def _repeat(source: random.Random, data: bytes) -> bytes:
    place = _place(source, data)
    return data[:place] + data[place : place + 40] * source.choice((2, 5, 100)) + data[place:]


def _insert(source: random.Random, data: bytes) -> bytes:
    place = _place(source, data)
    return data[:place] + source.randbytes(source.randint(1, 64)) + data[place:]


def _number(source: random.Random, data: bytes) -> bytes:
    place = _place(source, data)
    form = source.choice((">I", "<I", ">H", "B", ">Q"))
    size = struct.calcsize(form)
    value = source.choice(NUMBERS) & ((1 << 8 * size) - 1)
    return data[:place] + struct.pack(form, value) + data[place + size :]


def _nothing(source: random.Random, data: bytes) -> bytes:
    return b""


_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_flip, _flip, _flip, _cut, _lose, _repeat, _insert, _number, _number),
    _nothing,
)
