"""The toy model: what a token must be, and the parts that compute it from what really is there.

The state after a token is a hash of the state before, of the token, and of the *contents* of all
expert slots that served its row; the first state is that of the tenant, and the next token is a
hash of the newest state. So a slot that is empty, half written or another expert's, or a KV block
of another prompt or tenant, changes all tokens after it, and ``right_tokens`` says what they must
be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.simulation.kernel import Kernel
from tests.simulation.toy_adapters import adapter_value
from tests.simulation.toy_text import ToyGrammar
from workers.beams.search import BeamSearch
from workers.model.config import BankSpec, ExchangeSpec, ExpertMatrix, ModelConfig, TensorPart
from workers.model.side_stream import SideStream
from workers.requests.request import TokenLogprob

VOCAB = 997
TOP_K = 2
NUM_EXPERTS = int(os.environ.get("SIMULATED_EXPERTS", "8"))
"""Number of routed experts, of which each expert worker of a large cluster needs one."""
BLOCK_TOKEN_BYTES = 8
"""Of a block's data, for each token."""
_COPY_S = 200e-6
"""Longest time to copy a block."""
MATRICES = 2
"""Matrices of an expert: between two of them it is half loaded."""
BANKS = tuple(
    BankSpec(
        index=layer,
        bank="mlp",
        layer=layer,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        exchanges=(ExchangeSpec(index=0, name="mlp", in_width=1, out_width=1, expert_width=1),),
    )
    for layer in range(2)
)
"""The most that a model has."""
CONFIG = ModelConfig(
    model_type="toy",
    vocab_size=VOCAB,
    hidden_size=1,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    eos_token_ids=(),
    dtype="float32",
    rope=SimpleNamespace(rope_type="default", factor=1.0),  # type: ignore[arg-type]
)


def first_state(salt: str) -> int:
    """State before the first token of a tenant's prompt: a block of another tenant's is wrong."""
    return int.from_bytes(salt.encode())


def banks() -> tuple[BankSpec, ...]:
    """The banks that the model has in the simulation that runs."""
    kernel = Kernel.current
    assert kernel is not None
    return BANKS[: kernel.num_banks]


def chosen_experts(token: int, position: int, bank: int) -> tuple[int, int]:
    """The router: experts of one row. Half of the rows go where their token belongs."""
    drawn = hash((token, position, bank))
    first = (drawn >> 8) % NUM_EXPERTS if drawn & 1 else token * NUM_EXPERTS // VOCAB
    other = (first + 1 + hash((position, bank, token)) % (NUM_EXPERTS - 1)) % NUM_EXPERTS
    return first, other


def matrix_value(bank: int, expert: int, matrix: int) -> int:
    """What a matrix of an expert holds in the checkpoint."""
    return 1 + bank * 1000 + expert * 10 + matrix


def expert_value(bank: int, expert: int) -> int:
    """What an expert contributes to the state of a row: a digest of its matrices."""
    return digest([matrix_value(bank, expert, m) for m in range(MATRICES)])


def digest(matrices: Sequence[int]) -> int:
    """Of the matrices in a slot, below 2 ** 31."""
    return hash(tuple(matrices)) & 0x7FFFFFFF


def next_state(state: int, token: int, contents: Sequence[int]) -> int:
    """State after a token, below 2 ** 62."""
    return hash((state, token, *contents)) & ((1 << 62) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How the tokens of one choice are drawn from states."""

    seed: int
    choice: int
    top_k: int = 0
    """Only these tokens, from 0 on, so that outputs repeat themselves; 0: all."""

    def next_token(self, state: int, index: int, grammar: ToyGrammar | None = None) -> int:
        """Token ``index`` of the output, from the state before it."""
        size = self.top_k or VOCAB
        token = hash((state, self.seed, self.choice, index)) % size
        while grammar is not None and not grammar.allows(token):
            token = (token + 1) % size
        return token


def beam_candidates(state: int, width: int, ending: Container[int]) -> list[TokenLogprob]:
    """What may follow a beam, the best first: enough that do not end it."""
    found: dict[int, float] = {}
    num_open = draw = 0
    while num_open < width:
        token, value = hash((state, draw)) % VOCAB, hash((state, draw, draw)) % 4096
        draw += 1
        if token not in found:
            found[token] = -0.1 - value / 1024
            num_open += token not in ending
    ranked = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    return [TokenLogprob(token_id=token, logprob=value) for token, value in ranked]


_VALUES = tuple(tuple(expert_value(b, e) for e in range(NUM_EXPERTS)) for b in range(len(BANKS)))


def state_after(state: int, token: int, position: int, adapter: str = "") -> int:
    """The state that a token must lead to."""
    contents = [
        _VALUES[bank][expert]
        for bank in range(len(banks()))
        for expert in chosen_experts(token, position, bank)
    ]
    return next_state(state, token, [*contents, adapter_value(adapter)] if adapter else contents)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an output goes on from."""

    ids: Sequence[int]
    salt: str
    adapter: str = ""
    """Its name."""

    def state(self) -> int:
        """The state that it must lead to."""
        state = first_state(self.salt)
        for position, token in enumerate(self.ids):
            state = state_after(state, token, position, self.adapter)
        return state

    def state_after(self, state: int, output: Sequence[int]) -> int:
        """The state behind an output, from the one before its last token."""
        return state_after(state, output[-1], len(self.ids) + len(output) - 1, self.adapter)


def right_tokens(
    prompt: Prompt, drawing: Drawing, count: int, grammar: ToyGrammar | None
) -> list[int]:
    """The oracle: the first tokens of a choice, whatever happens; fewer where a grammar ends."""
    state, output = prompt.state(), list[int]()
    while len(output) < count and not (grammar is not None and grammar.is_complete):
        output.append(drawing.next_token(state, len(output), grammar))
        state = prompt.state_after(state, output)
        if grammar is not None:
            grammar.advance(output[-1])
    return output


def right_beams(
    prompt: Prompt, search: BeamSearch, width: int, ending: Container[int]
) -> list[tuple[list[int], bool]]:
    """The oracle: the outputs of a search, the best first, and whether each ends by itself."""
    beams = [(prompt.state(), list[int]())]
    while not search.is_over:
        found = search.advance([beam_candidates(state, width, ending) for state, _ in beams])
        grown = [(beams[one.parent][0], [*beams[one.parent][1], one.token]) for one in found]
        beams = [(prompt.state_after(state, output), output) for state, output in grown]
    outputs = [[token.token_id for token in one.path.tokens()] for one in search.ended]
    return [(output, output[-1] in ending) for output in outputs]


class ToyFamily:
    """In place of ``workers.model.families``."""

    config = CONFIG

    def __init__(self) -> None:
        self.banks = banks()

    def expert_matrices(
        self, bank: BankSpec, exchange: int, expert: int, tensors: object
    ) -> list[ExpertMatrix]:
        name = f"{bank.index}.{expert}"
        return [
            ExpertMatrix(shape=shape, parts=(TensorPart(name=f"{name}.{m}", shape=shape),))
            for m, shape in enumerate(bank.exchanges[exchange].matrix_shapes)
        ]


class ToyBank:
    """In place of ``ExpertBank``: the numbers in the slots."""

    version = 0

    def __init__(self, spec: BankSpec, num_slots: int, on_write: Any) -> None:
        self.spec = spec
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.num_slots = 0
        self.slots: list[list[int]] = []
        self.values: list[int] = []
        """What a row gets from each slot."""
        self._on_write = on_write
        self.resize(num_slots)

    def native(self, exchange: int) -> None:
        """See ``SlotBank``."""

    def resize(self, num_slots: int) -> None:
        for slot in range(num_slots, self.num_slots):
            self._on_write(self.spec.index, slot)
        self.slots = [
            *self.slots[:num_slots],
            *([0] * MATRICES for _ in range(self.num_slots, num_slots)),
        ]
        self.num_slots = num_slots
        self.values = [digest(slot) for slot in self.slots]

    def store(
        self, slot: int, exchange: int, matrix: int, weight: Tensor, is_idle: bool = False
    ) -> None:
        self._on_write(self.spec.index, slot)
        self.slots[slot][matrix] = int(weight[0, 0])
        self.values[slot] = digest(self.slots[slot])

    def read(self, slot: int, exchange: int, matrix: int) -> Tensor:
        shape = self.spec.exchanges[exchange].matrix_shapes[matrix]
        return torch.full(shape, float(self.slots[slot][matrix]))

    def clear(self, slot: int) -> None:
        self._on_write(self.spec.index, slot)
        self.slots[slot] = [0] * MATRICES
        self.values[slot] = digest(self.slots[slot])


class ToyCache:
    """In place of ``KVCache``: the state after each token, in ``slots``. It has no recurrent
    ones."""

    compute_threads: Any = None

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.side = SideStream(torch.device("cpu"))
        self.null_block = num_blocks
        self.slots = [0] * ((num_blocks + 1) * block_size)
        self.states: tuple[Tensor, ...] = ()
        self.state_shape = (0, 0)
        self.state_bytes = 0

    @property
    def block_shape(self) -> tuple[int, ...]:
        return (self.block_size,)

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64

    @property
    def block_bytes(self) -> int:
        return BLOCK_TOKEN_BYTES * self.block_size

    def read_block(self, block: int) -> Tensor:
        _copying()
        first = block * self.block_size
        return torch.tensor(self.slots[first : first + self.block_size], dtype=torch.int64)

    def write_block(self, block: int, data: Tensor) -> None:
        _copying()
        first = block * self.block_size
        self.slots[first : first + self.block_size] = data.tolist()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        size = self.block_size
        for source, target in pairs:
            copied = self.slots[source * size : (source + 1) * size]
            self.slots[target * size : (target + 1) * size] = copied

    def clear_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.slots[slot] = 0

    def clear(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.clear_slots(range(block * self.block_size, (block + 1) * self.block_size))


def _copying() -> None:
    """A block is copied, in a thread; others go on meanwhile."""
    kernel = Kernel.current
    assert kernel is not None
    if kernel.fiber is not None:
        kernel.sleep(kernel.rng.random() * _COPY_S)


@dataclass(frozen=True, slots=True)
class ToyResult:
    """In place of ``StepResult``."""

    states: tuple[Sequence[int], ...]
    """After each row of each entry of the plan."""
    routed: Sequence[Sequence[Any]]
    drawn: Mapping[Any, int] | None
    """The new token of each sequence, if the step may be read late."""

    def to_host_later(self) -> Callable[[], ToyResult]:
        """See ``StepResult``."""
        return lambda: self

    def select(self, entries: Sequence[int]) -> ToyResult:
        """See ``StepResult``. A step that may be read late has a row for each entry."""
        kept, count = list(entries), len(entries)
        routed = [
            [replace(own, topk_ids=own.topk_ids[kept], num_decodes=count) for own in bank]
            for bank in self.routed
        ]
        return ToyResult(tuple(self.states[entry] for entry in kept), routed, self.drawn)


def rows_of(plan_rows: Sequence[Any], newest: Mapping[Any, int]) -> Iterator[tuple[Any, int, int]]:
    """(entry, token, position) of every row. ``newest``: tokens that are not committed yet."""
    for planned in plan_rows:
        if planned.first == planned.sequence.num_tokens:
            yield planned, newest[planned.sequence], planned.first
            continue
        last = planned.first + planned.count - len(planned.drafts)
        tokens = (*planned.sequence.tokens(planned.first, last), *planned.drafts)
        for position, token in enumerate(tokens, planned.first):
            yield planned, token, position
