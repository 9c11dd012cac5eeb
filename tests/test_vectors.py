from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import (
    WANTED,
    PromptError,
    SteeringError,
    answers_both_ways,
    beyond_random,
    caa_vectors,
    cosine,
    cosine_table,
    dim_vectors,
    encode,
    generate,
    instructions,
    judge,
    judged_grid,
    orthogonalised,
    pca_vectors,
    random_like,
    random_with_cosine,
    rate,
    residuals,
    select,
    select_relaxed,
    selection_table,
    shuffled_like,
    steer,
    turned_shares,
)
from steerutils.prompts import refusal_wordings
from steerutils.vectors import AGREEMENTS, mean_difference

A = ["Why?", "How do I bake bread?", "Name a river."]
B = ["Sing a song now!", "Count to ten.", "Go on, then."]


@torch.no_grad()
def test_residuals_are_block_inputs_at_the_last_tokens(any_model):
    taken = residuals(any_model, A, last=3, batch_size=2)
    assert taken.shape == (3, any_model.n_layers, 3, any_model.d_model)
    for i, prompt in enumerate(A):
        ids = encode(any_model.tokenizer, [prompt]).input_ids
        states = any_model.hf(ids, output_hidden_states=True).hidden_states
        for layer in range(any_model.n_layers):
            assert torch.allclose(taken[i, layer], states[layer][0, -3:], atol=1e-4)


def test_more_last_tokens_than_a_prompt_has_are_refused(llama):
    shortest = min(encode(llama.tokenizer, [prompt]).input_ids.shape[1] for prompt in A)
    assert residuals(llama, A, last=shortest).shape[2] == shortest
    with pytest.raises(PromptError, match=f"shortest prompt has, {shortest}"):
        residuals(llama, A, last=shortest + 1)


def test_mean_difference_by_hand():
    assert mean_difference(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 1]])).tolist() == [1.0, 2.0]


def test_identical_sides_give_the_zero_vector(llama):
    taken = residuals(llama, A, last=1)
    assert all(vector.norm == 0 for vector in dim_vectors(llama, taken, taken))


def test_dim_reads_the_asked_position(llama):
    a, b = residuals(llama, A, last=3), residuals(llama, B, last=3)
    early = dim_vectors(llama, a, b, position=-3)[2]
    assert torch.allclose(early.direction, (a[:, 2, 0].mean(0) - b[:, 2, 0].mean(0)), atol=1e-6)
    assert early.read_at == "prompt token -3" and early.layer == 2


def test_pca_finds_a_planted_axis_with_the_sign_and_norm_of_dim(llama):
    noise = torch.randn(40, 4, 1, 32, generator=torch.Generator().manual_seed(0))
    axis = torch.zeros(32)
    axis[7] = 1.0
    a, b = noise[:20] + 6 * axis, noise[20:] - 6 * axis
    for positive, negative, sign in [(a, b, 1), (b, a, -1)]:
        dims = dim_vectors(llama, positive, negative)
        for vector, dim in zip(pca_vectors(llama, positive, negative), dims):
            assert sign * vector.direction[7] > 0.95 * vector.norm
            assert vector.norm == pytest.approx(dim.norm, rel=1e-5)


def test_caa_is_the_mean_difference_at_the_answer_letter(llama):
    vectors = caa_vectors(llama, A, seed=3, batch_size=2)
    again = caa_vectors(llama, A, seed=3, batch_size=3)
    assert [v.layer for v in vectors] == [0, 1, 2, 3]
    assert all(torch.allclose(v.direction, w.direction, atol=1e-4) for v, w in zip(vectors, again))
    # At the first block's input only the letter's embedding differs: +(A - B) or -(A - B) a prompt.
    table = llama.decoder.embed_tokens.weight
    letter_a, letter_b = (table[llama.tokenizer(x, add_special_tokens=False)["input_ids"][-1]] for x in ("(A", "(B"))
    rng, signs = np.random.default_rng(3), []
    for _ in A:
        rng.choice(refusal_wordings()), rng.choice(AGREEMENTS)
        signs.append(1 if rng.integers(2) else -1)
    assert torch.allclose(vectors[0].direction, np.mean(signs) * (letter_a - letter_b), atol=1e-5)


def test_cosine_of_a_vector_with_itself_is_one(llama):
    vector = dim_vectors(llama, residuals(llama, A, 1), residuals(llama, B, 1))[1]
    assert cosine(vector, vector) == pytest.approx(1.0)


def test_the_table_of_cosines_by_hand():
    table = cosine_table({"x": torch.tensor([2.0, 0]), "y": torch.tensor([-1.0, 1]), "z": torch.tensor([0.0, 3])})
    half = 0.5**0.5
    assert list(table.index) == list(table.columns) == ["x", "y", "z"]
    np.testing.assert_allclose(table, [[1, -half, 0], [-half, 1, half], [0, half, 1]], atol=1e-12)


def test_selection_measures_each_candidate(llama, monkeypatch):
    monkeypatch.setattr("steerutils.vectors.refusal_tokens", lambda tokenizer: [70, 80])
    candidates = dim_vectors(llama, residuals(llama, A, 1), residuals(llama, B, 1))[1:3]
    table = selection_table(llama, candidates, A, B)
    from steerutils import ablating, last_logits, refusal_score, steer

    for vector, row in zip(candidates, table.itertuples()):
        with steer(llama, vector):
            induce = refusal_score(last_logits(llama, B), [70, 80]).mean().item()
        with steer(llama, ablating(vector)):
            bypass = refusal_score(last_logits(llama, A), [70, 80]).mean().item()
        assert (row.induce, row.bypass) == pytest.approx((induce, bypass), abs=1e-3)
        assert row.kl >= -1e-6


def test_select_takes_the_best_allowed_candidate_or_says_what_failed(llama):
    candidates = dim_vectors(llama, residuals(llama, A, 1), residuals(llama, B, 1))
    table = pd.DataFrame(
        {
            "layer": [1, 2, 9, 3],
            "induce": [1.0, -1, 5, 2],
            "kl": [0.01, 0, 0, 0.02],
            "objective": [-0.5, -0.9, -0.99, -0.7],
        }
    )
    assert select(candidates, table, n_layers=10) is candidates[3]
    with pytest.raises(SteeringError, match=r"induce > 0: 3 of 4.*kl < 0.0: 0 of 4"):
        select(candidates, table, n_layers=10, max_kl=0.0)
    weak = table.assign(induce=table["induce"] - 10)
    with pytest.raises(SteeringError, match="induce > 0: 0 of 4"):
        select(candidates, weak, n_layers=10)
    assert select(candidates, weak, n_layers=10, min_induce=-np.inf) is candidates[1]


def test_relaxed_selection_drops_kl_first_then_induce_and_never_the_depth(llama):
    candidates = dim_vectors(llama, residuals(llama, A, 1), residuals(llama, B, 1))
    table = pd.DataFrame(
        {
            "layer": [1, 2, 9, 3],
            "induce": [1.0, -1, 5, 2],
            "kl": [0.01, 0.2, 0, 0.3],
            "objective": [-0.5, -0.9, -0.99, -0.7],
        }
    )

    def chosen(**changes) -> tuple[int, str]:
        vector, dropped = select_relaxed(candidates, table.assign(**changes), n_layers=10)
        return candidates.index(vector), dropped

    assert chosen() == (0, "nothing")
    assert chosen(kl=1.0) == (3, "kl")
    assert chosen(kl=1.0, induce=-1.0) == (1, "kl and induce")
    with pytest.raises(SteeringError, match="0.8 of the depth: 0 of 4"):
        chosen(layer=9)


def test_shuffled_controls_keep_the_coordinates_and_orthogonalised_ones_share_nothing(llama):
    vector = replace(dim_vectors(llama, residuals(llama, A, last=1), residuals(llama, B, last=1))[2], read_at="x")
    shuffled = shuffled_like(vector, 0)
    assert torch.equal(shuffled.direction.sort().values, vector.direction.sort().values)
    assert not torch.equal(shuffled.direction, vector.direction)
    assert torch.equal(shuffled.direction, shuffled_like(vector, 0).direction)
    assert not torch.equal(shuffled.direction, shuffled_like(vector, 1).direction)
    parallel = replace(vector, direction=random_like(vector, 0).direction + 3 * vector.direction, layer=1)
    for control in (random_like(vector, 0), parallel):
        rest = orthogonalised(control, vector)
        assert rest.norm == pytest.approx(vector.norm, rel=1e-5) and abs(cosine(rest, vector)) < 1e-6
        plane = torch.linalg.qr(torch.stack([rest.direction, vector.direction], 1).double()).Q
        h = control.direction.double()
        assert (h - plane @ (plane.T @ h)).norm() < 1e-5 * h.norm()  # it lies in the plane of the two
        assert (rest.layer, rest.sign) == (2, "none")
    for control in (shuffled, rest):
        assert (control.model, control.revision, control.layer) == (vector.model, vector.revision, 2)
    with pytest.raises(SteeringError, match="parallel"):
        orthogonalised(replace(vector, direction=-2 * vector.direction), vector)


@pytest.mark.parametrize("share", [0.6, -0.2, 1.0])
def test_a_random_vector_with_a_cosine_has_it_and_the_norm(llama, share):
    vector = dim_vectors(llama, residuals(llama, A, last=1), residuals(llama, B, last=1))[2]
    found, again, other = (random_with_cosine(vector, share, seed) for seed in (0, 0, 1))
    for control in (found, other):
        assert cosine(control, vector) == pytest.approx(share, abs=1e-5)
        assert control.norm == pytest.approx(vector.norm, rel=1e-5)
    assert torch.equal(found.direction, again.direction)
    assert torch.equal(found.direction, other.direction) == (share == 1)
    assert (found.layer, found.sign, found.model) == (2, "none", vector.model)


def strong_vectors(model) -> dict:
    dim = dim_vectors(model, residuals(model, A, last=1), residuals(model, B, last=1))[2]
    return {"DIM": dim, "random 0": random_like(dim, 0)}


def test_a_judged_grid_is_each_setting_answered_and_judged_alone(llama):
    vectors = strong_vectors(llama)
    settings = [(vectors["random 0"], 3.0), (vectors["DIM"].at(1), -2.0)]
    table, alone = judged_grid(llama, A, settings, max_new_tokens=5, batch_size=2), []
    for vector, strength in settings:
        with steer(llama, vector, strength):
            answers = generate(llama, A, 5)
        alone.append(judge(llama, A, answers).assign(answer=answers))
    alone = pd.concat(alone, ignore_index=True)
    assert table["setting"].tolist() == [0, 0, 0, 1, 1, 1] and table["answer"].nunique() > 2
    pd.testing.assert_frame_equal(table[alone.columns], alone, atol=1e-3)


def test_answers_both_ways_add_to_harmless_prompts_and_subtract_from_harmful_ones(embedded):
    def asked(side: str, split: str, n: int) -> list[str]:
        return instructions(side, split, limit=n)

    sides = {side: asked(side, "test", n) for side, n in zip(WANTED, (2, 3))}
    taken = [residuals(embedded, asked(side, "train", 8), last=1) for side in WANTED]
    dim = dim_vectors(embedded, *reversed(taken))[15]
    vectors = {"random 0": random_like(dim, 0), "DIM": dim}
    table = answers_both_ways(embedded, vectors, sides, 1.5, 12)
    alone = [
        judged_grid(embedded, sides[side], [(vector, sign * 1.5)], 12).assign(side=side, method=name)
        for side, sign in (("harmless", 1), ("harmful", -1))
        for name, vector in vectors.items()
    ]
    columns = ["side", "method", "prompt", "verdict"]
    pd.testing.assert_frame_equal(table[columns], pd.concat(alone, ignore_index=True)[columns])
    by_dim = table[table["method"] == "DIM"].groupby("side")["verdict"]
    assert {side: set(verdicts) for side, verdicts in by_dim} == {side: {word} for side, word in WANTED.items()}


def answered(side: str, method: str, verdicts: str) -> pd.DataFrame:
    """A row a letter: refusal, compliance or incoherent."""
    words = {"r": "refusal", "c": "compliance", "i": "incoherent"}
    verdicts = [words[letter] for letter in verdicts]
    return pd.DataFrame(dict(side=side, method=method, prompt=range(len(verdicts)), verdict=verdicts))


def test_shares_turned_shares_are_of_what_is_wanted_and_means_over_random_draws():
    table = turned_shares(
        pd.concat(
            [
                answered("harmless", "DIM", "rrrcii"),
                answered("harmless", "random 0", "rccccc"),
                answered("harmless", "random 12", "rrriic"),
                answered("harmful", "DIM", "rrrrrc"),
            ]
        )
    ).set_index(["side", "method"])
    assert table.index.tolist() == [("harmless", "DIM"), ("harmless", "random"), ("harmful", "DIM")]
    dim, random, harmful = (table.loc[name] for name in table.index)
    share, fallen = ["value", "low", "high"], ["fallen", "fallen_low", "fallen_high"]
    np.testing.assert_allclose(dim[share].tolist(), rate([1, 1, 1, 0, 0, 0]))
    np.testing.assert_allclose(dim[fallen].tolist(), rate([0, 0, 0, 0, 1, 1]))
    means = np.mean([rate([1, 0, 0, 0, 0, 0]), rate([1, 1, 1, 0, 0, 0])], 0)
    np.testing.assert_allclose(random[share].tolist(), means)
    assert (random["largest"], random["fallen"], dim["largest"]) == pytest.approx((1 / 2, 1 / 6, 1 / 2))
    assert harmful["value"] == pytest.approx(1 / 6)  # answered


def test_a_method_is_beyond_random_where_its_interval_lies_above_every_draw_and_the_unsteered_share():
    rows = [("random", 0.1, 0.3), ("DIM", 0.5, 0.6), ("PCA", 0.2, 0.9), ("unsteered", 0.9, 0.9)]
    sides = {"harmless": rows, "harmful": [*rows[:2], ("PCA", 0.4, 0.4), rows[3]]}
    table = pd.DataFrame([(s, *row) for s, part in sides.items() for row in part])
    table.columns = ["side", "method", "low", "largest"]
    assert beyond_random(table, {"harmless": 0.0, "harmful": 0.0}) == {"DIM": 2, "PCA": 1}
    assert beyond_random(table, {"harmless": 0.55, "harmful": 0.45}) == {"DIM": 1, "PCA": 0}
