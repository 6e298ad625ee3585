"""Which part of the controller changes which record: all others only read it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cluster.controller

ROOT = Path(cluster.controller.__file__).parent
RESTORES = "failover.py"
"""Continues for an earlier controller: it may write what it restores."""

FIELDS = {
    # of the cluster
    "drain": "running_drain.py",
    "scale": "scale.py",
    "late": "failure_detector.py",
    "known_nodes": "node_follower.py",
    "error": "controller.py",
    "state": "controller.py",
    # of the membership: its properties in ``Cluster`` have no setter
    "placement": "recovery.py",
    "desired": "running_drain.py scale.py",
    "experts_complete": "recovery.py",
    # of the newest generation
    "answers": "recovery.py",
    "loaded": "recovery.py",
    "joins": "membership.py",
    # of a worker
    "awaits_adapters": "adapters.py",
    "drains": "running_drain.py",
    "operation": "running_drain.py",
    "started_with": "recovery.py",
    "disconnected": "controller.py",
    "call_again_by": "controller.py",
    "has_process": "controller.py",
    "since": "controller.py",
    "pending_status_token": "controller.py",
    "kept_version": "controller.py",
    "gaps": "failure_detector.py",
    "starved_s": "failure_detector.py",
    "mismatch": "failure_detector.py",
    "heard_at": "failure_detector.py membership.py",
    "progress_at": "membership.py",
    "stalled_s": "membership.py",
    "gone_at": "workers.py",
    # of a running operation
    "result": "running_drain.py scale.py rebalancing.py",
    "generation": "running_drain.py scale.py",
    "phase": "drain_operation.py scale_operation.py rebalancing.py running_rebalance.py",
    "progress": "drain_operation.py scale_operation.py",
    "outcome": "running_drain.py scale.py",
    "before": "running_drain.py scale.py membership.py",
    "copied_in": "running_drain.py",
    "removes_places": "running_drain.py",
    "added": "scale.py",
    "is_proved": "rebalancing.py",
    # of records with one owner
    "seconds": "traces.py",
    "num_open": "gateway_polls.py",
    "answered_at": "gateway_polls.py",
}
"""Field of another object -> the modules that may assign it."""

CALLS = {
    "membership": {
        "form": "cluster.py",
        "run": "cluster.py",
        "stall": "recovery.py",
        "activate": "epoch_change.py",
        "next_epoch": "epoch_change.py",
        "set_roles": "scale.py failover.py",
        "restore": RESTORES,
    },
    "places": {
        "lost": "recovery.py",
        "joined": "recovery.py",
        "take_due": "recovery.py",
        "cordon": "running_drain.py",
        "reopen": "running_drain.py",
        "remove": "running_drain.py cluster.py",
        "add": "scale.py",
        "set_roles": "membership.py",
        "nodes_alive": "cluster.py",
        "restore": RESTORES,
    },
    "workers": {
        "add": "recovery.py",
        "lose": "controller.py",
        "forget": "controller.py",
        "learn_model": "controller.py",
    },
}
"""Record of the cluster -> its methods that change it -> the modules that may call them."""


def trees() -> Iterator[tuple[str, ast.AST]]:
    """The modules of the controller: path below its folder, and syntax tree."""
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def foreign_fields(tree: ast.AST) -> Iterator[str]:
    """Names of the fields of other objects that a module assigns."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                field = each.value if isinstance(each, ast.Subscript) else each
                is_own = isinstance(field, ast.Attribute) and ast.unparse(field.value) == "self"
                if isinstance(field, ast.Attribute) and not is_own:
                    yield field.attr


def changing_calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(record, method) of the calls that change a record."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            record = ast.unparse(node.func.value).rpartition(".")[2].removeprefix("_")
            if node.func.attr in CALLS.get(record, {}):
                yield record, node.func.attr


def test_each_field_of_another_object_is_assigned_by_its_owner() -> None:
    wrong = [
        (module, field)
        for module, tree in trees()
        for field in foreign_fields(tree)
        if module not in (*FIELDS.get(field, "").split(), RESTORES)
    ]
    assert not wrong


def test_records_are_changed_by_the_part_that_decides_on_them() -> None:
    found = {(module, *call) for module, tree in trees() for call in changing_calls(tree)}
    wrong = [
        (module, record, method)
        for module, record, method in found
        if module not in (*CALLS[record][method].split(), RESTORES)
    ]
    assert not wrong


def test_every_entry_is_in_use() -> None:
    assigned = {field for _, tree in trees() for field in foreign_fields(tree)}
    called = {call for _, tree in trees() for call in changing_calls(tree)}
    assert FIELDS.keys() <= assigned
    assert {(record, m) for record, methods in CALLS.items() for m in methods} <= called
