"""Expert load of a demo model, as the engine counts it while it serves text.

Each stretch of the held-out text is a prompt, and the model writes on from there: so prompt rows
and decode rows are counted as in a cluster. To measure a checkpoint again:

    python -m benchmarks.demo_model.served_load --corpus tinyshakespeare.txt --checkpoint DIR
"""

import argparse
import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.demo_model.corpus import split_corpus
from benchmarks.demo_model.export import ExpertLoad, write_load_profile
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from workers.requests.request import Request, SamplingParams

logger = logging.getLogger(__name__)

HELDOUT_FRACTION = 0.05
"""Of the corpus; training never saw it."""
PROMPT_TOKENS = 192
"""Tokens of a prompt."""
NEW_TOKENS = 64
"""Tokens that the model writes after it."""


def served_load(checkpoint: Path, text: str) -> ExpertLoad:
    """Serve all of `text`, and count."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    requests = [
        Request(
            request_id=f"text-{start}",
            prompt=tuple(ids[start : start + PROMPT_TOKENS]),
            params=SamplingParams(
                max_tokens=NEW_TOKENS, temperature=0.8, seed=start, ignore_eos=True
            ),
        )
        for start in range(0, len(ids), PROMPT_TOKENS)
    ]
    section = EngineSection(max_num_seqs=32, enable_prefix_caching=False)
    engine = LocalEngine(checkpoint, section=section)
    engine.run(requests)
    report = engine.engine.load.report()
    counts = [torch.from_numpy(bank.prefill + bank.decode) for bank in report.banks.values()]
    return ExpertLoad(
        num_tokens=report.rows, top_k=engine.banks[0].top_k, counts=torch.stack(counts)
    )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _, text = split_corpus(args.corpus.read_text(encoding="utf-8"), HELDOUT_FRACTION)
    load = served_load(args.checkpoint, text)
    write_load_profile(load, args.checkpoint)
    peaks = load.counts.amax(1) / load.counts.double().mean(1)
    logger.info("%d rows; busiest over mean %s", load.num_tokens, peaks.tolist())
    for devices in (2, 4, 8):
        balance = load.balancedness(devices)
        logger.info("%d devices: %.2f, worst %.2f", devices, balance.mean(), balance.min())


if __name__ == "__main__":
    main()
