"""Rows of block tables: seats are taken once, and blocks are appended."""

from __future__ import annotations

import pytest

from workers.kv.block_tables import BlockTables


def test_blocks_are_appended_to_the_row_of_a_seat() -> None:
    tables = BlockTables(2, 4)
    first, second = tables.take_seat(), tables.take_seat()
    tables.put(first, 0, [7, 3])
    tables.put(second, 0, [5])
    tables.put(first, 2, [9, 1])
    assert tables.array[first].tolist() == [7, 3, 9, 1]
    assert tables.array[second, :1].tolist() == [5]


def test_a_seat_is_taken_once_until_it_is_free() -> None:
    tables = BlockTables(2, 4)
    assert {tables.take_seat(), tables.take_seat()} == {0, 1}
    with pytest.raises(IndexError):
        tables.take_seat()
    tables.free_seat(1)
    assert tables.take_seat() == 1


def test_a_table_longer_than_a_context_is_refused() -> None:
    tables = BlockTables(1, 2)
    with pytest.raises(ValueError, match="could not broadcast"):
        tables.put(0, 1, [4, 5])


def test_changes_are_kept_once_for_each_place() -> None:
    tables = BlockTables(2, 4)
    tables.put(0, 0, [9])
    tables.follow()
    tables.put(1, 0, [7, 3])
    tables.put(1, 1, [5, 6])
    places, blocks = tables.take_changes()
    assert dict(zip(places.tolist(), blocks.tolist(), strict=True)) == {4: 7, 5: 5, 6: 6}
    assert not len(tables.take_changes()[0])
