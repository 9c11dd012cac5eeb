from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from steerutils import (
    SteeringError,
    caa_vectors,
    cosine,
    cosine_table,
    dim_vectors,
    encode,
    orthogonalised,
    pca_vectors,
    random_like,
    random_with_cosine,
    residuals,
    select,
    selection_table,
    shuffled_like,
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
