"""Prompts and special tokens by all layouts of the files, compared with transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.core.errors import CheckpointError, RequestError
from gateway.text.tokenizer import load_tokenizer
from gateway.text.tokenizer_files import read_tokenizer_files
from tests.gateway.fakes import tiny_backend
from tests.harness.tiers import quick_rows

pytestmark = pytest.mark.heavy

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ENTRIES: tuple[Any, ...] = (
    None,
    "ENTRY {{ messages[0].content }} {{ bos_token }} {{ eos_token }}",
    [
        {"name": "default", "template": "LISTED {{ messages[0].content }}{{ eos_token }}"},
        {"name": "tool_use", "template": "LISTED TOOLS {{ messages[0].content }}"},
    ],
    [{"name": "default", "template": "ALONE {{ messages[0].content }}"}],
    [{"name": "tool_use", "template": "TOOLS ALONE {{ messages[0].content }}"}],
    {"default": "OBJECT {{ image_token }}", "tool_use": "OBJECT TOOLS {{ messages[0].content }}"},
)
FILES: tuple[dict[str, str], ...] = (
    {},
    {"chat_template.jinja": "FILE {{ messages[0].content }} {{ bos_token }}"},
    {
        "chat_template.jinja": "FILE {{ messages[0].content }}",
        "additional_chat_templates/tool_use.jinja": "FILE TOOLS {{ messages[0].content }}",
    },
    {"additional_chat_templates/tool_use.jinja": "ONLY TOOLS {{ messages[0].content }}"},
    {
        "chat_template.jinja": "FILE {{ messages[0].content }}",
        "additional_chat_templates/rag.jinja": "RAG {{ messages[0].content }}",
    },
    {"chat_template.jinja": "FILE", "additional_chat_templates/default.jinja": "NAMED"},
)
TOKENS: tuple[tuple[dict[str, Any], dict[str, Any] | None], ...] = (
    ({"bos_token": "<b>", "eos_token": "<e>"}, None),
    ({"bos_token": "<b>"}, {"eos_token": "<e>"}),
    ({}, {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": "<e>"}),
    ({"eos_token": "<old>"}, {"eos_token": "<e>", "pad_token": "<p>"}),
    ({"eos_token": "<e>", "added_tokens_decoder": {}}, {"bos_token": "<b>", "eos_token": "<x>"}),
    ({"bos_token": None, "eos_token": {"content": "<e>", "__type": "AddedToken"}}, None),
    ({"bos_token": "<b>", "extra_special_tokens": {"image_token": "<i>"}}, None),
    ({"image_token": "<old>", "extra_special_tokens": {"image_token": "<i>"}}, None),
    ({"bos_token": "<b>", "extra_special_tokens": ["<i>"]}, {"eos_token": "<e>"}),
    ({"model_specific_special_tokens": {"image_token": "<i>"}}, None),
    ({"bos_token": "<b>"}, {"image_token": "<i>"}),
    ({"image_token": "<i>"}, {"image_token": "<mapped>"}),
    ({"image_token": "<i>", "model_specific_special_tokens": {"pad_token": "<p>"}}, None),
    ({"extra_special_tokens": {"image_token": "<i>"}}, {"extra_special_tokens": ["<x>"]}),
    (
        {"extra_special_tokens": {"image_token": "<i>", "pad_token": "<p>"}},
        {"extra_special_tokens": {"image_token": "<mapped>"}},
    ),
)
USUAL = tuple(f"{name}_token" for name in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"])
CLASSES = (
    *("LlamaTokenizer", "LlamaTokenizerFast", "GPT2TokenizerFast", "GPTNeoXTokenizerFast"),
    *("Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "GemmaTokenizerFast"),
    *("CohereTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "Unknown", None),
)
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")


def pieces() -> tokenizers.Tokenizer:
    """A tokenizer as SentencePiece makes them."""
    found = tokenizers.Tokenizer(models.BPE(vocab={"\u2581": 0, "a": 1}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    return found


def write(
    folder: Path, entry: Any, files: dict[str, str], tokens: tuple[dict[str, Any], Any]
) -> Path:
    config, special = tokens
    folder.mkdir()
    tiny_backend().save(str(folder / "tokenizer.json"))
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    if entry is not None:
        config["chat_template"] = entry
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def ours(folder: Path, tools: Any) -> str | None:
    """The prompt; None where there is no template for it."""
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    if tokenizer.chat_template is None:
        return None
    try:
        return tokenizer.chat_template.render(MESSAGES, tools=tools)
    except RequestError:
        return None


def theirs(tokenizer: Any, tools: Any) -> str | None:
    try:
        found: str = tokenizer.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True
        )
    except ValueError:
        return None
    return found


@pytest.mark.parametrize("tokens", quick_rows(TOKENS[::3], TOKENS), ids=range(len(TOKENS)))
def test_prompts_and_tokens_are_those_of_transformers(
    tmp_path: Path, tokens: tuple[dict[str, Any], dict[str, Any] | None]
) -> None:
    from transformers import AutoTokenizer

    layouts = itertools.product(ENTRIES, FILES)
    for number, (entry, files) in enumerate(layouts):
        folder = write(tmp_path / str(number), entry, files, tokens)
        expected = AutoTokenizer.from_pretrained(str(folder))
        found = read_tokenizer_files(folder)
        known = {n: t for n in NAMES if (t := getattr(expected, n, None)) is not None}
        assert {n: t for n, t in found.tokens.items() if n in NAMES} == known
        for tools in (None, TOOLS):
            assert ours(folder, tools) == theirs(expected, tools), (entry, files, tools)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_tokens_of_no_file_are_those_of_the_class(tmp_path: Path, file: str) -> None:
    from transformers import AutoTokenizer

    backends = {"bytes": tiny_backend().to_str(), "pieces": pieces().to_str()}
    configs: tuple[dict[str, Any], ...] = ({}, {"bos_token": None}, {"eos_token": "<e>"})
    for number, (backend, name, config) in enumerate(
        itertools.product(backends.values(), CLASSES, configs)
    ):
        if (file, name) == ("config.json", "Unknown"):
            continue  # transformers fails
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(backend)
        named = {} if name is None else {"tokenizer_class": name}
        files = {"config.json": {}, "tokenizer_config.json": config}
        files[file] = {**files[file], **named}
        for path, content in files.items():
            (folder / path).write_text(json.dumps(content))
        expected = AutoTokenizer.from_pretrained(str(folder))
        known = {n: t for n in USUAL if (t := getattr(expected, n)) is not None}
        assert read_tokenizer_files(folder).tokens == known, (name, config)


def test_a_template_of_an_old_processor_comes_last(tmp_path: Path) -> None:
    files = {"chat_template.json": json.dumps({"chat_template": "OLD"})}
    assert ours(write(tmp_path / "a", None, files, ({}, None)), None) == "OLD"
    assert ours(write(tmp_path / "b", "ENTRY", files, ({}, None)), None) == "ENTRY"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", None, {}, ({}, None))
    (folder / "special_tokens_map.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json must hold"):
        load_tokenizer(str(folder))
    (folder / "special_tokens_map.json").unlink()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer(str(folder))
