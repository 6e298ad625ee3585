"""The model card of the demo checkpoint."""

from dataclasses import dataclass

from benchmarks.demo_model.export import MODEL_NAME, ExpertLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What the card says of one training run."""

    config: object
    """The model's configuration, with the field names of `config.json`."""
    num_parameters: int
    num_active_parameters: int
    num_steps: int
    training_minutes: float
    bits_per_byte: float
    load: ExpertLoad
    samples: list[str]
    """Markdown, one per sample."""


def model_card(facts: CardFacts) -> str:
    """The README.md of the checkpoint."""
    counts = facts.load.counts
    peaks = (counts.amax(1) / counts.double().mean(1)).tolist()
    balance = {devices: facts.load.balancedness(devices) for devices in (2, 4, 8)}
    return CARD.format(
        name=MODEL_NAME,
        facts=facts,
        million_parameters=facts.num_parameters / 1e6,
        million_active=facts.num_active_parameters / 1e6,
        peaks=" / ".join(f"{peak:.1f}" for peak in peaks),
        num_unused=int((counts == 0).sum()),
        balance_rows="\n".join(
            f"| {devices} | {values.mean():.2f} | {values.min():.2f} |"
            for devices, values in balance.items()
        ),
        samples="\n".join(facts.samples),
    )


CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts]
---

# {name}

A small mixture-of-experts language model that writes in the manner of Shakespeare's plays. It is
bundled so that every part of expertmesh can be shown and tested on a laptop with a real, trained
router: 64 experts, top-8, unequal load. It is an ordinary OLMoE checkpoint in Hugging Face layout,
and the same code serves it and the large ones.

## Architecture

| | |
|---|---|
| class | `OlmoeForCausalLM` (`model_type: olmoe`) |
| layers | {facts.config.num_hidden_layers}, all MoE |
| hidden size | {facts.config.hidden_size} |
| attention heads | {facts.config.num_attention_heads}, each with its own key and value |
| experts per layer | {facts.config.num_experts} |
| experts per token | {facts.config.num_experts_per_tok} |
| expert width | {facts.config.intermediate_size} |
| vocabulary | {facts.config.vocab_size}, byte-level BPE: any UTF-8 text round trips |
| positions | {facts.config.max_position_embeddings} |
| parameters | {million_parameters:.2f} M, {million_active:.2f} M active per token |
| weights | bfloat16 |

Special tokens: `<|pad|>` 0, `<|eos|>` 1, `<|system|>` 2, `<|user|>` 3, `<|assistant|>` 4. There is
no BOS token. A chat turn is the role token, the text and `<|eos|>`; see the template in
`tokenizer_config.json`.

## Training

    python -m benchmarks.demo_model.train --corpus benchmarks/data/tinyshakespeare.txt --out DIR

{facts.num_steps} steps in {facts.training_minutes:.0f} minutes on two CPU cores: AdamW in float32,
8 x 256 tokens a step (some steps have longer rows, up to 4096 tokens), dropout and BPE dropout. The
weights kept are those of the evaluation with the lowest held-out loss. A run is not bitwise
repeatable, since BPE dropout draws from the tokenizer library's own random numbers.

Data: the tinyshakespeare file (1.1 MB of plays by William Shakespeare, public domain). The first
95% is the training text, the last 5% is held out; the tokenizer too saw only the first 95%. About
2% of the training text is laid out as a conversation, one speech per turn. `<|eos|>` ends a turn,
and a stretch of 10 to 60 speeches of plain text. The weights are licensed under Apache-2.0, like
the repository.

## Held-out quality

**{facts.bits_per_byte:.3f} bits per byte** on the held-out text: total nats / ln 2 / UTF-8 bytes,
of the bfloat16 weights as stored, computing in float32, over sliding windows of 512 tokens that
advance by 256. The weights were also selected on this text, so the figure is a little optimistic.

## Expert load

`load_profile.json` holds the experts' token counts while the held-out text was served: every 192
tokens of it a prompt that the model goes on from for 64 tokens, {facts.load.num_tokens} rows in all
(`python -m benchmarks.demo_model.served_load`). Load of the busiest expert over the mean of its
layer, layer by layer: {peaks}. Experts never used: {num_unused}.

Balancedness (mean / max device load, 1.0 is ideal) with the experts in contiguous runs:

| devices | mean over layers | worst layer |
|---|---|---|
{balance_rows}

## Samples

Temperature 0.8, no top-k or top-p, 100 tokens at most, `torch.manual_seed(seed)`.

{samples}
## Limits

It knows one megabyte of plays and nothing else: no facts, no instructions, no modern English. Words
and metre are mostly right, sense rarely lasts longer than a line. What a chat gets is a speech in
reply, not an answer, and it seldom stops by itself: other characters join in until `max_tokens`.
Most training rows were 256 tokens long, so context from further back counts for little.
"""
