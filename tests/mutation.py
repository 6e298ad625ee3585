"""A trial of mutants: random small changes of pure modules, each against that module's unit tests.

    python -m tests.mutation --seed 7 --num 80      # names the mutants that survive

A mutant is one changed operator, constant or condition in a function. Tests and module are imported
once; for each mutant a forked process exchanges the code of the functions, and runs the tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import multiprocessing
import os
import random
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import pytest

from tests.paths import ROOT

_SCHEDULING = (
    "workers/scheduling/test_scheduler.py",
    "workers/scheduling/test_scheduler_beams.py",
    "workers/scheduling/test_scheduler_states.py",
    "workers/scheduling/test_kv_waits.py",
    "workers/scheduling/test_fairness.py",
    "workers/scheduling/test_seat_reserve.py",
    "workers/engine/test_isolation.py",
)
TESTS: Mapping[str, tuple[str, ...]] = {
    "cluster/core/placement.py": ("cluster/core/test_placement.py",),
    "cluster/core/load_profile.py": ("cluster/core/test_load_profile.py",),
    "cluster/core/load_report.py": ("cluster/core/test_load_report.py",),
    "cluster/load/tracker.py": (
        "cluster/load/test_load_tracker.py",
        "cluster/load/test_load_view.py",
    ),
    "cluster/load/view.py": ("cluster/load/test_load_view.py",),
    "cluster/policy/coverage.py": ("cluster/policy/test_coverage.py",),
    "cluster/policy/failure.py": ("cluster/policy/test_failure.py",),
    "cluster/policy/places.py": ("cluster/policy/test_places.py",),
    "cluster/policy/rebalance.py": ("cluster/policy/test_rebalance.py",),
    "cluster/policy/silence.py": ("cluster/policy/test_silence.py",),
    "cluster/sizing/roofline.py": ("cluster/sizing/test_sizing.py",),
    "gateway/core/field_checks.py": (
        "gateway/core/test_field_checks.py",
        "gateway/calls/test_validate.py",
    ),
    "gateway/engines/kv_index.py": ("gateway/engines/test_kv_index.py",),
    "gateway/engines/router.py": ("gateway/engines/test_router.py",),
    "gateway/engines/submission.py": ("gateway/engines/test_submission.py",),
    "gateway/text/detokenizer.py": ("gateway/text/test_detokenizer.py",),
    "workers/beams/search.py": ("workers/beams/test_search.py",),
    "workers/dispatch/copies.py": (
        "workers/dispatch/test_copies.py",
        "workers/dispatch/test_random_copies.py",
        "workers/dispatch/test_copies_of_plans.py",
    ),
    "workers/engine/leader.py": ("workers/engine/test_leader.py",),
    "workers/engine/micro_batches.py": ("workers/engine/test_micro_batches.py",),
    "workers/engine/step_proposals.py": ("workers/engine/test_step_proposals.py",),
    "workers/engine/step_tree.py": ("workers/engine/test_step_tree.py",),
    "workers/engine/prefill_cap.py": ("workers/engine/test_prefill_cap.py",),
    "workers/kv/block_pool.py": ("workers/kv/test_block_pool.py",),
    "workers/kv/eviction.py": ("workers/kv/test_eviction.py",),
    "workers/kv/prefix_cache.py": ("workers/kv/test_prefix_cache.py",),
    "workers/kv/prefix_tree.py": ("workers/kv/test_eviction.py",),
    "workers/kv/turn_ages.py": ("workers/kv/test_eviction.py",),
    "workers/kv/turn_queues.py": ("workers/kv/test_eviction.py",),
    "workers/lora/catalog.py": ("workers/lora/test_catalog.py",),
    "workers/lora/settings.py": ("workers/lora/test_settings.py",),
    "workers/process/intake/intake_request.py": ("workers/process/intake/test_request_intake.py",),
    "workers/process/intake/request_intake.py": ("workers/process/intake/test_request_intake.py",),
    "workers/quantization/formats.py": (
        "workers/quantization/test_matrix.py",
        "workers/quantization/test_storage_format.py",
    ),
    "workers/quantization/storage_format.py": ("workers/quantization/test_storage_format.py",),
    "workers/requests/block_hash.py": (
        "workers/requests/test_block_hash.py",
        "workers/kv/test_block_pool.py",
        "gateway/engines/test_kv_index.py",
    ),
    "workers/requests/sequence.py": (
        "workers/requests/test_sequence.py",
        "workers/scheduling/test_scheduler.py",
    ),
    "workers/requests/step_header.py": ("workers/requests/test_step_header.py",),
    "workers/sampling/draws.py": ("workers/sampling/test_sampling.py",),
    "workers/sampling/logits_processors.py": ("workers/sampling/test_logits_processors.py",),
    "workers/sampling/sampler.py": ("workers/sampling/test_sampling.py",),
    **dict.fromkeys(
        (
            "workers/scheduling/admission.py",
            "workers/scheduling/block_manager.py",
            "workers/scheduling/draft_budget.py",
            "workers/scheduling/preemption.py",
            "workers/scheduling/queues.py",
            "workers/scheduling/scheduler.py",
            "workers/scheduling/short_steps.py",
            "workers/scheduling/step_intent.py",
        ),
        _SCHEDULING,
    ),
    "workers/scheduling/fairness.py": (
        "workers/scheduling/test_fairness.py",
        "workers/scheduling/test_waiting_turns.py",
    ),
    "workers/scheduling/kv_waits.py": ("workers/scheduling/test_kv_waits.py",),
    "workers/scheduling/seat_reserve.py": ("workers/scheduling/test_seat_reserve.py",),
    "workers/scheduling/step_plan.py": (
        "workers/scheduling/test_step_plan.py",
        "workers/scheduling/test_scheduler.py",
    ),
    "workers/scheduling/steps_ahead.py": ("workers/scheduling/test_steps_ahead.py",),
    "workers/scheduling/stop_conditions.py": (
        "workers/scheduling/test_scheduler.py",
        "workers/scheduling/test_steps_ahead.py",
    ),
    "workers/speculation/acceptance.py": ("workers/speculation/test_acceptance.py",),
    "workers/speculation/ngram.py": ("workers/speculation/test_ngram.py",),
    "workers/speculation/speculator.py": ("workers/speculation/test_speculator.py",),
    "workers/speculation/step_cost.py": ("workers/speculation/test_step_cost.py",),
}
"""Module -> its unit tests, under ``tests/``."""
EQUIVALENT: Mapping[str, Mapping[str, str]] = {
    "cluster/core/placement.py": {
        "abs(total - 1.0) > 1e-6": "no sum of floats is that far from 1",
        "else -1": "stands in for an expert without copies, which the check refuses",
    },
    "cluster/policy/rebalance.py": {
        "1.0 - best.time_ratio < _LEAST_GAIN": "no quotient of floats is that far from 1",
    },
    "gateway/engines/kv_index.py": {
        "self._all_bits = 0": "a bit without a worker has no blocks, and is never given out",
        "depth <= most": "speed: the depth that follows is at most this one",
        "+ 1)  # the lowest": "any bit that is not taken will do",
    },
    "gateway/engines/router.py": {
        "load.fetch_cost < math.inf": "speed: no worker fetches at an infinite cost",
        "lacks > rest": "a fetch of nothing has a cost, and so is never the best",
    },
    "workers/scheduling/admission.py": {
        "max_rows <= 0": "speed: a sequence for which no row is left is not planned",
    },
    "workers/scheduling/scheduler.py": {
        "limit - missing": "speed: the sum is cut to the limit",
    },
    "workers/kv/turn_ages.py": {
        "self._clock = 0": "only differences of times count",
        "self._clock += 1": "only proportions of ages count",
    },
    "workers/quantization/storage_format.py": {
        "not 0": "1 is no multiple, and refused as such",
    },
    "workers/requests/block_hash.py": {
        "to_bytes(8": "the hash function fills its salt up with zeros",
    },
    "workers/requests/sequence.py": {
        "last <= length": "speed: the general case gives the same tokens",
        "first >= length": "speed: the general case gives the same tokens",
    },
    "workers/lora/settings.py": {
        "1)": "a file with one byte too many is refused, however many follow",
    },
    "workers/sampling/draws.py": {
        '"top_k"] > 0': "speed: a row without limits keeps all tokens",
        '"top_p"] < 1': "speed: a row without limits keeps all tokens",
        "numbers.top_p >= 1": "speed: all tokens together have a share of 1",
        " 16)": "speed: the width grows until it suffices",
        "1 << 18": "speed: a row's token is its own",
    },
    "workers/sampling/logits_processors.py": {
        "values > 0": "a logit of 0 stays 0",
    },
    "workers/speculation/ngram.py": {
        "self._key = 0": "the mask takes it off before a key is whole",
    },
    "workers/speculation/speculator.py": {
        "of(1).price(1)": "no step is known: the price is the same for any number",
    },
}
"""Module -> a part of one of its lines whose changes make no difference -> the reason."""
LIMIT_S = 60
"""CPU seconds of a mutant, and seconds of one of its tests; then it counts as killed."""
LIMIT_BYTES = 8 << 30
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


def functions_of(path: str) -> list[FunctionType]:
    """All functions of an imported module, methods included."""
    name = path.removesuffix(".py").replace("/", ".")
    every = (one for one in gc.get_objects() if type(one) is FunctionType)
    return [function for function in every if function.__module__ == name]


def apply(mutant: Mutant, functions: Iterable[FunctionType]) -> None:
    """Give the functions of a module the code of its mutant."""
    tree = ast.parse((ROOT / mutant.path).read_text())
    change(places(tree)[mutant.number])
    module = compile(ast.fix_missing_locations(tree), mutant.path, "exec", dont_inherit=True)
    codes = {(code.co_qualname, code.co_firstlineno): code for code in _codes(module)}
    for function in functions:
        code = function.__code__
        function.__code__ = codes.get((code.co_qualname, code.co_firstlineno), code)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a module or function, and of the functions within."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class _Forks:
    """A plugin of pytest: after the collection, a forked process runs the tests of each mutant."""

    def __init__(self, mutants: Sequence[Mutant]) -> None:
        self._mutants = mutants
        self.alive: list[Mutant] = []
        self.is_child = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        paths = list(dict.fromkeys(mutant.path for mutant in self._mutants))
        functions = {path: functions_of(path) for path in paths}
        gc.freeze()  # else each process copies most of the memory
        for path in paths:
            tests = {ROOT / "tests" / name for name in TESTS[path]}
            items = [item for item in session.items if item.path in tests]
            for mutant in (None, *(one for one in self._mutants if one.path == path)):
                process = os.fork()
                if process == 0:
                    self.is_child = True
                    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
                    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
                    if mutant is not None:
                        apply(mutant, functions[path])
                    session.items = items
                    return None  # on to the tests
                is_alive = _passes(os.waitpid(process, 0)[1])
                if mutant is None and not is_alive:
                    raise RuntimeError(f"without a mutant, too, the tests of {path} fail")
                self.alive += [mutant] if mutant is not None and is_alive else []
        return True


def _passes(status: int) -> bool:
    """Whether all tests passed; the status is that of the ended process."""
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) > pytest.ExitCode.TESTS_FAILED:
        raise RuntimeError(f"pytest ended with status {os.WEXITSTATUS(status)}")
    return status == 0


def survivors(mutants: Sequence[Mutant]) -> list[Mutant]:
    """The mutants that fail no test; for a process of its own."""
    forks = _Forks(mutants)
    names = dict.fromkeys(name for mutant in mutants for name in TESTS[mutant.path])
    tests = [str(ROOT / "tests" / name) for name in names]
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--timeout={LIMIT_S}"]
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/report", "w") as report:
        with contextlib.redirect_stdout(report):
            status = pytest.main([*options, f"--basetemp={folder}/tests", *tests], [forks])
        if forks.is_child:
            os._exit(status)
        if status != pytest.ExitCode.OK:
            raise RuntimeError(Path(report.name).read_text())
    return forks.alive


def mutants_of(path: str) -> list[Mutant]:
    """Those of a module that differ from it."""
    text = (ROOT / path).read_text()
    lines, parts = text.splitlines(), tuple(EQUIVALENT.get(path, ()))
    return [
        Mutant(path, number)
        for number, node in enumerate(places(ast.parse(text)))
        if not any(_is_within(node, lines[node.lineno - 1], part) for part in parts)
    ]


def _is_within(node: Place, line: str, part: str) -> bool:
    begin = line.find(part)
    ends_here = node.end_lineno == node.lineno and (node.end_col_offset or 0) <= begin + len(part)
    return 0 <= begin <= node.col_offset and ends_here


def draw(seed: int, num: int, modules: Sequence[str]) -> list[Mutant]:
    """So many different mutants, or all of them."""
    every = [mutant for path in modules for mutant in mutants_of(path)]
    return random.Random(seed).sample(every, min(num, len(every)))


def trial(mutants: Sequence[Mutant]) -> list[Mutant]:
    """The mutants that survive."""
    paths = list(dict.fromkeys(mutant.path for mutant in mutants))
    parts = [paths[number::NUM_PROCESSES] for number in range(NUM_PROCESSES)]
    groups = [[one for one in mutants if one.path in part] for part in parts]
    with ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return [one for alive in pool.map(survivors, filter(None, groups)) for one in alive]


def main() -> int:
    """A trial: name the survivors, and fail if they are more than one in twenty."""
    parser = argparse.ArgumentParser(description="Random mutants against unit tests.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num", type=int, default=60, help="mutants")
    parser.add_argument("--module", action="append", choices=TESTS, help="only of these")
    asked = parser.parse_args()
    mutants = draw(asked.seed, asked.num, asked.module or tuple(TESTS))
    alive = trial(mutants)
    sys.stdout.writelines(f"survives: {mutant}\n" for mutant in alive)
    sys.stdout.write(f"{len(mutants) - len(alive)} of {len(mutants)} mutants were killed\n")
    return 1 if len(alive) > len(mutants) // 20 else 0


if __name__ == "__main__":
    raise SystemExit(main())
