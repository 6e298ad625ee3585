"""Checks a checkpoint in a short-lived child process, before anything else starts.

The check compares every tensor with the model and therefore imports torch, which costs a second and
300 MB that the CLI process avoids. ``python -m cluster.launch.checkpoint_check FOLDER`` prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config.kv_cache import KvCacheDType, kv_vector_bytes
from cluster.config.lora import LoraSection
from cluster.config.model import Quantize
from cluster.core.codec import from_plain
from cluster.core.errors import CheckpointError, ConfigError
from cluster.core.load_profile import LoadProfile
from cluster.core.process import yield_cpus_to_others
from cluster.sizing.mode_choice import bank_sizes
from cluster.sizing.roofline import ModelSize
from workers.native.library import InstructionsError, runnable

CHECK_LIMIT_S = 120.0
_ITEMSIZES = {"float32": 4, "bfloat16": 2}
_MAX_ITEMSIZE = max(_ITEMSIZES.values())
_ALLOW_BARE = "--allow-bare"
_QUANTIZE = "--quantize"
_HAS_PREDICTOR = "--has-predictor"
_LORA_MODULES = "--lora-modules"
_MAX_RANK = "--max-lora-rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFacts:
    """Facts about a checkpoint and this host's torch that a start needs."""

    model_type: str
    dtype: str
    """Compute dtype that ``--dtype auto`` selects for the checkpoint."""
    context_tokens: int
    """Context length in tokens."""
    kv_vectors_per_token: int
    """Number of key and value vectors of one token in the KV cache, over all layers and heads."""
    head_dim: int
    """Number of elements of a key or value vector of one head."""
    state_bytes: int = 0
    """Bytes of a sequence's recurrent states over all layers; 0 if the model has none."""
    attention_values: int
    """Number of weights that an attention rank reads in each step."""
    attention_weights: int
    """Number of weights that an attention rank holds."""
    banks: tuple[dict[str, Any], ...]
    """Expert banks (sets of routed experts of a layer) in the order of their use, as dicts of
    ``bank``, ``layer`` and the fields of ``cluster.sizing.roofline.BankSize``.
    """
    is_captured: bool = True
    """Whether decode steps on GPUs are CUDA graphs, in clusters with several workers."""
    torch_has_cuda: bool
    """Whether the installed torch supports CUDA."""
    gpu: str = ""
    """Name of this host's first GPU; empty without a GPU."""
    gpu_bandwidth_bytes_s: float = 0.0
    """Memory bandwidth of this host's first GPU, in bytes per second; 0 if it is not reported."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of ``config.json`` that expertmesh ignores."""
    has_tokenizer: bool = True
    """Whether the checkpoint has a tokenizer; without it, requests must contain token ids."""
    has_weights: bool = True
    """Whether the checkpoint has weights, which a start needs and a plan does not."""

    def itemsize(self, dtype: str) -> int:
        """Return the bytes of a value in a compute dtype; ``auto``: the checkpoint's dtype.

        Raises ``ConfigError`` if the checkpoint's dtype is no compute dtype.
        """
        name = self.dtype if dtype == "auto" else dtype
        if name not in _ITEMSIZES:
            rule = f"must be one of {', '.join(_ITEMSIZES)}: choose one explicitly"
            raise ConfigError("dtype", name, rule)
        return _ITEMSIZES[name]

    def kv_bytes_per_token(self, dtype: str, kv_cache_dtype: KvCacheDType = "auto") -> int:
        """Return the bytes of one token in the KV cache, over all layers."""
        each = kv_vector_bytes(kv_cache_dtype, self.head_dim, self.itemsize(dtype))
        return self.kv_vectors_per_token * each

    def size(
        self, dtype: str, profile: LoadProfile | None, kv_cache_dtype: KvCacheDType = "auto"
    ) -> ModelSize:
        """Return the sizes of the model, with the experts' loads if ``profile`` has them."""
        return ModelSize(
            banks=bank_sizes(self.banks, profile),
            attention_values=self.attention_values,
            kv_bytes_per_token=self.kv_bytes_per_token(dtype, kv_cache_dtype),
            state_bytes=self.state_bytes,
            itemsize=self.itemsize(dtype),
            is_captured=self.is_captured,
        )


class CheckpointCheck:
    """Check of a checkpoint in a child process, which overlaps with other work of the start."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        allow_bare: bool = False,
        quantize: Quantize = "auto",
        has_predictor: bool = False,
        lora: LoraSection | None = None,
    ) -> None:
        """Start the check of ``folder``.

        Args:
            environment: environment variables of the child process.
            allow_bare: accept a folder without weights, as plans do.
            quantize: as in ``ModelSection``.
            has_predictor: whether the model is served with the layer that predicts further tokens.
            lora: LoRA adapters that are loaded at the start; None without adapters.
        """
        flags = {_ALLOW_BARE: allow_bare, _HAS_PREDICTOR: has_predictor}
        given = (flag for flag, is_set in flags.items() if is_set)
        words = [str(folder), _QUANTIZE, quantize, *given]
        if lora is not None and lora.lora_modules:
            words += [_MAX_RANK, str(lora.max_lora_rank), _LORA_MODULES, *lora.lora_modules]
        self._child = _start_child(words, environment)

    def yield_cpus(self) -> None:
        """Let models that serve on this host have the CPUs first."""
        yield_cpus_to_others(self._child.pid)

    def result(self) -> CheckpointFacts:
        """Wait for the end of the check; return the facts. Raises ``CheckpointError``."""
        try:
            output, errors = self._child.communicate(timeout=CHECK_LIMIT_S)
        except subprocess.TimeoutExpired as err:
            self.cancel()
            raise CheckpointError(f"check took more than {CHECK_LIMIT_S:g} s") from err
        try:
            answer = json.loads(output)
        except ValueError as err:
            words = errors.strip().splitlines() or [f"exit code {self._child.returncode}"]
            raise CheckpointError(f"the check itself failed: {words[-1]}") from err
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return from_plain(answer, CheckpointFacts)

    def cancel(self) -> None:
        self._child.kill()
        self._child.communicate()


def _start_child(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.launch.checkpoint_check", *words],
        env=dict(environment),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(
    folder: Path,
    allow_bare: bool = False,
    quantize: Quantize = "auto",
    has_predictor: bool = False,
    lora: LoraSection = LoraSection(),  # noqa: B008  # immutable
) -> CheckpointFacts:
    """Compare a checkpoint's config and tensor headers with the model; read tokenizer and adapters.

    ``allow_bare``, ``quantize``, ``has_predictor`` and ``lora`` are as in ``CheckpointCheck``.
    Raises ``CheckpointError``, and ``ConfigError`` if the model cannot be quantized.
    """
    import torch

    from gateway.text.tokenizer import load_tokenizer
    from workers.lora.catalog import targets_without_weights
    from workers.lora.folder import read_folder
    from workers.model.config import returns_pairs
    from workers.model.cuda.device import gpu_facts
    from workers.model.loading.checkpoint_summary import check_checkpoint, plan_checkpoint
    from workers.model.loading.config_file import auto_dtype

    is_bare = allow_bare and not any(folder.glob("*.safetensors*"))
    summarize = plan_checkpoint if is_bare else check_checkpoint
    summary = summarize(folder, quantize, has_predictor=has_predictor)
    family = summary.family
    for name, path in lora.modules:
        targets = targets_without_weights(family.attention_tensors())
        try:
            read_folder(Path(path), targets, lora.max_lora_rank)
        except CheckpointError as err:
            raise CheckpointError(f"lora_modules ({name}={path}): {err}") from err
    dtype = auto_dtype(family.config)
    gpu, bandwidth_bytes_s = "", 0.0
    if torch.cuda.is_available():
        gpu, bandwidth_bytes_s = gpu_facts(torch.device("cuda:0"))
    return CheckpointFacts(
        model_type=family.config.model_type,
        dtype=dtype,
        context_tokens=family.config.context_tokens,
        kv_vectors_per_token=family.config.kv_vectors_per_token,
        head_dim=family.config.head_dim,
        state_bytes=family.config.state_bytes,
        attention_values=summary.attention_values,
        attention_weights=summary.attention_weights,
        banks=tuple(
            {
                "bank": bank.bank,
                "layer": bank.layer,
                "num_experts": bank.num_experts,
                "top_k": bank.top_k,
                "expert_values": values,
                "expert_bytes": (
                    bank.num_bytes(_ITEMSIZES.get(dtype, _MAX_ITEMSIZE))
                    if any(e.form is not None for e in bank.exchanges)
                    else 0
                ),
                "num_exchanges": len(bank.exchanges),
                "in_values": sum(
                    e.in_width * (bank.top_k if e.per_slot_input else 1) for e in bank.exchanges
                ),
                "out_values": sum(
                    e.out_width * (1 if e.weighted else bank.top_k) for e in bank.exchanges
                ),
            }
            for bank, values in zip(family.banks, summary.expert_values, strict=True)
        ),
        is_captured=(
            family.config.delta_net is None
            and family.config.latent_rank is None
            and not family.config.has_predictor
            and not returns_pairs(family.banks, "sum")
        ),
        torch_has_cuda=torch.version.cuda is not None,
        gpu=gpu,
        gpu_bandwidth_bytes_s=bandwidth_bytes_s,
        ignored_keys=family.config.ignored_keys,
        has_tokenizer=load_tokenizer(str(folder)) is not None,
        has_weights=not is_bare,
    )


def main(words: Sequence[str] | None = None) -> None:
    """Entry point of the check process; ``words`` are its arguments, by default ``sys.argv``."""
    try:
        parser = argparse.ArgumentParser()
        parser.add_argument("folder", type=Path)
        parser.add_argument(_ALLOW_BARE, action="store_true")
        parser.add_argument(_QUANTIZE, default="auto")
        parser.add_argument(_HAS_PREDICTOR, action="store_true")
        parser.add_argument(_MAX_RANK, type=int, default=LoraSection().max_lora_rank)
        parser.add_argument(_LORA_MODULES, nargs="*", default=[])
        args = parser.parse_args(words)
        runnable()
        lora = LoraSection(
            lora_modules=tuple(args.lora_modules),
            max_loras=len(args.lora_modules),
            max_lora_rank=args.max_lora_rank,
        )
        facts = check(args.folder, args.allow_bare, args.quantize, args.has_predictor, lora)
        answer = asdict(facts)
    except (CheckpointError, ConfigError, InstructionsError) as err:
        answer = {"error": str(err)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
