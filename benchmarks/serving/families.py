"""Speed of the model families at one size, compared with transformers.

All models have the hidden size, layers and vocabulary of the random OLMoE of ``serving``. The
numbers of experts are those of the public checkpoints, with smaller experts: dots.llm1 six of 128
and two shared experts, JetMoE two of 8 in attention and MLP, Qwen3-MoE eight of 128, GLM-4.5 eight
of 128 and a shared expert, Mixtral two of 8, DeepSeek-V3 eight of 256, a shared expert and latent
attention.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.serving.throughput import QUICK, TINY, Case, measure, random_model, report

CASE = Case(batches=(1, 8), new_tokens=16, patience_s=3.0)
MODELS = {
    "OLMoE": RandomModel(),
    "dots.llm1": RandomModel(family="dots1", experts=128, top_k=6, ffn=176),
    "JetMoE": RandomModel(family="jetmoe", experts=8, top_k=2, ffn=1408),
    "Qwen3-MoE": RandomModel(family="qwen3_moe", experts=128, ffn=192),
    "GLM-4.5": RandomModel(family="glm4_moe", experts=128, ffn=176),
    "Mixtral": RandomModel(family="mixtral", experts=8, top_k=2, ffn=1792),
    "DeepSeek-V3": RandomModel(family="deepseek_v3", experts=256, ffn=144),
}
"""Name of the family -> random model."""
TINY_MODELS = {
    "dots.llm1": replace(TINY, family="dots1"),
    "JetMoE": replace(TINY, family="jetmoe"),
    "Qwen3-MoE": replace(TINY, family="qwen3_moe"),
    "GLM-4.5": replace(TINY, family="glm4_moe"),
    "Mixtral": replace(TINY, family="mixtral"),
    "DeepSeek-V3": replace(TINY, family="deepseek_v3"),
}
"""Models of a quick run."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else CASE
    parts = [_words(case)]
    for name, model in (TINY_MODELS if quick else MODELS).items():
        with random_model(model) as checkpoint:
            parts.append(report(_title(name, model), case, measure(checkpoint, case)))
    return "\n\n".join(parts)


def _title(name: str, model: RandomModel) -> str:
    return (
        f"Random {name}: hidden {model.hidden}, {model.layers} layers, top-{model.top_k} of "
        f"{model.experts} experts, ffn {model.ffn}, vocabulary {model.vocab}, bf16"
    )


def _words(case: Case) -> str:
    return (
        "## Model families\n\nSystems and columns are those of *Serving*. Prompts have "
        f"{case.prompt_tokens} random tokens, outputs {case.new_tokens} tokens; medians of "
        f"{case.repeats} runs."
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
