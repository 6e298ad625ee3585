"""Log-likelihoods by transformers, for a checkpoint and a dtype.

Token ids [[..], ..] come as JSON on stdin; on stdout, for each prompt, the log-probability of each
of its tokens but the first, and whether it was the likeliest.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


def main() -> None:
    """Read, compute, write."""
    from transformers import AutoModelForCausalLM

    path, dtype = sys.argv[1:]
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()
    found = []
    for ids in json.load(sys.stdin):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        behind = torch.tensor(ids[1:])
        scores = logits.log_softmax(-1).gather(1, behind[:, None])[:, 0]
        found.append([scores.tolist(), (logits.argmax(-1) == behind).tolist()])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
