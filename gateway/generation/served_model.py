"""The served model as clients name it, and its limits as the engines report them."""

from __future__ import annotations

from contextlib import ExitStack

from cluster.core.errors import ModelNotFoundError, NotReadyError
from gateway.auth.adapter_catalog import AdapterCatalog
from gateway.core.model import ModelFacts, model_facts
from gateway.engines.engine_pool import EnginePool
from workers.requests.wire import EngineHello


class ServedModel:
    """Decides what a client's name of a model means, and which limits calls to it have.

    Args:
        name: the one under which it is served.
        engines: their hellos describe it.
    """

    def __init__(self, name: str, engines: EnginePool) -> None:
        self.name = name
        self.adapters = AdapterCatalog()
        self._engines = engines
        self._hello: EngineHello | None = None
        self._facts: ModelFacts | None = None

    @property
    def hello(self) -> EngineHello | None:
        """The last one that an engine with an open stream has sent; None before the first."""
        hello = next((client.hello for client in self._engines.clients), None)
        if hello is not None and hello is not self._hello:
            self._hello, self._facts = hello, model_facts(self.name, hello)
        return self._hello

    @property
    def facts(self) -> ModelFacts | None:
        """Its limits; None until a worker has reported them."""
        return self._facts if self.hello is not None else None

    def require_facts(self) -> ModelFacts:
        """Its limits. Raises ``NotReadyError`` before a worker has reported them."""
        if (facts := self.facts) is None:
            raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
        return facts

    def adapter_of(self, name: str | None) -> str:
        """Key of the adapter that a request names as its model; empty for the model itself, which
        None means, too.

        Raises ``ModelNotFoundError``.
        """
        if name is None or name == self.name:
            return ""
        if (key := self.adapters.find(name)) is None:
            raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")
        return key

    def hold_adapter(self, name: str | None, held: ExitStack) -> str:
        """What ``adapter_of`` returns; the adapter stays loaded until ``held`` is closed."""
        adapter = self.adapter_of(name)
        self.adapters.begin(held, adapter)
        held.callback(self.adapters.end, held)
        return adapter
