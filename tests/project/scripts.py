from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.paths import ROOT


def load_script(name: str) -> ModuleType:
    """A script of ``.ci`` as a module, with the scripts beside it that it imports."""
    if str(ROOT / ".ci") not in sys.path:
        sys.path.append(str(ROOT / ".ci"))
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
