"""Makes Triton's interpreter faster: by half, where kernels call functions of their own."""

from __future__ import annotations

import sys
from typing import Any

_done = False


def hasten_interpreter() -> None:
    """Let a function that a kernel calls take the language as the kernel has patched it.

    The interpreter goes through all names of the language for each call, only to find them patched.
    Without effect where Triton's interpreter was not imported.
    """
    global _done
    if _done or "triton.runtime.interpreter" not in sys.modules:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterError

    patch_and_call = InterpretedFunction.__call__

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return patch_and_call(function, *args, **kwargs)
        rewritten = function.rewrite()
        try:
            return rewritten(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    InterpretedFunction.__call__ = call
    _done = True
