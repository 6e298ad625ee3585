"""Reads chat templates and special tokens from the files of a checkpoint.

The precedence of the files is as in transformers 5 (``PreTrainedTokenizerBase._from_pretrained``):

- Template files (``chat_template.jinja``, ``additional_chat_templates/NAME.jinja``) override the
  entry ``chat_template`` of ``tokenizer_config.json``, which is a text or several named templates.
  The entry in ``chat_template.json``, which older processors wrote, has the lowest precedence.
- ``special_tokens_map.json`` overrides ``tokenizer_config.json``, unless the latter has
  ``added_tokens_decoder``.
- A special token that is missing in all files is the default of the tokenizer class.
- Models may define additional special tokens, for example ``image_token``, as top-level entries or
  in an object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.core.errors import CheckpointError
from gateway.text.tokenizer_classes import default_special_tokens

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of a checkpoint's chat templates: for all conversations, and for those with tools."""
_ENTRY = "chat_template"
_FIELDS = ("name", "template")
_TOKEN = "_token"
"""Suffix of the names of special tokens in templates, for example ``bos_token``."""
_USUAL = frozenset(f"{name}{_TOKEN}" for name in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"])
_MODEL_SPECIFIC, _EXTRA = "model_specific_special_tokens", "extra_special_tokens"
"""Entries of the checkpoint's files with additional special tokens by name. The second entry and
top-level entries override the first entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """Chat templates and special tokens of a checkpoint."""

    templates: Mapping[str, str]
    """Jinja texts of the chat templates by template name."""
    tokens: Mapping[str, str]
    """Texts of the special tokens by their name in templates, for example ``bos_token``."""


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the chat templates and special tokens from the checkpoint files that exist.

    Raises ``CheckpointError`` if a file cannot be read.
    """
    config = _read_json(folder / "tokenizer_config.json")
    is_byte_level = '"ByteLevel"' in _read(folder / "tokenizer.json")
    model = _read_json(folder / "config.json")
    tokens = {**default_special_tokens(config, model, is_byte_level=is_byte_level), **config}
    model_specific = {
        name: token for name, token in config.items() if _is_model_specific(name, token)
    }
    model_specific |= _object(config.get(_EXTRA))
    model_specific = model_specific or _object(config.get(_MODEL_SPECIFIC))
    if "added_tokens_decoder" not in config:
        further = _read_json(folder / "special_tokens_map.json")
        tokens |= further
        model_specific = {
            **_object(further.get(_MODEL_SPECIFIC, model_specific)),
            **_object(further.get(_EXTRA)),
        }
    named = {
        name: token for name, token in tokens.items() if name.endswith(_TOKEN)
    } | model_specific
    texts = {name: _content(token) for name, token in named.items()}
    templates = _template_files(folder) or _templates_of(config.get(_ENTRY))
    return TokenizerFiles(
        templates=templates or _templates_of(_read_json(folder / "chat_template.json").get(_ENTRY)),
        tokens={name: text for name, text in texts.items() if text},
    )


def _is_model_specific(name: str, token: Any) -> bool:
    """Whether an entry of ``tokenizer_config.json`` is an additional special token."""
    return name.endswith(_TOKEN) and name not in _USUAL and isinstance(token, str)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _template_files(folder: Path) -> dict[str, str]:
    default = folder / "chat_template.jinja"
    files = {DEFAULT: default} if default.is_file() else {}
    files |= {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    return {name: _read(path) for name, path in sorted(files.items())}


def _templates_of(entry: Any) -> dict[str, str]:
    """Return templates by name from the entry ``chat_template``: one text, or several templates."""
    if isinstance(entry, str):
        return {DEFAULT: entry}
    if isinstance(entry, dict):
        return {name: text for name, text in entry.items() if isinstance(text, str)}
    templates = {}
    for named in entry if isinstance(entry, list) else ():
        name, text = (named.get(k) if isinstance(named, dict) else None for k in _FIELDS)
        if isinstance(name, str) and isinstance(text, str):
            templates[name] = text
    return templates


def _content(token: Any) -> str | None:
    """Return the text of a special token, which may be given as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as err:
        raise CheckpointError(f"{path.name} is not JSON: {err}") from err
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return content


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise CheckpointError(f"{path.name} cannot be read: {err}") from err
