"""Successes and shares by topic, changes of traits, and their intervals, on judgements that are written down."""

import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import (
    TRAITS,
    Study,
    activation_difference,
    attribute_trait,
    bootstrap,
    by_topic,
    choice_by_topic,
    end_probabilities,
    graph_of,
    judged_by_choice,
    load_traits,
    over_topics,
    own_change,
    own_lead,
    percentile_interval,
    picked_by_topic,
    probe_accuracy,
    resamples,
    share_high,
    side_change,
    side_correlation,
    still_coherent,
    study_of,
    success_and_coherence,
    success_by_topic,
    trait_changes,
    trait_study,
    trait_successes,
)

# --- intervals over topics ---------------------------------------------------------------------------------------


def test_topics_are_drawn_with_all_their_values():
    values = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, np.nan, 1.0]])  # [trait, topic]
    by_hand = [0.5, 0.5, 0.0, 1.0]
    assert over_topics(values, seed=2) == bootstrap(np.nanmean, by_hand, seed=2)
    assert over_topics(np.stack([values, values]), seed=2) == over_topics(values, seed=2)
    assert over_topics(pd.Series(by_hand), seed=2) == over_topics(values, seed=2)
    assert over_topics([[0.25], [0.75]]) == (0.5,)  # one topic has no interval


def test_an_interval_of_resamples_is_that_of_the_bootstrap():
    values = np.random.default_rng(0).random(9)
    rows = resamples(9, seed=4)
    assert rows.shape == (1001, 9) and rows[0].tolist() == list(range(9))
    assert percentile_interval(values[rows].mean(1)) == pytest.approx(bootstrap(np.mean, values, seed=4))
    rng = np.random.default_rng(4)
    assert (resamples(9, rng) == rows).all() and (resamples(9, rng) != rows).any()  # a generator goes on
    assert percentile_interval(np.array([0.3, np.nan, 1.0, np.nan, 2.0])) == pytest.approx((0.3, 1.025, 1.975))


# --- successes and shares ----------------------------------------------------------------------------------------


def judged(strength, prompt, coherent, **columns):
    """Answers at one block, as `steered_traits` gives them; traits that are not told are judged at 0.5."""
    table = pd.DataFrame({"layer": 3, "strength": strength, "prompt": prompt, "coherent": coherent})
    return table.assign(**dict.fromkeys(TRAITS, 0.5) | columns)


def test_only_coherent_answers_that_went_the_right_way_are_successes():
    table = pd.DataFrame(
        {"layer": 3, "strength": [2.0, 2.0, -2.0, -2.0], "prompt": [0, 1, 0, 1],
         "coherent": [True, False, True, True], "openness": [0.9, 0.9, 0.9, 0.1]}
    )  # fmt: skip
    found = trait_successes(table, "openness")
    assert found.index.tolist() == [(3, 2.0)]
    assert found.loc[(3, 2.0)].to_dict() == {(True, 0): 1.0, (True, 1): 0.0, (False, 0): 0.0, (False, 1): 1.0}


def test_both_directions_of_a_topic_are_one_share():
    table = judged([2.0, 2.0, -2.0, -2.0], [0, 1, 0, 1], [True, False, True, True], openness=[0.9, 0.9, 0.9, 0.1])
    done = trait_successes(pd.concat([table, table.assign(layer=5, openness=0.9)]), "openness")
    assert by_topic(done).tolist() == [[0.5, 0.5], [0.5, 0.0]]  # [setting, topic]
    assert by_topic(np.arange(12).reshape(1, 2, 6)).tolist() == [[[1.5, 2.5, 3.5], [7.5, 8.5, 9.5]]]


def test_incoherent_answers_fail_at_either_end_but_are_left_out_of_a_choice():
    table = judged(1.0, [1, 1, 0, 0, 2], [True, False, True, True, False], openness=[0.9, 0.9, 0.9, 0.2, 0.1])
    table = table.assign(choice=["openness", "openness", "neuroticism", "openness", "openness"])
    assert success_by_topic(table, "openness", "high").tolist() == [0.5, 0.5, 0.0]
    assert success_by_topic(table, "openness", "low").tolist() == [0.5, 0.0, 0.0]
    assert np.array_equal(choice_by_topic(table, "openness"), [0.5, 1.0, np.nan], equal_nan=True)
    assert picked_by_topic(table, "openness").tolist() == [0.5, 0.5, 0.0]  # an incoherent answer is no success


def test_the_share_of_high_answers_counts_topics_once_there_are_several_answers_of_each():
    single = judged(1.0, range(10), [True] * 8 + [False] * 2, openness=[0.9] * 6 + [0.1] * 2 + [0.9] * 2)
    assert share_high(single, "openness") == pytest.approx((0.75, 0.409275, 0.928521), abs=1e-5)  # Wilson's, 6 of 8
    several = judged(1.0, [0, 0, 0, 1], True, openness=[0.9, 0.9, 0.9, 0.1])
    assert share_high(several, "openness") == (0.5, 0.0, 1.0)
    assert share_high(several, "openness", seed=1) == over_topics([1.0, 0.0], 1)
    assert share_high(several[:3].assign(openness=[0.9, 0.9, 0.1]), "openness") == (pytest.approx(2 / 3), 0.0, 1.0)
    assert np.isnan(share_high(single.assign(coherent=False), "openness")).all()


def test_success_is_counted_among_the_coherent_answers_of_a_setting():
    table = judged([2.0, 2.0, -2.0, -2.0], [0, 1, 0, 1], [True, False, True, True], openness=[0.9, 0.9, 0.9, 0.1])
    broken = table.assign(strength=table["strength"] / 2, coherent=False)
    found = success_and_coherence({"openness": pd.concat([table, broken], ignore_index=True), "neuroticism": table})
    assert found.columns.tolist() == ["trait", "layer", "strength", "coherent", "right"]
    assert found[["trait", "strength", "coherent"]].to_numpy().tolist() == [
        ["openness", 1.0, 0.0], ["openness", 2.0, 0.75], ["neuroticism", 2.0, 0.75]
    ]  # fmt: skip
    assert np.allclose(found["right"], [np.nan, 2 / 3, 2 / 3], equal_nan=True)  # 0.5 is the low end


def test_a_traits_study_takes_all_seeds_pairs_and_judges_on_topics(llama):
    statements = load_traits("statements", "openness", "train")
    statements = statements[statements["topic"].isin(statements["topic"].unique()[:8])]
    parts = [attribute_trait(llama, statements, 2, seed) for seed in (0, 1)]
    rng, graph = np.random.default_rng(0), graph_of(llama)
    index = pd.MultiIndex.from_product([[1, 3], [0.5, 1.0]], names=["layer", "strength"])
    on_validation, on_test = (pd.DataFrame(rng.integers(2, size=(4, 6)).astype(float), index) for _ in range(2))
    high, low = (torch.tensor(rng.normal(mean, 1, (10, 4, 3))) for mean in (0.4, 0.0))
    by_steering = {"absolute": np.array([[1.0, 3.0], [4.0, 6.0]]), "signed": np.array([[-1.0, 3.0], [0.0, -6.0]])}
    study = trait_study(graph, parts, high, low, on_validation, on_test, by_steering)
    assert study.layers.tolist() == [1, 3]
    for side, found in (("in", study.into), ("out", study.out)):
        assert np.array_equal(found, np.concatenate([part[side] for part in parts])[:, [1, 3]])
    plain = study_of(graph, parts, {}, on_validation, on_test)
    assert np.array_equal(study.test, plain.test.reshape(2, 2, 3).mean(1)) and study.test.shape == (2, 3)
    assert study.methods["activation difference"][0].tolist() == activation_difference(high, low)[[1, 3]].tolist()
    assert study.methods["probe"][0].tolist() == probe_accuracy(high, low)[[1, 3]].tolist()
    assert study.methods["steering as the contrast"].tolist() == [
        [2, 5]
    ]  # means over topics, a block that was tried each
    assert study.methods["the metric's shift"].tolist() == [[1, -3]]
    assert study.methods["probe"][0].max() > 0.5 and np.array_equal(study.methods["Out"], plain.methods["Out"])


def test_a_block_is_pushed_harder_while_half_of_its_answers_hold_together():
    table = judged([1.0, -1.0, 2.0, -2.0] * 3, 0, [True] * 4 + [True, True, True, False] + [True, True, False, False])
    table["layer"] = np.repeat([3, 5, 6], 4)
    assert still_coherent(table, reach=9.0) == [(3, 4.0), (5, 4.0)]
    assert still_coherent(table, reach=3.9) == []
    more = judged([4.0, -4.0], 0, [True, False]).assign(layer=5)
    assert still_coherent(pd.concat([more, table]), reach=9.0) == [(3, 4.0), (5, 8.0)]
    assert still_coherent(table.iloc[:0], reach=9.0) == []


def test_judged_by_the_choice_a_success_is_a_coherent_answer_picked_as_the_traits():
    study = Study(np.array([1, 3]), {"Out": np.ones((2, 2)), "small grid": np.zeros((1, 2))}, np.zeros((1, 2)),
                  np.zeros((1, 2)), np.array([0.5, 0.5]), np.zeros((2, 2)), np.zeros((2, 2)))  # fmt: skip
    tables = []
    for coherent, choice in (([1, 1, 0, 1], "ooon"), ([1, 1, 1, 1], "nnoo")):  # by block and topic
        table = judged([2.0, 2.0, 1.0, 1.0], [0, 1, 0, 1], np.array(coherent, bool)).assign(layer=[1, 1, 3, 3])
        table["choice"] = [{"o": "openness", "n": "neuroticism"}[letter] for letter in choice]
        down = table.assign(strength=-table["strength"], coherent=True, choice="openness")  # says nothing here
        tables.append(pd.concat([table, down], ignore_index=True))
    on_test, on_validation = tables
    weaker = on_validation.query("layer == 1 and strength > 0").assign(strength=0.5, choice="openness")
    found = judged_by_choice(study, "openness", pd.concat([on_validation, weaker]), on_test)
    assert found.test.tolist() == [[1.0, 1.0], [0.0, 0.0]] and found.layers is study.layers
    assert found.validation.tolist() == [0.0, 1.0] and found.methods["small grid"].tolist() == [[0.0, 1.0]]
    assert found.methods["Out"] is study.methods["Out"] and study.methods["small grid"].tolist() == [[0.0, 0.0]]


# --- one trait's effect on another -------------------------------------------------------------------------------


def test_ends_are_read_by_topic_and_direction_without_incoherent_answers():
    table = judged([-1.0, 1.0, 1.0, -1.0], [0, 1, 0, 1], [True, True, True, False], openness=[0.1, 0.8, 0.9, 0.2])
    found = end_probabilities([table, table.assign(openness=0.3)])
    assert found.shape == (2, 2, 2, 5)  # [vector, topic, up or down, judged]
    assert np.array_equal(found[0, :, :, TRAITS.index("openness")], [[0.9, 0.1], [0.8, np.nan]], equal_nan=True)
    assert np.array_equal(found[1, :, :, 0], [[0.5, 0.5], [0.5, np.nan]], equal_nan=True)


def test_changes_are_of_means_over_coherent_answers():
    ends = np.full((2, 3, 2, 5), 0.5)
    ends[0, :, 0, 2], ends[0, :, 1, 2] = [0.9, 0.7, np.nan], [0.1, np.nan, 0.3]
    ends[1, :, 0] = np.nan
    topics = np.array([[0, 1, 2], [0, 0, 2], [1, 1, 1]])
    found = trait_changes(ends, topics)  # [draw, vector, judged]
    assert np.allclose(found[:, 0, 2], [0.8 - 0.2, 0.9 - (0.1 + 0.1 + 0.3) / 3, np.nan], equal_nan=True)
    assert (found[:, 0, [0, 1, 3, 4]] == 0).all() and np.isnan(found[:, 1]).all()
    drawn = trait_changes(ends, topics, np.array([[0, 1], [1, 1], [1, 0]]))
    assert np.array_equal(drawn[0], found[0], equal_nan=True) and np.isnan(drawn[1]).all()
    assert np.array_equal(drawn[2], found[2, ::-1], equal_nan=True)


def test_a_vectors_own_change_is_told_from_those_of_the_other_traits():
    changes = np.zeros((2, 5, 5))  # [draw, steered, judged]
    changes[0] = np.diag([0.5, 0.4, np.nan, 0.1, 0.0])
    changes[0, 0, 3], changes[0, 1, 2], changes[0, 4, 0] = -0.8, 0.2, np.nan
    assert np.allclose(own_change(changes), [0.2, 0.0])
    assert np.allclose(side_change(changes), [1.0 / 20, 0.0])
    assert np.allclose(own_lead(changes), [[-0.3, 0.2, 0.0, 0.1, 0.0], [0.0] * 5])


def test_cosines_foretell_side_effects_that_follow_them():
    cosines = np.random.default_rng(0).normal(size=(5, 5))
    changes = np.stack([2 * cosines, -cosines, np.full((5, 5), 0.3)])
    changes[:, range(5), range(5)] = [[9.0], [-9.0], [5.0]]  # what a vector does to its own trait does not count
    assert np.allclose(side_correlation(changes, cosines), [1.0, -1.0, 0.0])
