"""The OV decomposition against literal sums, and the readability score against hand-made vocabularies."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from float64 import float64_softmax, true_float64
from transformers import PreTrainedTokenizerBase

from steerutils import (
    SteeringError,
    SteeringVector,
    capture,
    encode,
    last_logits,
    logit_difference,
    random_like,
    remove_direct,
    steer,
)
from steerutils import ov as module
from steerutils.models import edit
from steerutils.ov import (
    DANGER_WORDS,
    REFUSAL_WORDS,
    WORDS,
    against_null,
    attention_changes,
    attention_runs,
    beyond_null,
    by_head,
    change_by_source,
    cosines_of_random_pairs,
    decompose,
    head_words,
    largest_share,
    lens,
    most_as_good,
    most_effective,
    random_directions,
    readable_share,
    reading_gaps,
    readings,
    share_of_all,
    steering_values,
    strongest_svvs,
    svv_attribution,
    svv_attributions,
    svv_effects,
    svv_shares,
    svv_sums,
    token_direction,
    top_tokens,
    turned,
    word_rows,
    word_score,
    word_tokens,
)

PROMPTS = ["Why?", "How do I bake it?"]
STRENGTH = 1.5


def vector_for(model, layer=1, scale=3.0, seed=1):
    direction = scale * torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(direction.to(model.dtype), layer, "random", model.name, model.revision)


@pytest.fixture(scope="module")
def exact_model(any_model):
    with float64_softmax():
        yield true_float64(any_model)


def norm_gain(model, norm):
    """What the family multiplies by: read off the norm itself, not off its weight's name."""
    x = torch.eye(model.d_model, dtype=model.dtype) * 1e4  # a unit row has RMS 1e4 / sqrt(d)
    return norm(x).diagonal() / model.d_model**0.5


# --- the svvs and the identity ---------------------------------------------------------------------------


def test_svv_equals_loops_over_heads(exact_model):
    vector = vector_for(exact_model, layer=2)
    found = steering_values(exact_model, vector)
    assert found.shape == (2, 4, 32)
    for row, layer in enumerate((2, 3)):
        block = exact_model.blocks[layer]
        gained = block.self_attn.v_proj.weight @ (vector.direction * norm_gain(exact_model, block.input_layernorm))
        for head in range(4):
            group = head // 2
            value = gained[8 * group : 8 * group + 8]
            expected = block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] @ value
            if exact_model.has_post_norms:
                expected = expected * norm_gain(exact_model, block.post_attention_layernorm)
            torch.testing.assert_close(found[row, head], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(steering_values(exact_model, vector, [3]), found[1:])


@torch.no_grad()
def test_the_steered_attention_output_is_rest_plus_svvs(exact_model):
    """The identity, to float64 rounding, in the run that `steer` makes; padded rows included."""
    vector, batch = vector_for(exact_model), encode(exact_model.tokenizer, PROMPTS, ["An answer", "One"])
    parts = decompose(exact_model, batch, vector, STRENGTH)
    with steer(exact_model, vector, STRENGTH), capture(exact_model, "attention_write") as written:
        exact_model.hf(**batch.inputs(), use_cache=False)
    assert list(parts) == [1, 2, 3]
    real = batch.attention_mask.bool()
    for layer, part in parts.items():
        torch.testing.assert_close(part.total[real], written[layer][real], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(part.svv, steering_values(exact_model, vector, [layer])[0])
        assert part.direct[real].norm() > 1e-2 * written[layer][real].norm()


@torch.no_grad()
def test_the_identity_as_shipped_in_float32(any_model):
    vector, batch = vector_for(any_model), encode(any_model.tokenizer, PROMPTS)
    with steer(any_model, vector, -1.0), capture(any_model, "attention_write") as written:
        any_model.hf(**batch.inputs(), use_cache=False)
    real = batch.attention_mask.bool()
    for layer, part in decompose(any_model, batch, vector, -1.0).items():
        torch.testing.assert_close(part.total[real], written[layer][real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_rest_and_the_coefficients_are_literal_sums(exact_model):
    """Loops over positions, keys and heads, one row without padding; the rest from a norm with the scale held."""
    vector, batch = vector_for(exact_model), encode(exact_model.tokenizer, PROMPTS[:1])
    part = decompose(exact_model, batch, vector, STRENGTH)[2]
    with (
        steer(exact_model, vector, STRENGTH),
        capture(exact_model, "block_input") as inputs,
        capture(exact_model, "attention_output") as outputs,
    ):
        pattern = exact_model.hf(**batch.inputs(), use_cache=False, output_attentions=True).attentions[2][0]
    block, x, o = exact_model.blocks[2], inputs[2][0], outputs[2][0]
    gain, eps = norm_gain(exact_model, block.input_layernorm), exact_model.config.rms_norm_eps
    n = len(x) - 1  # the last position
    rest, coefficients = torch.zeros_like(x[0]), torch.zeros(4, dtype=x.dtype)
    for head in range(4):
        z = torch.zeros(8, dtype=x.dtype)
        for k in range(n + 1):
            rms = (x[k].square().mean() + eps).sqrt()
            read = gain * (x[k] - STRENGTH * vector.direction) / rms
            z += pattern[head, n, k] * block.self_attn.v_proj(read)[8 * (head // 2) : 8 * (head // 2) + 8]
            coefficients[head] += STRENGTH * pattern[head, n, k] / rms
        rest += block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] @ z
    if exact_model.has_post_norms:
        after = (o[n].square().mean() + eps).sqrt()
        rest, coefficients = rest * norm_gain(exact_model, block.post_attention_layernorm) / after, coefficients / after
    torch.testing.assert_close(part.rest[0, n], rest, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(part.coefficients[0, n], coefficients, atol=1e-10, rtol=1e-10)


# --- what steering changes in attention ------------------------------------------------------------------


@torch.no_grad()
def test_attention_changes_are_differences_of_two_runs(exact_model):
    vector, batch = vector_for(exact_model), encode(exact_model.tokenizer, PROMPTS)
    found = attention_changes(attention_runs(exact_model, batch, vector, STRENGTH)).set_index(["block", "prompt"])
    assert list(found.index) == [(block, prompt) for block in (1, 2, 3) for prompt in (0, 1)]
    runs = {}
    for factor in (0.0, STRENGTH):
        with (
            steer(exact_model, vector, factor),
            capture(exact_model, "attention_write") as written,
            capture(exact_model, "block_input") as inputs,
        ):
            exact_model.hf(**batch.inputs(), use_cache=False)
        runs[factor] = written, inputs
    parts = decompose(exact_model, batch, vector, STRENGTH)
    for (block, prompt), row in found.iterrows():
        change, moved = ((s[block] - b[block])[prompt, -1] for b, s in zip(runs[0.0], runs[STRENGTH]))
        direct = parts[block].coefficients[prompt, -1] @ parts[block].svv
        lengths = [piece.norm().item() for piece in (change, direct, change - direct)]
        assert row[["change", "direct", "rest"]].tolist() == pytest.approx(lengths, rel=1e-6)
        assert row["cosine"] == pytest.approx((change @ direct).item() / lengths[0] / lengths[1])
        along = (moved @ vector.direction).item() / STRENGTH / vector.norm**2
        assert row["along"] == pytest.approx(along, rel=1e-5)
    assert found.loc[1, "along"].tolist() == pytest.approx([1, 1], abs=1e-6)


@torch.no_grad()
def test_the_change_of_a_block_by_its_source_from_literal_runs(exact_model):
    """The base run's patterns and values, every key's value read at the steered RMS, key by key."""
    vector, batch = vector_for(exact_model, layer=2), encode(exact_model.tokenizer, PROMPTS)
    found = change_by_source(exact_model, attention_runs(exact_model, batch, vector, STRENGTH))
    with capture(exact_model, "block_input") as inputs, capture(exact_model, "attention_write") as written:
        run = exact_model.hf(**batch.inputs(), use_cache=False, output_attentions=True)
    with steer(exact_model, vector, STRENGTH), capture(exact_model, "attention_write") as steered:
        exact_model.hf(**batch.inputs(), use_cache=False)
    change = (steered[2] - written[2])[:, -1]
    direct = decompose(exact_model, batch, vector, STRENGTH)[2].direct[:, -1]
    np.testing.assert_allclose(found["whole"], change.square().sum(-1), rtol=1e-6)
    np.testing.assert_allclose(found["direct"], (direct * change).sum(-1), rtol=1e-6)
    if exact_model.has_post_norms:
        assert list(found) == ["direct", "whole"]
        return
    block, x = exact_model.blocks[2], inputs[2]
    longer = x + STRENGTH * vector.direction
    rms = (longer.square().mean(-1, keepdim=True) + exact_model.config.rms_norm_eps).sqrt()
    values = block.self_attn.v_proj(norm_gain(exact_model, block.input_layernorm) * x / rms)
    values = values.unflatten(-1, (2, 8)).repeat_interleave(2, 2)  # [prompt, pos, head, d_head]
    z = torch.einsum("bhk,bkhe->bhe", run.attentions[2][:, :, -1], values).flatten(-2)
    norm = block.self_attn.o_proj(z) - written[2][:, -1]
    np.testing.assert_allclose(found["norm"], (norm * change).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(found[["direct", "norm", "pattern"]].sum(axis=1), found["whole"])
    assert (found.abs().min() > 1e-4 * found["whole"].min()).all()


# --- effects of the svvs ---------------------------------------------------------------------------------


def metric_of(batch):
    return logit_difference(torch.full((batch,), 5), torch.full((batch,), 77))


@torch.no_grad()
def test_svv_effects_equal_a_literal_removal(exact_model):
    """In the steered run the head's value is rebuilt without the vector, key by key, from its own patterns."""
    vector, batch = vector_for(exact_model), encode(exact_model.tokenizer, PROMPTS)
    effects, whole = svv_effects(exact_model, batch, vector, metric_of(2), STRENGTH)
    assert effects.shape == (2, 3, 4)
    with steer(exact_model, vector, STRENGTH), capture(exact_model, "block_input") as inputs:
        run = exact_model.hf(**batch.inputs(), use_cache=False, output_attentions=True)
    base = exact_model.hf(**batch.inputs(), use_cache=False).logits
    np.testing.assert_allclose(whole, (metric_of(2)(run.logits) - metric_of(2)(base)).numpy(), atol=1e-9)
    for layer, head in ((1, 0), (2, 3), (3, 2)):
        block, x = exact_model.blocks[layer], inputs[layer]
        rms = (x.square().mean(-1, keepdim=True) + exact_model.config.rms_norm_eps).sqrt()
        read = norm_gain(exact_model, block.input_layernorm) * (x - STRENGTH * vector.direction) / rms
        values = block.self_attn.v_proj(read)[..., 8 * (head // 2) : 8 * (head // 2) + 8]

        def replace(z, layer=layer, head=head, values=values):
            z = z.clone()
            z[..., 8 * head : 8 * head + 8] = run.attentions[layer][:, head] @ values
            return z

        with steer(exact_model, vector, STRENGTH), edit(exact_model, [("heads", layer, replace)]):
            without = exact_model.hf(**batch.inputs(), use_cache=False).logits
        expected = (metric_of(2)(run.logits) - metric_of(2)(without)).numpy()
        np.testing.assert_allclose(effects[:, layer - 1, head], expected, atol=1e-6)
        assert np.abs(expected).max() > 1e-4


@torch.no_grad()
def test_effects_of_heads_are_kept_layer_by_layer(exact_model, tmp_path, monkeypatch):
    about = exact_model, encode(exact_model.tokenizer, PROMPTS), vector_for(exact_model), metric_of(2)
    whole = svv_effects(*about, STRENGTH)
    made, calls = module.resume, []
    monkeypatch.setattr(module, "resume", lambda *given: calls.append(given[2]) or made(*given))

    def cut_off(*given):
        if len(calls) > 7:  # two runs, one layer of four heads, and one head
            raise KeyboardInterrupt
        return made(*(calls.append(given[2]) or given))

    monkeypatch.setattr(module, "resume", cut_off)
    with pytest.raises(KeyboardInterrupt):
        svv_effects(*about, STRENGTH, tmp_path)
    assert len([*tmp_path.iterdir()]) == 1
    calls.clear()
    monkeypatch.setattr(module, "resume", lambda *given: calls.append(given[2]) or made(*given))
    again = svv_effects(*about, STRENGTH, tmp_path)
    assert calls.count(1) <= 3 and calls.count(2) == calls.count(3) == 4  # whole runs alone: not its heads again
    for one, other in zip(whole, again):
        np.testing.assert_allclose(one, other, atol=1e-12)
    svv_effects(*about, STRENGTH / 2, tmp_path)
    assert len([*tmp_path.iterdir()]) == 6  # another strength is kept by itself


def test_svv_attribution_is_svv_effects_to_first_order(exact_model):
    batch = encode(exact_model.tokenizer, PROMPTS)

    def error(strength):
        vector = vector_for(exact_model)
        exact, _ = svv_effects(exact_model, batch, vector, metric_of(2), strength)
        found = svv_attribution(exact_model, batch, vector, metric_of(2), strength)
        return np.abs(found - exact).max() / np.abs(exact).max()

    small = error(1e-3)
    assert small < 1e-2 and small < 0.2 * error(1e-2)


def head_gradients(model, batch, vector):
    """Gradients of the metric at the heads' outputs in the run that `steer` makes, by block from the vector's on."""
    kept, start = {}, torch.zeros(model.d_model, dtype=model.dtype, requires_grad=True)  # gradients need a leaf
    layers = range(vector.layer, model.n_layers)
    reads = [("heads", layer, lambda z, layer=layer: kept.update({layer: z})) for layer in layers]
    with steer(model, vector, STRENGTH), edit(model, [("block_input", 0, lambda h: h + start), *reads]):
        logits = model.hf(**batch.inputs(), use_cache=False).logits
    return dict(zip(kept, torch.autograd.grad(metric_of(2)(logits).sum(), list(kept.values()))))


def test_first_order_effects_of_many_vectors_are_those_of_each(exact_model):
    """Each vector's by its definition: the coefficient, the value gained, and the gradient of a literal steered run."""
    batch = encode(exact_model.tokenizer, PROMPTS)
    vectors = [vector_for(exact_model, seed=seed) for seed in range(3)]
    found = svv_attributions(exact_model, batch, vectors, metric_of(2), STRENGTH, together=2)
    assert found.shape == (3, 2, 3, 4)
    for each, vector in zip(found, vectors):
        alone = svv_attribution(exact_model, batch, vector, metric_of(2), STRENGTH)
        np.testing.assert_allclose(alone, each, atol=1e-9)
        if exact_model.has_post_norms:  # there the scale of the norm after attention is in the coefficient
            continue
        parts = decompose(exact_model, batch, vector, STRENGTH)
        for layer, gradient in head_gradients(exact_model, batch, vector).items():
            block = exact_model.blocks[layer]
            gained = block.self_attn.v_proj.weight @ (vector.direction * norm_gain(exact_model, block.input_layernorm))
            gained = gained.unflatten(0, (2, 8)).repeat_interleave(2, 0)  # [head, d_head]
            written = parts[layer].coefficients[..., None] * gained
            expected = (written * gradient.unflatten(-1, (4, 8))).sum((1, 3))
            np.testing.assert_allclose(each[:, layer - 1], expected.detach(), atol=1e-8, rtol=1e-5)
    with pytest.raises(ValueError, match="of one block"):
        svv_attributions(exact_model, batch, [vectors[0], vector_for(exact_model, 2)], metric_of(2))
    with pytest.raises(ValueError, match="at least one"):
        svv_attributions(exact_model, batch, [], metric_of(2))


def test_sums_of_svvs_of_many_directions(exact_model):
    vectors = [vector_for(exact_model, 2, seed=seed) for seed in range(3)]
    sums = svv_sums(exact_model, torch.stack([vector.direction for vector in vectors]), 2)
    for vector, found in zip(vectors, sums):
        torch.testing.assert_close(found, steering_values(exact_model, vector).sum((0, 1)))


def test_the_strongest_svvs_of_each_vector_by_hand():
    values = torch.arange(12.0).reshape(2, 2, 3, 1)  # two vectors of two blocks with three heads
    effects = np.array([[[0.1, -3, 2], [0, 1, 0.5]], [[1, 1, 0], [-4, 0, 2]]])
    found = strongest_svvs(values, effects, 3)
    assert found.squeeze(-1).tolist() == [[1, 2, 4], [9, 11, 6]]  # by size whatever the sign, ties in order
    assert [(row, head) for row, head in most_effective(effects[1], 3)] == [(1, 0), (1, 2), (0, 0)]


def test_shares_of_heads_are_ratios_of_means_with_intervals_over_prompts():
    rng = np.random.default_rng(0)
    whole = np.array([1.0, 2.0, 3.0, 2.0])
    effects = np.stack([0.5 * whole, -0.25 * whole, whole[::-1] * rng.uniform(0, 1, 4)], -1)[:, None]
    found = svv_shares(effects, whole)
    assert found.shape == (1, 3, 3)
    np.testing.assert_allclose(found[0, :2], np.array([[0.5] * 3, [-0.25] * 3]))  # the same share on every prompt
    value, low, high = found[0, 2]
    assert value == pytest.approx(effects[:, 0, 2].sum() / 8) and low < value < high
    np.testing.assert_array_equal(svv_shares(effects[:, :, 2:], whole), found[:, 2:])  # the same resamples for each


def test_an_interval_of_shares_covers_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), []
    for _ in range(100):
        whole = rng.normal(2, 1, 100)
        low, high = svv_shares((0.3 * whole + rng.normal(0, 1, 100))[:, None, None], whole)[0, 0, 1:]
        hits.append(low < 0.3 < high)
    assert 0.88 < np.mean(hits) < 1


def test_the_largest_share_is_chosen_on_one_half_and_measured_on_the_other():
    effects, whole = np.zeros((6, 2, 3)), np.array([2.0, 4, 2, 4, 2, 4])
    effects[::2, 1, 2] = 1.8  # 0.9 of the effect where it is chosen
    effects[1::2, 1, 2] = 1.0  # a quarter where it is measured
    effects[1::2, 0, 0] = 4.0
    row, head, share = largest_share(effects, whole)
    assert (row, head) == (1, 2) and share == pytest.approx((0.25, 0.25, 0.25))


@torch.no_grad()
def test_the_share_of_all_svvs_is_what_their_removal_takes(llama):
    vector, prompts = vector_for(llama), [*PROMPTS, "Name a river."]
    metric = metric_of(3)

    def mean():
        return metric(last_logits(llama, prompts)[:, None]).double().mean().item()

    base = mean()
    with steer(llama, vector, STRENGTH):
        steered = mean()
        with remove_direct(llama, vector, STRENGTH, "values"):
            without = mean()
    value, low, high = share_of_all(llama, prompts, vector, metric, STRENGTH)
    assert value == pytest.approx((steered - without) / (steered - base), rel=1e-4) and low <= value <= high
    other = share_of_all(llama, prompts, vector, metric, -STRENGTH)[0]
    assert abs(other - value) > 1e-3


# --- the lens and the score ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_lens_is_the_models_own_last_step(any_model):
    batch = encode(any_model.tokenizer, PROMPTS)
    with capture(any_model, "final_residual", [0]) as taken:
        logits = any_model.hf(**batch.inputs(), use_cache=False).logits
    torch.testing.assert_close(lens(any_model, taken[0]), logits)
    direction = vector_for(any_model).direction
    assert torch.equal(lens(any_model, 8 * direction).argsort()[-20:], lens(any_model, direction).argsort()[-20:])
    ids = lens(any_model, direction).argsort(descending=True)[:3].tolist()
    assert top_tokens(any_model, direction, 3) == [any_model.tokenizer.decode([i]) for i in ids]
    assert len(top_tokens(any_model, direction)) == 20


class FakeTokenizer(PreTrainedTokenizerBase):
    tokens = ["Ġsorry", "▁Danger", "dangerous", "harmony", "harmful", "HARM", "Ġrefusal", "sorrys", "a harm", None, "'"]

    def __init__(self):
        pass

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]


def test_which_tokens_spell_a_word_by_hand():
    found = word_tokens(FakeTokenizer(), 13)
    expected = [True, True, True, False, True, True, True, False, False, False, False, False, False]
    assert found.tolist() == expected  # two ids more than the tokenizer has: a padded vocabulary
    assert set(WORDS) == set(REFUSAL_WORDS) | set(DANGER_WORDS) and len(set(WORDS)) == len(WORDS)
    assert all(word == word.lower() and word.rstrip("*").isalpha() for word in WORDS)


def test_the_share_by_hand(llama):
    """The unembedding is set so that a direction along axis i puts tokens 2i and 2i + 1 highest."""
    model = tiny_model("llama")
    weight = model.hf.get_output_embeddings().weight
    weight.zero_()
    for axis in range(32):
        weight[2 * axis, axis] = weight[2 * axis + 1, axis] = 1.0
    model.decoder.norm.weight.fill_(1.0)
    spelled = model.tokenizer.convert_ids_to_tokens(list(range(64)))
    axes = [spelled.index("C") // 2, spelled.index("K") // 2]
    directions = torch.eye(32)[axes]
    words = [letter.lower() for letter in spelled[2 * axes[0] : 2 * axes[0] + 2]]  # both tokens of the first
    assert readable_share(model, directions, words, 2).tolist() == [1.0, 0.0]
    assert readable_share(model, directions, words[:1], 2).tolist() == [0.5, 0.0]
    assert readable_share(model, directions[None], words[:1], 2).shape == (1, 2)
    many = directions[:1].expand(300, -1)  # more than one chunk
    assert readable_share(model, many, words, 2).tolist() == [1.0] * 300
    with pytest.raises(SteeringError, match="spells any of the"):
        readable_share(model, directions)  # a byte vocabulary has no words


def test_the_null_by_hand(llama):
    null = np.array([0.0, 0.1, 0.1, 0.3])
    assert against_null(0.1, null) == 4 / 5  # three at least as high
    assert against_null(np.array(0.5), null) == 1 / 5  # as readable_share of one direction gives it
    heads = np.stack([null, null[::-1], np.full(4, 0.1)], 1)  # each value beside its own column
    np.testing.assert_allclose(against_null(np.array([0.3, 0.05, 0.2]), heads), [2 / 5, 4 / 5, 1 / 5])
    with pytest.raises(ValueError, match="draw some"):
        against_null(0.1, np.array([]))
    some = random_directions(llama, 500, seed=1)
    assert torch.allclose(some.norm(dim=-1), torch.ones(500)) and torch.equal(some, random_directions(llama, 500, 1))
    assert (some @ some.T).fill_diagonal_(0).abs().mean() < 0.2 and some.mean(0).abs().max() < 0.05
    assert not torch.equal(some, random_directions(llama, 500, 2))


def test_the_null_of_a_heads_own_svvs_has_its_shape(llama):
    vector = vector_for(llama)
    null = torch.stack([steering_values(llama, random_like(vector, seed), [2]) for seed in range(3)])
    assert readable_share(llama, null, ["a", "b"]).shape == (3, 1, 4)


def test_a_vector_that_does_not_fit_is_refused(llama):
    vector = vector_for(llama)
    with pytest.raises(SteeringError, match="not on tiny-qwen2"):
        steering_values(tiny_model("qwen2"), vector)
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        steering_values(llama, vector, [4])
    with pytest.raises(SteeringError, match="not on tiny-qwen2"):
        decompose(tiny_model("qwen2"), encode(llama.tokenizer, PROMPTS), vector)


def test_word_score_equals_mean_and_deviation_of_the_logits(exact_model):
    if getattr(exact_model.config, "final_logit_softcapping", None):
        pytest.skip("the score is taken before the soft cap")
    directions = torch.randn(2, 3, exact_model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    words = ["a", "k", "z"]
    spells = word_tokens(exact_model.tokenizer, exact_model.config.vocab_size, words)
    logits = lens(exact_model, directions).double().numpy()
    wanted = (logits[..., spells].mean(-1) - logits.mean(-1)) / logits.std(-1)
    np.testing.assert_allclose(word_score(exact_model, directions, words), wanted, rtol=1e-5)
    np.testing.assert_allclose(word_score(exact_model, -directions, words), -wanted, rtol=1e-5)
    with pytest.raises(SteeringError, match="spells any"):
        word_score(exact_model, directions, ["nosuchword"])


def test_how_many_of_a_null_may_read_as_well_by_hand():
    assert [most_as_good(n) for n in (4, 19, 20, 39, 40, 99)] == [-1, -1, 0, 0, 1, 3]
    for n in (20, 99):
        null, k = np.arange(n, dtype=float), most_as_good(n)
        assert against_null(n - k - 0.5, null) < 0.05 <= against_null(n - k - 1.5, null)


def test_directions_are_turned_where_their_effect_is_negative():
    directions = torch.tensor([[[1.0, 2], [3, 4]]])
    expected = [[[-1.0, -2], [3, 4]]]
    assert turned(directions, np.array([[-0.5, 0.0]])).tolist() == expected
    assert turned(directions, torch.tensor([[-2.0, 5]])).tolist() == expected
    assert turned(directions[0, 0], torch.tensor(-1.0)).tolist() == [-1.0, -2.0]


def test_words_of_heads_and_which_are_listed(llama):
    svv = steering_values(llama, vector_for(llama, layer=2))  # [2, 4, 32]
    spells = np.zeros(llama.config.vocab_size, dtype=bool)
    best = lens(llama, svv[1, 3]).argsort(descending=True)[:3].tolist()
    spells[best[0]] = True
    lists, listed = head_words(llama, svv, spells, 3)
    assert lists[1][3] == top_tokens(llama, svv[1, 3], 3) and lists[0][2] == top_tokens(llama, svv[0, 2], 3)
    assert listed.shape == (2, 4, 3) and listed[1, 3].tolist() == [True, False, False]


def test_the_direction_of_tokens_is_their_mean_row_beside_the_vocabularys(llama):
    weight = llama.hf.get_output_embeddings().weight
    expected = (weight[3] + weight[9]) / 2 - weight.sum(0) / len(weight)
    torch.testing.assert_close(token_direction(llama, [3, 9]), expected)
    torch.testing.assert_close(token_direction(llama, np.array([3, 9])), expected)


def test_readings_stand_beside_the_null_of_their_own_place():
    """Directions of one dimension, so that a measure gives their only number back."""
    vectors, null = torch.tensor([[3.0], [-1.0]]), torch.arange(40.0)[:, None]  # mean 19.5
    heads, flat = torch.tensor([[[1.0], [5.0]], [[2.0], [2.0]]]), torch.full((40, 2, 1), 2.0)
    measures = {"size": lambda rows: rows[..., 0].numpy(), "negative": lambda rows: -rows[..., 0].numpy()}
    table = readings(measures, ["a", "b"], {"itself": (vectors, null), "heads": (heads, flat)})
    rows = table.set_index(["measure", "place", "method"]).sort_index()
    assert len(table) == 8 and list(rows.loc[("size", "heads"), "value"]) == [3.0, 2.0]  # means over heads
    assert list(rows.loc[("size", "itself"), "p"]) == [38 / 41, 1.0]
    assert list(rows.loc[("negative", "itself"), "p"]) == [5 / 41, 1 / 41]
    a = rows.loc[("size", "itself", "a")]
    assert (a["null_low"], a["null_mean"], a["null_high"]) == (0.0, 19.5, 38.0)  # one may be as good: 2 / 41
    assert a["z"] == pytest.approx((3 - 19.5) / null.numpy().std())
    assert rows.loc["size"].loc["heads", "z"].isna().all()  # a null without spread has no scale
    small = readings(measures, ["a", "b"], {"itself": (vectors, null[:19])})
    assert (small["null_high"] == np.inf).all() and (small["p"] >= 0.05).all()
    for number in (37.5, 38.5):  # null_high is what p < 0.05 must exceed
        (p,) = readings(measures, ["a"], {"itself": (torch.tensor([[number]]), null)})["p"][:1]
        assert (p < 0.05) == (number > 38)


def test_a_bar_moves_what_p_must_beat():
    null, measures = torch.arange(999.0)[:, None], {"size": lambda rows: rows[..., 0].numpy()}
    (row,) = readings(measures, ["a"], {"itself": (torch.tensor([[997.5]]), null)}, 0.003).to_dict("records")
    assert row["p"] == pytest.approx(0.002) and row["null_high"] == 997.0 and most_as_good(999, 0.003) == 1
    assert most_as_good(99, 0.05 / 18) == -1


def test_only_a_p_at_either_end_of_the_null_settles_anything():
    assert beyond_null(0.001, 0.0, 0.003) is True
    assert beyond_null(0.003, 0.002, 0.003) is None and beyond_null(0.5, 0.49, 0.003) is None
    assert beyond_null(0.98, 0.997, 0.003) is None and beyond_null(0.999, 0.9971, 0.003) is False


def test_the_least_number_there_is_is_not_unreadable_where_most_of_the_null_has_it_too():
    null = torch.cat([torch.zeros(890), torch.ones(110)])[:, None]  # a share of listed words is 0 for most directions
    measures = {"share": lambda rows: rows[..., 0].numpy()}
    table = readings(measures, ["none", "one"], {"itself": (torch.tensor([[0.0], [1.0]]), null)})
    none, one = table.to_dict("records")
    assert none["p"] == 1 and none["better"] == 0.11 and beyond_null(none["p"], none["better"], 0.05) is None
    assert one["better"] == 0 and beyond_null(one["p"], one["better"], 0.05) is None


def test_the_gap_of_two_readings_is_held_against_the_gaps_of_the_same_random_vectors():
    rng = np.random.default_rng(0)
    first = rng.normal(size=2000)
    second = 5 + 2 * (0.8 * first + 0.6 * rng.normal(size=2000))  # another scale, correlated with the first
    one, other = (torch.tensor(null)[:, None] for null in (second, first))
    read = lambda rows: rows[..., 0].numpy()  # noqa: E731
    vectors = torch.tensor([[11.0], [5.0]]), torch.tensor([[0.0], [0.0]])
    gaps = reading_gaps(read, (vectors[0], one), (vectors[1], other))
    z = (np.array([11, 5]) - second.mean()) / second.std() + first.mean() / first.std()
    np.testing.assert_allclose(gaps[:, 0], z)
    spread = (second - second.mean()) / second.std() - (first - first.mean()) / first.std()
    np.testing.assert_allclose(gaps[:, 1], z - np.quantile(spread, 0.975))
    np.testing.assert_allclose(gaps[:, 2], z - np.quantile(spread, 0.025))
    assert gaps[0, 1] > 0 and gaps[1, 1] < 0 < gaps[1, 2]
    wider = reading_gaps(read, (vectors[0], one), (vectors[1], other), 0.99)
    assert (wider[:, 1] < gaps[:, 1]).all() and (wider[:, 2] > gaps[:, 2]).all()
    assert np.isnan(reading_gaps(read, (vectors[0], torch.ones_like(one)), (vectors[1], other))).all()
    with pytest.raises(ValueError, match="same vectors"):
        reading_gaps(read, (vectors[0], one), (vectors[1], other[1:]))


def test_a_gap_covers_as_often_as_it_says():
    """A vector that is one more random draw: the interval of its gap holds 0, in 95 of 100."""
    rng = np.random.default_rng(1)
    pairs = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 3000)
    null, new = torch.tensor(pairs[:2000]), torch.tensor(pairs[2000:])
    places = [(new[:, at : at + 1], null[:, at : at + 1]) for at in (0, 1)]
    _, low, high = reading_gaps(lambda rows: rows[..., 0].numpy(), *places).T
    assert 0.93 < ((low < 0) & (high > 0)).mean() < 0.97


def test_rows_of_words_and_heads_by_name(llama):
    spells = np.zeros(llama.config.vocab_size, bool)
    directions = torch.randn(2, llama.d_model, generator=torch.Generator().manual_seed(0))
    best = lens(llama, directions).topk(3).indices
    spells[best[1, 2]] = True
    rows = word_rows(llama, {("DIM", "itself"): directions[0], ("PO", "sum"): directions[1]}, spells, 3)
    assert list(rows.columns) == ["method", "read", "listed", "1", "2", "3"]
    assert rows.iloc[1, :2].tolist() == ["PO", "sum"] and rows["listed"][1][2] == "1"
    assert rows.iloc[0, 3:].tolist() == [word[:40] for word in top_tokens(llama, directions[0], 3)]
    effects = np.array([[0.1, -3.0], [2.0, 0.0]])
    assert most_effective(effects, 3) == [(0, 1), (1, 0), (0, 0)]
    named = {
        "whole": 5,
        "block 11, head 1": 4.0,
        "block 11, head 0": 3.0,
        "block 9, head 1": 2.0,
        "block 9, head 0": 1.0,
    }
    values, first = by_head(named)
    assert first == 9 and values.tolist() == [[1, 2], [3, 4]]


def test_random_pairs_have_the_cosine_before_and_what_the_map_makes_of_it_after():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    for c in (-0.4, 0.0, 0.7, 1.0):  # no map at all: each pair keeps its cosine
        np.testing.assert_allclose(cosines_of_random_pairs(c, drawn, drawn), np.full(200, c), atol=1e-12)
    matrix = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    found = cosines_of_random_pairs(0.6, drawn, drawn @ matrix)
    first, partner = (vector / vector.norm() for vector in (drawn[7], drawn[6]))
    aside = partner - (partner @ first) * first
    second = 0.6 * first + 0.8 * aside / aside.norm()
    assert found[7] == pytest.approx(torch.cosine_similarity(first @ matrix, second @ matrix, dim=0).item())
