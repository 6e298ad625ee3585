"""The simulated GPU of ``benchmarks.harness``, for tests, which are skipped without Triton."""

import pytest

pytest.importorskip("triton.runtime.interpreter", reason="Triton has wheels for Linux only")

from benchmarks.harness.pretend_gpu import DEVICE, DeviceLog, pretend_gpu

__all__ = ["DEVICE", "DeviceLog", "pretend_gpu"]
