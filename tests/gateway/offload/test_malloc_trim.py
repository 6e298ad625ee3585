from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from gateway.offload import malloc_trim

_HOLD_AND_FREE = """
import ctypes, time
import psutil
from gateway.offload import malloc_trim

BLOCK, COUNT = 64 * 1024, 1024
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = psutil.Process().memory_info
before = memory().rss
blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
for block in blocks:
    ctypes.memset(block, 1, BLOCK)
for block in blocks[:-1]:
    libc.free(ctypes.c_void_p(block))
assert memory().rss - before > BLOCK * COUNT * 0.9, "the last block keeps what was freed below it"
thread = malloc_trim.start_trimming(0.01)
assert thread is malloc_trim.start_trimming(0.01)
while memory().rss - before > BLOCK * COUNT * 0.1:
    time.sleep(0.01)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_memory_freed_below_a_block_in_use_is_returned() -> None:
    subprocess.run([sys.executable, "-c", _HOLD_AND_FREE], check=True, timeout=60)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert malloc_trim.start_trimming.__wrapped__() is None
