"""The committed stubs are those of the .proto files."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from protos import admin_pb2, inference_pb2, types_pb2
from protos.generate import ROOT, generate

PACKAGE = "expertmesh.v1"


def _generator_of_stubs() -> str:
    text = (ROOT / "protos" / "inference_pb2_grpc.py").read_text()
    return text.partition("GRPC_GENERATED_VERSION = '")[2].partition("'")[0]


def test_committed_stubs_are_current(tmp_path: Path) -> None:
    made_with, here = _generator_of_stubs(), metadata.version("grpcio-tools")
    if made_with != here:
        pytest.skip(f"the stubs were made with grpcio-tools {made_with}, here is {here}")
    made = generate(tmp_path)
    assert len(made) == 12
    for path in made:
        committed = ROOT / "protos" / path.name
        assert committed.read_text() == path.read_text(), f"{path.name}: run protos/generate.py"


def test_all_contracts_are_of_one_package() -> None:
    for module in (admin_pb2, inference_pb2, types_pb2):
        assert module.DESCRIPTOR.package == PACKAGE


def test_enum_zero_is_unspecified() -> None:
    for name, enum in types_pb2.DESCRIPTOR.enum_types_by_name.items():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), name


def test_sampling_scalars_distinguish_unset_from_zero() -> None:
    fields = types_pb2.SamplingParams.DESCRIPTOR.fields
    plain = [f.name for f in fields if not f.is_repeated and not f.has_presence]
    assert plain == []
