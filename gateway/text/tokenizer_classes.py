"""Special tokens that no file of a checkpoint says: the defaults of the tokenizer's class.

Which class a checkpoint has follows transformers 5 (``AutoTokenizer.from_pretrained``): the one
that ``tokenizer_config.json`` or ``config.json`` names, or the one of the model's type. Many types
have the plain class, without defaults, whatever the files name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_END_OF_TEXT = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN = dict.fromkeys(("eos_token", "pad_token", "unk_token"), _END_OF_TEXT)
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "pad_token": "<PAD>",
        "unk_token": "<UNK>",
        "cls_token": "<CLS>",
        "sep_token": "<SEP>",
        "mask_token": "<MASK_TOKEN>",
    },
}
_OF_MODELS: Mapping[str, str | None] = {
    "olmoe": "GPTNeoXTokenizer",
    **dict.fromkeys(("qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(
        ("ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "minimax_m2", "mixtral")
    ),
}
"""Class by ``model_type`` where the files name none; None: the plain one, whatever they name."""
_QWEN3_5 = ("qwen3_5_moe", "qwen3_5_moe_text")
"""These types have their class whatever the files name."""


def class_tokens(
    tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], *, is_byte_level: bool
) -> Mapping[str, str]:
    """Special tokens by name; empty for the plain class and for one that is not known."""
    model = str(config.get("model_type"))
    registered = _OF_MODELS.get(model)
    if model in _QWEN3_5:
        return _QWEN
    if model in _OF_MODELS and registered is None:
        return {}
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or registered
    name = str(named).removesuffix("Fast")
    if name == "LlamaTokenizer" and is_byte_level:
        return {}  # the class is for SentencePiece, so transformers takes the plain one
    return _DEFAULTS.get(name, {})
