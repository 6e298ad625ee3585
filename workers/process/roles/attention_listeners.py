"""The servers of an attention worker: engine stream and KV server."""

from __future__ import annotations

from msgspec.structs import replace

from cluster.core.topology import Member
from workers.engine.engine import Engine
from workers.inspection.buffers import shape_of
from workers.process.context import WorkerContext
from workers.process.engine_server import EngineServer
from workers.process.gateway_streams import GATEWAY_SILENCE_LIMIT_S
from workers.process.intake.commands import Inbox
from workers.requests.block_hash import HASH_BYTES
from workers.requests.wire import EngineHello


class AttentionListeners:
    """Opens the engine stream and the KV server before the weights are loaded, and provides the
    worker's ``EngineHello`` for gateways.
    """

    def __init__(self, context: WorkerContext) -> None:
        """Raises ``OSError`` if a listener cannot be opened."""
        args, token = context.args, context.config.cluster_token
        self._hello = _hello_of(context)
        self._membership = context.membership
        self._block_size = context.config.engine.block_size_tokens
        self.inbox = Inbox(context.connections.wake)
        """Queue of gateway commands."""
        self.stream = EngineServer(
            args.host,
            token,
            self.inbox,
            self.hello,
            max(GATEWAY_SILENCE_LIMIT_S, context.config.transport.detection_limit_s),
        )
        self._address = self.stream.start()
        context.cleanup.callback(self.stream.stop)
        self.kv_server = context.open_peer_server("kv-blocks", HASH_BYTES)
        """Server from which other workers fetch KV blocks; started after the weights are loaded."""

    def with_addresses(self, member: Member) -> Member:
        """Copy of ``member`` with the addresses of these servers."""
        return replace(member, engine_address=self._address, kv_address=self.kv_server.address)

    def hello(self) -> EngineHello:
        """The reply to a gateway's hello. Any thread."""
        return replace(self._hello, generation=self._membership.generation.number)

    def set_capacity(self, engine: Engine, *, keeps_copies: bool) -> None:
        """Add the engine's capacity to the hello, once the weights are loaded."""
        self._hello = replace(
            self._hello,
            max_model_len=engine.max_model_len,
            max_kv_tokens=engine.pool.num_blocks * self._block_size,
            keeps_copies=keeps_copies,
        )


def _hello_of(context: WorkerContext) -> EngineHello:
    """The hello while the engine does not exist yet, without its capacity."""
    config, section = context.family.config, context.config.engine
    return EngineHello(
        worker=context.member.name,
        generation=0,
        max_model_len=0,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_kv_tokens=0,
        dtype=context.model.dtype_name,
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_layers=len(config.kv_layers),
        num_heads=config.num_heads,
        labels=config.labels,
        pad_token_id=config.pad_token_id,
        problem_type=config.problem_type or "",
        banks=shape_of(config, context.family.banks).banks,
        kv_block_size=section.block_size_tokens if section.enable_prefix_caching else 0,
        kv_length_matters_above=config.length_matters_above,
        keeps_copies=False,
    )
