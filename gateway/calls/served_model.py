"""The served model: its names and the limits that the engines report."""

from __future__ import annotations

from contextlib import ExitStack

from cluster.core.errors import ModelNotFoundError, NotReadyError
from gateway.auth.adapter_catalog import AdapterCatalog
from gateway.core.model import ModelFacts, model_facts
from gateway.engines.engine_pool import EnginePool
from workers.requests.wire import EngineHello


class ServedModel:
    """Resolves the model names of clients, and provides the limits of the model.

    Args:
        name: name under which the model is served.
        engines: streams to the engines, whose ``EngineHello`` messages describe the model.
    """

    def __init__(self, name: str, engines: EnginePool) -> None:
        self.name = name
        self.adapters = AdapterCatalog()
        self._engines = engines
        self._hello: EngineHello | None = None
        self._facts: ModelFacts | None = None

    @property
    def hello(self) -> EngineHello | None:
        """``EngineHello`` of a connected engine, or the last known one; None before the first."""
        hello = next((client.hello for client in self._engines.clients), None)
        if hello is not None and hello is not self._hello:
            self._hello, self._facts = hello, model_facts(self.name, hello)
        return self._hello

    @property
    def facts(self) -> ModelFacts | None:
        """Limits of the model; None until a worker has reported them."""
        return self._facts if self.hello is not None else None

    def require_facts(self) -> ModelFacts:
        """Limits of the model. Raises ``NotReadyError`` before a worker has reported them."""
        if (facts := self.facts) is None:
            raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
        return facts

    def adapter_of(self, name: str | None) -> str:
        """Key of the adapter with this model name; empty for the base model and for None.

        Raises ``ModelNotFoundError``.
        """
        if name is None or name == self.name:
            return ""
        if (key := self.adapters.find(name)) is None:
            raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")
        return key

    def hold_adapter(self, name: str | None, held: ExitStack) -> str:
        """Like ``adapter_of``; also keep the adapter loaded until ``held`` is closed."""
        adapter = self.adapter_of(name)
        self.adapters.begin(held, adapter)
        held.callback(self.adapters.end, held)
        return adapter
