"""A Jinja sandbox that limits the run time and the output size of templates.

Jinja's sandbox only protects Python objects from a template. This sandbox also checks the time in
each loop iteration, and limits the sizes of texts from operators, filters and the template.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

TIME_LIMIT_S = 10.0
"""Maximum time in seconds to render one prompt."""
MAX_CHARS = 16 * 1024 * 1024
"""Maximum length of a prompt, and of each text or list that a template makes."""
_CHECK_EVERY = 256
_TICK, _JOIN = "bounded_tick", "bounded_join"
_MAX_POWER_BITS = 4096
BoundedTemplate = jinja2.Template  # noqa: TID251  # made by the environment below
_GROWING_FILTERS = ("center", "indent", "join", "replace", "format", "wordwrap")
"""Jinja filters that can return a much longer text than their input."""


@dataclass(slots=True)
class _Budget:
    deadline_s: float
    num_passes: int = 0


_BUDGET: contextvars.ContextVar[_Budget | None] = contextvars.ContextVar("budget", default=None)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja sandbox that limits a template's time and sizes; raises ``TemplateRuntimeError``."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals |= {_TICK: _check_time, _JOIN: _join}
        for name in _GROWING_FILTERS:
            self.filters[name] = _limited_filter(self.filters[name])

    def compile_bounded(self, source: str) -> BoundedTemplate:
        """Compile a template with limit checks in its loops and concatenations.

        Raises ``TemplateError`` if the template is invalid.
        """
        return self.from_string(_CheckInserter().visit(self.parse(source)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int):
            num_bits = abs(right) * max(1, int(left).bit_length())
            _check(num_bits, "the bits of a power", _MAX_POWER_BITS)
        elif operator == "*":
            counts = [x for x in (left, right) if isinstance(x, int)]
            sizes = [len(x) for x in (left, right) if hasattr(x, "__len__")]
            _check(counts[0] * sizes[0] if counts and sizes else 0, "the length of a repetition")
        return _check_size(super().call_binop(context, operator, left, right))


def render(template: BoundedTemplate, values: Mapping[str, Any]) -> str:
    """Render a template of ``BoundedEnvironment`` within the time and size limits.

    Raises the exceptions of the template, and ``TemplateRuntimeError`` beyond a limit.
    """
    token = _BUDGET.set(_Budget(time.monotonic() + TIME_LIMIT_S))
    try:
        return "".join(_pieces(template, values))
    finally:
        _BUDGET.reset(token)


def _pieces(template: BoundedTemplate, values: Mapping[str, Any]) -> Iterator[str]:
    num_chars = 0
    for piece in template.generate(values):
        num_chars += len(piece)
        _check(num_chars, "the length of the prompt")
        yield piece


class _CheckInserter(NodeTransformer):
    """Adds calls that check the time and size limits to the syntax tree of a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call(_TICK, []), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call(_JOIN, node.nodes)


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


def _check_time() -> str:
    budget = _BUDGET.get()
    if budget is not None:
        budget.num_passes += 1
        if not budget.num_passes % _CHECK_EVERY and time.monotonic() > budget.deadline_s:
            raise jinja2.TemplateRuntimeError(f"it takes more than {TIME_LIMIT_S:g} s")
    return ""


def _join(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    _check(sum(map(len, texts)), "the length of a text")
    return "".join(texts)


def _limited_filter(apply: Any) -> Any:
    def applied(*args: Any, **options: Any) -> Any:
        numbers = [n for n in (*args, *options.values()) if isinstance(n, int)]
        _check(max(numbers, default=0), "an integer argument of a filter")
        return _check_size(apply(*args, **options))

    for name, value in vars(apply).items():  # attributes that tell Jinja which arguments to pass
        setattr(applied, name, value)
    return applied


def _check_size(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        _check(len(value), "the length of a text or list")
    return value


def _check(number: int, name: str, maximum: int = MAX_CHARS) -> None:
    if number > maximum:
        raise jinja2.TemplateRuntimeError(f"{name} must be at most {maximum}")
