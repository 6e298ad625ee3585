"""Measure a demo model, and write the parts of its checkpoint that are not weights."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.demo_model.corpus import CHAT_TEMPLATE, EOS, PAD

MODEL_NAME = "expertmesh-demo"
MAX_LENGTH_TOKENS = 4096
LogitsFn = Callable[[Tensor], Tensor]
"""A model in evaluation mode: token ids [1, n] to logits [1, n, vocab_size]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """How often the routers chose each expert."""

    num_tokens: int
    top_k: int
    counts: Tensor
    """[num_layers, num_experts] int64; each row sums to num_tokens * top_k."""

    def balancedness(self, num_devices: int) -> Tensor:
        """[num_layers] mean / max load of devices that hold equal, contiguous runs of experts."""
        num_layers = self.counts.shape[0]
        per_device = self.counts.view(num_layers, num_devices, -1).sum(2).double()
        return torch.div(per_device.mean(1), per_device.amax(1))

    def to_profile(self) -> dict[str, object]:
        """The load profile file format, schema 1."""
        return {
            "schema": 1,
            "model": MODEL_NAME,
            "top_k": self.top_k,
            "tokens": self.num_tokens,
            "banks": [
                {"bank": "mlp", "layer": layer, "counts": counts}
                for layer, counts in enumerate(self.counts.tolist())
            ],
        }


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH_TOKENS,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_load_profile(load: ExpertLoad, out: Path) -> None:
    """Write `load_profile.json`."""
    (out / "load_profile.json").write_text(json.dumps(load.to_profile()) + "\n")


@torch.no_grad()
def heldout_bits_per_byte(
    logits_of: LogitsFn, tokenizer: Tokenizer, text: str, *, window: int, stride: int
) -> float:
    """Bits the model needs per UTF-8 byte of `text`, each token scored once.

    Windows of `window` tokens advance by `stride`; a window scores the targets that no earlier
    window scored. EOS stands before the text, as between the documents of the training text.
    """
    ids = torch.tensor([tokenizer.token_to_id(EOS), *tokenizer.encode(text).ids])
    last = len(ids) - 1
    nats, num_scored, start = 0.0, 0, 0
    while num_scored < last:
        end = min(start + window, last)
        logits = logits_of(ids[None, start:end])[0, num_scored - start :].float()
        targets = ids[num_scored + 1 : end + 1]
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        num_scored, start = end, start + stride
    return nats / math.log(2) / len(text.encode())
