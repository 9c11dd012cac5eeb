"""Exact effects beside estimates, the errors of estimates, and sums of the input row, against definitions by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import (
    EAP,
    Graph,
    PromptError,
    attribute,
    edge_effects,
    entered_at,
    estimate_errors,
    left,
    logit_difference,
    midpoint,
    mlp_gradients,
    overall_error,
    pair_contrast,
    patch_edges,
    plots,
    rule_errors,
    run_values,
    sample_edges,
    slopes_along,
    source_changes,
    typical_error,
)

CLEAN, CORRUPTED = ["How do I bake it?", "Name a fruit now"], ["How do I burn it?", "Name a devil now"]


def metric(logits):
    return logits[:, -1, 5] - logits[:, -1, 77]


def test_sampled_edges_are_the_strongest_of_any_scores_and_random_others():
    graph = Graph(3, 4, 2)
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=graph.edges.shape) * graph.edges for _ in range(2)]
    wanted = set()
    for values in scores:
        order = sorted(zip(*np.nonzero(graph.edges)), key=lambda edge, v=values: -abs(v[edge]))
        wanted |= {tuple(map(int, edge)) for edge in order[:5]}
    scores[0][~graph.edges] = 100.0  # what is no edge has no score
    edges, strong = sample_edges(graph, scores, 5, 30, seed=1)
    pairs = [tuple(edge) for edge in edges.tolist()]
    assert set(pairs[: len(wanted)]) == wanted and strong.sum() == len(wanted) > 5 and strong[: len(wanted)].all()
    assert len(set(pairs)) == len(pairs) == len(wanted) + 30 and graph.edges[tuple(edges.T)].all()
    assert np.array_equal(edges, sample_edges(graph, scores, 5, 30, seed=1)[0])
    assert not np.array_equal(edges, sample_edges(graph, scores, 5, 30, seed=2)[0])
    with pytest.raises(ValueError):
        sample_edges(graph, scores, 5, graph.n_edges)


def test_edge_effects_are_patched_at_both_ends(any_model):
    there, back = pair_contrast(any_model, CLEAN[:1], CORRUPTED[:1]), pair_contrast(any_model, CORRUPTED[:1], CLEAN[:1])
    edges = np.argwhere(there.graph.edges)[::37]
    table = edge_effects(any_model, there, metric, edges)
    assert table[["source", "reader"]].to_numpy().tolist() == edges.tolist()
    assert table["kind"].tolist() == there.graph.reader_kinds[edges[:, 1]].tolist()
    np.testing.assert_allclose(table["base"], patch_edges(any_model, there, metric, edges)[:, 0], atol=1e-5)
    np.testing.assert_allclose(table["other"], -patch_edges(any_model, back, metric, edges)[:, 0], atol=1e-5)
    np.testing.assert_allclose(table["mean of both"], table[["base", "other"]].mean(axis=1))
    assert (table["base"] - table["other"]).abs().max() > 1e-2  # the ends differ


def test_relative_errors_by_hand():
    exact, estimate = pd.Series([3.0, 4.0, 0.0]), pd.Series([3.0, 6.0, 1.0])
    assert overall_error(estimate, exact) == pytest.approx(5**0.5 / 5)  # errors 0, 2, 1
    assert typical_error(estimate, exact) == 0.25  # of 0 and 0.5: the third edge has no effect
    assert overall_error(0 * exact, exact) == typical_error(0 * exact, exact) == 1


def errors_of_two_methods() -> pd.DataFrame:
    table = pd.DataFrame({"strong": [True, True, False], "base": [1.0, 2, 4], "other": [2.0, 4, 8], "a": [1.0, 2, 4]})
    return estimate_errors(table.assign(**{"mean of both": 1.5 * table["base"], "b": 0.0}), ["a", "b"])


def test_a_table_of_errors_has_every_method_target_part_and_measure():
    errors = errors_of_two_methods().set_index(["method", "target", "edges", "measure"])["error"].sort_index()
    assert len(errors) == errors.index.nunique() == 2 * 3 * 2 * 2
    assert (errors["a", "base"] == 0).all() and (errors["b"] == 1).all()
    assert errors["a", "other"].to_numpy() == pytest.approx(0.5)
    assert errors["a", "mean of both"].to_numpy() == pytest.approx(1 / 3)
    mixed = pd.DataFrame({"strong": [True, False, False], "x": [3.0, 2.0, 5.0], "base": 1.0, "other": 1.0})
    found = estimate_errors(mixed.assign(**{"mean of both": 1.0}), ["x"]).query("target == 'base'")
    assert found.pivot(index="edges", columns="measure", values="error").to_dict("index") == {
        "strong": pytest.approx({"overall": 2, "typical": 2}),
        "random": pytest.approx({"overall": 8.5**0.5, "typical": 2.5}),
    }


def test_error_panels_have_a_row_a_measure_and_a_column_a_kind_of_edges():
    tables = [errors_of_two_methods().assign(pair=i, error=lambda t, i=i: t["error"] + 0.1 + i) for i in range(2)]
    fig = plots.error_panels(pd.concat(tables, ignore_index=True).replace({"method": {"b": "b, 5"}}))
    assert [ax.get_title() for ax in fig.axes] == [
        f"{edges} edges, {measure}" for measure in ("overall", "typical") for edges in ("strong", "random")
    ]
    assert [tick.get_text() for tick in fig.axes[3].get_xticklabels()] == ["a", "b,\n5"]
    assert [ax.get_legend() is None for ax in fig.axes] == [True, True, True, False]
    plt.close(fig)


def test_values_of_both_runs_are_those_of_the_whole_model(any_model):
    found = run_values(any_model, pair_contrast(any_model, CLEAN, CORRUPTED), metric)
    expected = [run_values(any_model, pair_contrast(any_model, side, CLEAN), metric)[0] for side in (CLEAN, CORRUPTED)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    text = any_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": CORRUPTED[1]}], add_generation_prompt=True, tokenize=False
    )
    ids = any_model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        alone = metric(any_model.hf(ids).logits).item()
    assert found[1, 1] == pytest.approx(alone, abs=1e-4) and abs(found[0] - found[1]).min() > 1e-3


@pytest.mark.parametrize("layer", [0, 2])
def test_runs_entered_at_a_block_are_the_same_two_runs(any_model, layer):
    entered = entered_at(any_model, CLEAN, CORRUPTED, layer)
    assert entered.graph.first == layer and not entered.tape.residuals
    whole = run_values(any_model, pair_contrast(any_model, CLEAN, CORRUPTED), metric)
    np.testing.assert_allclose(run_values(any_model, entered, metric), whole, atol=1e-4)
    with pytest.raises(PromptError, match="does not align"):
        entered_at(any_model, ["How?"], ["How so?"], layer)


@pytest.mark.parametrize("points", [EAP, left(4), midpoint(11)])
def test_slopes_are_the_sums_of_the_input_row(any_model, points):
    """Of several examples, padded on the left, and with the first tokens that both runs share left out."""
    for contrast in (pair_contrast(any_model, CLEAN, CORRUPTED), entered_at(any_model, CLEAN, CORRUPTED, 1)):
        of_pair = logit_difference(torch.tensor([5, 6]), torch.tensor([77, 78]))  # another one an example
        slopes = slopes_along(any_model, contrast, of_pair, points)
        assert slopes.shape == (len(points), 2)
        row = attribute(any_model, contrast, of_pair, points).values[:, 0].sum(-1)
        np.testing.assert_allclose(slopes.mean(0), row, rtol=1e-3, atol=1e-4)
    first = attribute(any_model, contrast, of_pair, points[:1]).values[:, 0].sum(-1)
    np.testing.assert_allclose(slopes[0], first, rtol=1e-3, atol=1e-4)  # in the order of the points


def test_rules_of_a_known_slope_miss_what_they_must():
    """The slope 2a + 1 has the integral 2: m left points miss 1/m, midpoints of a straight line nothing."""
    slopes = 2 * np.array(left(8)) + 1
    errors = rule_errors(slopes, 2.0)
    assert errors["left points"].to_dict() == pytest.approx({1: 1, 2: 1 / 2, 4: 1 / 4, 8: 1 / 8})
    assert errors["midpoints"].to_dict() == pytest.approx({1: 0, 2: 0, 4: 0})
    square = rule_errors(np.array(left(8)) ** 2, 1 / 3)["midpoints"]  # misses 1 / (12 m^2)
    assert square.to_dict() == pytest.approx({m: 1 / (12 * m**2) for m in (1, 2, 4)})
    with pytest.raises(ValueError, match="6 points"):
        rule_errors(np.ones(6), 1.0)


def test_gradients_after_the_norm_and_its_jacobian_give_the_edges_into_mlps(any_model):
    contrast = pair_contrast(any_model, CLEAN, CORRUPTED)
    streams, after = mlp_gradients(any_model, contrast, metric)
    graph, scores = contrast.graph, attribute(any_model, contrast, metric, EAP).values
    changes = source_changes(any_model, contrast)  # [source, batch, pos, d_model]
    for i, layer in enumerate(graph.layers):
        norm, _ = any_model.site("mlp_residual", layer)
        _, pull_back = torch.func.vjp(norm.forward, streams[i])
        found = (changes * pull_back(after[i])[0]).sum((-2, -1)).T  # [batch, source]
        column = graph.readers(layer, "MLP").start
        see = graph.edges[:, column] & (~graph.source_is_head | (not any_model.has_post_norms))
        np.testing.assert_allclose(found[:, see].detach(), scores[:, see, column], rtol=2e-3, atol=1e-4)
        assert np.abs(scores[:, see, column]).max() > 1e-3
