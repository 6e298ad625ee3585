"""Returns freed memory to the operating system.

Python frees the memory of a request, but glibc returns only free memory at the end of a heap to
the system. After a burst of requests, most free memory is elsewhere. ``cluster.launch.local_ray``
sets one heap for all threads.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable


@functools.cache
def start_trimming(period_s: float = 30.0) -> threading.Thread | None:
    """Start a thread that returns freed memory every ``period_s`` seconds; starts at most one.

    Each time takes 5 to 9 ms for a heap of 100 MiB, without holding the GIL. Returns None if the C
    library is not glibc, which alone has ``malloc_trim``.
    """
    return_freed = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if return_freed is None:
        return None
    thread = threading.Thread(
        target=_trim_forever, args=(return_freed, period_s), name="freed-memory", daemon=True
    )
    thread.start()
    return thread


def _trim_forever(return_freed: Callable[[int], int], period_s: float) -> None:
    while True:
        time.sleep(period_s)
        return_freed(0)
