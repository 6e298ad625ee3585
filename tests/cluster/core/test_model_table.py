"""The table of models and revisions."""

from __future__ import annotations

import pytest

from cluster.core.codec import from_plain, to_plain
from cluster.core.errors import ConfigError, ConflictError, ModelNotFoundError
from cluster.core.model_table import (
    FIRST_REVISION,
    Canary,
    ModelTable,
    Revision,
    RevisionState,
    ServedModelEntry,
)


def make_table(*others: str) -> ModelTable:
    """A table with model ``m``, its active revision 1, and further ready revisions."""
    revisions = [Revision(FIRST_REVISION, "", {}, RevisionState.READY)]
    table = ModelTable([ServedModelEntry("m", FIRST_REVISION, revisions)], num_fleets=1)
    for name in others:
        added = table.add("m", name, table.new_fleet(), {}, in_place=False)
        added.state = RevisionState.READY
    return table


def states(table: ModelTable) -> dict[str, str]:
    return {revision.name: revision.state.value for _, revision in table}


def test_a_table_survives_as_plain_data() -> None:
    table = make_table("b")
    table.set_canary("m", "b", 5.0, ("team",))
    assert from_plain(to_plain(table), ModelTable) == table


def test_each_fleet_gets_a_new_name() -> None:
    table = ModelTable()
    assert [table.new_fleet() for _ in range(3)] == ["", "model-1", "model-2"]


def test_revisions_get_the_next_number() -> None:
    table = make_table("b")
    assert table.add("m", "", "model-2", {}, in_place=False).name == "2"
    assert table.add("other", "", "model-3", {}, in_place=False).name == FIRST_REVISION
    assert [model.name for model in table.models] == ["m", "other"]


def test_every_change_is_a_new_version() -> None:
    table = make_table("b")
    versions = [table.version]
    for change in (
        lambda: table.set_canary("m", "b", 5.0, ()),
        lambda: table.promote("m"),
        lambda: table.rollback("m"),
    ):
        change()
        versions.append(table.version)
    assert versions == sorted(set(versions))


@pytest.mark.parametrize("name", ["-x", "a b", "ä", "x" * 65])
def test_bad_names_of_revisions_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="revision"):
        make_table().check_load("m", name, in_place=False)


def test_a_load_is_refused_while_another_one_runs() -> None:
    table = make_table()
    table.add("m", "b", "model-1", {}, in_place=False)
    with pytest.raises(ConflictError, match="revision b of m is being loaded"):
        table.check_load("m", "c", in_place=False)


def test_a_name_is_taken_unless_its_revision_has_failed() -> None:
    table = make_table("b")
    with pytest.raises(ConflictError, match="has a revision b already: READY"):
        table.check_load("m", "b", in_place=False)
    failed = table.find("m").find("b")
    table.set_state(table.find("m"), failed, RevisionState.FAILED, "no such tensor")
    table.check_load("m", "b", in_place=False)
    added = table.add("m", "b", "model-9", {}, in_place=False)
    assert [one for _, one in table if one.name == "b"] == [added]


def test_nothing_takes_the_place_of_an_unknown_model() -> None:
    with pytest.raises(ConfigError, match="in_place"):
        make_table().check_load("other", "", in_place=True)


@pytest.mark.parametrize("percent", [-1.0, 100.5])
def test_a_share_is_from_0_to_100(percent: float) -> None:
    with pytest.raises(ConfigError, match="percent"):
        make_table("b").set_canary("m", "b", percent, ())


def test_a_share_of_nothing_ends_a_canary() -> None:
    table = make_table("b")
    assert table.set_canary("m", "b", 5.0, ()).canary == Canary("b", 5.0)
    assert table.set_canary("m", "b", 0.0, ()).canary is None


def test_the_active_revision_is_no_canary() -> None:
    with pytest.raises(ConflictError, match="is active"):
        make_table("b").set_canary("m", FIRST_REVISION, 5.0, ())


def test_the_canary_is_promoted_and_the_other_stays() -> None:
    table = make_table("b", "c")
    table.set_canary("m", "c", 5.0, ())
    entry = table.promote("m")
    assert (entry.active, entry.previous, entry.canary) == ("c", FIRST_REVISION, None)
    assert set(states(table).values()) == {"READY"}


def test_a_promotion_needs_a_name_if_several_are_ready() -> None:
    with pytest.raises(ConflictError, match="several are ready"):
        make_table("b", "c").promote("m")
    with pytest.raises(ConflictError, match="no other one is ready"):
        make_table().promote("m")


def test_only_a_ready_revision_is_promoted() -> None:
    table = make_table()
    table.add("m", "b", "model-1", {}, in_place=False)
    with pytest.raises(ConflictError, match="revision b of m is LOADING"):
        table.promote("m", "b")
    with pytest.raises(ConflictError, match="active already"):
        table.promote("m", FIRST_REVISION)
    with pytest.raises(ModelNotFoundError, match="no revision 'x'"):
        table.promote("m", "x")


def test_a_rollback_ends_the_canary_first() -> None:
    table = make_table("b")
    table.set_canary("m", "b", 5.0, ())
    assert table.rollback("m") is None
    assert states(table) == {FIRST_REVISION: "READY", "b": "RETIRING"}
    assert table.find("m").canary is None


def test_a_rollback_returns_to_the_previous_revision() -> None:
    table = make_table("b")
    table.promote("m")
    table.rollback("m")
    assert table.find("m").active == FIRST_REVISION
    assert states(table) == {FIRST_REVISION: "READY", "b": "RETIRING"}
    with pytest.raises(ConflictError, match="neither a canary nor an earlier revision"):
        table.rollback("m")


def test_a_replaced_revision_takes_its_place_again() -> None:
    table = make_table()
    entry = table.find("m")
    added = table.add("m", "b", "model-1", {}, in_place=True)
    assert (added.state, entry.is_held) == (RevisionState.WAITING, True)
    for change in (table.promote, table.rollback):
        with pytest.raises(ConflictError, match="is being replaced"):
            change("m")
    first = entry.find(FIRST_REVISION)
    table.set_state(entry, first, RevisionState.STOPPED)
    table.set_state(entry, added, RevisionState.READY)
    table.release(entry, added)
    assert (entry.active, entry.previous, entry.is_held) == ("b", FIRST_REVISION, False)
    assert table.rollback("m") is first
    assert (first.state, entry.is_held) == (RevisionState.WAITING, True)


def test_the_active_revision_and_the_only_model_stay() -> None:
    table = make_table("b")
    with pytest.raises(ConflictError, match="is active"):
        table.unload("m", FIRST_REVISION)
    with pytest.raises(ConflictError, match="the only model"):
        table.unload("m")
    with pytest.raises(ModelNotFoundError, match="'other' does not exist"):
        table.unload("other")


def test_a_model_goes_with_its_last_revision() -> None:
    table = make_table()
    added = table.add("other", "", "model-1", {}, in_place=False)
    added.state = RevisionState.READY
    entry = table.unload("other")
    assert added.state is RevisionState.RETIRING
    table.remove(entry, added)
    assert [model.name for model in table.models] == ["m"]


def test_the_last_model_that_serves_is_not_unloaded() -> None:
    table = make_table()
    other = table.add("other", "", "model-1", {}, in_place=False)
    with pytest.raises(ConflictError, match="the only model that serves"):
        table.unload("m")
    other.state = RevisionState.READY
    table.unload("m")
    with pytest.raises(ConflictError, match="the only model that serves"):
        table.unload("other")


def test_a_model_that_is_being_unloaded_loads_nothing() -> None:
    table = make_table()
    table.add("other", "", table.new_fleet(), {}, in_place=False)
    table.unload("other")
    with pytest.raises(ConflictError, match="other is being unloaded"):
        table.check_load("other", "", in_place=False)


def test_an_unloaded_canary_gets_no_requests() -> None:
    table = make_table("b")
    table.set_canary("m", "b", 5.0, ("team",))
    assert table.unload("m", "b").canary is None
