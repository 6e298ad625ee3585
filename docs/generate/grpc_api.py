"""The page of the gRPC services, from the contracts and the comments in them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from docs.generate.markdown import code, page, prose, table

ROOT = Path(__file__).resolve().parent.parent.parent
_INTRODUCTION = """Every method and message of the gRPC ports, with the comments of the contracts.
[gRPC](grpc.md) has calls to try and the rules for deadlines, errors and retries."""
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
"""Numbers of a file's lists in the paths of its comments (descriptor.proto)."""
_FIELD, _VALUE, _METHOD = 2, 2, 2
"""Numbers of the lists in a message, an enum and a service."""
_NESTED = 3
_KINDS = FieldDescriptorProto.Type
Path_ = tuple[int, ...]


def grpc_api() -> str:
    """The page. Runs ``protoc``."""
    files = [file for file in _read_contracts().file if file.name.startswith("protos/")]
    return page("gRPC services", _INTRODUCTION, *(part for file in files for part in _file(file)))


def _read_contracts() -> FileDescriptorSet:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "protos").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "all.bin"
        flags = ["-I", ".", "--include_source_info", f"--descriptor_set_out={target}"]
        command = [sys.executable, "-m", "grpc_tools.protoc", *flags, *sources]
        subprocess.run(command, cwd=ROOT, check=True, timeout=120)
        return FileDescriptorSet.FromString(target.read_bytes())


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = {
        tuple(place.path): place.leading_comments or place.trailing_comments
        for place in file.source_code_info.location
    }
    yield f"## {file.name}"
    yield prose("".join(_leading_of_syntax(file)))
    for index, service in enumerate(file.service):
        rows = [
            (
                code(method.name),
                _type_link(method.input_type),
                ("stream of " if method.server_streaming else "") + _type_link(method.output_type),
                prose(comments.get((_SERVICE, index, _METHOD, number), "")),
            )
            for number, method in enumerate(service.method)
        ]
        yield f"### service {service.name}"
        yield prose(comments.get((_SERVICE, index), ""))
        yield table(("Method", "Request", "Response", "Description"), rows)
    for index, message in enumerate(file.message_type):
        yield from _message(message, message.name, (_MESSAGE, index), comments)
    for index, enum in enumerate(file.enum_type):
        yield from _enum(enum, enum.name, (_ENUM, index), comments)


def _leading_of_syntax(file: FileDescriptorProto) -> Sequence[str]:
    """The comment at the head of the file."""
    return [
        place.leading_comments
        for place in file.source_code_info.location
        if list(place.path) == [12]
    ]


def _message(
    message: DescriptorProto, name: str, path: Path_, comments: dict[Path_, str]
) -> Iterator[str]:
    rows = [
        (
            code(field.name),
            _type_of(field, message),
            code(message.oneof_decl[field.oneof_index].name) if _is_choice(field) else "",
            prose(comments.get((*path, _FIELD, number), "")),
        )
        for number, field in enumerate(message.field)
    ]
    yield f"### {name}"
    yield prose(comments.get(path, ""))
    yield table(("Field", "Type", "One of", "Description"), rows) or "No fields."
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            where = (*path, _NESTED, index)
            yield from _message(nested, f"{name}.{nested.name}", where, comments)
    for index, enum in enumerate(message.enum_type):
        yield from _enum(enum, f"{name}.{enum.name}", (*path, 4, index), comments)


def _enum(
    enum: EnumDescriptorProto, name: str, path: Path_, comments: dict[Path_, str]
) -> Iterator[str]:
    rows = [
        (code(value.name), prose(comments.get((*path, _VALUE, number), "")))
        for number, value in enumerate(enum.value)
    ]
    yield f"### {name}"
    yield prose(comments.get(path, ""))
    yield table(("Value", "Description"), rows)


def _is_choice(field: FieldDescriptorProto) -> bool:
    return field.HasField("oneof_index") and not field.proto3_optional


def _type_of(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
            key, value = nested.field
            return f"map of {_type_of(key, nested)} to {_type_of(value, nested)}"
    kind = _type_link(field.type_name) or _KINDS.Name(field.type).removeprefix("TYPE_").lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if field.proto3_optional else kind


def _type_link(name: str) -> str:
    """A link to the heading of a type of ours; the name of another one."""
    if not name.startswith(".expertmesh.v1."):
        return code(name.strip("."))
    short = name.removeprefix(".expertmesh.v1.")
    return f"[{short}](#{short.lower().replace('.', '')})"
