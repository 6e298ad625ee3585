"""Move loaded weights to huge pages, if Linux supports them and the weights are not in such pages.

Large weights are allocated in huge pages (``workers.native.memory``); small ones share a page with
other data. The speed of small batches depends on how fast weights are read. Under a hypervisor, a
TLB miss is expensive, and pages of 4 KiB cost 128 misses for 512 x 512 bfloat16. On two cores
of an AMD EPYC in a virtual machine, random model of ``make bench``, 64 tokens: 1 sequence 60.4 ->
65.4 tokens/s, 8 sequences 180.6 -> 190.6 tokens/s. ``MADV_COLLAPSE`` also moves memory that
libraries allocated before, one huge page at a time: unlike ``MADV_HUGEPAGE`` it can be stopped when
the kernel takes long to find free huge pages. Source: ``madvise(2)``, Linux 6.1 and later.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MIN_BYTES = 64 * 1024 * 1024
"""Minimum bytes of weights for which moving to huge pages is worth the time."""
LIMIT_S = 2.0
"""Time limit of ``collapse`` in seconds, enough for about 0.8 GB if memory is not fragmented."""
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
"""Folder of the settings with which the administrator enables huge pages."""
_MADV_COLLAPSE = 25
_MIN_PRESENT = 0.95
"""Minimum share of a huge page's range that must be in use already to move the range to a huge
page, so that the process hardly grows."""
_MAPPING = re.compile(r"([0-9a-f]+-[0-9a-f]+) rw-p \S+ \S+ 0\s+(?:\[heap\])?$")
"""Pattern of the line in ``/proc/self/smaps`` at which the heap or anonymous private memory
begins."""
_PRESENT_BIT = 0x80
_ENTRY_BYTES = 8
"""Bytes of an entry of ``/proc/self/pagemap``, one per page; its last byte has the present bit."""


def collapse_weights(
    device_type: str, loaded_bytes: int, advance: Callable[[], None] | None = None
) -> None:
    """Move loaded weights to huge pages (``collapse``) if they are on the CPU and have at least
    ``MIN_BYTES``."""
    if device_type == "cpu" and loaded_bytes >= MIN_BYTES:
        collapse(advance=advance)


def collapse(
    limit_s: float = LIMIT_S,
    advance: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    settings: Path = SETTINGS,
) -> int:
    """Move memory of this process to huge pages, for about ``limit_s``; return the bytes moved.

    Calls ``advance``, a progress callback, before every huge page. Moves nothing and returns 0 if
    the system lacks ``MADV_COLLAPSE`` or its administrator has disabled huge pages.
    """
    huge_bytes = _huge_page_bytes(settings)
    if not huge_bytes:
        return 0
    madvise = ctypes.CDLL(None).madvise
    end, collapsed = clock() + limit_s, 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for address in _candidates(huge_bytes):
            if clock() >= end:
                break
            if advance is not None:
                advance()
            if _is_in_use(pagemap.fileno(), address, huge_bytes):
                place, length = ctypes.c_void_p(address), ctypes.c_size_t(huge_bytes)
                collapsed += huge_bytes * (madvise(place, length, _MADV_COLLAPSE) == 0)
    return collapsed


def _huge_page_bytes(settings: Path) -> int:
    """Size of a huge page in bytes; 0 if huge pages must not be used."""
    try:
        if "[never]" in (settings / "enabled").read_text():
            return 0
        return int((settings / "hpage_pmd_size").read_text())
    except OSError:
        return 0


def _candidates(huge_bytes: int) -> Iterator[int]:
    """Yield the address of every aligned range of ``huge_bytes`` within the heap and anonymous
    private memory, except memory for which huge pages were already requested."""
    span = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (found := _MAPPING.match(line)) is not None:
            span = found[1]
        elif line.startswith("VmFlags:") and span:
            first, last = (int(address, 16) for address in span.split("-"))
            aligned = -(-first // huge_bytes) * huge_bytes
            if "hg" not in line.split():
                yield from range(aligned, last - huge_bytes + 1, huge_bytes)
            span = ""


def _is_in_use(pagemap: int, address: int, huge_bytes: int) -> bool:
    """Whether nearly all small pages in the range of a huge page at ``address`` are present."""
    num_pages = huge_bytes // mmap.PAGESIZE
    entries = os.pread(pagemap, num_pages * _ENTRY_BYTES, address // mmap.PAGESIZE * _ENTRY_BYTES)
    present = sum(byte & _PRESENT_BIT > 0 for byte in entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES])
    return present >= _MIN_PRESENT * num_pages
