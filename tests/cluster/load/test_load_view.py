"""Reports of the experts' load."""

from __future__ import annotations

import pytest

from cluster.config.expert_load import LoadSection
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.load.tracker import LoadTracker
from cluster.load.view import (
    balancedness_of,
    load_document,
    num_at_risk,
    placement_report,
    slot_tokens,
)
from tests.cluster.controller.load_reports import make_report

BANK = BankPlacement.from_maps(
    bank="mlp",
    layer=0,
    num_experts=3,
    physical_to_logical=[[0, 1], [2, 1], [-1, -1]],
    split=[[1.0, 0.25], [1.0, 0.75], [0.0, 0.0]],
    decode_device=[0, 1, 1],
)
PLACEMENT = ExpertPlacement(epoch=1, banks=(BANK,))
PROFILE = LoadProfile(
    model="demo",
    top_k=2,
    tokens=10,
    banks=(BankLoad(bank="mlp", layer=0, counts=(10, 40, 30)),),
)


def make_tracker(epoch: int = 1) -> LoadTracker:
    load = LoadTracker(LoadSection(), 0.0)
    load.take("a", make_report(9, [2, 4, 6], [[3, 0], [1, 5], [7, 0]], epoch=epoch))
    return load


def test_tokens_are_found_in_the_slots_of_their_copies() -> None:
    load = make_tracker().copies(1)["mlp", 0]
    assert slot_tokens(BANK, load, "prefill") == [[3, 1], [7, 5], [0, 0]]
    assert slot_tokens(BANK, load, "decode") == [[2, 0], [6, 4], [0, 0]]
    assert slot_tokens(BANK, load) == [[5, 1], [13, 9], [0, 0]]


def test_copies_beyond_those_that_were_ever_chosen_have_no_prompt_tokens() -> None:
    load = LoadTracker(LoadSection(), 0.0)
    load.take("a", make_report(9, [2, 4, 6], [[3], [1], [7]]))
    copies = load.copies(load.epoch)["mlp", 0]
    assert slot_tokens(BANK, copies, "prefill") == [[3, 1], [7, 0], [0, 0]]


def test_layers_run_in_lockstep() -> None:
    assert balancedness_of([[1, 3]]) == pytest.approx(2 / 3)
    assert balancedness_of([[1, 3], [4, 2]]) == pytest.approx(5 / 7)
    assert balancedness_of([[0.25, 0.75]]) == pytest.approx(0.5 / 0.75)
    assert balancedness_of([[3], [4]]) == 1.0
    assert balancedness_of([[0, 0]]) is None
    assert balancedness_of([]) is None


def test_the_placement_report_has_the_documented_form() -> None:
    report = placement_report(PLACEMENT, make_tracker(), PROFILE)
    assert report == {
        "schema": 1,
        "epoch": 1,
        "banks": [
            {
                "bank": "mlp",
                "layer": 0,
                "physical_to_logical": [[0, 1], [2, 1], [-1, -1]],
                "load": [5, 10, 13],
                "balancedness": {
                    "predicted": pytest.approx(40 / 60),
                    "achieved": pytest.approx(14 / 22),
                },
            }
        ],
    }


def test_without_load_nothing_is_achieved() -> None:
    (bank,) = placement_report(PLACEMENT, LoadTracker(LoadSection(), 0.0), None)["banks"]
    assert bank["load"] == []
    assert bank["balancedness"] == {"predicted": None, "achieved": None}


def test_counts_of_another_epoch_are_not_taken_for_this_one() -> None:
    (bank,) = placement_report(PLACEMENT, make_tracker(epoch=2), PROFILE)["banks"]
    assert bank["balancedness"]["achieved"] is None
    assert bank["load"] == [5, 10, 13]


def test_the_load_document_is_a_profile_with_more_beside_it() -> None:
    load = make_tracker()
    load.tick(10.0)
    load.take("a", make_report(11, [4, 4, 6], [[3, 0], [1, 5], [7, 0]]))
    document = load_document(PLACEMENT, load, PROFILE, "demo", 2)
    profile = LoadProfile.from_dict(document)
    assert (profile.model, profile.top_k, profile.tokens) == ("demo", 2, 11)
    assert profile.counts("mlp", 0) == (7, 10, 13)
    (bank,) = document["banks"]
    assert bank["prefill"] == [3, 6, 7]
    assert bank["decode"] == [4, 4, 6]
    assert bank["window"] == [5, 10, 13]
    assert bank["average"] == [5, 10, 13]
    assert bank["slots"] == [[7, 1], [13, 9], [0, 0]]
    assert bank["watched"] == [0, 1, 2]
    assert bank["watched_tokens"] == [2, 0, 0]  # since they were chosen
    assert bank["rest_tokens"] == 5 + 10 + 13
    assert bank["copies"] == [1, 2, 1]
    assert document["window_tokens"] == document["average_tokens"] == 9
    # the newest window's devices took 4 and 12 tokens of prompts, 2 and 10 of decodes
    assert bank["phases"] == {
        "prefill": {"predicted": pytest.approx(40 / 60), "achieved": pytest.approx(8 / 12)},
        "decode": {"predicted": pytest.approx(40 / 70), "achieved": pytest.approx(6 / 10)},
    }
    assert bank["balancedness"]["achieved"] == pytest.approx(14 / 22)
    assert bank["load"] == bank["counts"]
    for what in ("balancedness", "phases"):
        assert document[what] == bank[what]


def test_the_load_document_before_the_first_report() -> None:
    document = load_document(PLACEMENT, LoadTracker(LoadSection(), 0.0), None, "demo", 2)
    (bank,) = document["banks"]
    assert bank["counts"] == [0, 0, 0]
    assert bank["prefill"] is bank["window"] is bank["slots"] is None


def test_averages_are_rounded_to_a_tenth_of_a_token() -> None:
    load = LoadTracker(LoadSection(window_s=10.0, half_life_s=20.0), 0.0)
    load.take("a", make_report(9, [2, 4, 6], [[3, 0], [1, 5], [7, 0]]))
    load.tick(10.0)
    load.take("a", make_report(10, [3, 4, 6], [[3, 0], [1, 5], [7, 0]]))
    load.tick(20.0)
    (bank,) = load_document(PLACEMENT, load, PROFILE, "demo", 2)["banks"]
    assert bank["average"] == [4.5, 7.1, 9.2]


def test_experts_in_one_failure_domain_are_at_risk() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp", layer=0, num_experts=3, physical_to_logical=[[0, 1], [2, 1], [-1, -1]]
    )
    assert num_at_risk(bank, ["a", "b", "c"]) == 2
    assert num_at_risk(bank, ["a", "a", "a"]) == 3
