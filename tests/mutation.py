"""A trial of mutants: random small changes of pure modules, each against that module's unit tests.

    python -m tests.mutation --seed 7 --num 80      # names the mutants that survive

A mutant is one changed operator, constant or condition. It exists in the memory of its process
only: an import hook compiles the changed tree, and no file is written.
"""

from __future__ import annotations

import argparse
import ast
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from tests.paths import ROOT

TESTS: Mapping[str, tuple[str, ...]] = {
    "cluster/core/placement.py": ("cluster/core", "cluster/planner"),
    "cluster/load/tracker.py": ("cluster/load",),
    "cluster/policy/coverage.py": ("cluster/policy", "cluster/controller"),
    "cluster/policy/failure.py": ("cluster/policy", "cluster/controller"),
    "cluster/policy/rebalance.py": ("cluster/policy", "cluster/controller"),
    "cluster/policy/replacement.py": ("cluster/policy", "cluster/controller"),
    "gateway/engines/kv_index.py": ("gateway/engines",),
    "gateway/engines/router.py": ("gateway/engines/test_router.py",),
    "gateway/engines/submission.py": ("gateway/engines",),
    "gateway/text/detokenizer.py": ("gateway/text",),
    "workers/dispatch/copies.py": (
        "workers/dispatch/test_copies.py",
        "workers/dispatch/test_random_copies.py",
        "workers/dispatch/test_copies_of_plans.py",
    ),
    "workers/engine/scheduler.py": (
        "workers/engine/test_scheduler.py",
        "workers/engine/test_isolation.py",
        "workers/engine/test_prefill_cap.py",
    ),
    "workers/kv/block_pool.py": ("workers/kv",),
    "workers/sampling/logits_processors.py": ("workers/sampling",),
    "workers/sampling/sampler.py": ("workers/sampling",),
}
"""Module -> its unit tests, under ``tests/``."""
LIMIT_S = 300.0
"""A mutant that runs for longer is killed: it waits for ever."""
NUM_PROCESSES = 2
_COMPARE: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_BINARY: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Add,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the module, and the place of the changed node among those that can change."""

    path: str
    number: int

    def __str__(self) -> str:
        node = places(ast.parse((ROOT / self.path).read_text()))[self.number]
        line = (ROOT / self.path).read_text().splitlines()[node.lineno - 1].strip()
        return f"{self.path}:{node.lineno}:{node.col_offset + 1} ({type(node).__name__}): {line}"


Place = ast.Compare | ast.BinOp | ast.BoolOp | ast.Constant | ast.UnaryOp


def places(tree: ast.Module) -> list[Place]:
    """Nodes that can change, in the functions of a module."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    found: dict[int, Place] = {}
    for function in functions:
        for statement in function.body:
            for node in _without_messages(statement):
                if isinstance(node, Place) and _can_change(node):
                    found[id(node)] = node
    return sorted(found.values(), key=lambda n: (n.lineno, n.col_offset, type(n).__name__))


def _without_messages(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below, without annotations, assertions, errors and texts of them."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.FunctionDef):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return  # of zip: an assertion, too
    yield node
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST) and name != "annotation":
                yield from _without_messages(child)


def _can_change(node: Place) -> bool:
    match node:
        case ast.Compare(ops=[op]):
            return type(op) in _COMPARE
        case ast.BinOp(op=op):
            return type(op) in _BINARY
        case ast.BoolOp():
            return True
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Constant(value=value):
            return isinstance(value, bool | int)
    return False


def change(node: Place) -> None:
    """Change a node in its tree."""
    match node:
        case ast.Compare(ops=[op]):
            node.ops = [_COMPARE[type(op)]()]
        case ast.BinOp(op=operator):
            node.op = _BINARY[type(operator)]()
        case ast.BoolOp(op=ast.And()):
            node.op = ast.Or()
        case ast.BoolOp():
            node.op = ast.And()
        case ast.UnaryOp():
            node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=int(value)):
            node.value = value + 1


class _Importer(MetaPathFinder, Loader):
    """Imports one module with a change."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = mutant.path.removesuffix(".py").replace("/", ".")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = str(ROOT / self._mutant.path)
        return ModuleSpec(name, self, origin=file) if name == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        file = ROOT / self._mutant.path
        tree = ast.parse(file.read_text())
        change(places(tree)[self._mutant.number])
        module.__file__ = str(file)
        exec(compile(ast.fix_missing_locations(tree), str(file), "exec"), module.__dict__)


def run_tests(mutant: Mutant) -> int:
    """Run a mutant's unit tests in this process; pytest's exit status."""
    sys.meta_path.insert(0, _Importer(mutant))
    import pytest

    paths = [str(ROOT / "tests" / path) for path in TESTS[mutant.path]]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *paths]))


def survives(mutant: Mutant) -> bool:
    """Whether no unit test of its module fails, in a process of its own."""
    words = [sys.executable, "-m", "tests.mutation", "--one", mutant.path, str(mutant.number)]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def draw(seed: int, num: int, modules: Sequence[str]) -> list[Mutant]:
    """So many different mutants, or all of them."""
    every = [
        Mutant(path, number)
        for path in modules
        for number in range(len(places(ast.parse((ROOT / path).read_text()))))
    ]
    return random.Random(seed).sample(every, min(num, len(every)))


def trial(seed: int, num: int, modules: Sequence[str] = tuple(TESTS)) -> list[Mutant]:
    """The mutants of a trial that survive."""
    mutants = draw(seed, num, modules)
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        alive = pool.map(survives, mutants)
        return [mutant for mutant, is_alive in zip(mutants, alive, strict=True) if is_alive]


def main() -> int:
    """A trial, or one mutant's tests."""
    parser = argparse.ArgumentParser(description="Random mutants against unit tests.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=60, help="mutants")
    parser.add_argument("--module", action="append", choices=TESTS, help="only of this one")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        return run_tests(Mutant(asked.one[0], int(asked.one[1])))
    alive = trial(asked.seed, asked.num, asked.module or tuple(TESTS))
    sys.stdout.writelines(f"survives: {mutant}\n" for mutant in alive)
    sys.stdout.write(f"{asked.num - len(alive)} of {asked.num} mutants were killed\n")
    return 1 if len(alive) > asked.num // 20 else 0


if __name__ == "__main__":
    raise SystemExit(main())
