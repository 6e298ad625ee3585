"""Beam searches by transformers, in float32.

Cases come as JSON on stdin: ``[{"path": checkpoint, "prompt": [..], "num_beams": 4, ..}, ..]``,
with the names of ``generate``; on stdout, for each case, its beams, the best first, and how near
the search was to another result:

    {"beams": [[tokens, ends included], ..], "scores": [..], "margin": 0.0123}
"""

from __future__ import annotations

import json
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch

from tests.reference.make_goldens import load_model


class Margins:
    """The smallest difference between two numbers whose order decided something."""

    def __init__(self, model: Any) -> None:
        self.least = float("inf")
        self._model = model
        self._get_top = model._get_top_k_continuations
        self._check = model._check_early_stop_heuristic
        self.ending: list[int] = []
        model._get_top_k_continuations = self._top
        model._check_early_stop_heuristic = self._stop

    def _top(self, accumulated_log_probs: Any, num_beams: int, **more: Any) -> Any:
        """Which beams are kept, and whether ends are among the best."""
        row = accumulated_log_probs[0]
        vocab_size = len(row) // num_beams
        is_end = torch.isin(torch.arange(len(row)) % vocab_size, torch.tensor(self.ending).long())
        for kept in (row, row[~is_end]):
            best = kept.topk(num_beams + 1).values
            self.note(float(best[-2] - best[-1]))
        return self._get_top(
            accumulated_log_probs=accumulated_log_probs, num_beams=num_beams, **more
        )

    def _stop(self, beam_scores: Any, is_sent_finished: Any, **more: Any) -> Any:
        """Whether it ends."""
        if is_sent_finished.all():
            length = more["cur_len"] - more["decoder_prompt_len"]
            if more["early_stopping"] == "never" and more["length_penalty"] > 0:
                length = more["max_length"] - more["decoder_prompt_len"]
            best = more["running_beam_scores"][0, 0] / length ** more["length_penalty"]
            self.note(abs(float(best - beam_scores.min())))
        return self._check(beam_scores=beam_scores, is_sent_finished=is_sent_finished, **more)

    def note(self, margin: float) -> None:
        self.least = min(self.least, margin)


def search(model: Any, margins: Margins, case: dict[str, Any]) -> dict[str, Any]:
    """The beams of one case."""
    ending = case["eos_token_id"]
    margins.least, margins.ending = float("inf"), ending
    num_beams, prompt = case["num_beams"], torch.tensor([case["prompt"]])
    with torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=case["max_new_tokens"],
            min_new_tokens=case.get("min_new_tokens"),
            length_penalty=case.get("length_penalty", 1.0),
            early_stopping=case.get("early_stopping", False),
            eos_token_id=ending or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    beams = [_cut(ids[prompt.shape[1] :].tolist(), set(ending)) for ids in found.sequences]
    scores = found.sequences_scores.tolist() if num_beams > 1 else []
    for one, other in pairwise(scores):
        margins.note(one - other)
    return {"beams": beams, "scores": scores, "margin": margins.least}


def _cut(ids: list[int], ending: set[int]) -> list[int]:
    """Without what fills a shorter output up."""
    end = next((place for place, token in enumerate(ids) if token in ending), len(ids))
    return ids[: end + 1]


def main() -> None:
    """Read, compute, write."""
    torch.set_num_threads(1)
    results: list[Any] = []
    for path, cases in groupby(json.load(sys.stdin), key=lambda case: case["path"]):
        model = None
        config = json.loads((Path(path) / "config.json").read_text())
        for case in cases:
            if model is None or "dynamic" in str(model.config):  # such a rope remembers lengths
                model = load_model(Path(path), config)
                model.generation_config.eos_token_id = None
                model.generation_config.use_mtp = False
                margins = Margins(model)
            results.append(search(model, margins, case))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
