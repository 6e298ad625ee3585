"""The modules of a model that LoRA adapters may change: attention, shared experts, dense MLPs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.model.config import TensorPart
from workers.model.layers import LayerProduct

_WEIGHT = ".weight"
_ROUTERS = frozenset({"router", "attention_router", "mlp_router", "shared_gate"})
"""Short names of router and gate matrices, which adapters must not change."""
_GATE = "is a router or a gate, which adapters do not change"
_RULES: Sequence[tuple[tuple[str, ...], str]] = (
    ((".experts.", ".experts"), "is of routed experts, which adapters do not change"),
    ((".input_linear", ".output_linear"), "is of routed experts, which adapters do not change"),
    (("embed_tokens",), "is the embedding, which adapters do not change"),
    (("lm_head", "score"), "is the model's head, which adapters do not change"),
    ((".gate", "_gate"), _GATE),
    ((".router", ".router."), _GATE),
    (("norm",), "is a norm, which adapters do not change"),
    ((".kv_b_proj",), "is computed head by head, and adapters do not change it"),
)
"""Parts or ends of names of modules that adapters cannot change, with the reason for error
messages."""


_NOT_LOADED: Any = None
"""Placeholder for the product of a ``LoraTarget`` in a model without weights."""


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A module that LoRA adapters may change: one of the matrices that a product joins."""

    product: LayerProduct
    name: str
    """Short name of the module's matrix in the product."""

    @property
    def part(self) -> TensorPart:
        return self.product.parts[self.name]


def targets_of(products: Sequence[LayerProduct]) -> Mapping[str, LoraTarget]:
    """Return the modules that adapters may change, by the names of the checkpoint's tensors without
    ``.weight``."""
    return {
        target.part.name.removesuffix(_WEIGHT): target
        for product in products
        for target in _targets(product)
    }


def targets_without_weights(parts: Iterable[TensorPart]) -> Mapping[str, LoraTarget]:
    """Return the modules that adapters may change in a model that is not loaded, by module name.

    ``parts``: the tensors of an attention worker. The results serve only to check adapters: their
    products cannot be called.
    """
    modules = {part.name.removesuffix(_WEIGHT): part for part in parts if _is_matrix(part)}
    return {
        module: LoraTarget(LayerProduct(_NOT_LOADED, {module: part}), module)
        for module, part in modules.items()
        if _reason_by_name(module) is None
    }


def refusal_reason(module: str) -> str:
    """Return why adapters cannot change a module, as the rest of a sentence that begins with the
    module's name."""
    other = "is no projection of attention, shared expert or dense MLP of this model"
    return _reason_by_name(module) or other


def _reason_by_name(module: str) -> str | None:
    for marks, rule in _RULES:
        if any(module.endswith(mark) or (mark.endswith(".") and mark in module) for mark in marks):
            return rule
    return None


def _is_matrix(part: TensorPart) -> bool:
    """Whether a part is one complete matrix of the checkpoint, which an adapter requires."""
    is_plain = part.index is None and part.rows is None and not part.is_transposed
    return is_plain and len(part.shape) == 2


def _targets(product: LayerProduct) -> Iterator[LoraTarget]:
    for name, part in product.parts.items():
        if name not in _ROUTERS and _is_matrix(part):
            yield LoraTarget(product, name)
