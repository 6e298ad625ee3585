"""The bounds of torch's releases, and that private functions are named in one module."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import Backend, FakeProcessGroup, FakeWork, HashStore

from tests.paths import ROOT
from workers.model import torch_private
from workers.model.torch_private import check_version, coalesced, connect_nccl_group, has_failed
from workers.transport.nccl_environment import NCCL_ENVIRONMENT

pytestmark = pytest.mark.heavy

TORCH = Path(torch.__file__).parent
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", "2.13.1", "2.12.0a0+git1", torch.__version__]
)
def test_tested_releases_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.14.0a0+git1", "3.0.0", "1.13.1"])
def test_other_releases_are_refused_by_name(version: str) -> None:
    message = f"torch {version} is not supported: must be at least 2.11 and below 2.14"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        check_version(version)


def test_the_package_asks_for_the_same_releases() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "torch>=2.11,<2.14" in project["dependencies"]


def test_no_other_module_names_a_private_function() -> None:
    private = re.compile(r"\btorch(\.\w+)*\._[a-z]|\b(_start_coalescing|_Options|_C)\b")
    folders = [ROOT / name for name in ("workers", "cluster", "gateway")]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    found = {file.name for file in files if private.search(file.read_text(encoding="utf-8"))}
    assert found == {"torch_private.py"}


_WITHOUT_ONEDNN = """
from types import SimpleNamespace
import torch
torch._C._has_mkldnn = False
torch.ops.mkldnn = SimpleNamespace()
from workers.experts.scripted_products import expert_products
from workers.model.layers import Linear, can_pack
weight, rows = torch.randn(512, 512), torch.randn(3, 512)
assert not can_pack(weight)
torch.testing.assert_close(Linear(weight)(rows), rows @ weight.T)
torch.testing.assert_close(expert_products(rows, [3], [weight], [], False), rows @ weight.T)
"""


@pytest.mark.slow
def test_a_torch_without_onednn_computes_with_plain_weights() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_ONEDNN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# NCCL's groups, of which a build for CPUs has the base class, the declarations and the headers.


def group_with_signatures_of_torch() -> Any:
    """Compiled by torch: a call with a wrong argument raises TypeError."""
    return FakeProcessGroup._create_internal(0, 2)


def test_transfers_are_coalesced_by_the_calls_that_torch_has() -> None:
    group = group_with_signatures_of_torch()
    begun: list[int] = []

    def start() -> None:
        group.send([torch.zeros(1)], 1, 7)
        group.recv([torch.zeros(1)], 1, 7)
        begun.append(1)

    assert isinstance(coalesced(group, start), FakeWork)
    assert begun
    for name in ("_start_coalescing", "_end_coalescing", "abort"):
        signature = (getattr(Backend, name).__doc__ or "").splitlines()[0]
        assert re.fullmatch(rf"{name}\(self: [\w.]+\) -> .+", signature), signature


def test_a_group_is_closed_when_a_transfer_cannot_start() -> None:
    """NCCL's groups nest: a later one would never run."""
    calls: list[str] = []
    group = SimpleNamespace(
        _start_coalescing=lambda: calls.append("start"),
        _end_coalescing=lambda: calls.append("end"),
    )

    def start() -> None:
        raise RuntimeError("aborted")

    with pytest.raises(RuntimeError, match="aborted"):
        coalesced(group, start)
    assert calls == ["start", "end"]


def test_a_device_is_connected_by_the_call_that_torch_has() -> None:
    connect_nccl_group(group_with_signatures_of_torch(), CPU)


def test_a_failed_transfer_is_seen_without_a_wait() -> None:
    def result_of(*names: str) -> Any:
        future: Any = torch.futures.Future()
        for name in names:
            results: Any = vars(_distributed_c10d)["WorkResult"]  # not in torch's stub
            future.set_result(int(results.__members__[name]))
        return SimpleNamespace(get_future_result=lambda: future)

    assert not has_failed(result_of())
    assert not has_failed(result_of("SUCCESS"))
    assert has_failed(result_of("COMM_ERROR"))
    assert has_failed(result_of("TIMEOUT"))


def declared(*path: str) -> dict[str, ast.stmt]:
    """What torch declares for a class of its compiled module, by name."""
    body: list[ast.stmt] = ast.parse((TORCH / "_C/_distributed_c10d.pyi").read_text()).body
    for name in path:
        body = next(n.body for n in body if isinstance(n, ast.ClassDef) and n.name == name)
    named = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    fields = [n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return {n.name: n for n in named} | {ast.unparse(n.target): n for n in fields}


def test_a_group_of_nccl_is_made_of_what_torch_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nonblocking, so that it can be aborted, and without a time limit beside the step's."""
    config = SimpleNamespace(blocking=1)
    made: list[tuple[Any, ...]] = []

    class ProcessGroupNCCL:
        Options = staticmethod(lambda: SimpleNamespace(config=config, _timeout=None))

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            made.append((store, rank, size, options))

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", ProcessGroupNCCL, raising=False)
    store = HashStore()
    torch_private.nccl_group(store, 1, 2)
    ((*place, options),) = made
    assert place == [store, 1, 2]
    assert options._timeout >= timedelta(hours=1)
    assert config.blocking == 0
    constructor = declared("ProcessGroupNCCL")["__init__"]
    assert isinstance(constructor, ast.FunctionDef)
    names = [argument.arg for argument in constructor.args.args]
    assert names == ["self", "store", "rank", "size", "options"]
    assert "blocking" in declared("ProcessGroupNCCL", "NCCLConfig")
    assert "config" in declared("ProcessGroupNCCL", "Options")
    assert "_timeout" in declared("Backend", "Options")
    assert "eager_connect_single_device" in declared("Backend")


def test_torch_knows_the_environment_variables_of_its_groups() -> None:
    folder = TORCH / "include/torch/csrc/distributed/c10d"
    headers = "".join((folder / f"{n}.hpp").read_text() for n in ("ProcessGroupNCCL", "NCCLUtils"))
    known = set(re.findall(r"TORCH_NCCL_\w+", headers))
    of_nccl = {"NCCL_GRAPH_REGISTER"}  # an old one of NCCL's, which torch does not read
    assert set(NCCL_ENVIRONMENT) - known - of_nccl == {"TORCH_NCCL_NONBLOCKING_TIMEOUT"}
    assert "nccl_nonblocking_timeout()" in headers  # reads that one, in a file without a header
