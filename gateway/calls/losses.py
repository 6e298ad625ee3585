"""Computes the losses of an inspection from the arrays of its prompts. Pure.

Source: transformers, ``load_balancing_loss_func`` of each family and the losses of sequence
classification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import RequestError
from workers.requests.inspection import IGNORED_LABEL, RouterShape


def aux_loss(
    prompts: Sequence[Mapping[str, NDArray[np.float32]]],
    lengths: Sequence[int],
    banks: Sequence[RouterShape],
) -> dict[str, float]:
    """Return the auxiliary loss over all tokens of all prompts, as transformers 4 and 5 define it.

    The keys are ``transformers_4`` and ``transformers_5``. ``prompts`` have one [2, E] array per
    bank (set of E experts of a router): for each expert, the number of tokens that chose it and the
    sum of its probabilities. The loss is E * sum over e of f_e * p_e, where f_e and p_e are these
    two numbers of expert e divided by the number of (token, router) pairs. ``lengths`` are the
    numbers of tokens of the prompts.
    """
    found = {}
    for version in (4, 5):
        copies = {bank.name: min(bank.aux_copies, 1 if version == 4 else 2) for bank in banks}
        sums = np.sum(
            [
                copies[name] * sums.astype(np.float64)
                for one in prompts
                for name, sums in one.items()
            ],
            axis=0,
        )
        chosen, probability = sums / (sum(copies.values()) * sum(lengths))
        found[f"transformers_{version}"] = float(len(chosen) * (chosen * probability).sum())
    return found


def classification_loss(
    logits: NDArray[np.float32], labels: Sequence[Sequence[float]], problem_type: str
) -> float | None:
    """Return the mean loss of logits [prompts, classes]; None if all labels are -100 (ignored).

    ``labels`` has a row per prompt. Without a problem type, a model with one class does regression,
    and integer labels name single classes. Raises ``RequestError`` for labels of the wrong shape.
    """
    num_classes = logits.shape[1]
    is_whole = all(len(row) == 1 and float(row[0]).is_integer() for row in labels)
    kind = problem_type
    if not kind:
        single = "single_label_classification" if is_whole else "multi_label_classification"
        kind = "regression" if num_classes == 1 else single
    scores = logits.astype(np.float64)
    if kind == "single_label_classification":
        return _cross_entropy(scores, labels, is_whole)
    wrong = next((row for row in labels if len(row) != num_classes), None)
    if wrong is not None:
        raise RequestError(
            f"labels has {len(wrong)} values for a prompt, there are {num_classes} classes",
            "labels",
        )
    targets = np.array(labels, dtype=np.float64)
    if kind == "regression":
        return float(((scores - targets) ** 2).mean())
    # Numerically stable form of -t log s(x) - (1 - t) log(1 - s(x)).
    losses = np.maximum(scores, 0) - scores * targets + np.log1p(np.exp(-np.abs(scores)))
    return float(losses.mean())


def _cross_entropy(
    scores: NDArray[np.float64], labels: Sequence[Sequence[float]], is_whole: bool
) -> float | None:
    num_classes = scores.shape[1]
    known = {IGNORED_LABEL, *range(num_classes)}
    if not is_whole or any(int(row[0]) not in known for row in labels):
        raise RequestError(
            f"labels must be one class a prompt, {IGNORED_LABEL} or 0 to {num_classes - 1}",
            "labels",
        )
    classes = np.array([int(row[0]) for row in labels])
    kept = classes != IGNORED_LABEL
    if not kept.any():
        return None
    shifted = scores - scores.max(1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-logprobs[kept, classes[kept]].mean())
