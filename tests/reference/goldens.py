"""Golden checkpoints for tests: made once a machine by ``reference/make_goldens.py``, then cached.

A golden is a folder with a tiny random checkpoint and, in ``golden.safetensors``, what transformers
computes on it in float64 for 8 prompts p0 .. p7 (1 to 100 tokens), each alone, rounded to float32:

    p0.prompt_ids [n], p0.logits [n, V], p0.hidden_states [L + 1, n, H], p0.greedy_ids [32]
    p0.router_ids, p0.router_weights [layers, n + 31, k] (ids ascending), p0.router_logits [.., E]

The largest error of transformers in float32 on this machine is float32_error.logits, for example.
Variants with a bfloat16 run add p0.logits_bf16 and others. transformers is needed for making them
only; without it the tests that ask for a golden are skipped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.paths import ROOT

OLMOE_VARIANTS = (
    "olmoe-base",
    "olmoe-norm-gqa-clip",
    "olmoe-bias-tied-mqa",
    "olmoe-legacy-config",
    "olmoe-bf16",
    "olmoe-fused",
    "olmoe-rope-linear",
    "olmoe-rope-dynamic",
    "olmoe-rope-yarn",
    "olmoe-rope-llama3",
    "olmoe-gelu-fp16",
)
DOTS1_VARIANTS = (
    "dots1-groups",
    "dots1-official-like",
    "dots1-swa",
    "dots1-negative-bias",
    "dots1-dense0-headdim",
    "dots1-dense2-yarn",
    "dots1-layer-types",
    "dots1-fused-bf16",
    "dots1-gelu-tanh-llama3",
    "dots1-relu-dynamic-fp16",
)
JETMOE_VARIANTS = (
    "jetmoe-tied",
    "jetmoe-untied-top3-eps",
    "jetmoe-legacy-config",
    "jetmoe-top1-linear",
    "jetmoe-bf16",
    "jetmoe-gelu-yarn-fp16",
    "jetmoe-relu-dynamic",
)
QWEN3_VARIANTS = (
    "qwen3moe-base",
    "qwen3moe-official-like",
    "qwen3moe-dense-layers",
    "qwen3moe-window-bias-tied",
    "qwen3moe-fused-bf16",
    "qwen3moe-yarn-gelu",
    "qwen3moe-fp8",
)
GLM4_VARIANTS = (
    "glm4moe-base",
    "glm4moe-official-like",
    "glm4moe-norms-groups",
    "glm4moe-quarter-tied",
    "glm4moe-yarn-fused-bf16",
    "glm4moe-dynamic-fp16",
)
MIXTRAL_VARIANTS = (
    "mixtral-base",
    "mixtral-official-like",
    "mixtral-window-tied",
    "mixtral-llama3-gelu-fp16",
)
MINIMAX_VARIANTS = ("minimaxm2-official-like", "minimaxm2-fp8-whole", "minimaxm2-dynamic")
GPT_OSS_VARIANTS = (
    "gptoss-base",
    "gptoss-official-like",
    "gptoss-layers-tied",
    "gptoss-default-rope",
)
FLEX_OLMO_VARIANTS = ("flexolmo-base", "flexolmo-official-like", "flexolmo-bias-gqa-tied")
LATENT_VARIANTS = (
    "deepseekv3-base",
    "deepseekv3-official-like",
    "deepseekv3-plain-tied",
    "deepseekv3-dynamic-fp16",
    "kimik2-official-like",
    "deepseekv2-official-like",
    "deepseekv2-lite",
    "deepseekv2-bias-tied-bf16",
    "glm4lite-official-like",
    "glm4lite-layers-tied",
)
QWEN3_NEXT_VARIANTS = (
    "qwen3next-base",
    "qwen3next-official-like",
    "qwen3next-layers-bias-tied",
    "qwen3next-yarn-fused-fp16",
    "qwen3next-fp8",
)
QWEN35_VARIANTS = ("qwen35moe-base", "qwen35moe-official-like")
ERNIE_VARIANTS = ("ernie45-official-like", "ernie45-layers", "ernie45-headdim-linear")
OTHER_VARIANTS = (
    *(*DOTS1_VARIANTS, *JETMOE_VARIANTS),
    *(*QWEN3_VARIANTS, *GLM4_VARIANTS, *MIXTRAL_VARIANTS, *MINIMAX_VARIANTS),
    *(*ERNIE_VARIANTS, *GPT_OSS_VARIANTS, *FLEX_OLMO_VARIANTS, *LATENT_VARIANTS),
    *(*QWEN3_NEXT_VARIANTS, *QWEN35_VARIANTS),
)
"""Of all families but the first."""
ALL_VARIANTS = OLMOE_VARIANTS + OTHER_VARIANTS
"""All language models."""
NUM_RANDOM = 3
"""Random variants of each family."""
RANDOM_VARIANTS = tuple(
    f"{family}-random-{number}"
    for family in (
        "olmoe",
        "dots1",
        "jetmoe",
        "qwen3moe",
        "glm4moe",
        "mixtral",
        "minimaxm2",
        "ernie45",
        "gptoss",
        "flexolmo",
        "qwen3next",
        "qwen35moe",
        "deepseekv3",
        "deepseekv2",
        "glm4lite",
    )
    for number in range(NUM_RANDOM)
)
"""Language models of random configs, see ``reference/random_variants.py``."""
CLASSIFIERS = ("jetmoe-seqcls", "jetmoe-seqcls-nopad")
"""Sequence classifiers; their tensors are another kind."""
BF16_VARIANTS = (
    "olmoe-base",
    "olmoe-bf16",
    "dots1-groups",
    "dots1-fused-bf16",
    "jetmoe-tied",
    "jetmoe-bf16",
    "qwen3moe-base",
    "qwen3moe-fused-bf16",
    "glm4moe-base",
    "glm4moe-yarn-fused-bf16",
    "mixtral-base",
    "mixtral-official-like",
    "minimaxm2-official-like",
    "ernie45-official-like",
    "gptoss-base",
    "gptoss-official-like",
    "flexolmo-base",
    "flexolmo-official-like",
    "deepseekv3-base",
    "deepseekv3-official-like",
    "deepseekv2-official-like",
    "deepseekv2-bias-tied-bf16",
    "glm4lite-official-like",
    "qwen3next-base",
    "qwen3next-official-like",
    "qwen35moe-base",
    "qwen35moe-official-like",
)
"""Variants with a bfloat16 run of transformers."""
FIRST_BF16 = frozenset({name.split("-")[0]: name for name in reversed(BF16_VARIANTS)}.values())
"""One of each family."""
BY_TURNS = tuple(
    name
    for turn in zip_longest(OLMOE_VARIANTS, DOTS1_VARIANTS, JETMOE_VARIANTS)
    for name in turn
    if name is not None
)
"""Those of the first three families, which take turns."""
IN_CLUSTERS = BY_TURNS[:10]
"""Those that are served by clusters of all kinds where others are computed in one process."""
NUM_PROMPTS = 8
NUM_NEW_TOKENS = 32
MAX_MODEL_LEN = 192
"""Holds the longest prompt and its output; also the stretched context of dynamic rope, 4 x 48."""

_MAKER = "tests.reference.make_goldens"
_RANDOM_MAKER = Path(__file__).with_name("random_variants.py")
_LIMIT_S = 1_800.0
"""Of one family: half a minute of work on a machine that does little else."""


@dataclass(frozen=True, slots=True)
class Golden:
    """One variant."""

    name: str
    """Variant."""
    path: Path
    """Checkpoint folder."""
    tensors: dict[str, Tensor]
    """What transformers computed."""

    def prompt(self, i: int) -> tuple[int, ...]:
        """Token ids of prompt i."""
        return tuple(self.tensors[f"p{i}.prompt_ids"].tolist())

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """All prompts."""
        return [self.prompt(i) for i in range(NUM_PROMPTS)]

    def greedy(self, i: int) -> tuple[int, ...]:
        """The 32 greedy tokens after prompt i."""
        return tuple(self.tensors[f"p{i}.greedy_ids"].tolist())

    def float32_error(self, name: str) -> float:
        """Largest error of transformers in float32, over all prompts, in ``logits`` for example."""
        return self.tensors[f"float32_error.{name}"].item()


def golden_path(variant: str, family: str = "olmoe") -> Path:
    """Folder of a variant; makes the family's goldens first if they are not there.

    Skips the calling test when transformers is missing.
    """
    folder = _cache_folder() / family
    if not (folder / "complete").is_file():
        if importlib.util.find_spec("transformers") is None:
            pytest.skip("transformers is not installed: goldens cannot be made")
        _make(folder, family)
    return folder / variant


def load_golden(variant: str) -> Golden:
    """Read a variant; see ``golden_path``."""
    family, *_, number = variant.split("-")
    is_random = variant in RANDOM_VARIANTS
    return read_golden(golden_path(variant, _random(int(number)) if is_random else family))


def read_golden(path: Path) -> Golden:
    """Read a folder that one of the makers wrote."""
    return Golden(path.name, path, load_file(path / "golden.safetensors"))


def make_random(folder: Path, first: int, count: int) -> list[Golden]:
    """Goldens of each family's random configs ``first`` .. ``first + count - 1``."""
    words = [sys.executable, "-m", "tests.reference.random_variants", str(folder)]
    _run([*words, "--first", str(first), "--count", str(count)], _LIMIT_S * count)
    return [read_golden(path) for path in sorted(folder.iterdir())]


def _random(number: int) -> str:
    """Name of the folder of ``RANDOM_VARIANTS`` of this number, another for each state of their
    maker."""
    return f"random-{number}-{hashlib.sha256(_RANDOM_MAKER.read_bytes()).hexdigest()[:8]}"


def _cache_folder() -> Path:
    """One folder for each state of the maker, its libraries and the kind of processor."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    makers = [folder / "make_goldens.py", folder / "double.py"]
    for path in [*makers, *sorted((folder / "variants").glob("*.py"))]:
        digest.update(path.read_bytes())
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        digest.update(f"{package} {version}\n".encode())
    digest.update(platform.machine().encode())
    name = f"expertmesh-goldens-{os.getuid()}-{digest.hexdigest()[:16]}"
    return Path(tempfile.gettempdir()) / name


def _make(folder: Path, family: str) -> None:
    """Write into a folder of our own, then move it into place: tests may run side by side."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        if family in map(_random, range(NUM_RANDOM)):
            make_random(scratch, int(family.split("-")[1]), 1)
        else:
            _run([sys.executable, "-m", _MAKER, str(scratch), "--only", family], _LIMIT_S)
        (scratch / "complete").touch()
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            scratch.replace(folder)
    except OSError:
        if not (folder / "complete").is_file():
            raise  # else another process was faster
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str], limit_s: float) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = ROOT
    subprocess.run(
        command, check=True, capture_output=True, env=environment, timeout=limit_s, cwd=root
    )
