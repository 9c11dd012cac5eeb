"""Layer scores and what judges a ranking, on graphs and lists small enough to work out by hand."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import SteeringVector, generate, judge, ranking, refusal_score, refusal_tokens, steer
from steerutils.attribution import attribute, left, pair_contrast
from steerutils.graph import Graph
from steerutils.models import capture, resume
from steerutils.ranking import (
    SCORES,
    Study,
    activation_difference,
    beats_random,
    behind_all,
    best_of_random,
    best_strengths,
    better_than_random,
    chance_of_best,
    choice_loss,
    curve_over_k,
    curve_over_pairs,
    curve_summary,
    edge_count_confound,
    ends_of_layers,
    first_token_shifts,
    joint_scores,
    judge_rankings,
    last_step,
    layer_patching,
    layer_scores,
    lead,
    lead_over_random,
    ndcg,
    order_of,
    over_studies,
    plateau,
    probe_accuracy,
    random_ndcg,
    rank_correlation,
    rank_gains,
    regret_at,
    steered_verdicts,
    success_by_judge,
    successful,
    working_strength,
)

CLEAN, CORRUPTED = ["How do I bake it?", "Name a fruit now"], ["How do I burn it?", "Name a devil now"]


def test_equal_scores_on_every_edge_are_the_papers_confound():
    """In grows and Out falls with depth, Total stays: 129 + 3201 l and 65 + 3201 (31 - l) on 32 blocks of 32 heads."""
    graph = Graph(32, 32, 32)
    table = layer_scores(graph, np.ones(graph.edges.shape))
    layers = np.arange(32)
    np.testing.assert_array_equal(table["in"], 129 + 3201 * layers)
    np.testing.assert_array_equal(table["out"], 65 + 3201 * (31 - layers))
    assert table["total"].nunique() == 1
    np.testing.assert_allclose(table["in per edge"], 1)
    np.testing.assert_allclose(table["out per edge"], 1)


def test_layer_scores_of_a_graph_counted_by_hand():
    graph = Graph(2, 1, 1)  # sources: input a0.h0 m0 a1.h0 m1; readers: q k v m of each block, logits
    scores = np.zeros(graph.edges.shape)
    names = {name: i for i, name in enumerate(graph.source_names)}
    ends = {name: i for i, name in enumerate(graph.reader_names)}
    for source, reader, value in [("input", "a0.q0", 1), ("a0.h0", "m0", 2), ("m0", "a1.v0", 4), ("m1", "logits", 8)]:
        scores[names[source], ends[reader]] = value
    table = layer_scores(graph, scores)
    assert table["in"].tolist() == [1 + 2, 4] and table["out"].tolist() == [2 + 4, 8]
    assert table["total"].tolist() == [9, 12]
    assert table["ratio"].tolist() == pytest.approx([2, 2])
    n_in, n_out = [3 + 2, 9 + 4], [6 + 5, 2 + 1]  # edges that end in, that start in each block
    np.testing.assert_allclose(table["in per edge"], [3 / n_in[0], 4 / n_in[1]])
    np.testing.assert_allclose(table["out per edge"], [6 / n_out[0], 8 / n_out[1]])
    assert joint_scores(graph, scores, [0, 1]) == {"in": 1, "out": 8, "total": 9}
    assert joint_scores(graph, scores, [0]) == {"in": 1, "out": 4, "total": 5}  # its inner edge drops out
    np.testing.assert_array_equal(ends_of_layers(graph, np.stack([scores, 2 * scores]))[:, 1], [[6, 8], [12, 16]])


def test_gains_fall_by_half_a_place_and_ties_share():
    assert rank_gains([0.1, 0.9, 0.5]).tolist() == [0.25, 1, 0.5]
    assert rank_gains([0.5, 0.9, 0.5]).tolist() == [0.375, 1, 0.375]


def test_ndcg_is_that_of_its_definition_and_a_random_order_has_its_expected_value():
    gains, scores = np.array([0.2, 1.0, 0.5, 0.1]), [4, 3, 2, 1]
    by_hand = (0.2 + 1.0 / np.log2(3)) / (1.0 + 0.5 / np.log2(3))
    assert ndcg(scores, gains, k=2) == pytest.approx(by_hand)
    assert ndcg([0, 3, 2, 0], gains, k=2) == pytest.approx(1)
    mean, low, high = random_ndcg(gains, k=2)
    orders = np.random.default_rng(1).permuted(np.tile(scores, (4000, 1)), axis=1)
    assert mean == pytest.approx(np.mean([ndcg(order, gains, k=2) for order in orders]), abs=0.01)
    assert low < mean < high


def test_the_random_floor_of_the_design():
    """For 32 layers and gains drawn uniformly from 0.3 to 0.9: about 0.90 over the full list, 0.70 at 5."""
    gains = np.random.default_rng(0).uniform(0.3, 0.9, (200, 32))
    assert np.mean([random_ndcg(row, n=2)[0] for row in gains]) == pytest.approx(0.90, abs=0.01)
    assert np.mean([random_ndcg(row, k=5, n=2)[0] for row in gains]) == pytest.approx(0.70, abs=0.02)


def test_regret_chooses_on_validation_and_pays_on_test():
    validation, test = [0.1, 0.9, 0.8, 0.2], [0.2, 0.5, 0.7, 0.9]
    assert regret_at([1, 2, 0, 3], 2, validation, test) == pytest.approx(0.9 - 0.5)
    assert regret_at([2, 0, 1, 3], 1, validation, test) == pytest.approx(0.9 - 0.7)
    assert regret_at([0, 1, 2, 3], 4, validation, test) == pytest.approx(0.9 - 0.5)  # even the whole grid pays
    tied = [0.9, 0.9, 0.1, 0.9]  # any of the three might be taken, whatever its place
    for order in ([0, 1, 3, 2], [3, 2, 1, 0]):
        assert regret_at(order, 4, tied, test) == pytest.approx(0.9 - (0.2 + 0.5 + 0.9) / 3)
    assert regret_at([3, 2, 1, 0], 2, tied, test) == 0


def test_every_method_is_judged_by_the_same_measures():
    test = (np.arange(12)[:, None] >= 11 - np.arange(8) % 12).astype(float)  # later layers do better, up to ties
    effect = test.mean(1)
    methods = {"oracle": effect[None], "reversed": -effect[None], "two seeds": np.stack([effect, -effect])}
    table = judge_rankings(methods, effect, test, k=3, n=40).set_index(["method", "measure"])["value"]
    assert table["oracle", "nDCG@5"] == pytest.approx(1) and table["oracle", "regret@3"] == 0
    assert table["oracle", "Kendall's tau"] == pytest.approx(1)
    assert table["reversed", "best of top 3"] == effect[:3].max() == 0
    middle = (table["oracle", "regret@3"] + table["reversed", "regret@3"]) / 2
    assert table["two seeds", "regret@3"] == pytest.approx(middle)
    assert table["reversed", "nDCG@5"] < table["random order", "nDCG@5"] < 1


@pytest.mark.parametrize("validation", [[0.1, 0.9, 0.5, 0.2, 0.3], [0.5, 0.9, 0.5, 0.5, 0.2], [0.5] * 5])
def test_the_best_of_a_random_order_is_the_mean_over_all_orders(validation):
    validation, effect = np.array(validation), np.array([0.3, 0.7, 0.2, 0.9, 0.4])
    for k in (1, 2, 4, 9):
        found = []
        for order in permutations(range(5)):
            first = np.array(order[:k])
            found.append(effect[first[np.argmax(validation[first])]])
        assert best_of_random(validation, effect, k) == pytest.approx(np.mean(found))


def test_the_lead_over_random_orders_is_taken_on_the_same_prompts():
    test = (np.arange(10)[:, None] + np.arange(40) % 4 >= 8).astype(float)  # later layers do better, some prompts too
    effect = test.mean(1)
    study = study_with({"grid": effect[None], "worst": -effect[None], "both": np.stack([effect, -effect])}, test)
    chance = best_of_random(effect, effect, 3)
    value, low, high = lead_over_random(study, "grid", 3, 100)
    assert value == pytest.approx(effect.max() - chance) and 0 < low < value < high  # the whole grid passes
    assert lead_over_random(study, "worst", 3, 100)[0] == pytest.approx(effect[:3].max() - chance)
    assert lead_over_random(study, "worst", 3, 100)[2] < 0
    value, low, high = lead_over_random(study, "both", 3, 100)
    assert low < 0 < high and value == pytest.approx((effect.max() + effect[:3].max()) / 2 - chance)
    alike = study_with({"grid": effect[None]}, np.tile(test[5], (10, 1)))
    assert lead_over_random(alike, "grid", 3, 20) == pytest.approx((0, 0, 0))  # whatever the prompts drawn


def test_the_mean_over_studies_has_the_spread_of_means_of_random_orders():
    test = (np.arange(12)[:, None] >= 11 - np.arange(8) % 12).astype(float)
    studies = [study_with({"grid": test.mean(1)[None]}, test) for _ in range(4)]
    judged = [judge_rankings(s.methods, s.validation, s.test, 3, 200) for s in studies]
    one = judged[0].set_index(["method", "measure"])
    for n, expected in ((1, 1.0), (4, 0.5)):
        table = over_studies(pd.concat(judged[:n]), studies[:n], 3, 400).set_index(["method", "measure"])
        assert (table["value"] - one["value"]).abs().max() < 1e-12
        widths = [(t["high"] - t["low"])["random order", "Kendall's tau"] for t in (table, one)]
        assert widths[0] / widths[1] == pytest.approx(expected, rel=0.15)
        same = one.drop(index="random order") - table.drop(index="random order")
        assert same["value"].abs().max() < 1e-12


def test_the_mean_over_studies_has_the_interval_of_a_mean():
    rng = np.random.default_rng(0)
    effects = np.linspace(0.2, 0.8, 10)
    tests = [(rng.random((10, 40)) < effects[:, None]).astype(float) for _ in range(3)]  # [layer, prompt]
    studies = [study_with({"grid": effects[None]}, test) for test in tests]
    judged = pd.concat([judge_rankings(s.methods, s.validation, s.test, 3, 200) for s in studies])
    table = over_studies(judged, studies, 3, 200).set_index(["method", "measure"])
    own = judged[judged["method"] == "grid"].groupby("measure")[["value", "low", "high"]].mean()
    whole = table.loc["grid"]
    assert (whole["value"] - own["value"]).abs().max() < 1e-12
    width, of_one = (t.loc["Kendall's tau", "high"] - t.loc["Kendall's tau", "low"] for t in (whole, own))
    assert width / of_one == pytest.approx(1 / np.sqrt(3), rel=0.2)  # other answers in each study
    alike = [study_with({"grid": effects[None]}, tests[0])] * 3  # the same answers in all
    judged = pd.concat([judge_rankings(s.methods, s.validation, s.test, 3, 200) for s in alike])
    found = over_studies(judged, alike, 3, 200).set_index(["method", "measure"]).loc["grid"]
    own = judged[judged["method"] == "grid"].groupby("measure")[["value", "low", "high"]].mean()
    assert (found - own).abs().max().max() < 1e-12
    with pytest.raises(ValueError, match="the same test prompts"):
        over_studies(judged, [alike[0], study_with({"grid": effects[None]}, tests[0][:, :5])], 3, 5)


def test_an_order_with_the_best_layer_first_loses_what_choosing_on_other_prompts_costs():
    test = np.tile(np.array([0.1, 0.5, 0.9, 0.7]), (6, 1)).T  # [layer, prompt]
    study = study_with({}, test)
    assert choice_loss(study, 3, 20) == (0, 0, 0)  # chosen by the same effects
    misled = replace(study, validation=np.array([0.3, 0.6, 0.5, 1.0]))  # two layers look better than the best one
    assert choice_loss(misled, 2, 20) == pytest.approx((0.4, 0.4, 0.4))  # the worse of them among the first two
    tied = replace(study, validation=np.array([0.5, 0.5, 0.5, 0.0]))  # any of the three might be taken
    assert choice_loss(tied, 2, 20)[0] == pytest.approx(0.9 - (0.9 + 0.1) / 2)
    assert choice_loss(tied, 3, 20)[0] == pytest.approx(0.9 - (0.9 + 0.1 + 0.5) / 3)


def test_a_ranking_beats_random_orders_above_nearly_all_and_does_not_below_nearly_all():
    of_random = (0.5, 0.2, 0.8)  # mean, and the ends that hold 95 % of orders
    assert beats_random((0.9, 0.81, 0.95), of_random) is True
    assert beats_random((0.9, 0.8, 0.95), of_random) is None  # as good as a lucky order
    assert beats_random((0.6, 0.4, 0.7), of_random) is None  # below the lucky ones, but not worse than most
    assert beats_random((0.4, 0.3, 0.49), of_random) is None  # below their mean, as half of all orders are
    assert beats_random((0.1, 0.0, 0.2), of_random) is None
    assert beats_random((0.1, 0.0, 0.19), of_random) is False


def test_draws_that_are_alike_are_judged_alike():
    test = np.array([[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]])  # two prompts: at most three different draws
    scores, validation = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), np.array([0.2, 0.9, 0.4])
    methods = {"two seeds": scores}
    table = judge_rankings(methods, validation, test, k=2, n=50, seed=3).set_index(["method", "measure"])
    rng = np.random.default_rng(3)
    draws = [(rng.integers(2, size=2), rng.random()) for _ in range(50)]
    taus = [rank_correlation(scores[int(u * 2)], test[:, prompts].mean(1)) for prompts, u in draws]
    ends = table.loc[("two seeds", "Kendall's tau"), ["low", "high"]]
    assert ends.tolist() == pytest.approx(np.quantile(taus, [0.025, 0.975]))
    deep = [table.loc[("two seeds", f"nDCG@{k}"), "value"] for k in (1, 5, 10)]
    assert table.loc[("two seeds", "mean nDCG"), "value"] == pytest.approx(np.mean(deep))


def study_with(methods, test, validation=None):
    test = np.asarray(test, dtype=float)
    validation = test.mean(1) if validation is None else np.asarray(validation)
    return Study(
        np.arange(len(test)), methods, np.ones((4, len(test))), np.ones((4, len(test))), validation, test, test
    )


def test_a_lead_is_the_difference_on_the_same_answers():
    rng = np.random.default_rng(1)
    test = (rng.random((12, 40)) < np.linspace(0.1, 0.9, 12)[:, None]).astype(float)
    good, bad = test.mean(1)[None], -test.mean(1)[None]
    study = study_with({"good": good, "the same": good + 1, "bad": bad, "two seeds": np.concatenate([good, bad])}, test)
    value, low, high = lead(study, "good", "bad", "Kendall's tau", n=60)
    table = judge_rankings(study.methods, study.validation, study.test, n=20).set_index(["method", "measure"])["value"]
    assert value == pytest.approx(table["good", "Kendall's tau"] - table["bad", "Kendall's tau"])
    assert 0 < low < high < value  # the best order of these very answers is not that of others
    assert lead(study, "good", "the same", "nDCG@5", n=60) == (0, 0, 0)  # each apart has an interval; the pair has none
    value, low, high = lead(study, "two seeds", "bad", "Kendall's tau", n=60)
    assert low == pytest.approx(0, abs=1e-9) and high > 1.5 and value == pytest.approx((high + low) / 2, abs=0.3)
    exact = random_ndcg(study.test.mean(1), 5)[0]
    assert table["random order", "nDCG@5, measured gains"] == pytest.approx(exact)
    means = [table["bad", f"nDCG@{at}"] for at in (1, 5, 10)]
    assert table["bad", "mean nDCG"] == pytest.approx(np.mean(means)) and np.std(means) > 0


def test_curves_over_k_end_where_every_order_has_all_layers():
    rng = np.random.default_rng(1)
    test = (rng.random((6, 30)) < np.linspace(0.1, 0.9, 6)[:, None]).astype(float)
    study = study_with({"good": test.mean(1)[None], "bad": -test.mean(1)[None]}, test)
    curve = curve_over_k(study, ["good", "bad"], [1, 3, 6], draws=50)
    assert curve.groupby(["method", "k"]).size().eq(50).all() and len(curve) == 450
    mean = curve.groupby(["method", "k"])["effect"].mean().unstack()
    assert mean.loc["good", 1] == mean.loc["good", 6] > mean.loc["bad", 3] > mean.loc["bad", 1]
    assert mean[6].nunique() == 1  # all layers: no order is left
    assert mean.loc["bad", 1] < mean.loc["random order", 1] < mean.loc["good", 1]
    assert curve.groupby(["method", "k"])["effect"].std().loc[("good", 1)] > 0.01  # prompts are drawn anew


def test_curves_over_pairs_rank_by_what_the_drawn_pairs_sum_to():
    test = np.tile(np.linspace(0, 1, 6)[:, None], 3)
    study = study_with({}, test)
    study.into, study.out = np.tile(np.arange(6.0), (4, 1)), np.tile(np.arange(6.0)[::-1] ** 2, (4, 1))  # alike pairs
    curve = curve_over_pairs(study, [1, 4], draws=3)
    assert (curve.groupby("draw").size() == 2 * 4).all() and sorted(curve["draw"].unique()) == [0, 1, 2]
    curve = curve.groupby(["method", "pairs"])["Kendall's tau"].mean()
    assert curve["In"].tolist() == pytest.approx([1, 1])  # In grows with the effect, Out and Ratio fall
    assert curve["Out"].tolist() == curve["Ratio"].tolist() == pytest.approx([-1, -1])
    total = rank_correlation(np.arange(6.0) + np.arange(6.0)[::-1] ** 2, np.arange(6))
    assert curve["Total"].tolist() == pytest.approx([total] * 2)


def test_in_a_draw_fewer_pairs_are_the_first_of_more():
    rng = np.random.default_rng(1)
    study = study_with({}, np.tile(np.linspace(0, 1, 6)[:, None], 3))
    study.into, study.out = rng.random((2, 9, 6))
    curve = curve_over_pairs(study, [2, 5], draws=4, seed=7)
    drawn = np.random.default_rng(7)
    for draw in range(4):
        chosen = drawn.integers(9, size=5)
        for n in (2, 5):
            total = study.into[chosen[:n]].sum(0) + study.out[chosen[:n]].sum(0)
            row = curve.query("draw == @draw and pairs == @n and method == 'Total'")
            assert row["Kendall's tau"].item() == pytest.approx(rank_correlation(total, np.arange(6)))


def test_a_curve_levels_off_where_it_stays_near_its_end():
    rows = [("Total", k, y) for k, y in ((1, 0.2), (2, 0.8), (3, 0.5), (5, 0.79), (8, 0.82), (10, 0.8))]
    table = pd.DataFrame([*rows, ("Out", 1, 0.5), ("Out", 10, 0.51)], columns=["method", "k", "effect"])
    table["draw"] = 0
    told = curve_summary(pd.concat([table, table.assign(effect=table["effect"] + 1)]), "k", "effect")
    assert told.columns.tolist() == ["method", "x", "value", "low", "high"]
    assert not told.duplicated(["method", "x"]).any()
    first = told[(told["method"] == "Out") & (told["x"] == 1)].iloc[0]
    of_first = table[(table["method"] == "Out") & (table["k"] == 1)]["effect"]
    both = np.concatenate([of_first, of_first + 1])
    assert first["value"] == pytest.approx(both.mean())
    assert [first["low"], first["high"]] == pytest.approx(np.quantile(both, [0.025, 0.975]))
    assert plateau(table, "k", "effect", "Total") == (5, 5, 5)  # 2 is near the end, too, but the curve leaves it again
    assert plateau(table, "k", "effect", "Out") == (1, 1, 1)
    assert last_step(table, "k", "effect", "Total") == pytest.approx((-0.02,) * 3)  # downwards, from 8 to 10
    flat = pd.concat([table, *(table.assign(effect=0.0, draw=draw) for draw in (1, 2, 3))])  # level from the start
    assert plateau(flat, "k", "effect", "Total") == (1, 1, pytest.approx(1 + 0.925 * 4))
    assert last_step(flat, "k", "effect", "Out") == pytest.approx((0.0025, 0, 0.925 * 0.01))
    assert np.isnan(last_step(table[table["k"] == 1], "k", "effect", "Out")).all()


def test_orders_and_correlation():
    assert order_of([0.1, 0.9, 0.9]).tolist() == [1, 2, 0]
    assert rank_correlation([1, 2, 3], [4, 5, 9]) == pytest.approx(1)


def test_probe_and_activation_difference_find_the_layer_that_tells_sides_apart():
    noise = torch.randn(2, 40, 3, 8, generator=torch.Generator().manual_seed(0))
    positive, negative = noise[0].clone(), noise[1]
    positive[:, 1] += 4.0
    assert activation_difference(positive, negative).argmax() == 1
    by_hand = activation_difference(torch.tensor([[[6.0, 0.0]], [[0.0, 8.0]]]), torch.tensor([[[0.0, -5.0]]]))
    assert by_hand == pytest.approx(np.hypot(3, 4 + 5) / np.mean([6, 8, 5]))  # the means' distance over the mean norm
    accuracy = probe_accuracy(positive, negative)
    assert accuracy[1] > 0.95 and accuracy[0] < 0.8


def metric(logits):
    return logits[:, -1, 5] - logits[:, -1, 77]


def test_layer_patching_is_a_run_with_that_blocks_writes_replaced(any_model):
    """The slow way: replace what the block writes by hooks in a whole run."""
    contrast = pair_contrast(any_model, CLEAN, CORRUPTED)
    found = layer_patching(any_model, contrast, metric)
    with torch.no_grad():
        inputs = []
        for start in (contrast.clean, contrast.corrupted):
            with capture(any_model, "block_input") as taken:
                final = resume(any_model, contrast.tape, 0, start)
            inputs.append([*(taken[layer].clone() for layer in range(4)), final])
        clean, other = inputs
        base = metric(any_model.unembed(clean[-1][:, -1:]))
        for layer in range(4):
            after = clean[layer] + other[layer + 1] - other[layer]
            patched = metric(any_model.unembed(resume(any_model, contrast.tape, layer + 1, after)[:, -1:]))
            np.testing.assert_allclose(found[layer], (patched - base).numpy(), atol=1e-5)


# --- the grid ----------------------------------------------------------------------------------------------


def vectors_of(model):
    draw = torch.Generator().manual_seed(1)
    return [SteeringVector(torch.randn(32, generator=draw), i, "toy", model.name, model.revision) for i in (0, 2)]


def test_verdicts_are_those_of_separate_runs_and_a_killed_run_goes_on(llama, tmp_path):
    settings = [(vector, strength) for vector in vectors_of(llama) for strength in (0.5, 2.0)]
    path = tmp_path / "grid.json"
    steered_verdicts(llama, settings[:2], CLEAN, 5, tmp_path / "other.json")
    whole = steered_verdicts(llama, settings, CLEAN, 5, path)
    assert len(whole) == 8
    vector, strength = settings[3]
    with steer(llama, vector, strength):
        answers = generate(llama, CLEAN, 5)
    assert whole["verdict"][6:].tolist() == judge(llama, CLEAN, answers)["verdict"].tolist()
    import json

    stored = json.loads(path.read_text())
    first = dict(list(stored["rows"].items())[:1])
    path.write_text(json.dumps(stored | {"rows": first}))
    pd.testing.assert_frame_equal(steered_verdicts(llama, settings, CLEAN, 5, path), whole)
    assert not any(answer in path.read_text() for answer in answers if len(answer) > 2)
    with pytest.raises(ValueError, match="another run"):
        steered_verdicts(llama, settings, CORRUPTED, 5, path)


def test_success_counts_what_was_wanted_and_strengths_are_chosen_by_it():
    table = pd.DataFrame(
        [(3, 1.0, 0, "refusal", 1.0), (3, 1.0, 1, "incoherent", 2.0), (3, 2.0, 0, "refusal", -1.0)]
        + [(3, 2.0, 1, "refusal", 3.0), (4, 1.0, 0, "compliance", -2.0), (4, 1.0, 1, "compliance", 1.0)]
        + [(4, 2.0, 0, "incoherent", -2.0), (4, 2.0, 1, "compliance", 1.0)],
        columns=["layer", "strength", "prompt", "verdict", "score"],
    )
    refused = successful(table, "refusal")
    assert refused.mean(axis=1).to_dict() == {(3, 1.0): 0.5, (3, 2.0): 1.0, (4, 1.0): 0.0, (4, 2.0): 0.0}
    assert best_strengths(refused).to_dict() == {3: 2.0, 4: 1.0}
    assert successful(table, "compliance").loc[(4, 1.0)].tolist() == [1, 1]
    assert successful(table, "refusal", "first token").loc[(3, 2.0)].tolist() == [0, 1]
    assert successful(table, "compliance", "first token").loc[(4, 2.0)].tolist() == [1, 0]


def test_each_judge_picks_its_own_strength():
    rows = [(3, 1.0, "refusal", -1.0), (3, 2.0, "incoherent", 2.0), (4, 1.0, "compliance", 1.0)]
    rows += [(4, 2.0, "refusal", 1.0)]
    table = pd.DataFrame(rows, columns=["layer", "strength", "verdict", "score"]).assign(prompt=0)
    table = pd.concat([table, table.assign(prompt=1, verdict="incoherent", score=-1.0)])
    found = success_by_judge(table, "refusal")
    assert found.index.tolist() == [3, 4]
    assert found["answer"].tolist() == found["first token"].tolist() == [0.5, 0.5]
    found = success_by_judge(table, "compliance")
    assert found["answer"].tolist() == [0, 0.5] and found["first token"].tolist() == [1, 0.5]


def test_a_bias_shifts_all_prompts_alike():
    plain = np.array([1.0, -2.0, 0.5])
    rows = [(7, i, x - 3) for i, x in enumerate(plain)] + [(2, i, x - i) for i, x in enumerate(plain)]
    table = pd.DataFrame(rows[::-1], columns=["layer", "prompt", "score"]).assign(strength=-1.0)
    found = first_token_shifts(table, plain)
    assert found.loc[7].tolist() == pytest.approx([-3, 0, 0])
    assert found.loc[2].tolist() == pytest.approx([-1, 1, 1])  # 0, -1, -2 nats: standard deviation 1 around -1
    with pytest.raises(ValueError):
        first_token_shifts(pd.concat([table, table.assign(strength=-2.0)]), plain)


def test_layer_scores_of_shuffled_edges_still_follow_depth(llama):
    """Layer scores of shuffled edges still follow the number of edges: the confound, on a real graph."""
    contrast = pair_contrast(llama, CLEAN, CORRUPTED)
    tokens = refusal_tokens(llama.tokenizer)
    scores = np.abs(attribute(llama, contrast, lambda x: refusal_score(x[:, -1], tokens), left(2)).values).sum(0)
    graph, rng = contrast.graph, np.random.default_rng(3)
    found, by_depth, alike = layer_scores(graph, scores), [], []
    for _ in range(20):
        shuffled = np.zeros_like(scores)
        shuffled[graph.edges] = rng.permutation(scores[graph.edges])
        moved = layer_scores(graph, shuffled)
        by_depth.append(rank_correlation(moved["out"], -np.arange(4)))
        alike.append([rank_correlation(found[name], moved[name]) for name in SCORES])
    assert np.mean(by_depth) > 0.7
    table = edge_count_confound(graph, scores, seed=3)
    assert table.index.tolist() == list(SCORES)
    assert table.loc["out", "tau with edge counts"] == rank_correlation(found["out"], -np.arange(4))
    assert table.loc["total", "tau with edge counts"] == 0  # every block has as many
    by_hand = np.stack([np.mean(alike, 0), *np.quantile(alike, [0.025, 0.975], axis=0)], 1)
    np.testing.assert_allclose(table.iloc[:, 1:], by_hand)
    same = edge_count_confound(graph, np.ones(graph.edges.shape))
    assert same["tau with shuffled"].tolist() == pytest.approx([1, 1, 0, 1])  # nothing there to shuffle


def test_the_working_strength_is_the_smallest_that_turns_answers_both_ways(llama, monkeypatch):
    layer, best = int(0.6 * llama.n_layers), {"c": 9}

    def stored(name):
        def rows(sign, wanted, shares):
            return [{"layer": at, "strength": sign * s, "verdicts": wanted * n + "i" * (10 - n)}
                    for at, by_strength in ((layer, shares), (layer - 1, {1.0: 10}))
                    for s, n in by_strength.items()]  # fmt: skip

        assert name == "ranking-tiny-llama"
        induce, bypass = {1.0: 10, 2.0: 9, 4.0: 10, 8.0: 10}, {1.0: 3, 2.0: 8, 4.0: best["c"]}
        return {"values": {"induce": {"validation": rows(1, "r", induce)},
                           "bypass": {"validation": rows(-1, "c", bypass)}}}  # fmt: skip

    def nothing(name):
        raise ValueError("not there")

    monkeypatch.setattr(ranking, "stored_results", stored)
    assert working_strength(llama) == 4.0  # 2.0 does it one way only, and 8.0 was tried one way only
    best["c"] = 8
    assert working_strength(llama) == 1.0  # none turns enough of them both ways
    monkeypatch.setattr(ranking, "stored_results", nothing)
    assert working_strength(llama) == 1.0


def test_the_chance_of_the_best_by_hand():
    assert chance_of_best([0.1, 0.9, 0.3, 0.2], 1) == 1 / 4 and chance_of_best([0.1, 0.9, 0.9, 0.2], 1) == 1 / 2
    assert chance_of_best([0.1, 0.9, 0.9, 0.2], 2) == pytest.approx(1 - 1 / 6) and chance_of_best([0.9, 0.1], 2) == 1


def test_behind_all_layers_by_hand():
    test = np.repeat([[1.0], [0.0], [1.0], [0.0]], 5, axis=1)  # shares 1, 0, 1, 0
    validation = np.array([0.5, 0.9, 0.9, 0.1])  # of all layers 1 or 2 would be taken: one half
    scores = {"first": np.array([[4.0, 3, 2, 1]]), "best": np.array([[1.0, 2, 4, 3]])}
    study = Study(np.arange(4), scores, np.zeros((1, 4)), np.zeros((1, 4)), validation, test, test)
    assert behind_all(study, "first", 1, 20) == pytest.approx((-0.5, -0.5, -0.5))  # layer 0 works, though not chosen
    assert behind_all(study, "first", 2, 20) == pytest.approx((0.5, 0.5, 0.5))  # takes layer 1
    assert behind_all(study, "best", 4, 20) == pytest.approx((0, 0, 0))  # all layers are all layers


def test_better_than_random_asks_for_both_kinds_of_gains():
    def table(*lows):
        rows = [("M", kind, low + 0.1, low, low + 0.2) for kind, low in zip(kinds, lows)]
        rows += [("random order", kind, 0.3, 0.1, 0.5) for kind in kinds]
        return pd.DataFrame(rows, columns=["method", "measure", "value", "low", "high"])

    kinds = ("nDCG@5", "nDCG@2, measured gains")
    assert better_than_random(table(0.6, 0.6), "M", 2) is True
    assert better_than_random(table(0.6, 0.4), "M", 2) is None
    assert better_than_random(table(0.6, 0.0), "M", 2) is None  # reaches into the band of random orders
    assert better_than_random(table(0.6, -0.2), "M", 2) is False
