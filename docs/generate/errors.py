"""The page of errors, from the table of the gateway."""

from __future__ import annotations

from cluster.core.errors import DeadlineExceededError, ExpertMeshError
from docs.generate.markdown import code, page, prose, table
from gateway.core.errors import ERROR_TABLE, ErrorReport, RouteError, report_error

_INTRODUCTION = """How an exception reaches a client: over HTTP as the status and the error object
(`error.type`, `error.code`), over gRPC as the code and the reason of `ErrorInfo`, which equals
`error.code`. The first row whose class matches the exception applies, but the last two rows have
precedence. Code "varies" means that the exception sets it. For any exception not in the table, the
client gets `internal_error` with the id of its request. [Anthropic's Messages](messages.md#errors)
have an error object of their own, with the same status. [Rules of gRPC](grpc.md#rules) and
[Overload](../explanation/overload.md#overload) say when to send a request again."""
_SPECIAL = (
    ("`RouteError` if only the method is wrong", RouteError("", 405)),
    ("`DeadlineExceededError` with `started`", DeadlineExceededError("", True)),
)


def errors() -> str:
    """The page."""
    columns = ("Exception", "Means", "HTTP", "Type", "Code", "gRPC")
    rows = [
        (code(kind.__name__), _meaning(kind), str(status), code(type_), _code(own), code(grpc.name))
        for kind, status, type_, own, grpc in ERROR_TABLE
    ]
    special = [(name, _meaning(type(one)), *_cells(report_error(one))) for name, one in _SPECIAL]
    return page("Errors", _INTRODUCTION, table(columns, [*rows, *special]))


def _cells(report: ErrorReport) -> tuple[str, str, str, str]:
    return (
        str(report.http_status),
        code(report.type),
        code(report.code),
        code(report.grpc_code.name),
    )


def _code(own: str) -> str:
    return code(own) if own else "varies"


def _meaning(kind: type[ExpertMeshError]) -> str:
    return prose((kind.__doc__ or "").strip().split("\n\n")[0])
