"""KV blocks and recurrent states of one engine: the tensors, and which of them are in use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from cluster.config.cluster import EngineSection
from cluster.config.kv_cache import kv_vector_bytes
from workers.kv.block_pool import BlockPool
from workers.kv.cache import KVCache
from workers.kv.state_slots import StateSlots
from workers.kv.tiers.tiers import KvTiers
from workers.kv.transfer.store import KvTransferStore
from workers.model.compute_threads import ComputeThreads
from workers.model.config import ModelConfig
from workers.model.layers import AttentionModel
from workers.requests.sequence import SequenceState
from workers.scheduling.step_plan import PlannedRows, StepPlan


class KvMemory:
    """Holds the KV blocks and recurrent states of one engine, and clears blocks that contain NaN.

    The blocks of a sequence with NaN or infinity are removed from the prefix cache and zeroed.
    """

    def __init__(
        self,
        model: AttentionModel,
        config: ModelConfig,
        section: EngineSection,
        max_model_len: int,
        compute_threads: ComputeThreads,
    ) -> None:
        """Allocate KV blocks and states on the model's device. Raises ``ConfigError``."""
        kind, itemsize = section.kv_cache_dtype, model.dtype.itemsize
        token_bytes = config.kv_vectors_per_token * kv_vector_bytes(kind, config.head_dim, itemsize)
        num_blocks = section.num_kv_blocks(token_bytes, max_model_len)
        has_states = config.delta_net is not None
        states = StateSlots(section.num_states, section.max_num_seqs) if has_states else None
        self.states = states
        """Slots of recurrent states; None if the model has none."""
        self.cache = KVCache(
            config=config,
            num_blocks=num_blocks,
            block_size=section.block_size_tokens,
            dtype=model.dtype,
            device=model.device,
            compute_threads=compute_threads,
            kv_cache_dtype=kind,
            num_states=0 if states is None else states.num_slots,
        )
        self.pool = BlockPool(num_blocks, int(num_blocks * section.kv_kept_share))
        """Reference counts of all blocks, and the hashes of cached blocks."""
        self.store = KvTransferStore(self.pool, self.cache, states)
        """Has references to blocks while they are sent to other workers or fetched from them."""
        self.tiers: KvTiers | None = None
        """Tiers (host memory and disk) with copies of blocks; None without tiers."""

    def clear_planned(self, plan: StepPlan) -> None:
        """Clear the cache slots that the rows of a plan may have written."""
        self.cache.clear_slots(plan.cache_slots(self.cache.block_size))

    def clear_rejected(
        self, broken: Sequence[PlannedRows], drawn: Mapping[SequenceState, Sequence[int]]
    ) -> None:
        """Clear the cache slots of rejected draft tokens, which may contain NaN.

        ``broken``: plan entries with drafts in which any row has NaN. ``drawn``: the new tokens of
        each sequence, one more than its accepted drafts.
        """
        rejected = [
            replace(rows, first=rows.first + kept, count=rows.count - kept)
            for rows in broken
            if (kept := max(len(drawn.get(rows.sequence, ())), 1)) < rows.count
        ]
        self.clear_planned(StepPlan(tuple(rejected)))

    def forget(self, broken: Sequence[SequenceState]) -> Collection[int]:
        """Remove the blocks of ``broken`` sequences (with NaN) from the prefix cache and the tiers.

        Returns these blocks.
        """
        dirty = {block for sequence in broken for block in sequence.blocks}
        self.pool.forget(dirty)
        if self.states is not None:
            for sequence in broken:
                self.states.forget(sequence.block_hashes)
        if self.tiers is not None:
            self.tiers.forget(name for s in broken for name in s.block_hashes)
        return dirty

    def clear_free(self, dirty: Collection[int]) -> None:
        """Zero the blocks of ``dirty`` that are free, before another sequence gets them."""
        self.cache.clear([block for block in dirty if self.pool.is_free(block)])
