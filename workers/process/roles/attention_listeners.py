"""The servers of an attention worker: engine stream and KV server."""

from __future__ import annotations

from msgspec.structs import replace

from cluster.core.topology import Member
from workers.engine.engine import Engine
from workers.engine.hello import add_capacity, make_hello
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
        hello = add_capacity(self._hello, engine, self._block_size)
        self._hello = replace(hello, keeps_copies=keeps_copies)


def _hello_of(context: WorkerContext) -> EngineHello:
    """The hello while the engine does not exist yet, without its capacity."""
    family, section = context.family, context.config.engine
    return replace(
        make_hello(context.member.name, family.config, family.banks, context.model.dtype_name),
        kv_block_size=section.block_size_tokens if section.enable_prefix_caching else 0,
    )
