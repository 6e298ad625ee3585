"""Names of KV blocks: what makes them differ."""

from __future__ import annotations

from typing import NoReturn

import pytest
from msgspec.structs import replace

from workers.requests.block_hash import (
    block_hashes,
    prompt_hashes,
    root_hash,
    sequence_hashes,
    state_key,
)
from workers.requests.request import Request, SamplingParams

REQUEST = Request(request_id="r", prompt=tuple(range(10)), params=SamplingParams())


def test_an_adapter_has_blocks_of_its_own() -> None:
    found = [replace(REQUEST, adapter=key) for key in ("", "sql@1", "sql@2")]
    names = [tuple(block_hashes(request, 4, None)) for request in found]
    assert [len(own) for own in names] == [2, 2, 2]
    assert len({name for own in names for name in own}) == 6
    assert len({tuple(prompt_hashes(request, 4, None)) for request in found}) == 3
    same = replace(found[1], request_id="other", output_so_far=((7, 8),))
    assert sequence_hashes(same, 0, 4, None)[:2] == names[1]


def test_a_block_has_a_name_once_its_last_token_is_known() -> None:
    for num_output, expected in ((0, 2), (1, 2), (2, 3), (3, 3), (5, 3), (6, 4)):
        request = replace(REQUEST, output_so_far=(tuple(range(num_output)),))
        assert len(sequence_hashes(request, 0, 4, None)) == expected


@pytest.mark.parametrize("num_known", [0, 1, 2])
def test_known_blocks_of_a_prompt_are_not_named_again(num_known: int) -> None:
    request = replace(REQUEST, cache_salt="t", output_so_far=((7,) * 9,))
    known = block_hashes(request, 4, None)[:num_known]
    assert sequence_hashes(request, 0, 4, None, known) == sequence_hashes(request, 0, 4, None)


def test_known_blocks_of_a_prompt_are_not_read_again() -> None:
    class Prompt(tuple[int, ...]):
        def __iter__(self) -> NoReturn:
            raise AssertionError("read as a whole")

    request = replace(REQUEST, output_so_far=((7,) * 9,))
    names = sequence_hashes(request, 0, 4, None)
    lazy = replace(request, prompt=Prompt(request.prompt))
    assert sequence_hashes(lazy, 0, 4, None, names[:2]) == names


def test_keys_of_adapters_are_no_salts() -> None:
    roots = {
        root_hash("a"),
        root_hash("", owner="a"),
        root_hash("", adapter="a"),
        root_hash("a", adapter="a"),
        root_hash("", length=1, adapter="a"),
        root_hash("a\0a"),
    }
    assert len(roots) == 6


def test_a_state_has_a_name_of_its_own_that_leads_back_to_its_block() -> None:
    """Workers of one release agree on it."""
    block = bytes(range(32))
    assert state_key(block) == b"\xff" + block[1:]
    assert state_key(state_key(block)) == block
