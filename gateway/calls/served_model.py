"""The served model: its name, its adapters, and the limits that the engines report."""

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
        """First message of a connected engine, which describes the model.

        Without a connected engine, the last known message; None before the first.
        """
        hello = next((client.hello for client in self._engines.clients), None)
        if hello is not None and hello is not self._hello:
            self._hello, self._facts = hello, model_facts(self.name, hello)
        return self._hello

    @property
    def facts(self) -> ModelFacts | None:
        """Limits and properties of the model; None until an attention worker has reported them."""
        return self._facts if self.hello is not None else None

    def require_facts(self) -> ModelFacts:
        """Return the limits of the model.

        Raises ``NotReadyError`` until an attention worker has reported them.
        """
        if (facts := self.facts) is None:
            raise NotReadyError("no attention worker is ready", "not_ready", 2.0)
        return facts

    def knows(self, name: str) -> bool:
        """Whether this is the name of the model, or of an adapter that the caller may use."""
        return name == self.name or self.adapters.find(name) is not None

    def adapter_of(self, name: str | None) -> str:
        """Return the key of the adapter with this model name; empty for the base model or None.

        Raises ``ModelNotFoundError`` for an unknown name.
        """
        if name is None or name == self.name:
            return ""
        if (key := self.adapters.find(name)) is None:
            raise ModelNotFoundError(f"the model {name[:128]!r} does not exist")
        return key

    def hold_adapter(self, name: str | None, held: ExitStack) -> str:
        """Return the key of the adapter with this model name, and keep it loaded for a call.

        The adapter stays loaded until ``held`` is closed. The key is empty for the base model or
        None. Raises ``ModelNotFoundError`` for an unknown name.
        """
        adapter = self.adapter_of(name)
        self.adapters.begin(held, adapter)
        held.callback(self.adapters.end, held)
        return adapter
