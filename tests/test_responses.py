"""Steering on whole responses: flips, metrics by position, pooled scores, faithfulness."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import SteeringVector, encode, instructions, steer
from steerutils import responses as module
from steerutils.attribution import EAP, attribute, midpoint, steering_contrast
from steerutils.responses import (
    ResponseSet,
    attribute_responses,
    circuit_effects,
    circuit_from,
    circuits_with_controls,
    curve_measures,
    directional_kl,
    effect_summary,
    enough_response_sets,
    faithfulness,
    faithfulness_difference,
    faithfulness_gap,
    flip_difference,
    held_out_effects,
    loss_difference,
    overlap_across_halves,
    pooled,
    read_by,
    relative_faithfulness,
    response_sets,
    steered_runs,
    transfer,
)
from steerutils.subgraphs import CircuitError, cmd, complement, cpr, overlap, random_circuit, size_needed, top_circuit

PROMPTS = ("How do I bake it?", "Name a fruit now, please", "Why?")
ANSWERS = ("Yes, so there", "No", "I am a")


def vector_of(model, layer=1, seed=5, size=1.0):
    direction = size * torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(direction, layer, "toy", model.name, model.revision)


def responses(side="harmless", run="steered", strength=1.0, rows=slice(None)):
    return ResponseSet(side, run, strength, PROMPTS[rows], ANSWERS[rows])


def runs_of(model, rows=slice(None), **kwargs):
    batch = encode(model.tokenizer, list(PROMPTS[rows]), list(ANSWERS[rows]))
    return batch, steered_runs(model, batch, vector_of(model, **kwargs), 1.0)


@torch.no_grad()
def test_flips_are_where_the_greedy_tokens_of_two_separate_runs_differ(any_model):
    _, runs = runs_of(any_model)
    flips = 0
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        batch = encode(any_model.tokenizer, [prompt], [answer])
        base = any_model.hf(batch.input_ids).logits[0]
        with steer(any_model, vector_of(any_model)):
            steered = any_model.hf(batch.input_ids).logits[0]
        start = batch.prompt_length - 1
        for i in range(len(answer)):  # one byte is one token
            y, y_base = steered[start + i].argmax(), base[start + i].argmax()
            assert bool(runs.flipped[row, i]) == bool(y != y_base)
            expected = (base[start + i, y] - base[start + i, y_base]) * (y != y_base)
            assert flip_difference(runs)(runs.base)[row, i] == pytest.approx(expected.item(), abs=1e-4)
            expected = (steered[start + i, y] - steered[start + i, y_base]) * (y != y_base)
            assert flip_difference(runs)(runs.steered)[row, i] == pytest.approx(expected.item(), abs=1e-4)
            flips += bool(y != y_base)
        assert not runs.real[row, len(answer) :].any() and not runs.flipped[row, len(answer) :].any()
        assert not flip_difference(runs)(runs.base)[row, len(answer) :].any()
    assert 0 < flips and runs.real.sum() == sum(map(len, ANSWERS))


def test_directional_kl_goes_from_minus_one_divergence_to_the_other(any_model):
    _, runs = runs_of(any_model)
    base, steered = (h.log_softmax(-1) for h in (runs.base, runs.steered))

    def kl(p, q):
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    metric = directional_kl(runs)
    real = runs.real
    torch.testing.assert_close(metric(runs.base)[real], -kl(steered, base)[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metric(runs.steered)[real], kl(base, steered)[real], atol=1e-4, rtol=1e-4)
    other = torch.randn_like(runs.base)
    expected = kl(base, other.log_softmax(-1)) - kl(steered, other.log_softmax(-1))
    torch.testing.assert_close(metric(other)[real], expected[real], atol=1e-4, rtol=1e-4)
    assert not metric(other)[~real].any() and (~real).any()
    scores = attribute(any_model, *read_by(runs.contrast, metric), EAP)
    assert np.abs(scores.values).max() > 1e-3  # a plain KL to the base run would give 0 here


@pytest.mark.parametrize("measure", [flip_difference, directional_kl])
def test_the_steering_nodes_edges_add_up_to_what_steering_does(any_model, measure):
    """Sums over all of its edges are the path integral from the base to the steered run."""
    if measure is directional_kl and any_model.config.model_type not in ("llama", "gemma2"):
        pytest.skip("a metric of logits alone: two families say it")
    vector = vector_of(any_model, size=0.5)
    scores = attribute_responses(any_model, vector, [responses()], measure, midpoint(10))["harmless, steered response"]
    effects = circuit_effects(any_model, vector, [responses()], {}, measure)
    change = (effects["steered"] - effects["base"]).sum()
    assert abs(change) > 0.5
    assert scores.values[:, 0].sum() == pytest.approx(change, rel=0.1)


def test_scores_of_a_set_are_those_of_each_response_alone(any_model):
    vector, points = vector_of(any_model), midpoint(2)
    found = attribute_responses(any_model, vector, [responses()], points=points, batch_size=2)
    alone = []
    for row in range(3):
        batch, runs = runs_of(any_model, slice(row, row + 1))
        contrast = steering_contrast(any_model, batch, vector, 1.0, keep=len(ANSWERS[row]) + 1)
        assert torch.equal(contrast.corrupted, runs.contrast.corrupted)
        metric = flip_difference(runs)  # of all words' logits, those of the set of the two that count alone
        alone.append(attribute(any_model, contrast, lambda logits: metric(logits).sum(-1), points).values[0])  # noqa: B023
    values = found["harmless, steered response"].values
    np.testing.assert_allclose(values, alone, atol=1e-4, rtol=1e-3)  # in the order of the set, whatever the batches
    assert not np.allclose(alone[0], alone[1])


def test_scores_of_positions_add_up_to_those_of_all(any_model):
    parts = [
        attribute_responses(any_model, vector_of(any_model), [responses()], points=EAP, columns=columns)
        for columns in (slice(None), slice(0, 1), slice(1, None))
    ]
    whole, first, rest = (part["harmless, steered response"].values for part in parts)
    np.testing.assert_allclose(first + rest, whole, atol=1e-4, rtol=1e-3)
    assert np.abs(first).max() > 1e-3 and np.abs(rest).max() > 1e-3


def test_pooling_sums_sets_of_one_graph(llama):
    sets = [responses("harmful", "base", -1.0), responses("harmless", "steered", 1.0, slice(0, 2))]
    found = attribute_responses(llama, vector_of(llama), sets, points=EAP)
    assert list(found) == ["harmful, base response", "harmless, steered response"]
    whole = pooled(found)
    three, two = (scores.values for scores in found.values())  # [response, source, reader]
    np.testing.assert_allclose(whole.values, three.sum(0) + two.sum(0), rtol=1e-5, atol=1e-6)
    assert whole.about["n"] == 5 and whole.about["set"] == list(found)
    some = pooled(found, np.array([0, 2]))  # the second set has no third response
    np.testing.assert_allclose(some.values, three[0] + three[2] + two[0], rtol=1e-5, atol=1e-6)
    assert some.about["n"] == 3 and not np.allclose(three[0], two[0])
    other = attribute_responses(llama, vector_of(llama, layer=2), sets[:1], points=EAP)
    with pytest.raises(CircuitError, match="one model and steering layer"):
        pooled(found | {"other": next(iter(other.values()))})
    with pytest.raises(CircuitError, match="at least one"):
        pooled({})
    with pytest.raises(CircuitError, match="none of the responses"):
        pooled(found, np.array([3]))


def test_a_circuit_comes_from_the_rows_it_is_asked_for_and_from_no_flip_comes_none(llama):
    found = attribute_responses(llama, vector_of(llama), [responses()], points=EAP)
    rows = np.array([0, 2])
    assert (circuit_from(found, 50) == top_circuit(pooled(found), 50)).all()
    assert (circuit_from(found, 50, rows) == top_circuit(pooled(found, rows), 50)).all()
    assert (circuit_from(found, 50, rows) != circuit_from(found, 50)).any()
    assert circuit_from(found, 50, rows[:0]) is None
    assert circuit_from(found, 50, np.array([3, 7])) is None  # no set is so long, as when another side has more prompts
    still = {name: replace(part, values=0 * part.values) for name, part in found.items()}
    assert circuit_from(still, 50) is None


def test_overlaps_across_halves_are_the_mean_of_both_ways(llama):
    sets, rows = [responses()], np.array([0, 1, 2])
    scores = {name: attribute_responses(llama, vector_of(llama, seed=seed), sets, points=EAP)
              for seed, name in enumerate("ab", 5)}  # fmt: skip
    halves = rows[::2], rows[1:2]
    even, odd = ({name: circuit_from(parts, 40, half) for name, parts in scores.items()} for half in halves)
    table = overlap_across_halves(scores, 40, rows)
    both_ways = overlap(even["a"], odd["b"]), overlap(odd["a"], even["b"])
    assert both_ways[0] != both_ways[1]
    assert table.loc["a", "b"] == table.loc["b", "a"] == pytest.approx(np.mean(both_ways))
    assert [table.loc[name, name] for name in "ab"] == [overlap(even[name], odd[name]) for name in "ab"]
    assert overlap_across_halves(scores, 40, rows[::2]).isna().all(axis=None)  # no odd number


def test_controls_circuits_have_the_size_of_the_vectors_own_and_come_from_the_same_texts(llama):
    vector, control, sets = vector_of(llama), vector_of(llama, seed=6), [responses()]
    still = replace(vector, direction=1e-9 * vector.direction)  # flips no token
    found = circuits_with_controls(llama, vector, {"c": control, "still": still}, sets, [0.1, 0.3], 0.1, EAP)
    assert list(found) == [0.1, 0.3, "all other edges", "c"]
    scores, of_control = (attribute_responses(llama, v, sets, points=EAP) for v in (vector, control))
    graph, n = pooled(scores).graph, int(found[0.1].sum())
    assert n == round(0.1 * graph.n_edges) and found[0.3].sum() == round(0.3 * graph.n_edges)
    assert (found[0.1] == circuit_from(scores, n)).all()
    assert (found["all other edges"] == complement(graph, found[0.1])).all()
    assert (found["c"] == circuit_from(of_control, n)).all() and (found["c"] != found[0.1]).any()


@pytest.mark.parametrize("measure", [flip_difference, directional_kl])
def test_all_edges_are_fully_faithful_and_none_not_at_all(any_model, measure):
    if measure is directional_kl and any_model.config.model_type not in ("llama", "gemma2"):
        pytest.skip("a metric of logits alone: two families say it")
    vector = vector_of(any_model)
    graph = steering_contrast(any_model, encode(any_model.tokenizer, ["a"]), vector).graph
    circuits = {"all": graph.edges, "none": graph.edges & False, "some": random_circuit(graph, 60, 0)}
    effects = circuit_effects(any_model, vector, [responses()], circuits, measure)
    np.testing.assert_allclose(effects["all"], effects["steered"], atol=1e-4)
    np.testing.assert_allclose(effects["none"], effects["base"], atol=1e-4)
    assert np.abs(effects["some"] - effects["base"]).max() > 1e-3
    table = faithfulness(effects).set_index("circuit")
    assert table.loc["all", "faithfulness"] == pytest.approx(1, abs=1e-4)
    assert table.loc["none", "faithfulness"] == pytest.approx(0, abs=1e-4)


def test_a_run_that_was_cut_off_goes_on_after_its_finished_sets(llama, tmp_path, monkeypatch):
    """What is kept is read again, exactly, and only for the very same question; it shows no text."""
    vector, sets = vector_of(llama), [responses(), responses("harmful", "base", -0.5)]
    graph = steering_contrast(llama, encode(llama.tokenizer, ["a"]), vector).graph
    circuits = {0.3: random_circuit(graph, 60, 0), 1.0: graph.edges, "none": graph.edges & False}

    def both(folder=None, sets=sets, vector=vector, circuits=circuits, points=EAP, columns=slice(None), **how):
        scores = attribute_responses(llama, vector, sets, points=points, columns=columns, folder=folder, **how)
        return scores, circuit_effects(llama, vector, sets, circuits, folder=folder, **how)

    first_half, plain = both(tmp_path, sets[:1]), both()
    assert len(list(tmp_path.iterdir())) == 2  # one file of scores, one of effects
    runs = []
    whole = module.steered_runs
    monkeypatch.setattr(module, "steered_runs", lambda *args: runs.append(1) or whole(*args))
    scores, effects = both(tmp_path)
    assert len(runs) == 2 and list(scores) == list(plain[0])  # the second set alone, once for each
    again = both(tmp_path)
    assert len(runs) == 2
    for name, found in plain[0].items():
        assert np.array_equal(again[0][name].values, found.values) and again[0][name].about == found.about
    pd.testing.assert_frame_equal(again[1], plain[1], check_exact=True)
    pd.testing.assert_frame_equal(effects, plain[1], check_exact=True)
    assert first_half[0].keys() == {sets[0].name}
    others = [
        dict(vector=replace(vector, direction=-vector.direction)),
        dict(sets=[replace(part, strength=0.7) for part in sets]),
        dict(sets=[replace(part, prompts=part.prompts[::-1]) for part in sets]),
        dict(measure=directional_kl),
    ]
    for other in others:
        runs.clear()
        both(tmp_path, **other)
        assert len(runs) == 4, other
    runs.clear()
    both(tmp_path, points=midpoint(2), circuits=circuits | {1.0: circuits[0.3]})
    assert len(runs) == 4
    both(tmp_path, columns=slice(0, 1), circuits={2.0: circuits[0.3]})
    assert len(runs) == 8
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(text.encode() in kept for part in sets for text in part.prompts)


def test_equal_circuits_run_once_and_each_has_its_column(llama, monkeypatch):
    vector, ran = vector_of(llama), []
    graph = steering_contrast(llama, encode(llama.tokenizer, ["a"]), vector).graph
    one, other = (random_circuit(graph, 60, seed) for seed in (0, 1))
    real = module.circuit_logits
    monkeypatch.setattr(module, "circuit_logits", lambda m, c, masks: real(m, c, [ran.append(0) or x for x in masks]))
    table = circuit_effects(llama, vector, [responses()], {"a": one, "b": other, "c": one.copy()})
    assert len(ran) == 2 and list(table)[-5:] == ["base", "steered", "a", "b", "c"]
    assert (table["a"] == table["c"]).all() and (table["a"] != table["b"]).any()
    alone = circuit_effects(llama, vector, [responses()], {"b": other})
    np.testing.assert_allclose(table["b"], alone["b"], atol=1e-6)


def test_effects_have_a_row_a_response_token_whatever_the_batch(any_model):
    vector = vector_of(any_model)
    graph = steering_contrast(any_model, encode(any_model.tokenizer, ["a"]), vector).graph
    circuits = {0.3: random_circuit(graph, 60, 0)}
    sets = [responses(), responses("harmful", "base", -0.5)]
    tables = [circuit_effects(any_model, vector, sets, circuits, batch_size=size) for size in (1, 2)]
    keys = ["side", "run", "prompt", "position"]
    one, two = (table.sort_values(keys, ignore_index=True) for table in tables)
    pd.testing.assert_frame_equal(one, two, atol=1e-4, rtol=1e-3)
    counts = one[one["side"] == "harmless"].groupby("prompt").size()
    assert counts.tolist() == [len(answer) for answer in ANSWERS]
    _, runs = runs_of(any_model)
    first = one[(one["side"] == "harmless") & (one["prompt"] == 1)]
    np.testing.assert_allclose(first["steered"], flip_difference(runs)(runs.steered)[1, :2], atol=1e-4)
    assert first["flipped"].tolist() == runs.flipped[1, :2].tolist()
    batch = encode(any_model.tokenizer, list(PROMPTS), list(ANSWERS))
    weaker = steered_runs(any_model, batch, vector, -0.5)  # under the strength of its set
    first = one[(one["side"] == "harmful") & (one["prompt"] == 0)]
    np.testing.assert_allclose(first["steered"], flip_difference(weaker)(weaker.steered)[0, : len(first)], atol=1e-4)
    assert first["flipped"].any()
    assert (one.loc[~one["flipped"], ["base", "steered", 0.3]] == 0).all(axis=None)


def test_held_out_circuits_run_on_the_half_that_did_not_choose_them(llama):
    vector, sets = vector_of(llama), [responses(), responses("harmful", "base", -0.5)]
    graph = steering_contrast(llama, encode(llama.tokenizer, ["a"]), vector).graph
    from_even, from_odd = ({"c": random_circuit(graph, 60, seed)} for seed in (0, 1))
    found = held_out_effects(llama, vector, sets, [from_even, from_odd])
    both = circuit_effects(llama, vector, sets, {"from even": from_even["c"], "from odd": from_odd["c"]})
    keys = ["side", "run", "prompt", "position"]
    found, both = (table.sort_values(keys, ignore_index=True) for table in (found, both))
    pd.testing.assert_frame_equal(found.drop(columns="c"), both.drop(columns=["from even", "from odd"]), atol=1e-4)
    expected = np.where(both["prompt"] % 2 == 0, both["from odd"], both["from even"])
    np.testing.assert_allclose(found["c"], expected, atol=1e-4)
    assert (both["from odd"] - both["from even"]).abs().max() > 1e-3


def test_a_part_of_a_set_keeps_prompts_with_their_responses():
    part = responses(strength=0.5)[1:]
    assert (part.prompts, part.responses) == (PROMPTS[1:], ANSWERS[1:]) and len(part) == 2
    assert (part.name, part.strength) == ("harmless, steered response", 0.5)


def toy(rows):
    columns = ["side", "run", "prompt", "position", "flipped", "base", "steered", "c"]
    return pd.DataFrame(rows, columns=columns)


def test_faithfulness_by_hand_is_a_ratio_of_sums():
    effects = toy(
        [
            ("harmful", "base", 0, 0, True, -1.0, 9.0, 8.0),
            ("harmful", "base", 0, 1, True, 0.0, 2.0, 0.0),
            ("harmful", "steered", 0, 0, True, 0.0, 4.0, 4.0),
            ("harmless", "base", 0, 0, True, -1.0, 1.0, 2.0),
        ]
    )
    found = faithfulness(effects)
    assert found["faithfulness"].tolist() == pytest.approx([(9 + 0 + 4 + 3) / (10 + 2 + 4 + 2)])
    split = faithfulness(effects, by=["side", "run"]).set_index(["side", "run"])
    assert split["faithfulness"].to_dict() == pytest.approx(
        {("harmful", "base"): 9 / 12, ("harmful", "steered"): 1.0, ("harmless", "base"): 1.5}
    )
    assert split["low"].isna().all()  # one prompt each: no interval
    assert faithfulness(effects, by=["position"])["faithfulness"].tolist() == pytest.approx([16 / 16, 0.0])


def test_intervals_draw_prompts_and_both_responses_to_one_together():
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(30):
        value = rng.normal(0.5, 0.2)
        rows += [("harmful", run, prompt, 0, True, 0.0, 1.0, value) for run in ("base", "steered")]
    effects = toy(rows)
    row = faithfulness(effects).iloc[0]
    assert row["low"] < row["faithfulness"] < row["high"]
    apart = effects.assign(prompt=range(60))  # as if they were 60 prompts
    narrow = faithfulness(apart).iloc[0]
    ratio = (row["high"] - row["low"]) / (narrow["high"] - narrow["low"])
    assert ratio == pytest.approx(2**0.5, rel=0.15)
    again = faithfulness(effects).iloc[0]
    assert (again["low"], again["high"]) == (row["low"], row["high"])


def test_groups_without_a_flip_have_no_faithfulness_and_none_at_all_is_an_error():
    rows = [("harmful", "base", 0, 0, True, -1.0, 1.0, 0.0), ("harmful", "base", 0, 1, False, 0.0, 0.0, 0.0)]
    found = faithfulness(toy(rows), by=["position"])
    assert found["faithfulness"].iloc[0] == 0.5 and np.isnan(found["faithfulness"].iloc[1])
    with pytest.raises(CircuitError, match="no position flips"):
        faithfulness(toy(rows[1:]))


def test_prompts_without_a_flip_leave_value_and_interval_as_they_are():
    rows = [("harmless", "base", prompt, 0, True, 0.0, 1.0, 0.4 + 0.1 * (prompt % 3)) for prompt in range(3)]
    still = [("harmless", "base", prompt, 0, False, 0.0, 0.0, 0.0) for prompt in range(3, 40)]
    flipping, all_prompts = (faithfulness(toy(table)).iloc[0] for table in (rows, rows + still))
    assert flipping["low"] < flipping["faithfulness"] == pytest.approx(0.5) and np.isfinite(flipping["high"])
    assert (flipping == all_prompts).all()


def two_circuits(n=8):
    """Effects of steering on `n` prompts under two circuits, "c" and "d"."""
    random = np.random.default_rng(0)
    table = toy([("harmless", "base", prompt, 0, True, random.normal(), 0.0, 0.0) for prompt in range(n)])
    table["steered"] = table["base"] + random.uniform(1, 3, n)
    for name in "cd":
        table[name] = table["base"] + random.uniform(0, 2, n)
    return table


def test_only_the_circuits_asked_for_are_measured_and_each_as_if_alone():
    table = two_circuits()
    every = faithfulness(table).set_index("circuit")
    assert list(every.index) == ["c", "d"]
    pd.testing.assert_frame_equal(faithfulness(table, circuits=["d"]).set_index("circuit"), every.loc[["d"]])


def test_a_gap_is_the_difference_of_two_circuits_drawn_together():
    table = two_circuits()
    c, d = faithfulness(table)["faithfulness"]
    value, low, high = faithfulness_gap(table, "c", "d")
    assert value == pytest.approx(c - d) and low < value < high
    assert faithfulness_gap(table, "d", "c") == pytest.approx((-value, -high, -low))
    np.testing.assert_allclose(faithfulness_gap(table.assign(d=table["c"] - 0.1 * (table["steered"] - table["base"])),
                                                "c", "d"), 0.1)  # fmt: skip


def test_a_circuit_that_overshoots_is_as_far_from_steering_as_one_that_falls_short():
    table = toy([("harmless", "base", prompt, 0, True, 1.0, 11.0, 9.0) for prompt in range(10)])
    table = table.assign(d=table["base"] + 10 * 1.5, e=table["base"] + 10 * 1.2)  # c: 0.8
    assert faithfulness_gap(table, "c", "d") == pytest.approx([0.3] * 3)
    assert faithfulness_gap(table, "c", "e") == pytest.approx([0.0] * 3)
    assert faithfulness_difference(table, table, "c", "d") == pytest.approx([0.3] * 3)


def test_a_circuit_that_is_nearly_whole_is_not_pushed_away_by_the_draws():
    rng = np.random.default_rng(0)
    table = toy([("harmless", "base", prompt, 0, True, 1.0, 11.0, 11.0) for prompt in range(200)])
    table = table.assign(c=10.9 + rng.normal(0, 3, 200), d=table["base"] + 10 * 0.9)  # c: about 0.99, to either side
    value, low, high = faithfulness_gap(table, "c", "d")
    assert (low + high) / 2 == pytest.approx(value, abs=0.005)


def test_a_vector_that_loses_more_in_a_circuit_than_another_by_hand():
    one = toy([("harmless", "base", prompt, 0, True, 1.0, 11.0, 1.0 + prompt / 2) for prompt in range(12)])
    one = one.assign(own=one["base"] + 9.0)  # 0.9 of it; c: 0 to 0.55
    other = toy([("harmless", "base", prompt, 0, True, 2.0, 6.0, 4.0) for prompt in range(1, 13)])
    other = other.assign(best=other["base"] + 3.0)  # 0.75 of it; c: half
    value, low, high = loss_difference(one, other, "own", "best", "c")
    assert value == pytest.approx((0.9 - 0.3) - (0.75 - 0.5)) and low < value < high  # prompts 1 to 11
    assert loss_difference(one, one, "own", "own", "c") == pytest.approx([0.0] * 3)
    assert loss_difference(other, one, "best", "own", "c") == pytest.approx((-value, -high, -low))


def test_relative_faithfulness_by_hand():
    table = toy([("harmless", "base", prompt, 0, True, 1.0, 11.0, 9.0) for prompt in range(3)])
    table = table.assign(d=[2.0, 3.0, 5.0], e=[4.0, 5.0, 5.0])  # less the base: 1, 2, 4 and 3, 4, 4; c: 8 each
    value, low, high = relative_faithfulness(table, ["d", "e"], "c")
    assert value == pytest.approx((2 + 3 + 4) / 24) and low < value < high
    with pytest.raises(CircuitError, match="circuit d carries nothing"):
        relative_faithfulness(table.assign(d=1.0), ["c"], "d")


def test_the_mean_faithfulness_of_random_circuits_is_over_prompts_and_circuits():
    rng = np.random.default_rng(0)
    table = toy([("harmless", "base", prompt, 0, True, 1.0, 11.0, 0.0) for prompt in range(40)])
    table = table.assign(**{str(i): 1 + 10 * share + rng.normal(size=40) for i, share in enumerate((0.1, 0.2, 0.6))})
    value, low, high = relative_faithfulness(table, ["0", "1", "2"], "steered")
    assert value == pytest.approx((table[["0", "1", "2"]] - 1).to_numpy().mean() / 10)
    spread = relative_faithfulness(table, ["0"], "steered")
    assert high - low > 0.2 > 2 * (spread[2] - spread[1])  # the circuits differ more than the prompts do


def test_the_difference_of_two_vectors_circuits_by_hand():
    one = toy([("harmless", "base", prompt, 0, True, 1.0, 11.0, 1.0 + prompt / 2) for prompt in range(12)])
    other = toy([("harmless", "base", prompt, 0, True, 2.0, 6.0, 4.0) for prompt in range(1, 13)])  # half, on 1 to 11
    value, low, high = faithfulness_difference(one, other, "c", "c")
    assert value == pytest.approx(66 / 2 / 110 - 0.5) and low < value < high
    assert faithfulness_difference(one, one, "c", "c") == (0, 0, 0)
    fewer = faithfulness_difference(one[:10], other, "c", "c")  # nine in common
    assert fewer[0] == pytest.approx(45 / 2 / 90 - 0.5) and np.isnan(fewer[1:]).all()
    still = one.assign(steered=np.where(one["prompt"] < 11, 1.0, 11.0))  # one prompt that it changes
    assert np.isnan(faithfulness_difference(one, still, "c", "c")).all()
    assert np.isnan(relative_faithfulness(one[:1], ["c"], "steered")[1:]).all()


def test_the_summary_of_a_site_has_a_row_a_circuit_and_the_size_needed():
    table = two_circuits().rename(columns={"d": 0.3})
    found = effect_summary(table, {"carried": 0.3, "rest": "c", "random": "not run"}, [0.3])
    assert list(found.index) == ["carried", "rest", "random", "needed"]
    measured = faithfulness(table).set_index("circuit")
    for name, circuit in (("carried", 0.3), ("rest", "c")):
        assert found.loc[name].tolist() == measured.loc[circuit].tolist()
    assert found.loc["random"].isna().all()
    assert found.loc["needed"].tolist() == curve_measures(table, {0.3: 0.3}).loc["needed"].tolist()


def test_measures_of_a_curve_are_those_of_its_faithfulness_and_drawn_with_it():
    """CPR is linear in faithfulness, so its interval is that of one more column: the area under each prompt's curve."""
    sizes, random = (0.1, 0.4, 1.0), np.random.default_rng(0)
    table = pd.DataFrame({"side": "harmless", "run": "base", "prompt": np.repeat(np.arange(12), 2), "position": 0,
                          "flipped": True, "base": random.normal(size=24)})  # fmt: skip
    table["steered"] = table["base"] + random.uniform(1, 3, 24)
    for size, share in zip(sizes[:2], (0.6, 0.9)):
        table[size] = table["base"] + (table["steered"] - table["base"]) * (share + random.uniform(-0.3, 0.3, 24))
    found = curve_measures(table, {size: size for size in sizes[:2]})
    curve = [*faithfulness(table)["faithfulness"], 1.0]
    assert found.loc["cpr", "value"] == pytest.approx(cpr(sizes, curve))
    assert found.loc["cmd", "value"] == pytest.approx(cmd(sizes, curve))
    assert found.loc["needed", "value"] == size_needed(sizes, curve) and {*found.loc["needed"]} <= {*sizes}
    area = np.trapezoid(table[[0.1, 0.4, "steered"]].to_numpy() - table[["base"]].to_numpy(), sizes, axis=1)
    as_column = faithfulness(table.drop(columns=[0.1, 0.4]).assign(area=table["base"] + area)).iloc[0, 1:]
    np.testing.assert_allclose(found.loc["cpr"], as_column.astype(float))
    assert found.loc["cpr", "low"] < found.loc["cpr", "value"] < found.loc["cpr", "high"]
    assert curve_measures(table, {size: size for size in sizes[:2]}, target=2.0).isna().loc["needed", "value"]
    one = curve_measures(table[table["prompt"] == 0], {0.1: 0.1})
    assert one["value"].notna().all() and one[["low", "high"]].isna().all(axis=None)


def test_a_circuit_with_the_name_of_a_column_is_refused(llama):
    graph = steering_contrast(llama, encode(llama.tokenizer, ["a"]), vector_of(llama)).graph
    with pytest.raises(CircuitError, match="cannot be called base"):
        circuit_effects(llama, vector_of(llama), [responses()], {"base": graph.edges})


def test_transfer_measures_every_circuit_on_every_vector(llama):
    vectors = {name: vector_of(llama, seed=seed) for seed, name in enumerate(("DIM", "random"), 5)}
    sets = {"DIM": [responses()], "random": [responses("harmful", "base", -1.0)]}
    circuits = {name: top_circuit(pooled(attribute_responses(llama, vectors[name], sets[name], points=EAP)), 60)
                for name in vectors}  # fmt: skip
    table = transfer(llama, vectors, sets, circuits).set_index(["vector", "circuit"])["faithfulness"]
    assert len(table) == 4
    for name in vectors:
        alone = faithfulness(circuit_effects(llama, vectors[name], sets[name], {"mine": circuits["random"]}))
        assert table[name, "random"] == pytest.approx(alone["faithfulness"][0])
    with pytest.raises(CircuitError, match="another steering layer"):
        transfer(llama, {"DIM": vector_of(llama, layer=2)}, sets, circuits)


def test_sets_hold_the_prompts_that_flip_the_way_they_should(llama, monkeypatch):
    strengths = []

    def steered_answers(model, prompts, settings, n):
        strengths.append([strength for _, strength in settings])
        for run in ("base", "steered"):
            yield [f"{run} answer to {prompt}" for prompt in prompts], None

    verdicts = {
        "base answer to a": "refusal", "steered answer to a": "compliance",
        "base answer to b": "compliance", "steered answer to b": "refusal",
        "base answer to c": "refusal", "steered answer to c": "incoherent",
        "base answer to d": "compliance", "steered answer to d": "compliance",
    }  # fmt: skip
    monkeypatch.setattr(module, "steered_answers", steered_answers)
    monkeypatch.setattr(
        module, "judge", lambda model, prompts, texts: pd.DataFrame({"verdict": map(verdicts.get, texts)})
    )
    sets = response_sets(llama, vector_of(llama), list("abcd"), list("abcd"), 2.0)
    assert strengths == [[0.0, -2.0], [0.0, 2.0]]
    assert [(s.name, s.strength, s.prompts) for s in sets] == [
        ("harmful, base response", -2.0, ("a",)), ("harmful, steered response", -2.0, ("a",)),
        ("harmless, base response", 2.0, ("b",)), ("harmless, steered response", 2.0, ("b",)),
    ]  # fmt: skip
    assert [s.responses for s in sets[:2]] == [("base answer to a",), ("steered answer to a",)]
    assert "answer" not in repr(sets[0]) and len(sets[0]) == 1
    assert [s.prompts for s in response_sets(llama, vector_of(llama), list("aaa"), list("bb"), 2.0, per_side=2)] == [
        ("a", "a"), ("a", "a"), ("b", "b"), ("b", "b")
    ]  # fmt: skip
    with pytest.raises(CircuitError, match="flips none of 2 harmful prompts"):
        response_sets(llama, vector_of(llama), list("cd"), list("abcd"), 2.0)


def test_more_prompts_are_asked_until_enough_flip_or_there_are_no_more(llama, monkeypatch):
    """Prompts "+" flip, in either direction; how they are judged is not asked here."""

    def steered_answers(model, prompts, settings, n):
        answered.extend(prompts)
        for run in ("base", "steered"):
            yield [run + prompt + ("no" if settings[1][1] < 0 else "yes") for prompt in prompts], None

    def judge(model, prompts, texts):
        turned = {"base+no": "refusal", "steered+no": "compliance", "base+yes": "compliance", "steered+yes": "refusal"}
        return pd.DataFrame({"verdict": [turned.get(text, "incoherent") for text in texts]})

    monkeypatch.setattr(module, "steered_answers", steered_answers)
    monkeypatch.setattr(module, "judge", judge)
    counts, answered = [], []

    def find(harmful, harmless, enough, per_side=3):
        counts.clear()
        answered.clear()

        def ask(n):
            counts.append(n)
            return [list(harmful[:n]), list(harmless[:n])]

        return enough_response_sets(llama, vector_of(llama), ask, 2, per_side, enough)

    sets, asked = find("+-++++++", "-++-+++-", enough=2)
    assert counts == [2, 4] and asked == {"harmful": list("+-++"), "harmless": list("-++-")}
    assert [len(part) for part in sets] == [3, 3, 2, 2]
    assert [len(part) for part in find("+-++++++", "-++-+++-", enough=3)[0]] == [3, 3, 3, 3] and counts == [2, 4, 8]
    assert len(answered) == 16  # each prompt once
    sets, asked = find("++", "---+-+-", enough=3)  # of one side none at first; too few in all that there are
    assert counts == [2, 4, 8, 16] and [len(part) for part in sets] == [2, 2, 2, 2] and len(asked["harmless"]) == 7
    assert find("++", "++", enough=3)[1] == {"harmful": ["+"] * 2, "harmless": ["+"] * 2} and counts == [2, 4]
    for harmless in ("----", "-+--"):
        with pytest.raises(CircuitError, match="fewer than two prompts of a side"):
            find("++++", harmless, enough=2)

    def spread(n):  # over the whole set, as `instructions(..., limit=n)` is
        return [instructions(name, "test", n) for name in ("harmful", "harmless")]

    with pytest.raises(CircuitError, match="gave before first"):  # else a prompt would count twice
        enough_response_sets(llama, vector_of(llama), spread, 2, 3, 2)


def test_a_batch_without_responses_is_refused(llama):
    with pytest.raises(CircuitError, match="no response tokens"):
        steered_runs(llama, encode(llama.tokenizer, ["a"]), vector_of(llama))
