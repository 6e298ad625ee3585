"""What transformers says of the dense model, against which all is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.paths import ROOT

NEAR_TIE = 1e-3
"""Logits so close may change places by rounding."""
TOLERANCE = 2e-4
"""Of logits and log-probabilities in float32."""
_CORPUS = ROOT / "benchmarks" / "data" / "tinyshakespeare.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The dense model and its checkpoints as mixtures of experts."""

    dense: Any
    """``LlamaForCausalLM`` in float32."""
    tokenizer: Any
    """That of transformers."""
    folders: Mapping[str, Path]
    """Checkpoints by family."""
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def document(self, num_tokens: int) -> tuple[int, ...]:
        """The first tokens of the corpus."""
        text = _CORPUS.read_text(encoding="utf-8")[: 8 * num_tokens]
        return tuple(self.tokenizer.encode(text)[:num_tokens])

    def chat(self, messages: Sequence[Mapping[str, str]], **options: bool) -> tuple[int, ...]:
        """Token ids of a conversation."""
        found = self.tokenizer.apply_chat_template(messages, **options)
        return tuple(found["input_ids"])

    def ask(self, question: str) -> tuple[int, ...]:
        """The prompt of one question."""
        return self.chat([{"role": "user", "content": question}], add_generation_prompt=True)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], first: int = 0) -> Tensor:
        """Logits [n - first, V] behind each token from ``first`` on."""
        hidden = self.dense.model(torch.tensor([ids])).last_hidden_state[0, first:]
        found: Tensor = self.dense.lm_head(hidden)
        return found

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probabilities [n - 1] of the tokens behind the first one."""
        behind = torch.tensor(ids[1:])
        return self.logits(ids)[:-1].log_softmax(-1).gather(1, behind[:, None])[:, 0]

    def check_greedy(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Each token of an answer is the best one behind those before it, or nearly ties with it.

        Raises ``AssertionError``.
        """
        ids = (*prompt, *answer)
        if ids not in self._known:
            logits = self.logits(ids[:-1], len(prompt) - 1)
            own = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            self._known[ids] = logits.amax(-1) - own
        gaps = self._known[ids]
        worst = int(gaps.argmax())
        assert gaps[worst] < NEAR_TIE, (
            f"token {worst} of {list(answer)} is {gaps[worst]:.4f} below the best one"
        )
