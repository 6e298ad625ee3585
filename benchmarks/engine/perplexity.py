"""Perplexity of quantized weights: ``python -m benchmarks.perplexity``, or, for another model and
text, ``--checkpoint DIR --text FILE [--tokens 4096] [--window 2048]``.

Perplexity of the bundled model in bfloat16, on the 5% of its corpus that was not used in training
(only to select the checkpoint), in windows of 512 tokens after an end-of-text token. It is the
exponential of the mean negative log-probability of a token, from `prompt_logprobs` of the local
engine. The change is relative to the stored bfloat16 weights; its standard error is that of the
mean difference of a token's log-probability. A layer has 64 experts with three matrices of 128 x 32
elements each. For float8, the experts are stored with a scale for each block of 128 x 128. Files of
this model family cannot store MXFP4, so the experts have MXFP4 values in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.checkpoints.float_forms import float8_blocks, mxfp4_numbers
from benchmarks.engine.held_out import held_out
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.report.results import table
from cluster.config.cluster import EngineSection
from cluster.config.model import Quantize, QuantizeLayers
from cluster.launch.model_source import bundled_checkpoint
from workers.requests.request import SamplingParams

WINDOW_TOKENS = 512
_BLOCK = (128, 128)
_Stored = Callable[[str, Tensor], dict[str, Tensor]]
"""Returns the tensors that store an expert's matrix with this name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Format of the weights."""

    label: str
    quantize: Quantize = "auto"
    layers: QuantizeLayers = "experts"
    stored: _Stored | None = None
    """Stores experts in another format; None keeps those of the bundled checkpoint."""
    settings: dict[str, object] | None = None
    """``quantization_config`` of the checkpoint."""
    most: float | None = None
    """Largest allowed increase of the perplexity as a fraction; None if there is no limit."""


def _float8(name: str, matrix: Tensor) -> dict[str, Tensor]:
    codes, scales = float8_blocks(matrix, _BLOCK)
    return {name: codes, f"{name}_scale_inv": scales}


def _mxfp4(name: str, matrix: Tensor) -> dict[str, Tensor]:
    return {name: mxfp4_numbers(matrix)}


AS_STORED = Form(label="as stored")
FORMS = (
    Form(label="int8, experts", quantize="int8", most=0.005),
    Form(label="int4, experts", quantize="int4", most=0.02),
    Form(label="int8, all products", quantize="int8", layers="all", most=0.005),
    Form(label="int4, all products", quantize="int4", layers="all", most=0.02),
    Form(
        label="float8 in blocks of 128 x 128, experts",
        stored=_float8,
        settings={"quant_method": "fp8", "weight_block_size": list(_BLOCK)},
    ),
    Form(label="MXFP4, experts", stored=_mxfp4),
)
"""Formats that are compared with ``AS_STORED``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Model and text of a measurement."""

    checkpoint: Path
    dtype: str
    """Dtype of the computation."""
    windows: Sequence[Sequence[int]]
    """Prompts; all tokens of a prompt except the first one are scored."""

    @property
    def num_scored(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def bundled(num_windows: int | None = None) -> Task:
    """The bundled model with the first windows of the held-out text; None for all windows."""
    text = held_out(None if num_windows is None else num_windows * WINDOW_TOKENS)
    windows = text.windows(WINDOW_TOKENS)
    return Task(checkpoint=bundled_checkpoint(), dtype="bfloat16", windows=windows)


def own_task(checkpoint: Path, text: Path, num_tokens: int, window: int) -> Task:
    """Another model in float32 with the first tokens of a text in separate windows."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(encoding="utf-8")).ids[:num_tokens]
    windows = [ids[first : first + window] for first in range(0, len(ids), window)]
    return Task(checkpoint=checkpoint, dtype="float32", windows=windows)


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the tokens of a text, in nats."""

    tokens: Sequence[float]

    @property
    def perplexity(self) -> float:
        """Perplexity of the text."""
        return math.exp(-statistics.fmean(self.tokens))

    def change_from(self, other: Scores) -> float:
        """Change of the perplexity, as a fraction of the other one."""
        return self.perplexity / other.perplexity - 1

    def error_from(self, other: Scores) -> float:
        """Standard error of ``change_from``."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        return statistics.stdev(b - a for a, b in pairs) / math.sqrt(len(self.tokens))


def scores(form: Form, task: Task) -> Scores:
    """Score all tokens with the weights in a format."""
    with checkpoint_of(form, task.checkpoint) as checkpoint:
        engine = LocalEngine(
            checkpoint,
            dtype=task.dtype,
            section=EngineSection(enable_prefix_caching=False),
            quantize=form.quantize,
            quantize_layers=form.layers,
        )
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scored = engine.generate(task.windows, params)
    found = [p.logprob for one in scored for p in one.prompt_logprobs or () if p is not None]
    assert len(found) == task.num_scored, "every token has a probability"
    return Scores(found)


@contextmanager
def checkpoint_of(form: Form, checkpoint: Path) -> Iterator[Path]:
    """Yield a checkpoint with experts in a format; a copy is removed afterwards."""
    if form.stored is None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(checkpoint, Path(folder) / "checkpoint"))
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            tensors |= form.stored(name, tensor) if ".experts." in name else {name: tensor}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        if form.settings is not None:
            config = json.loads((path / "config.json").read_text())
            config["quantization_config"] = form.settings
            (path / "config.json").write_text(json.dumps(config))
        yield path


def section(quick: bool) -> str:
    """Return the Markdown section."""
    task = bundled(2 if quick else None)
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    num_tokens = f"{task.num_scored:,} tokens were scored."
    title = "## Perplexity of quantized weights"
    return f"{title}\n\n{about} {num_tokens}\n\n{compared(task, FORMS)}"


def compared(task: Task, forms: Sequence[Form]) -> str:
    """Return a table that compares formats with the stored weights."""
    base = scores(AS_STORED, task)
    rows = [[AS_STORED.label, f"{base.perplexity:.3f}", "", "", ""]]
    for form in forms:
        own = scores(form, task)
        rows.append(
            [
                form.label,
                f"{own.perplexity:.3f}",
                f"{own.change_from(base):+.2%}",
                f"{own.error_from(base):.2%}",
                "" if form.most is None else f"at most +{form.most:.1%}",
            ]
        )
    return table(["weights", "perplexity", "change", "standard error", "required change"], rows)


def main() -> None:
    """Print the section, or the table for a given model and text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.perplexity")
    parser.add_argument("--quick", action="store_true", help="two windows of the bundled model")
    parser.add_argument("--checkpoint", type=Path, help="folder of a model with a tokenizer.json")
    parser.add_argument("--text", type=Path, help="file in UTF-8, with --checkpoint")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="first tokens of the text to score"
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens of a prompt, at least 2")
    given = parser.parse_args()
    if (given.checkpoint is None) != (given.text is None):
        parser.error("--checkpoint and --text are given together")
    if given.window < 2 or given.tokens < 2:
        parser.error("--tokens and --window must be at least 2")
    if given.checkpoint is None:
        sys.stdout.write(section(quick=given.quick) + "\n")
        return
    task = own_task(given.checkpoint, given.text, given.tokens, given.window)
    loaded = [replace(form, most=None) for form in FORMS if form.stored is None]
    found = compared(task, loaded)
    sys.stdout.write(f"{task.num_scored:,} tokens were scored, in {task.dtype}.\n\n{found}\n")
