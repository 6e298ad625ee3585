"""Engines with quantized experts on the device, compared with an engine on a CPU."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.gpu_check.code_formats import FLOAT8, GPTQ, MAIN
from benchmarks.gpu_check.engines import SHORT_WAYS, all_ways, random_model
from benchmarks.gpu_check.section import Place, Report
from workers.quantization.formats import WeightFormat

_MODELS: Mapping[str, tuple[str, WeightFormat]] = {
    "int8": ("olmoe", MAIN["int8"]),
    "int4": ("olmoe", MAIN["int4"]),
    "float8": ("qwen3_moe", FLOAT8),
    "mxfp4": ("gpt_oss", MAIN["mxfp4"]),
    "GPTQ": ("dots1", GPTQ),
}
"""Name of the format -> a family whose checkpoints use it."""


def run(place: Place, report: Report) -> None:
    """Compare each format in the most different ways and in both dtypes."""
    for name, (family, form) in _MODELS.items():
        model = random_model(place, family, form=form)
        with report.part(name):
            seen = all_ways(place, report, model, SHORT_WAYS, f"{name} ")
            report.value(f"{name} log-probabilities", seen.found)
    report.say(", ".join(_MODELS))
