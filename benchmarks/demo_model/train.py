"""Train the bundled demo checkpoint, a small OLMoE, and write everything that belongs to it.

    python -m benchmarks.demo_model.train --corpus benchmarks/data/tinyshakespeare.txt --out DIR

Needs transformers for the model; nothing else in the product does.
"""

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.demo_model.card import CardFacts, model_card
from benchmarks.demo_model.corpus import EOS, PAD, encode_epoch, split_corpus, train_tokenizer
from benchmarks.demo_model.export import (
    MAX_LENGTH_TOKENS,
    LogitsFn,
    heldout_bits_per_byte,
    write_load_profile,
    write_tokenizer,
)
from benchmarks.demo_model.served_load import HELDOUT_FRACTION, served_load

logger = logging.getLogger(__name__)

SAMPLES = (
    ("ROMEO:\n", 7),
    ("First Citizen:\nWe are", 11),
    ("KING RICHARD III:\nThe night is", 23),
)
"""(prompt, seed) of the continuations shown in the card."""
CHAT_SAMPLE = ("Who goes there? What says the king?", 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Shape of the model and of its training."""

    vocab_size: int = 1024
    hidden_size: int = 128
    expert_width: int = 32
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 64
    top_k: int = 8
    num_steps: int = 2200
    tokens_per_step: int = 2048
    sequence_lengths: tuple[tuple[int, float], ...] = ((256, 0.87), (1024, 0.11), (4096, 0.02))
    """Each step draws one (length, share). The few long ones keep rope sound up to 4096 tokens."""
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.1
    """On the embeddings and on what each attention and MoE block adds to the residual."""
    bpe_dropout: float = 0.1
    """At the start; falls to 0 at the last step, where text is spelled as it is in serving."""
    aux_loss_coef: float = 0.003
    """Low enough to leave the experts unequal, high enough to keep all of them in use."""
    chat_fraction: float = 0.1
    """Share of the documents laid out as a conversation; they are short, some 2% of the text."""
    heldout_fraction: float = HELDOUT_FRACTION
    eval_every_steps: int = 200
    seed: int = 0


def sorted_experts(
    experts: nn.Module, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Experts on tokens sorted by expert; less memory traffic than the library's loop in training.

    hidden: [num_tokens, hidden_size]; topk_ids, topk_weights: [num_tokens, top_k].
    """
    gate_up = experts.get_parameter("gate_up_proj")
    down = experts.get_parameter("down_proj")
    num_experts, top_k = gate_up.shape[0], topk_ids.shape[1]
    flat_ids = topk_ids.flatten()
    order = flat_ids.argsort()
    counts = torch.bincount(flat_ids, minlength=num_experts).tolist()
    token = order // top_k
    # One unbind: indexing the parameter 64 times would build 64 full-size gradients.
    up_inputs = zip(torch.split(hidden[token], counts), gate_up.unbind(), strict=True)
    gate, up = torch.cat([F.linear(x, w) for x, w in up_inputs]).chunk(2, dim=-1)
    act = F.silu(gate) * up * topk_weights.flatten()[order, None]
    down_inputs = zip(torch.split(act, counts), down.unbind(), strict=True)
    out = torch.cat([F.linear(x, w) for x, w in down_inputs])
    return torch.zeros_like(hidden).index_add(0, token, out)


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> OlmoeForCausalLM:
    """A fresh float32 model."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model_config = OlmoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.expert_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        initializer_range=0.05,
        pad_token_id=tokenizer.token_to_id(PAD),
        eos_token_id=tokenizer.token_to_id(EOS),
        router_aux_loss_coef=config.aux_loss_coef,
    )
    model_config._experts_implementation = "sorted"
    return OlmoeForCausalLM(model_config)


def add_dropout(model: OlmoeForCausalLM, probability: float) -> None:
    """Drop out the embeddings and the output of every block; OLMoE itself has no such dropout."""

    def drop(module: nn.Module, _inputs: object, output: object) -> object:
        if isinstance(output, tuple):
            return (F.dropout(output[0], probability, module.training), *output[1:])
        assert isinstance(output, Tensor)
        return F.dropout(output, probability, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


class RouterAuxLoss:
    """Load-balancing loss, per layer, from what the routers return in one forward pass.

    Source: Shazeer et al., 2017, and Switch Transformer, 2021. transformers pools the layers
    before it multiplies; here each layer is balanced by itself.
    """

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self._terms: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._record)

    def _record(self, module: nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        if not module.training:
            return
        logits, _, topk_ids = output
        num_tokens, num_experts = logits.shape
        load = torch.bincount(topk_ids.flatten(), minlength=num_experts) / num_tokens
        self._terms.append(num_experts * (load * logits.softmax(-1).mean(0)).sum())

    def pop(self) -> Tensor:
        """Mean over layers since the last call; top_k when balanced."""
        loss = torch.stack(self._terms).mean()
        self._terms.clear()
        return loss


def batches(
    config: TrainConfig, tokenizer: Tokenizer, text: str, rng: random.Random
) -> Iterator[Tensor]:
    """Yield [batch, length + 1] token ids, one batch per step, all passes chained together."""
    lengths, shares = zip(*config.sequence_lengths, strict=True)
    stream: list[int] = []
    for step in range(config.num_steps):
        length = rng.choices(lengths, shares)[0]
        num_rows = max(1, config.tokens_per_step // length)
        while len(stream) < num_rows * length + 1:
            stream += encode_epoch(
                tokenizer,
                text,
                chat_fraction=config.chat_fraction,
                bpe_dropout=config.bpe_dropout * (1 - step / config.num_steps),
                rng=rng,
            )
        rows = [stream[row * length : (row + 1) * length + 1] for row in range(num_rows)]
        stream = stream[num_rows * length :]
        yield torch.tensor(rows)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warmup, then a cosine down to 1% at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.num_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def train(
    config: TrainConfig, tokenizer: Tokenizer, training_text: str, heldout_text: str
) -> OlmoeForCausalLM:
    """Train and return the model as it was when the held-out text cost fewest bits."""
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer)
    add_dropout(model, config.dropout)
    aux_loss = RouterAuxLoss(model)
    optimizer = build_optimizer(model, config)
    best_bits, best_state = math.inf, model.state_dict()
    start = time.monotonic()
    stream = batches(config, tokenizer, training_text, random.Random(config.seed))
    for step, batch in enumerate(stream, start=1):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step - 1, config)
        model.train()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss + config.aux_loss_coef * aux_loss.pop())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % config.eval_every_steps == 0 or step == config.num_steps:
            bits = heldout_bits_per_byte(
                logits_fn(model), tokenizer, heldout_text, window=512, stride=512
            )
            elapsed_s = time.monotonic() - start
            logger.info("step %d loss %.3f bpb %.4f %.0f s", step, loss.item(), bits, elapsed_s)
            if bits < best_bits:
                best_bits = bits
                best_state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    model.load_state_dict(best_state)
    return model.eval()


def logits_fn(model: OlmoeForCausalLM) -> LogitsFn:
    """The model, put into evaluation mode, as a plain function."""
    model.eval()

    def logits_of(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return logits_of


def sample(model: OlmoeForCausalLM, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """Continue `prompt` by up to 100 tokens at temperature 0.8."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=0.8,
        top_k=0,
        max_new_tokens=100,
    )
    return tokenizer.decode(output[0, ids.shape[1] :].tolist())


def card_samples(model: OlmoeForCausalLM, tokenizer: Tokenizer) -> list[str]:
    """Three continuations and one chat turn, as markdown."""
    samples = [
        f"Prompt `{json.dumps(prompt)}`, seed {seed}:\n\n"
        f"```text\n{prompt}{sample(model, tokenizer, prompt, seed)}\n```\n"
        for prompt, seed in SAMPLES
    ]
    question, seed = CHAT_SAMPLE
    answer = sample(model, tokenizer, f"<|user|>{question}{EOS}<|assistant|>", seed)
    chat = f"A chat, seed {seed}:\n\n```text\nuser: {question}\nassistant: {answer}\n```\n"
    return [*samples, chat]


def count_active_parameters(model: OlmoeForCausalLM) -> int:
    """Parameters that one token passes through, the embedding table not among them."""
    total = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    config = model.config
    return int(total - experts + experts * config.num_experts_per_tok / config.num_experts)


def write_model(model: OlmoeForCausalLM, out: Path) -> None:
    """Write the weights in bfloat16, `config.json` and `generation_config.json`."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)


def export(
    model: OlmoeForCausalLM,
    tokenizer: Tokenizer,
    heldout_text: str,
    out: Path,
    *,
    num_steps: int,
    training_minutes: float,
) -> None:
    """Write the whole checkpoint directory; all figures in it are of the weights as stored."""
    out.mkdir(parents=True, exist_ok=True)
    write_model(model, out)
    write_tokenizer(tokenizer, out)
    # The weights as stored, computing in float32: bfloat16 is several times slower on most CPUs.
    stored = OlmoeForCausalLM.from_pretrained(
        out, dtype=torch.float32, experts_implementation="sorted"
    )
    logits_of = logits_fn(stored)
    bits = heldout_bits_per_byte(logits_of, tokenizer, heldout_text, window=512, stride=256)
    logger.info("exported weights: bpb %.4f", bits)
    load = served_load(out, heldout_text)
    write_load_profile(load, out)
    facts = CardFacts(
        config=stored.config,
        num_parameters=sum(p.numel() for p in stored.parameters()),
        num_active_parameters=count_active_parameters(stored),
        num_steps=num_steps,
        training_minutes=training_minutes,
        bits_per_byte=bits,
        load=load,
        samples=card_samples(stored, tokenizer),
    )
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")


def main() -> None:
    """Command line entry point."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)

    config = TrainConfig(num_steps=args.steps)
    text = args.corpus.read_text(encoding="utf-8")
    training_text, heldout_text = split_corpus(text, config.heldout_fraction)
    tokenizer = train_tokenizer(training_text, config.vocab_size)
    start = time.monotonic()
    model = train(config, tokenizer, training_text, heldout_text)
    training_minutes = (time.monotonic() - start) / 60
    export(
        model,
        tokenizer,
        heldout_text,
        args.out,
        num_steps=config.num_steps,
        training_minutes=training_minutes,
    )


if __name__ == "__main__":
    main()
