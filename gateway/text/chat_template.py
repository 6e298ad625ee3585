"""Chat templates: a conversation rendered to a prompt, in a sandbox.

The template comes with the checkpoint (Jinja, as transformers defines it) and sees the messages,
the special tokens and the client's ``chat_template_kwargs``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.core.errors import CheckpointError, RequestError
from gateway.core.messages import with_reasoning
from gateway.core.thinking import END
from gateway.core.tool_use import ToolForm
from gateway.text.forms.call_ids import with_fitting_ids

_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
)
_PROBE = "expertmesh-probe"
_USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_MOST_SHOWN = 64


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (the name and type are Jinja's)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        variables: special tokens by name (``bos_token`` and so on).
        field: the request's field that brought it; None for the model's own.

    Raises:
        CheckpointError: the text is not a template.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str] | None = None,
        field: str | None = None,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as err:
            raise CheckpointError(f"the chat template is not valid: {err}") from err
        self._field = field
        self._source = source
        self._roles: dict[tuple[str, bool], bool] = {}
        self.variables = dict(variables or {})
        """Special tokens by name."""
        self.has_tools = "tools" in names
        self.tool_form = self._find_form()
        """How the model calls them; None where it has none, or the form is not known."""
        self.has_thinking = END in source
        """The model may write reasoning before its answers."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Raises:
            RequestError: the template refuses the conversation.
        """
        values = {**self.variables, **(variables or {}), "documents": None, "tools": tools}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            shown = with_fitting_ids(messages, self.tool_form)
            text = self._template.render(values, messages=[with_reasoning(m) for m in shown])
        except _RENDER_ERRORS as err:
            raise self._misfit(err) from err
        for place, message in enumerate(messages):
            if not self._knows_role(str(message.get("role")), tools):
                role = str(message.get("role"))[:_MOST_SHOWN]
                raise self._misfit(f"it has no role {role!r} (messages[{place}])")
        return _cut_at_end_of(text, messages[-1]) if continue_final_message else text

    def _find_form(self) -> ToolForm | None:
        """Harmony is the form of all answers, also where the template takes no tools."""
        shown = (form for form in ToolForm if form.is_shown_by(self._source))
        return next((f for f in shown if self.has_tools or f is ToolForm.HARMONY), None)

    def _knows_role(self, role: str, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the template has this role; a template may also refuse it itself.

        Roles beyond the usual ones must be named in the template. Since many templates leave out
        what they do not know, a message with the role must show in the prompt, if messages do.
        """
        if role not in _USUAL_ROLES and f"'{role}'" not in self._source.replace('"', "'"):
            return False
        key = (role, bool(tools))
        if key not in self._roles:
            self._roles[key] = self._shows(role, tools) or not self._shows("user", tools)
        return self._roles[key]

    def _shows(self, role: str, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        probe = {"role": role, "content": _PROBE, "name": "x", "tool_call_id": "x"}
        user, assistant = ({"role": who, "content": "x"} for who in ("user", "assistant"))
        found = []
        for messages in ([probe, user], [user, probe], [user, assistant, probe]):
            try:
                text = self._template.render(
                    self.variables, messages=messages, tools=tools, documents=None
                )
            except _RENDER_ERRORS:
                continue  # it has spoken for itself, and does so for the client's messages
            found.append(_PROBE in text)
        return any(found) or not found

    def _misfit(self, reason: Exception | str) -> RequestError:
        if self._field is not None:
            return RequestError(f"{self._field} does not fit the messages: {reason}", self._field)
        message = f"messages do not fit the model's chat template: {reason}"
        return RequestError(message, "messages")


def _cut_at_end_of(text: str, message: Mapping[str, Any]) -> str:
    """The prompt up to the last message's content, which the model is to go on with."""
    content = str(message.get("content") or "").strip()
    place = text.rfind(content)
    if not content or place < 0:
        raise RequestError(
            "continue_final_message needs a final message with content that the chat template "
            "keeps as it is",
            "continue_final_message",
        )
    return text[: place + len(content)]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
