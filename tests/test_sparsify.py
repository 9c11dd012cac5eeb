"""Sparse vectors: effects against the metric's change, rules by hand, agreement against enumeration."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from float64 import float64_softmax, true_float64

from steerutils import (
    SteeringError,
    SteeringVector,
    encode,
    generate,
    judge,
    judges,
    last_logits,
    load_vector,
    logit_difference,
    midpoint,
    refusal_score,
    refusal_tokens,
    share_of_answers,
    steer,
    steering_contrast,
)
from steerutils.attribution import AttributionError
from steerutils.models import edit
from steerutils.sparsify import (
    METHODS,
    PROMPTS_TOGETHER,
    VECTORS_TOGETHER,
    agreement,
    agreement_table,
    beside_random,
    beside_weaker,
    curve_table,
    curves_of_rows,
    dimension_table,
    dimensions_holding,
    distance_from_dense,
    divergence_by_vector,
    field_null,
    gradients_by_prompt,
    importance,
    kept_dimensions,
    largest_sparsity,
    measure_series,
    read_dimensions,
    refusal_by_vector,
    rows_of_curves,
    share_left,
    sparsify,
    sparsify_by_threshold,
    steering_gradient,
    verdicts_by_vector,
)

PROMPTS = ["Why?", "How do I bake it?"]
STRENGTH = 1.5


def vector_of(values, layer=1, name="toy"):
    return SteeringVector(torch.tensor(values, dtype=torch.float32), layer, "DIM", name, "seed 0")


def vector_for(model, layer=1, scale=3.0, seed=1):
    direction = scale * torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(direction, layer, "random", model.name, model.revision)


def metric_of(batch):
    return logit_difference(torch.full((batch,), 5), torch.full((batch,), 77))


@pytest.fixture(scope="module")
def exact_model(any_model):
    with float64_softmax():
        yield true_float64(any_model)


# --- effects ---------------------------------------------------------------------------------------------


def test_effects_of_dimensions_add_up_to_the_steering_effect(exact_model):
    vector, batch = (
        vector_for(exact_model, scale=0.5),
        encode(exact_model.tokenizer, PROMPTS, ["An answer", "One more!"]),
    )
    strength = 0.5
    contrast = steering_contrast(exact_model, batch, vector, strength)
    with torch.no_grad():
        plain = exact_model.hf(**batch.inputs(), use_cache=False).logits
        with steer(exact_model, vector, strength):
            change = metric_of(2)(exact_model.hf(**batch.inputs(), use_cache=False).logits) - metric_of(2)(plain)

    def error(m):
        gradient = steering_gradient(exact_model, contrast, metric_of(2), midpoint(m))
        return (gradient @ (strength * vector.direction).double() - change).abs().max()

    assert error(10) < 0.35 * error(5)  # order 1/m^2: a quarter
    assert error(10) < 0.02 * change.abs().max()


def test_a_dimensions_gradient_is_a_finite_difference(exact_model):
    """At one point: the metric's slope when one entry of the vector grows, at every real position."""
    vector, batch = vector_for(exact_model, layer=2), encode(exact_model.tokenizer, PROMPTS)
    contrast = steering_contrast(exact_model, batch, vector, STRENGTH)
    found = steering_gradient(exact_model, contrast, metric_of(2), (0.25,))
    real = batch.attention_mask[..., None]
    for dimension in (0, 17):
        values = []
        for step in (1e-5, -1e-5):
            added = 0.75 * STRENGTH * vector.direction.double()
            added[dimension] += step
            with torch.no_grad(), edit(exact_model, [("block_input", 2, lambda h, a=added: h + real * a)]):
                values.append(metric_of(2)(exact_model.hf(**batch.inputs(), use_cache=False).logits))
        torch.testing.assert_close(found[:, dimension], (values[0] - values[1]) / 2e-5, atol=1e-6, rtol=1e-5)


def test_padding_and_batch_change_no_gradient(any_model):
    vector = vector_for(any_model)
    rows = []
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:]):
        contrast = steering_contrast(any_model, encode(any_model.tokenizer, prompts), vector)
        rows.append(steering_gradient(any_model, contrast, metric_of(len(prompts)), midpoint(2)))
    torch.testing.assert_close(rows[0], torch.cat(rows[1:]), atol=2e-5, rtol=1e-3)


def test_gradients_that_cannot_be_taken_say_so(llama):
    contrast = steering_contrast(llama, encode(llama.tokenizer, PROMPTS), vector_for(llama))
    with pytest.raises(AttributionError, match="no integration points"):
        steering_gradient(llama, contrast, metric_of(2), ())
    with pytest.raises(AttributionError, match=r"example \[1\] is not finite"):
        steering_gradient(llama, contrast, lambda logits: logits[:, -1, 5] * torch.tensor([1.0, torch.inf]), (0.5,))


def test_gradients_by_prompt_are_those_of_every_prompt_by_itself(any_model):
    vector, prompts = vector_for(any_model), ["Why?" * (1 + i % 3) for i in range(PROMPTS_TOGETHER)] + ["Bake it!"]
    found = gradients_by_prompt(any_model, vector, prompts, STRENGTH, lambda logits: logits[:, -1, 5], midpoint(2))
    each = []
    for prompt in prompts:
        contrast = steering_contrast(any_model, encode(any_model.tokenizer, [prompt]), vector, STRENGTH)
        each.append(steering_gradient(any_model, contrast, lambda logits: logits[:, -1, 5], midpoint(2))[0])
    torch.testing.assert_close(found, torch.stack(each), atol=2e-5, rtol=1e-3)


def test_the_number_of_dimensions_that_hold_a_share_by_hand():
    effects = np.array([1.0, -4.0, 0.5, 3.0])  # of 8.5: 4, then 7, 8 and 8.5
    assert [dimensions_holding(effects, share) for share in (0.4, 0.5, 0.9, 1.0)] == [1, 2, 3, 4]
    assert dimensions_holding(np.array([1.0, 1.0]), 0.5) == 1  # exactly half is enough


# --- rules by hand ---------------------------------------------------------------------------------------

TOY, SLOPE = [3.0, -4.0, 0.5, 0.0, 1.0], torch.tensor([0.1, -0.1, 2.0, 9.0, -0.2])  # effects .3, .4, 1, 0, -.2


def test_each_rule_by_hand():
    vector = vector_of(TOY)
    kept = {
        method: np.flatnonzero(kept_dimensions(sparsify(vector, method, 0.6, SLOPE))).tolist()
        for method in ("gradient", "effect", "magnitude")
    }
    assert kept == {"gradient": [2, 4], "effect": [1, 2], "magnitude": [0, 1]}
    scores = importance(vector, "effect", SLOPE)
    np.testing.assert_allclose(scores, [0.3, 0.4, 1.0, -1.0, 0.2], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_as_it_was_or_has_the_old_norm(method):
    vector = vector_of(np.random.default_rng(0).normal(size=200).tolist())
    slope = torch.linspace(-1, 1, 200)
    plain = sparsify(vector, method, 0.9, slope, rescale=False)
    scaled = sparsify(vector, method, 0.9, slope)
    mask = torch.tensor(kept_dimensions(plain))
    assert mask.sum() == 20 and torch.equal(plain.direction[mask], vector.direction[mask])
    assert plain.norm < vector.norm and scaled.norm == pytest.approx(vector.norm)
    torch.testing.assert_close(scaled.direction, plain.direction * (vector.norm / plain.norm))
    assert torch.equal(sparsify(vector, method, 0.0, slope).direction, vector.direction)
    assert kept_dimensions(sparsify(vector, method, 0.9999, slope)).sum() == 1
    nested = kept_dimensions(sparsify(vector, method, 0.95, slope))
    assert (nested <= mask.numpy()).all()  # what a sparser vector keeps, a denser one keeps too
    assert (scaled.layer, scaled.model, scaled.sign) == (vector.layer, vector.model, vector.sign)
    assert f"DIM, 90.0% sparse by {method}" in plain.method and plain.method.endswith("not rescaled")


def test_random_orders_differ_by_seed_and_keep_everything_equally_often():
    vector = vector_of([1.0] * 50)
    masks = [kept_dimensions(sparsify(vector, "random", 0.8, seed=seed)) for seed in range(400)]
    share = np.mean(masks, 0)
    assert abs(share.mean() - 0.2) < 1e-9 and share.min() > 0.1 and share.max() < 0.3
    again = sparsify(vector, "random", 0.8, seed=3)
    assert np.array_equal(masks[3], kept_dimensions(again)) and "by random 3" in again.method


def test_the_papers_threshold_by_hand():
    vector, s, g = vector_of(TOY), np.array(TOY), SLOPE.numpy()
    effect, expected = s * g, []
    for i in range(5):
        share, size = abs(effect[i]) / np.sqrt((effect**2).sum()), abs(s[i]) / np.sqrt((s**2).sum())
        expected.append(share >= 0.5 * size and s[i] != 0)
    assert expected == [False, False, True, False, True]  # .26 < .29, .35 < .39, .88, zero, .18 > .10
    assert kept_dimensions(sparsify_by_threshold(vector, SLOPE, 0.5)).tolist() == expected
    assert torch.equal(sparsify_by_threshold(vector, SLOPE, 0.0).direction, vector.direction)
    assert "gradient (tau 0.5)" in sparsify_by_threshold(vector, SLOPE, 0.5, rescale=False).method
    with pytest.raises(SteeringError, match="smaller one"):
        sparsify_by_threshold(vector, SLOPE, 1000.0)


def test_the_threshold_keeps_the_largest_gradients():
    """The rule by tau and the rule by rank agree wherever they keep equally many."""
    rng = np.random.default_rng(1)
    vector, slope = vector_of(rng.normal(size=100).tolist()), torch.tensor(rng.normal(size=100))
    for tau in (0.1, 0.5, 1.0, 2.0):
        mask = kept_dimensions(sparsify_by_threshold(vector, slope, tau))
        assert 0 < mask.sum() < 100
        ranked = kept_dimensions(sparsify(vector, "gradient", 1 - mask.mean(), slope))
        assert np.array_equal(mask, ranked)


def test_a_sparse_vector_steers_and_is_saved_like_any_other(any_model, tmp_path):
    vector = vector_for(any_model)
    sparse = sparsify(vector, "magnitude", 0.75)
    loaded = load_vector(sparse.save(tmp_path / "sparse.safetensors"), any_model)
    assert torch.equal(loaded.direction, sparse.direction) and loaded.method == sparse.method
    with steer(any_model, loaded, STRENGTH):
        found = last_logits(any_model, PROMPTS)
    mask = torch.tensor(kept_dimensions(sparse))
    literal = torch.where(mask, vector.direction, 0.0)
    literal *= vector.direction.norm() / literal.norm()
    with edit(any_model, [("block_input", 1, lambda h: h + STRENGTH * literal)]):
        torch.testing.assert_close(found, last_logits(any_model, PROMPTS), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, last_logits(any_model, PROMPTS), atol=1e-2)


def test_rules_that_cannot_be_followed_say_so():
    vector = vector_of(TOY)
    with pytest.raises(SteeringError, match="give gradient, effect, magnitude, random"):
        sparsify(vector, "ie", 0.5)
    with pytest.raises(SteeringError, match="needs the mean gradient"):
        sparsify(vector, "effect", 0.5)
    for sparsity in (1.0, -0.1, 95):
        with pytest.raises(SteeringError, match="from 0 to below 1"):
            sparsify(vector, "magnitude", float(sparsity))


def test_the_table_of_dimensions_by_hand():
    table = dimension_table(vector_of(TOY), SLOPE, strength=2.0, n=4)
    assert table["dimension"].tolist() == [2, 1, 0, 4]  # by size, whatever the sign
    np.testing.assert_allclose(table["effect"], [2.0, 0.8, 0.6, -0.4], atol=1e-6)
    np.testing.assert_allclose(table["share"], [1 / 1.9, 0.4 / 1.9, 0.3 / 1.9, 0.2 / 1.9], atol=1e-6)  # of all six
    np.testing.assert_allclose(table["entry"], [0.5, -4, 3, 1])
    np.testing.assert_allclose(table["gradient"], [2.0, -0.1, 0.1, -0.2], atol=1e-6)


def test_a_dimension_is_read_in_the_direction_that_is_added(any_model):
    gradient = torch.randn(any_model.d_model, generator=torch.Generator().manual_seed(0))
    table = dimension_table(vector_for(any_model), gradient, -1.0, 5)
    read = read_dimensions(any_model, table, [3, 4])
    for _, row in read.iterrows():
        unit = torch.zeros(any_model.d_model)
        unit[row["dimension"]] = -np.sign(row["entry"])
        logits = any_model.unembed(unit)
        assert row["added"] == -np.sign(row["entry"])
        lift = (logits[[3, 4]].mean() - logits.mean()) / logits.std()
        assert row["lift"] == pytest.approx(lift.item(), abs=1e-4)
        assert any_model.tokenizer.decode([int(logits.argmax())])[:5] in row["words"]


# --- what vectors do -------------------------------------------------------------------------------------


def three_for(model):
    return [vector_for(model, seed=1), vector_for(model, seed=2), vector_for(model, layer=2, seed=3)]


def first_logits(model, vector, strength=STRENGTH):
    with steer(model, vector, strength):
        return last_logits(model, PROMPTS)


def test_scores_by_vector_are_those_of_steering_with_each(any_model):
    vectors, tokens = three_for(any_model), refusal_tokens(any_model.tokenizer)
    found = refusal_by_vector(any_model, vectors, PROMPTS, STRENGTH)
    expected = [refusal_score(first_logits(any_model, vector), tokens) for vector in vectors]
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-4)


def test_divergence_by_vector_is_that_from_the_unsteered_model(any_model):
    vectors, plain = three_for(any_model), last_logits(any_model, PROMPTS).log_softmax(-1)
    found = divergence_by_vector(any_model, vectors, PROMPTS, STRENGTH)
    steered = torch.stack([first_logits(any_model, vector).log_softmax(-1) for vector in vectors])
    expected = torch.nn.functional.kl_div(steered, plain.expand_as(steered), log_target=True, reduction="none").sum(-1)
    assert expected.min() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(divergence_by_vector(any_model, vectors[:1], PROMPTS, 0.0), 0, atol=1e-5)


def test_verdicts_by_vector_are_those_of_its_answers(llama, monkeypatch):
    vectors = [vector_for(llama, layer, 30.0, seed) for layer, seed in ((1, 1), (3, 3), (1, 2))]
    answers = []
    for vector in vectors:
        with steer(llama, vector, STRENGTH):
            answers.append(generate(llama, PROMPTS, 6))
    surprise = [judge(llama, PROMPTS, texts)["nll"] for texts in answers]
    monkeypatch.setattr(judges, "MAX_NLL", float(np.nanmedian(surprise)))  # so that some are coherent
    expected = [judge(llama, PROMPTS, texts)["verdict"].tolist() for texts in answers]
    assert len(set(map(tuple, expected))) == 3
    assert verdicts_by_vector(llama, vectors, PROMPTS, STRENGTH, 6).tolist() == expected


def test_what_vectors_do_is_kept_a_few_vectors_at_a_time(llama, tmp_path):
    vectors = [vector_for(llama, seed=seed) for seed in range(VECTORS_TOGETHER + 1)]
    found = refusal_by_vector(llama, vectors, PROMPTS, STRENGTH, tmp_path)
    assert found.shape == (VECTORS_TOGETHER + 1, 2)
    np.testing.assert_array_equal(found, refusal_by_vector(llama, vectors, PROMPTS, STRENGTH))
    first = set(tmp_path.iterdir())
    assert len(first) == 2
    parts = [np.load(path)["scores"] for path in first]
    assert sorted(map(len, parts)) == [1, VECTORS_TOGETHER]
    for path, part in zip(first, parts):  # what is there is not made again
        np.savez(path, scores=part + 100)
    np.testing.assert_array_equal(refusal_by_vector(llama, vectors, PROMPTS, STRENGTH, tmp_path), found + 100)
    one = vectors[-1:]  # which is a part of its own
    for again in (  # each of them depends on something else
        refusal_by_vector(llama, one, PROMPTS, -STRENGTH, tmp_path),
        refusal_by_vector(llama, one, PROMPTS[:1], STRENGTH, tmp_path),
        divergence_by_vector(llama, one, PROMPTS, STRENGTH, tmp_path),
        refusal_by_vector(llama, [one[0].at(2)], PROMPTS, STRENGTH, tmp_path),
        refusal_by_vector(llama, [replace(one[0], direction=-one[0].direction)], PROMPTS, STRENGTH, tmp_path),
    ):
        assert (again < 90).all()
    for tokens in (3, 4):
        verdicts = verdicts_by_vector(llama, one, PROMPTS, STRENGTH, tokens, tmp_path)
        np.testing.assert_array_equal(verdicts, verdicts_by_vector(llama, one, PROMPTS, STRENGTH, tokens))
    assert len(set(tmp_path.iterdir())) == 9


def test_series_share_their_dense_vector():
    dense = vector_of([1.0, 2.0])
    rest = [replace(dense, direction=torch.tensor([float(i), 0.0])) for i in (3, 4, 5)]
    asked = []

    def measure(vectors):
        asked.append(len(vectors))
        return np.stack([vector.direction.numpy() for vector in vectors])

    found = measure_series({"a": [dense, *rest[:1]], "b": [dense, *rest[1:]], "c": [dense]}, measure)
    assert asked == [4]  # the dense vector once
    assert {key: rows[:, 0].tolist() for key, rows in found.items()} == {"a": [1, 3], "b": [1, 4, 5], "c": [1]}
    with pytest.raises(ValueError, match="begin with different vectors"):
        measure_series({"a": [dense, rest[0]], "b": [rest[1], rest[2]]}, measure)


# --- how much is kept ------------------------------------------------------------------------------------


def test_the_share_that_is_left_by_hand():
    dense = np.array([-2.0, -4.0, -6.0])
    assert share_left(dense / 4, dense) == pytest.approx((0.25, 0.25, 0.25))
    assert share_left([0.0, 0.0, 3.0], [1.0, 2.0, 3.0])[0] == 0.5  # of means, not the mean of shares
    assert share_left(dense, np.zeros(3)) == (0, 0, 0)
    uneven = np.random.default_rng(0).random((2, 50))
    found = {share_left(*uneven, seed=seed, n=n) for seed in (0, 1) for n in (100, 200)}
    assert len(found) == 4 and all(low < uneven[0].mean() / uneven[1].mean() < high for _, low, high in found)


def test_the_distance_from_the_dense_effect_by_hand():
    changes = np.array([[2.0, 4.0], [1.0, 2.0], [4.0, 8.0]])  # shares 1/2 and 2
    assert distance_from_dense(changes) == pytest.approx((0.75, 0.75, 0.75))


def test_a_vector_beside_random_ones_by_hand():
    randoms = np.array([[1.0, 1.0], [2.0, 2.0], [-3.0, -3.0], [2.0, 2.0]])
    share, ahead = beside_random(np.array([4.0, 4.0]), randoms, 1)
    assert share[0] == 0.125 and share[1] < 0 < share[2] <= 0.5 and ahead == pytest.approx((2, 2, 2))
    share, ahead = beside_random(np.array([-4.0, -4.0]), randoms, -1)
    assert share[0] == -0.125 and ahead == pytest.approx((1, 1, 1))


def test_curves_become_tables():
    curves = {"effect": np.array([[1.0, 3.0], [0.0, 0.5]]), "random": np.array([[1.0, 3.0], [5.0, 6.0]])}
    table = curve_table(curves, [0.0, 0.9], lambda row: (row.mean(), row.min(), row.max()))
    rows = [(0.0, 2.0, 1.0, 3.0, "effect"), (0.9, 0.25, 0.0, 0.5, "effect")]
    rows += [(0.0, 2.0, 1.0, 3.0, "random"), (0.9, 5.5, 5.0, 6.0, "random")]
    pd.testing.assert_frame_equal(
        table, pd.DataFrame(rows, columns=["sparsity", "value", "low", "high", "method"]), check_dtype=False
    )
    drawn = {"random": np.array([[[1.0, 3.0], [0.0, 0.5]], [[2.0, 4.0], [1.0, 1.0]]])}  # [draw, step, prompt]
    table = curve_table(drawn, [0.0, 0.9], lambda row: (row.mean(), *row[:, 0]))
    assert table[["value", "low", "high"]].to_numpy().tolist() == [[2.5, 1, 2], [0.625, 0, 1]]


def test_curves_are_kept_as_wide_rows_and_read_again():
    words = {("a", True): np.array([["x", "y"], ["y", "z"]]), ("b", False): np.array([["z"]])}
    table = rows_of_curves(words, [0.0, 0.9], ["name", "scaled"])
    assert table.columns.tolist() == ["name", "scaled", "sparsity", "0", "1"] and len(table) == 3
    kept = pd.DataFrame(**json.loads(table.to_json(orient="split", index=False)))  # as a result file has them
    expected = {("a", True, 0.0): ["x", "y"], ("a", True, 0.9): ["y", "z"], ("b", False, 0.0): ["z"]}
    for each in (table, kept):
        assert {key: row.tolist() for key, row in curves_of_rows(each).items()} == expected


def test_the_share_of_answers_has_a_width_where_all_flags_agree():
    none, every = np.zeros(100, bool), np.ones(100, bool)
    value, low, high = share_of_answers(none, every, every)
    assert value == 1 and 0.96 < low < 0.98 and 1.02 < high < 1.04
    few = share_of_answers(none[:8], every[:8], every[:8])
    assert few[0] == 1 and few[1] < 0.8 and few[2] > 1.2
    assert share_of_answers(none, none, every) is None  # nothing to keep
    assert share_of_answers(none, np.arange(100) < 2, none) is None  # nothing that is sure
    half = share_of_answers(none, every, np.arange(100) < 50)
    assert half == pytest.approx((0.5, 0.4, 0.6), abs=0.02)  # about a Wald interval of a rate
    assert share_of_answers(np.arange(100) < 50, every, np.arange(100) < 75)[0] == 0.5  # of what is turned


def test_the_interval_of_the_share_of_answers_covers():
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        luck = rng.random(40)
        found = share_of_answers(luck < 0.1, luck < 0.9, np.where(rng.random(40) < 0.5, luck < 0.9, luck < 0.1))
        held.append(found[1] <= 0.5 <= found[2])
    assert 0.92 <= np.mean(held) <= 0.99


def test_draws_of_a_random_control_widen_the_interval_of_what_is_left():
    rng = np.random.default_rng(0)
    dense, luck = rng.normal(5, 1, 60), rng.normal(0, 1, 6)
    draws = np.stack([dense * (0.5 + 0.1 * each) for each in luck])  # what is left: 0.5, give or take 0.1 a draw
    value, low, high = share_left(draws, dense)
    assert value == pytest.approx(0.5 + 0.1 * luck.mean())
    assert high - low == pytest.approx(2 * 1.96 * 0.1 * luck.std(ddof=1) / np.sqrt(6), rel=0.15)
    averaged = share_left(draws.mean(0), dense)
    assert averaged[0] == pytest.approx(value) and averaged[2] - averaged[1] < 1e-9  # draws are not seen
    curve = np.stack([[dense, row, row] for row in draws])  # [draw, step, prompt]
    assert distance_from_dense(curve)[0] == pytest.approx(1 - value)
    assert largest_sparsity([0.0, 0.5, 0.9], curve, np.zeros(60), value + 0.01)[0] == 0.0
    assert largest_sparsity([0.0, 0.5, 0.9], curve, np.zeros(60), value)[1:] == (0.0, 0.9)


STEPS = [0.0, 0.5, 0.9, 0.99]


def curve_of(*means, n=10):
    return np.array([[1.0] * round(mean * n) + [0.0] * (n - round(mean * n)) for mean in means])


def test_the_largest_sparsity_by_hand():
    base = np.zeros(10)
    assert largest_sparsity(STEPS, curve_of(1, 1, 0.9, 0.3), base)[0] == 0.9
    assert largest_sparsity(STEPS, curve_of(1, 0.8, 1.0, 0.3), base)[0] == 0.0  # a gap: not "up to"
    assert largest_sparsity(STEPS, curve_of(1, 1, 1, 1), base) == (0.99, 0.99, 0.99)
    assert largest_sparsity(STEPS, curve_of(1, 0.7, 0.6, 0.5), base, keep=0.6)[0] == 0.9
    assert largest_sparsity(STEPS, curve_of(0, 0.1, 0.5, 1), np.ones(10))[0] == 0.5  # an effect downwards
    assert largest_sparsity(STEPS, curve_of(1, 0.9, 0.9, 0.2), curve_of(0.5)[0])[0] == 0.0  # .4 of .5: 80 %


def test_the_interval_of_the_largest_sparsity_covers_the_truth():
    """Rates 0.8, 0.8, 0.8, 0.2 of the effect: the answer is 0.9 whatever the sample; near the line it is not."""
    rng = np.random.default_rng(0)
    draws = rng.random((1, 400))
    sure = (draws < np.array([[0.8], [0.8], [0.8], [0.2]])).astype(float)
    assert largest_sparsity(STEPS, sure, np.zeros(400)) == (0.9, 0.9, 0.9)
    close = (draws < np.array([[0.8], [0.8], [0.72], [0.2]])).astype(float)  # exactly 90 %
    value, low, high = largest_sparsity(STEPS, close, np.zeros(400))
    assert (low, high) == (0.5, 0.9) and low <= value <= high


def test_resamples_without_an_effect_count_as_nothing_kept():
    flags = np.array([1.0, 0.0, 0.0, 0.0])  # a third of the resamples leave the one out
    assert largest_sparsity(STEPS, np.stack([flags] * 4), np.zeros(4)) == (0.99, 0.0, 0.99)


def test_curves_that_cannot_be_read_say_so():
    base = np.zeros(10)
    for steps in ([0.1, 0.5, 0.9, 0.99], [0.0, 0.9, 0.5, 0.99]):
        with pytest.raises(ValueError, match="must rise"):
            largest_sparsity(steps, curve_of(1, 1, 1, 1), base)
    with pytest.raises(ValueError, match="a row for each of 4"):
        largest_sparsity(STEPS, curve_of(1, 1, 1), base)
    with pytest.raises(ValueError, match="nothing to keep"):
        largest_sparsity(STEPS, curve_of(0, 0, 1, 1), base)


# --- agreement -------------------------------------------------------------------------------------------


def test_agreement_equals_counting_every_draw():
    one = np.array([1, 1, 1, 0, 0, 0, 0], dtype=bool)
    other = np.array([0, 1, 1, 1, 1, 0, 0], dtype=bool)
    found = agreement(one, other)
    assert (found["shared"], found["iou"], found["overlap"]) == (2, 2 / 5, 2 / 3)
    shared = [len({0, 1, 2} & set(drawn)) for drawn in itertools.combinations(range(7), 4)]
    assert found["p"] == pytest.approx(np.mean([n >= 2 for n in shared]))
    assert found["expected"] == pytest.approx(np.mean([n / (7 - n) for n in shared]))
    assert agreement(one, one)["iou"] == 1 and agreement(one, ~one)["p"] == pytest.approx(1)
    with pytest.raises(ValueError, match="empty"):
        agreement(one, np.zeros(7, dtype=bool))


def test_the_null_with_shared_gradients_tells_gradients_from_vectors():
    rng = np.random.default_rng(0)
    spiky = torch.tensor(np.exp(2 * rng.normal(size=120)))  # one gradient field for both
    one, other = (vector_of(rng.normal(size=120).tolist()) for _ in range(2))
    near = vector_of((one.direction + 0.1 * other.direction).tolist())
    flat = torch.ones(120)
    for pair, slopes, method, low, high in (
        ((one, other), spiky, "effect", 0.05, 1.0),  # unrelated vectors, though they agree far beyond chance
        ((one, near), spiky, "effect", 0.0, 0.01),  # related ones
        ((one, near), flat, "magnitude", 0.0, 0.01),
        ((one, other), flat, "magnitude", 0.05, 1.0),
    ):
        found, null, p = field_null(pair, (slopes, slopes), method, 0.9, n=200)
        masks = [kept_dimensions(sparsify(v, method, 0.9, slopes)) for v in pair]
        assert found == pytest.approx(agreement(*masks)["iou"]) and null.shape == (200,)
        assert low < p <= high or p == pytest.approx(1 / 201) and high < 0.05
        if slopes is spiky and pair[1] is other:
            assert agreement(*masks)["p"] < 0.001, "the hypergeometric test is fooled by the shared field"
            assert null.mean() > 3 * agreement(*masks)["expected"]
    assert field_null((one, near), (spiky, spiky), "gradient", 0.9, n=20)[2] == 1.0
    own = torch.zeros(120)
    own[:12] = 1.0  # the one's gradient: it keeps the first twelve, the other the last
    assert field_null((one, other), (own, own.flip(0)), "gradient", 0.9, n=2)[0] == 0.0
    second = vector_of([1.0] * 12 + [0.1] * 108)  # each vector is ranked with its own gradient
    assert field_null((second, second), (flat, 100 * own.flip(0)), "effect", 0.9, n=2)[0] == 0.0
    assert field_null((second, other), (flat, own.flip(0)), "effect", 0.9, n=2)[0] == 0.0
    fit = vector_of((spiky * torch.tensor(rng.random(120))).tolist())  # each follows the gradient, by itself
    too = vector_of((spiky * torch.tensor(rng.random(120))).tolist())
    loose, tight = (field_null((fit, too), (spiky, spiky), "effect", 0.9, n=200, bins=bins) for bins in (1, 10))
    assert loose[2] < 0.05 < tight[2] and tight[1].mean() > loose[1].mean()
    assert field_null((fit, too), (spiky, spiky), "effect", 0.9, n=5, bins=120)[1].tolist() == [tight[0]] * 5  # no move
    again = [field_null((one, near), (spiky, spiky), "effect", 0.9, n=5, seed=3)[1] for _ in range(2)]
    assert np.array_equal(*again)


def test_the_table_of_agreement_ranks_each_vector_with_its_own_gradient():
    rng = np.random.default_rng(2)
    vectors = {name: vector_of(rng.normal(size=60).tolist()) for name in "ABC"}
    slopes = {name: torch.tensor(np.exp(rng.normal(size=60))) for name in vectors}
    table = agreement_table(vectors, slopes, [0.5, 0.9], n=20, seed=4)
    assert table["pair"].unique().tolist() == ["A and B", "A and C", "B and C"] and len(table) == 3 * 3 * 2
    for (pair, method, x), part in table.groupby(["pair", "method", "sparsity"]):
        one, other = pair.split(" and ")
        masks = [kept_dimensions(sparsify(vectors[name], method, x, slopes[name])) for name in (one, other)]
        expected = agreement(*masks)
        iou, null, p = field_null((vectors[one], vectors[other]), (slopes[one], slopes[other]), method, x, 20, 4)
        row = part.iloc[0]
        assert row["iou"] == pytest.approx(expected["iou"]) and row["iou"] == pytest.approx(iou)
        assert (row["expected"], row["p"], row["field_p"]) == (expected["expected"], expected["p"], p)
        found = row[["field_low", "field_median", "field_high"]].tolist()
        assert found == np.quantile(null, [0.025, 0.5, 0.975]).tolist()
        null = field_null((vectors[one], vectors[other]), (slopes[one], slopes[other]), method, x, 20, 4, bins=10)
        assert (row["fit_p"], row["fit_median"]) == (null[2], np.median(null[1]))


def test_side_effects_are_compared_with_the_dense_vector_made_weaker():
    """A dense vector whose side effect grows with the square of its scale, and a sparse one with half of its effect."""
    scales = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    weaker, weaker_side = np.outer(scales, np.full(20, -4.0)), np.outer(scales**2, np.full(30, 1.6))
    effect, side = np.full(20, -2.0), np.full(30, 0.9)
    assert beside_weaker(effect, side, weaker, weaker_side) == pytest.approx((0.5, 0.5, 0.5))  # 0.9 - 1.6 / 4
    value, *_ = beside_weaker(np.full(20, -3.5), side, weaker, weaker_side)  # between scales: a straight line
    assert value == pytest.approx(0.9 - 1.6 * (0.75**2 + 1) / 2)
    assert beside_weaker(np.full(20, -4.1), side, weaker, weaker_side) is None  # the dense one never does as much
    rng = np.random.default_rng(0)
    noisy = beside_weaker(effect + rng.normal(size=20), side + rng.normal(size=30), weaker, weaker_side)
    assert noisy[1] < noisy[0] < noisy[2] and noisy[2] - noisy[1] > 0.5
