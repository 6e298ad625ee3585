"""Predictions for clusters of GPUs: ``python -m benchmarks.simulated.gpu_clusters [--json]``.

For each model and number of GPUs, the layout of ``benchmarks.sizing`` that fits into memory and
decodes fastest serves three loads in virtual time: prompts only, decodes only, and both as one
cluster serves them, with as many requests at once as its KV cache holds. Each cluster is predicted
twice: with the measured cost of single messages, and as if NCCL sent all messages of an exchange in
one kernel. With many GPUs, the cost of a message is the least certain assumption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.sizing.guide import known_model
from benchmarks.sizing.layouts import (
    BALANCEDNESS,
    GPUS_PER_NODE,
    H100_NODE,
    H200_NODE,
    Layout,
    NodeKind,
    SizedModel,
    best_layout,
)
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.config.cluster import EngineSection
from cluster.core.errors import ConfigError
from cluster.simulation.serving import ServingSimulation
from cluster.sizing.mixed_step import PoolSizes, RankRows, StepTimes
from cluster.sizing.roofline import DeviceSpec
from cluster.workload.arrivals import Arrival
from cluster.workload.tally import Tally
from workers.engine.micro_batches import MicroBatchRule

MODELS = ("OLMoE-1B-7B-0924", "Qwen3-235B-A22B", "DeepSeek-V3")
NODES = {"H100": H100_NODE, "H200": H200_NODE}
NUM_GPUS = (16, 64, 128)
INPUT_LEN, OUTPUT_LEN = 2000, 200
_PROMPTS_EACH = 4
"""Prompts that each attention worker computes when there are prompts only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a cluster does, by one assumption about messages."""

    model: str
    gpus: int
    layout: str
    message_us: float
    """Time of a message at each end."""
    num_seqs: int
    """Requests at once."""
    prompt_tokens_per_s_gpu: float
    """Prompt tokens of the whole cluster, divided by all GPUs, with prompts only."""
    decode_step_ms: float
    decode_tokens_per_s_gpu: float
    """Output tokens of the whole cluster, divided by all GPUs, with decodes only."""
    input_tokens_per_s_gpu: float
    """Prompt tokens with both, divided by all GPUs."""
    output_tokens_per_s_gpu: float
    """Output tokens with both, divided by all GPUs."""
    ttft_ms: float
    """Median with both: all requests at once, each begins when another ends."""
    itl_ms: float
    """Mean with both."""

    def columns(self) -> list[str]:
        """Texts of the values."""
        return [f"{v:.4g}" if isinstance(v, float) else str(v) for v in asdict(self).values()]


class GpuCluster:
    """A layout of a model on GPUs, under load."""

    def __init__(self, model: SizedModel, layout: Layout, device: DeviceSpec) -> None:
        self._layout = layout
        self._pools = PoolSizes(num_attention=layout.num_attention, num_experts=layout.num_experts)
        self._times = StepTimes(model.size, self._pools, device, balancedness=BALANCEDNESS)
        self._num_each = max(1, layout.num_seqs // layout.num_attention)
        engine = EngineSection(max_num_seqs=self._num_each)
        self._engine = engine.on_gpus(layout.num_attention)
        self._micro_batches = MicroBatchRule(
            setting="auto",
            decode_threshold=engine.micro_batch_decode_threshold,
            prefill_threshold=engine.micro_batch_prefill_threshold,
        )

    @property
    def num_seqs(self) -> int:
        """Requests at once."""
        return self._num_each * self._layout.num_attention

    def decode_s(self) -> float:
        """Return the seconds of a step in which all sequences decode."""
        context = INPUT_LEN + OUTPUT_LEN // 2
        rows = RankRows(self._num_each, self._num_each, self._num_each * context)
        num_micro_batches = self._micro_batches.choose(self._num_each, has_prefill=False)
        ranks = [rows] * self._layout.num_attention
        step = self._times.step(ranks, has_prefill=False, num_micro_batches=num_micro_batches)
        return step.step_s

    def serve(self, number: int, output_len: int) -> tuple[Tally, float]:
        """Serve ``number`` requests, at most ``num_seqs`` at once; return the results, seconds."""
        block = self._engine.block_size_tokens
        simulation = ServingSimulation(
            self._times,
            self._engine,
            num_attention=self._layout.num_attention,
            num_kv_blocks=self._layout.kv_tokens // block,
            max_model_len=INPUT_LEN + OUTPUT_LEN,
            micro_batches=self._micro_batches,
            max_concurrency=self.num_seqs,
        )
        tally = Tally({})
        simulation.run([Arrival(0.0, INPUT_LEN, output_len)] * number, tally, lambda: None)
        return tally, simulation.now_s


def predict(
    name: str, node: NodeKind, num_gpus: int, max_seqs: int, num_rounds: int
) -> Iterator[Prediction]:
    """Yield the predictions, first with the measured cost of single messages.

    Raises ``ConfigError`` if the model does not fit.
    """
    model = known_model(name)
    num_nodes = num_gpus // GPUS_PER_NODE
    layout = best_layout(model, node, num_nodes, max_seqs)
    device = node.worker(num_nodes)
    peers = max(layout.num_attention, layout.num_experts)
    for message_s in (device.message_s, device.message_s / peers):
        cluster = GpuCluster(model, layout, replace(device, message_s=message_s))
        prompts, prompts_s = cluster.serve(_PROMPTS_EACH * layout.num_attention, 1)
        both, both_s = cluster.serve(num_rounds * cluster.num_seqs, OUTPUT_LEN)
        found, decode_s = both.results(both_s), cluster.decode_s()
        yield Prediction(
            model=name,
            gpus=num_gpus,
            layout=f"{layout.num_attention} + {layout.num_experts}",
            message_us=1e6 * message_s,
            num_seqs=cluster.num_seqs,
            prompt_tokens_per_s_gpu=prompts.ended * INPUT_LEN / prompts_s / num_gpus,
            decode_step_ms=1e3 * decode_s,
            decode_tokens_per_s_gpu=cluster.num_seqs / decode_s / num_gpus,
            input_tokens_per_s_gpu=both.ended * INPUT_LEN / both_s / num_gpus,
            output_tokens_per_s_gpu=found["output_tokens_per_s"] / num_gpus,
            ttft_ms=found["ttft_ms"]["median"],
            itl_ms=found["itl_ms"]["mean"],
        )


def _gpus(text: str) -> int:
    """Read the GPUs of whole nodes. Raises ``argparse.ArgumentTypeError``."""
    number = count(text)
    if number % GPUS_PER_NODE:
        rule = f"must be a multiple of {GPUS_PER_NODE}, the GPUs of a node"
        raise argparse.ArgumentTypeError(rule)
    return number


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated.gpu_clusters")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--gpu", default="H200", choices=NODES)
    text = "multiples of 8"
    parser.add_argument("--gpus", type=_gpus, nargs="+", default=NUM_GPUS, metavar="N", help=text)
    text = "sequences for each GPU, as far as KV fits (64)"
    parser.add_argument("--max-seqs", type=count, default=64, metavar="N", help=text)
    text = "requests for each sequence (3)"
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help=text)
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the predictions, two rows for each model and number of GPUs."""
    args = make_parser().parse_args(arguments)
    rows: list[list[str]] = []
    for name in args.models:
        for num_gpus in args.gpus:
            try:
                for row in predict(name, NODES[args.gpu], num_gpus, args.max_seqs, args.rounds):
                    if args.json:
                        print(json.dumps(asdict(row)), flush=True)
                    rows.append(row.columns())
            except ConfigError as err:
                sys.stderr.write(f"{name} on {num_gpus}: {err}\n")
    if not args.json:
        heads = [word.upper().replace("_", " ") for word in Prediction.__dataclass_fields__]
        sys.stdout.write(table(heads, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
