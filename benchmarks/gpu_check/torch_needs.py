"""What our code calls of torch that may change between releases, and whether this torch has it.

Arguments are compared with those that torch declares: in the signature of a Python function, in the
docstring of a compiled one, in the schema of an operator.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import torch
import torch.distributed

_OPEN, _CLOSE = "([{<", ")]}>"


@dataclass(frozen=True, slots=True)
class Need:
    """A function by its name below ``torch``, and how it is called."""

    name: str
    positional: int = 0
    """Arguments without a name, but for ``self``."""
    keywords: tuple[str, ...] = ()


_C10D = "_C._distributed_c10d"
_STORE = ("is_master", "timeout", "wait_for_workers", "master_listen_fd")
NEEDS = (
    # Process groups: ``workers/model/torch_private.py`` and ``workers/transport``
    Need(f"{_C10D}.PrefixStore.__init__", 2),
    Need(f"{_C10D}.TCPStore.__init__", 2, _STORE),
    Need(f"{_C10D}.Backend.send", 3),
    Need(f"{_C10D}.Backend.recv", 3),
    Need(f"{_C10D}.Backend.abort"),
    Need(f"{_C10D}.Backend._start_coalescing"),
    Need(f"{_C10D}.Backend._end_coalescing"),
    Need(f"{_C10D}.Backend.eager_connect_single_device", 1),
    Need(f"{_C10D}.Work.get_future_result"),
    Need(f"{_C10D}.Work.is_completed"),
    Need(f"{_C10D}.Work.wait"),
    Need("distributed.ProcessGroupGloo.__init__", 4),
    Need("distributed.ProcessGroupGloo.create_device", 0, ("hostname",)),
    Need("distributed.ProcessGroupGloo._Options.__init__"),
    # Graphs, and the kernels of torch that a step has
    Need("cuda.graph_pool_handle"),
    Need("cuda.CUDAGraph.capture_begin", 0, ("pool", "capture_error_mode")),
    Need("cuda.CUDAGraph.capture_end"),
    Need("cuda.CUDAGraph.replay"),
    Need("cuda.CUDAGraph.reset"),
    Need("cuda.Event", 0, ("enable_timing", "external")),
    Need("cuda.Event.query"),
    Need("cuda.Event.record"),
    Need("cuda.Event.elapsed_time", 1),
    Need("nn.functional.scaled_dot_product_attention", 3, ("is_causal", "enable_gqa")),
)
CUDA_NEEDS = (
    Need("distributed.ProcessGroupNCCL.__init__", 4),
    Need("distributed.ProcessGroupNCCL.abort"),
    Need("distributed.ProcessGroupNCCL.Options.__init__"),
)
"""Builds for CPUs do not have these."""
ONEDNN_NEEDS = (
    Need("ops.mkldnn._linear_pointwise.default", 6),
    Need("ops.mkldnn._reorder_linear_weight.default", 1),
    Need("ops.mkldnn._is_mkldnn_bf16_supported.default"),
)
"""Builds with oneDNN have all of these or do without."""


def has_cuda_build() -> bool:
    """Whether torch was built for CUDA, with or without a device."""
    return torch.version.cuda is not None


def problems() -> Iterator[str]:
    """What is missing or takes other arguments; each is named with torch's version."""
    needs = NEEDS + CUDA_NEEDS * has_cuda_build()
    if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        needs += ONEDNN_NEEDS
    found = [problem_of(need) for need in needs]
    found += missing_options("distributed.ProcessGroupGloo._Options", ("_devices", "_timeout"))
    if has_cuda_build():
        names = ("_timeout", "config.blocking")
        found += missing_options("distributed.ProcessGroupNCCL.Options", names)
    found.append(_success_problem())
    yield from (f"torch {torch.__version__}: {words}" for words in found if words)


def problem_of(need: Need) -> str:
    """Why a function cannot be called as we do; empty if it can."""
    try:
        function = resolved(torch, need.name)
    except AttributeError:
        return f"torch.{need.name} is missing"
    declared = signatures(function)
    if not declared:
        return f"torch.{need.name} does not say what arguments it takes"
    if any(_takes(signature, need) for signature in declared):
        return ""
    words = ", ".join([f"{need.positional} without names", *need.keywords])
    return f"torch.{need.name} is called with {words}, but takes {declared[0]}"


def missing_options(name: str, wanted: Iterable[str]) -> list[str]:
    """Attributes that the options of a kind of process group lack."""
    try:
        options = resolved(torch, name)()
    except AttributeError:
        return []  # ``problem_of`` names it
    return [f"torch.{name} has no {path}" for path in wanted if not _has(options, path)]


def _has(owner: Any, name: str) -> bool:
    try:
        resolved(owner, name)
    except AttributeError:
        return False
    return True


def _success_problem() -> str:
    """What ``torch_private.has_failed`` compares with."""
    name = f"{_C10D}.WorkResult.SUCCESS"
    if not _has(torch, name):
        return f"torch.{name} is missing"
    value = int(resolved(torch, name))
    return "" if value == 0 else f"torch.{name} is {value}, not 0"


def resolved(owner: Any, name: str) -> Any:
    """An attribute by its dotted name. Raises ``AttributeError``."""
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def signatures(function: Any) -> list[Signature]:
    """What a function takes; several for a compiled one with overloads, none if it is not said."""
    if (schema := getattr(function, "_schema", None)) is not None:
        words = (("=" if a.has_default_value() else "") for a in schema.arguments)
        return [_signature(f"argument{i}{word}" for i, word in enumerate(words))]
    try:
        return [inspect.signature(function)]
    except (TypeError, ValueError):
        return list(documented(inspect.getdoc(function) or "", function.__name__))


def documented(text: str, name: str) -> Iterator[Signature]:
    """``send(self: Backend, peer: int, tag: int = 0) -> Work``: the signatures in a docstring, each
    at the start of a line or after its number."""
    for match in re.finditer(rf"^(?:\d+\. )?{re.escape(name)}\(", text, re.M):
        arguments = list(_arguments(text[match.end() :]))
        if arguments != ["*args", "**kwargs"]:  # which stands above all overloads
            yield _signature(arguments)


def _arguments(text: str) -> Iterator[str]:
    """Up to the bracket that closes them."""
    depth, begin = 0, 0
    for place, letter in enumerate(text):
        ends = letter in _CLOSE and depth == 0
        if ends or (letter == "," and depth == 0):
            if argument := text[begin:place].strip():
                yield argument
            begin = place + 1
        if ends:
            return
        depth += (letter in _OPEN) - (letter in _CLOSE)


def _signature(arguments: Iterable[str]) -> Signature:
    """``["self: Backend", "tag: int = 0"]``: names, and whether they may be left out."""
    kind: Any = Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for argument in arguments:
        if argument == "*":
            kind = Parameter.KEYWORD_ONLY
        elif argument != "/":
            has_default = "=" in argument
            name = re.split(r"[:=]", argument)[0].strip()
            default = ... if has_default else Parameter.empty
            parameters.append(Parameter(name, kind, default=default))
    return Signature(parameters)


def _takes(signature: Signature, need: Need) -> bool:
    has_self = next(iter(signature.parameters), "") == "self"
    given = [None] * (need.positional + has_self)
    try:
        signature.bind(*given, **dict.fromkeys(need.keywords))
    except TypeError:
        return False
    return True
