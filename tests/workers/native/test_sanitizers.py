"""The kernels' tests once more, with checks of memory, undefined behaviour and threads by gcc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.workers.native.builds import SANITIZER

NATIVE, MODEL = "tests/workers/native", "tests/workers/model"
MEMORY = [
    f"{NATIVE}/test_{name}.py" for name in ("experts", "matrix", "panels", "quantized", "delta_net")
]
MEMORY += [
    f"{MODEL}/native/test_native_sublayer.py",
    "tests/workers/dispatch/test_native_exchange.py",
    "tests/system/test_native_layers.py",
]
THREADS = [
    f"{NATIVE}/test_experts.py::test_threads_change_no_bit",
    f"{NATIVE}/test_delta_net.py::test_bits_depend_on_the_sequence_alone",
    f"{NATIVE}/test_matrix.py::test_products_are_near_plain_ones_and_rows_their_own",
    f"{NATIVE}/test_thread_team.py::test_sleeping_threads_are_woken",
    f"{MODEL}/native/test_native_sublayer.py::test_bits_depend_on_the_row_alone",
]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python and torch keep memory to the end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "report_signal_unsafe=0",
}


def test_the_listed_tests_exist() -> None:
    for name in (*MEMORY, *THREADS):
        file, _, function = name.partition("::")
        assert f"def {function}" in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kinds", "library", "tests"),
    [("address,undefined", "libasan.so", MEMORY), ("thread", "libtsan.so", THREADS)],
)
def test_sanitizers_find_nothing(kinds: str, library: str, tests: list[str]) -> None:
    gcc = shutil.which("gcc")
    assert gcc, "the sanitizers' libraries are those of gcc"
    named = subprocess.run([gcc, f"-print-file-name={library}"], capture_output=True, text=True)
    environ = {
        **os.environ,
        **OPTIONS,
        "CC": gcc,
        SANITIZER: kinds,
        "LD_PRELOAD": named.stdout.strip(),
        "OMP_NUM_THREADS": "1",
    }
    # Addresses that are not random: libtsan expects its own regions to be free.
    command = ["setarch", "--addr-no-randomize", sys.executable, "-m", "pytest", "-x", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-m", "not slow", *tests],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert "Sanitizer" not in done.stdout + done.stderr
