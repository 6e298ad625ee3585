"""What quantized weights do to a model: ``python -m benchmarks.perplexity``.

Perplexity of the bundled model, in bfloat16, on the 5% of its corpus that training never saw (the
loss on it only chose the step whose weights were kept), in windows of 512 tokens behind an end of
text: the exponential of the mean negative log-probability of a token, as `prompt_logprobs` of the
local engine gives it. The change is that of the perplexity from the weights as they are stored, the
standard error that of the mean difference of a token's log-probability. Each of the 64 experts of a
layer has three matrices of 128 and 32 rows and columns. In float8 the checkpoint stores its experts
itself, with a scale for each block of 128 x 128; MXFP4 is not a form of this family's files, so the
experts have its numbers in bfloat16.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.float_forms import float8_blocks, mxfp4_numbers
from benchmarks.held_out import held_out
from benchmarks.results import table
from cluster.config.cluster import EngineSection, Quantize, QuantizeLayers
from cluster.launch.model_source import bundled_checkpoint
from tests.reference.local_engine import LocalEngine
from workers.requests.request import SamplingParams

WINDOW_TOKENS = 512
_BLOCK = (128, 128)
_Stored = Callable[[str, Tensor], dict[str, Tensor]]
"""The tensors that stand for an expert's matrix of this name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How weights are kept."""

    label: str
    quantize: Quantize = "auto"
    layers: QuantizeLayers = "experts"
    stored: _Stored | None = None
    """Of experts; None: as the bundled checkpoint has them."""
    settings: dict[str, object] | None = None
    """``quantization_config``."""
    most: float | None = None
    """Largest allowed rise of the perplexity, as a fraction of it; None: no limit."""


def _float8(name: str, matrix: Tensor) -> dict[str, Tensor]:
    codes, scales = float8_blocks(matrix, _BLOCK)
    return {name: codes, f"{name}_scale_inv": scales}


def _mxfp4(name: str, matrix: Tensor) -> dict[str, Tensor]:
    return {name: mxfp4_numbers(matrix)}


AS_STORED = Form(label="as stored, bfloat16")
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
"""What is compared with ``AS_STORED``."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of the tokens of a text, in nats."""

    tokens: Sequence[float]

    @property
    def perplexity(self) -> float:
        """Of the text."""
        return math.exp(-statistics.fmean(self.tokens))

    def change_from(self, other: Scores) -> float:
        """Of the perplexity, as a share of the other one."""
        return self.perplexity / other.perplexity - 1

    def error_from(self, other: Scores) -> float:
        """Standard error of ``change_from``."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        return statistics.stdev(b - a for a, b in pairs) / math.sqrt(len(self.tokens))


def scores(form: Form, num_windows: int | None = None) -> Scores:
    """Of the first windows of the text; None: of all."""
    text = held_out(None if num_windows is None else num_windows * WINDOW_TOKENS)
    with checkpoint_of(form) as checkpoint:
        engine = LocalEngine(
            checkpoint,
            dtype="bfloat16",
            section=EngineSection(enable_prefix_caching=False),
            quantize=form.quantize,
            quantize_layers=form.layers,
        )
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    scored = engine.generate(text.windows(WINDOW_TOKENS), params)
    found = [p.logprob for one in scored for p in one.prompt_logprobs or () if p is not None]
    assert len(found) == len(text.ids), "every token of the text has a probability"
    return Scores(found)


@contextmanager
def checkpoint_of(form: Form) -> Iterator[Path]:
    """The bundled checkpoint with its experts stored in a form; a copy is removed afterwards."""
    bundled = bundled_checkpoint()
    if form.stored is None:
        yield bundled
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(bundled, Path(folder) / "checkpoint"))
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
    """The part of ``RESULTS.md``."""
    num_windows = 2 if quick else None
    base = scores(AS_STORED, num_windows)
    rows = [[AS_STORED.label, f"{base.perplexity:.3f}", "", "", ""]]
    for form in FORMS:
        own = scores(form, num_windows)
        rows.append(
            [
                form.label,
                f"{own.perplexity:.3f}",
                f"{own.change_from(base):+.2%}",
                f"{own.error_from(base):.2%}",
                "" if form.most is None else f"at most +{form.most:.1%}",
            ]
        )
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    num_tokens = f"{len(base.tokens):,} tokens were scored."
    head = ["weights", "perplexity", "change", "standard error", "asked"]
    title = "## Perplexity of quantized weights"
    return f"{title}\n\n{about} {num_tokens}\n\n{table(head, rows)}"


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
