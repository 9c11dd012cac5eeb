"""Stored rankings: the parts of a study, what a grid leaves open, costs, and the graph alone between models."""

import re

import numpy as np
import pandas as pd
import pytest

from steerutils import Study, stored_results
from steerutils.studies import (
    agreement_of_formats,
    depth_and_patching_taus,
    not_exhausted,
    number_format,
    ranking_costs,
    search_cost,
    separation,
    stored_parts,
    stored_ranking,
    stored_scores,
    strengths_tried,
    taus_with,
)


def test_a_stored_ranking_is_of_one_revision():
    revision = stored_results("ranking-smollm2-135m-refusal")["revision"]
    found = stored_ranking("models/smollm2-135m-refusal/", revision)
    assert found["settings"]["model_name"] == "smollm2-135m-refusal"
    with pytest.raises(ValueError, match=f"is of {re.escape(revision)}, not of this another"):
        stored_ranking("smollm2-135m-refusal", "another")
    with pytest.raises(ValueError, match="no stored results"):
        stored_ranking("nobody-ran-this", revision)


def stored_toy() -> dict:
    """A ranking of four layers as `make results` stores it; block 0 was not steered."""
    part = {"in": [[1, 2, 3, 4], [3, 2, 1, 0]], "out": [[4, 3, 2, 1], [4, 5, 6, 7]], "layer_patching": [[1, -2, 3, -8]]}
    part |= {"edges_in": [1, 2, 3, 4], "edges_out": [4, 3, 2, 1]}
    rows = [{"layer": i, "strength": s, "verdicts": "rc", "scores": [1.0, -1.0]} for i in (1, 2, 3) for s in (-1, -2)]
    task = {"validation": rows, "test": rows[::2], "all blocks": {"validation": [0.1, 0.2, 0.3, 0.4, 0.5]}}
    task["steering contrast"] = {"layers": [1, 2, 3], "absolute": [[1, 3], [2, 2], [5, 7]],
                                 "signed": [[1, -3], [2, 2], [-5, 7]]}  # fmt: skip
    settings = {"seeds": 2, "points": 5, "pairs": 10, "patched_pairs": 6, "train": 30, "validation": 2, "test": 7,
                "steered_prompts": 2}  # fmt: skip
    seconds = {"attribution-0": 10, "attribution-1": 30, "bypass-validation": 100, "bypass-test": 11, "baselines": 3,
               "bypass-all blocks": 4}  # fmt: skip
    values = {"attribution-0": part, "attribution-1": part, "bypass": task}
    values["baselines"] = {"probe": [[1, 2, 3, 5.0]] * 2}
    return {"settings": settings, "seconds": seconds, "values": values}


def test_parts_of_a_stored_ranking_have_steering_as_the_contrast_beside_the_baselines():
    stored = stored_toy()
    attributions, baselines, validation, test = stored_parts(stored, "bypass", -1.0)
    assert len(attributions) == 2 and attributions[0] is stored["values"]["attribution-0"]
    assert baselines["probe"] == [[1, 2, 3, 5]] * 2
    assert [row.tolist() for row in baselines["steering as the contrast"]] == [[0, 2, 2, 6]]
    assert [row.tolist() for row in baselines["the metric's shift"]] == [[0, 1, -2, -1]]  # less refusal is wanted
    assert (len(validation), len(test)) == (12, 6) and set(test["verdict"]) == {"refusal", "compliance"}
    assert stored["values"]["baselines"].keys() == {"probe"}
    del stored["values"]["bypass"]["steering contrast"]
    assert stored_parts(stored, "bypass", -1.0)[1].keys() == {"probe"}


def study_of_layers(layers, validation, methods=None):
    ones = np.ones((len(layers), 2))  # what these tests do not look at
    return Study(np.array(layers), methods or {}, ones.T, ones.T, np.array(validation), ones, ones)


def test_taus_of_methods_are_means_over_seeds():
    methods = {"a": np.array([[1.0, 2, 3], [3.0, 2, 1]]), "b": np.array([[0.0, 1, 1]])}
    found = taus_with(study_of_layers([1, 2, 3], np.ones(3), methods), [1, 2, 3], ["b", "a"])
    assert found.index.tolist() == ["b", "a"]
    assert found.tolist() == pytest.approx([2 / np.sqrt(6), 0])  # tau-b: two pairs in order, one tied


def test_strengths_are_told_with_their_doubling():
    assert strengths_tried({"strengths": [0.5, 1.0, 8]}) == "0.5, 1, 8"
    assert strengths_tried({"strengths": [1.0], "reach": 1.0}) == "1"
    assert strengths_tried({"strengths": [1.0, 2], "reach": 256}).startswith("1, 2, then doubled")
    assert strengths_tried({"strengths": [1.0, 2], "reach": 256}).endswith("up to 256")


def test_a_block_is_exhausted_when_it_works_or_answers_fall_apart_at_the_largest_strength():
    whole = {(1, -1.0): 1, (1, -4.0): 1, (2, -1.0): 1, (2, -4.0): 0.5, (5, -1.0): 0, (5, -2.0): 1, (6, -1.0): 1}
    rows = [(layer, s, "refusal" if i < 4 * share else "incoherent")
            for (layer, s), share in whole.items() for i in range(4)]  # fmt: skip
    study = study_of_layers([1, 2, 5, 6], [0.5, 0.5, 0.89, 0.9])
    assert not_exhausted(study, pd.DataFrame(rows, columns=["layer", "strength", "verdict"])) == [1, 5]


def test_formats_are_compared_answer_by_answer_and_block_by_block():
    def check(exact, other, *seconds):
        rows = [[{"layer": i, "verdicts": letters} for i, letters in enumerate(part)] for part in (exact, other)]
        return {kind: {"rows": part, "seconds": s} for kind, part, s in zip(("float32", "bfloat16"), rows, seconds)}

    checks = {"induce": check(["rrcc", "rrrr"], ["rrcr", "rrrr"], 30.0, 10.0),
              "bypass": check(["ccrr"], ["cirr"], 10.0, 10.0)}  # fmt: skip
    found = agreement_of_formats(checks, {"induce": "refusal", "bypass": "compliance"}, "bfloat16")
    assert (found["answers"], found["same verdict"]) == (12, pytest.approx(10 / 12))
    assert (found["mean"], found["largest"]) == (pytest.approx((0.25 + 0 + 0.25) / 3), 0.25)
    assert found["fast"] == pytest.approx(2)
    stored = {"settings": {"grid_dtype": "bfloat16"}, "values": {t: {"float32 check": c} for t, c in checks.items()}}
    told = number_format(stored, {"induce": "refusal", "bypass": "compliance"})
    assert told.startswith("bfloat16, 2.0 times as fast as float32 (of 12 answers in both formats 83% have the same")
    assert told.endswith("differs by 0.17 on average, 0.25 at most)")
    assert number_format({"settings": {}, "values": {}}, {"induce": "refusal"}) == "float32"


def test_cost_is_the_papers():
    found = search_cost(n_layers=32, n_prompts=2700, n_pairs=400)
    assert (found["grid"], found["a2a"]) == (86400, 19500) and round(found["saved"], 3) == 0.774


def test_costs_of_orders_are_counted_from_a_stored_ranking():
    table = ranking_costs(stored_toy(), "bypass")
    by_hand = {
        "In, Out, Total, Ratio": (3 * 5 * 10, 20),  # three passes a point and pair
        "exact layer patching": (6 * (2 + 2), np.nan),
        "activation difference, probe": (60, 3),
        "middle layers, 60 % of the depth": (0, 0),
        "small grid": (6 * 2, 100),
        "steering as the contrast": (15 * 3 * 2, np.nan),
        "the metric's shift": (3 * 2, np.nan),
        "all blocks at once": (5 * 2, 4),
        "the whole grid": (6 * 2 + 3 * 7, 111),
    }
    assert table.index.tolist() == list(by_hand)
    np.testing.assert_array_equal(table.to_numpy(), list(by_hand.values()))


def test_stored_scores_are_means_over_the_pairs_asked_for():
    values = stored_toy()["values"]
    found = stored_scores(values)
    assert {name: set(found[name]) for name in ("In", "Out", "Total")} == {"In": {2}, "Out": {4}, "Total": {6}}
    assert found["Ratio"] == pytest.approx(np.full(4, 2))
    assert found["exact layer patching"].tolist() == [1, 2, 3, 8] and found["probe"].tolist() == [1, 2, 3, 5]
    assert stored_scores(values, np.array([1, 1]))["In"].tolist() == [3, 2, 1, 0]


def test_taus_with_depth_and_patching_have_intervals_over_pairs():
    values, rng = stored_toy()["values"], np.random.default_rng(0)
    table = depth_and_patching_taus(values, rng).set_index(["score", "against"])
    assert table.loc["In", "depth"].tolist() == pytest.approx([0, -1, 1])  # either pair alone: up, or down
    assert table.loc["exact layer patching", "depth"].tolist() == pytest.approx([1, 1, 1])  # one pair: no other draw
    assert ("exact layer patching", "patching") not in table.index
    assert table.loc["probe", "patching"]["value"] == pytest.approx(1)
    assert table.loc["probe"][["low", "high"]].isna().all(axis=None)
    counted = table.xs("depth, every edge scored 1", level="against")
    assert counted["value"].to_dict() == pytest.approx({"In": 1, "Out": -1, "Total": 0, "Ratio": -1})
    assert len(table.dropna()) == 2 * 4 + 1 and len(table) == 2 * 4 + 1 + 2 + 4
    again = depth_and_patching_taus(values, np.random.default_rng(0)).set_index(["score", "against"])
    pd.testing.assert_frame_equal(again, table)


def test_sides_are_told_apart_by_their_means_and_by_couples():
    found = separation(np.array([0.0, 1.0]), np.array([1.0, 2.0, 3.0]), np.random.default_rng(0))
    assert found["difference"][0] == pytest.approx(1.5) and found["auc"][0] == pytest.approx(5 / 6)  # 1 > 1 is no
    for value, low, high in found.values():
        assert low < value <= high
    swapped = separation(np.array([1.0, 2.0, 3.0]), np.array([0.0, 1.0]), np.random.default_rng(0))
    assert swapped["difference"][0] == pytest.approx(-1.5) and swapped["auc"][0] == 0
    assert separation(np.zeros(3), np.ones(2), np.random.default_rng(0)) == {"difference": (1, 1, 1), "auc": (1, 1, 1)}
