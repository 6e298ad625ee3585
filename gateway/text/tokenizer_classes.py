"""Default special tokens by tokenizer class, for tokens that the checkpoint's files do not define.

``tokenizer_config.json`` or ``config.json`` names the class, as in transformers 5
(``AutoTokenizer.from_pretrained``), which has additional rules by model type.
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


def default_special_tokens(
    tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], *, is_byte_level: bool
) -> Mapping[str, str]:
    """Return the default special tokens of a checkpoint's tokenizer class, by name.

    The result is empty for the generic class and for unknown classes.
    """
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    name = str(named).removesuffix("Fast")
    if name == "LlamaTokenizer" and is_byte_level:
        return {}  # the class is for SentencePiece, so transformers uses the generic class
    return _DEFAULTS.get(name, {})
