"""Attribution's invariants on every family, and its errors."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_model
from float64 import float64_softmax, true_float64
from torch.nn.functional import linear

from steerutils import Batch, PromptError, SteeringVector, ablating, attribution, encode, steer
from steerutils.attribution import (
    EAP,
    AttributionError,
    attribute,
    attribute_pairs,
    batch_within,
    bytes_of_batch,
    clean_residuals,
    divergence_from,
    left,
    logit_difference,
    midpoint,
    pair_contrast,
    response_log_probability,
    steering_contrast,
    token_contrast,
)
from steerutils.circuits import patch_edges, source_changes
from steerutils.models import ChatModel, capture, edit, resume

CLEAN, CORRUPTED = ["How do I bake it?", "Name a fruit now"], ["How do I burn it?", "Name a devil now"]


def metric_of(batch: int):
    return logit_difference(torch.full((batch,), 5), torch.full((batch,), 77))


@pytest.fixture(scope="module")
def exact_model(any_model):
    with float64_softmax():
        yield true_float64(any_model)


def test_sources_sum_to_the_change_of_the_final_residual(any_model):
    contrast = pair_contrast(any_model, CLEAN, CORRUPTED)
    ends = [resume(any_model, contrast.tape, 0, h) for h in (contrast.corrupted, contrast.clean)]
    changes = source_changes(any_model, contrast)
    if any_model.has_post_norms:  # heads share a norm there: their changes add up only where it stays as it was
        changes = torch.cat([changes[:1], changes[contrast.graph.mlp(0) :: any_model.n_heads + 1]])
        with torch.no_grad():
            norms = [block.post_attention_layernorm for block in any_model.blocks]
            pairs = [_attention_outputs(any_model, contrast, h) for h in (contrast.corrupted, contrast.clean)]
            whole = [norm(one) - norm(other) for norm, one, other in zip(norms, *pairs)]
        changes = torch.cat([changes, torch.stack(whole)])
    torch.testing.assert_close(changes.sum(0), ends[0] - ends[1], atol=2e-5, rtol=1e-4)


def _attention_outputs(model, contrast, residual):
    with capture(model, "attention_output") as taken:
        resume(model, contrast.tape, 0, residual)
    return [taken[layer] for layer in range(model.n_layers)]


@pytest.mark.parametrize("along", ["inputs", "activations"])
def test_an_identical_pair_gives_exactly_zero(any_model, along):
    contrast = pair_contrast(any_model, CLEAN, CLEAN)
    assert not attribute(any_model, contrast, metric_of(2), left(2), along).values.any()


def test_the_input_row_adds_up_to_the_change_of_the_metric(exact_model):
    contrast = pair_contrast(exact_model, CLEAN, CORRUPTED)
    metric = metric_of(2)
    logits = [exact_model.unembed(resume(exact_model, contrast.tape, 0, h)[:, -1:])
              for h in (contrast.corrupted, contrast.clean)]  # fmt: skip
    change = (metric(logits[0]) - metric(logits[1])).numpy()

    def error(points):
        return np.abs(attribute(exact_model, contrast, metric, points).values[:, 0].sum(-1) - change).max()

    assert error(left(64)) < 0.65 * error(left(32))  # order 1/m: half
    assert error(midpoint(64)) < 0.35 * error(midpoint(32))  # order 1/m^2: a quarter
    assert error(midpoint(64)) < 0.05 * np.abs(change).max()


def components(model, contrast, start):
    """What attention (before a post-norm) and the MLPs write in a run from `start`: two dicts, layer -> tensor."""
    with torch.no_grad(), capture(model, "attention_output") as attention, capture(model, "mlp_write") as mlps:
        resume(model, contrast.tape, 0, start)
    return attention, mlps


def sent(model, contrast, start, n_attention, n_mlps):
    """What the input and the components of the first blocks send together; post-norms as linear maps at `start`'s run.

    Without post-norms this is the change of the residual stream there, whatever `start` is.
    """
    ends = [components(model, contrast, h) for h in (contrast.corrupted, contrast.clean)]
    at, total = components(model, contrast, start)[0], contrast.difference.clone()
    for layer in range(n_attention):
        change = ends[0][0][layer] - ends[1][0][layer]
        if model.has_post_norms:
            norm = model.blocks[layer].post_attention_layernorm
            change = torch.func.jvp(norm.forward, (at[layer],), (change,))[1]
        total += change
    return total + sum(ends[0][1][layer] - ends[1][1][layer] for layer in range(n_mlps))


def gradient_at(model, contrast, metric, start, kind, layer, number):
    """Gradient of the metric at one reader's residual input in a run from `start`, by autograd: it alone reads `more`.

    `kind` is "q", "k", "v" (then head or group `number`), "mlp" or "logits".
    """
    more, seen, block = torch.zeros_like(start, requires_grad=True), {}, model.blocks[layer]

    def change(h):
        module = getattr(block.self_attn, f"{kind}_proj")
        with_more = linear(block.input_layernorm.forward(seen["x"] + more), module.weight, module.bias)
        mine = torch.arange(h.shape[-1]) // block.self_attn.head_dim == number
        return torch.where(mine, with_more, h)

    edits = {"mlp": [("mlp_residual", layer, lambda h: h + more)], "logits": []}
    attention = [("block_input", layer, lambda h: seen.update(x=h)), (kind, layer, change)]
    with edit(model, edits.get(kind, attention)):
        final = resume(model, contrast.tape, 0, start) + (more if kind == "logits" else 0)
        return torch.autograd.grad(metric(model.unembed(final[:, -1:])).sum(), more)[0]


@pytest.mark.parametrize(
    "kind, layer, number", [("q", 2, 3), ("k", 1, 0), ("v", 3, 1), ("mlp", 2, 0), ("logits", 3, 0)]
)
def test_scores_into_a_reader_add_up_to_what_reaches_it_times_its_mean_gradient(exact_model, kind, layer, number):
    contrast, metric, points = pair_contrast(exact_model, CLEAN, CORRUPTED), metric_of(2), midpoint(3)
    n_attention = layer + (kind in ("mlp", "logits"))  # whose heads and MLPs the reader sees
    n_mlps = layer + (kind == "logits")
    expected = 0
    for point in points:
        start = contrast.corrupted - point * contrast.difference
        reaching = sent(exact_model, contrast, start, n_attention, n_mlps)
        gradient = gradient_at(exact_model, contrast, metric, start, kind, layer, number)
        expected += (reaching * gradient).sum((1, 2)).numpy() / len(points)
    if not exact_model.has_post_norms:
        site = {"mlp": ("mlp_residual", layer), "logits": ("final_residual", 0)}.get(kind, ("block_input", layer))
        ends = [residual_at(exact_model, contrast, h, *site) for h in (contrast.corrupted, contrast.clean)]
        torch.testing.assert_close(reaching, ends[0] - ends[1], atol=1e-12, rtol=0)
    name = {"mlp": f"m{layer}", "logits": "logits"}.get(kind, f"a{layer}.{kind}{number}")
    found = attribute(exact_model, contrast, metric, points).values[:, :, contrast.graph.reader_names.index(name)]
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(found.sum(1), expected, atol=1e-12, rtol=1e-10)


def residual_at(model, contrast, start, site, layer):
    """The residual stream at a site in a run from `start`; the final one, which is after all blocks, too."""
    kept = []
    with torch.no_grad(), edit(model, [(site, layer, lambda h: kept.append(h))]):
        model.decoder.norm(resume(model, contrast.tape, 0, start))
    return kept[0]


def errors_of_edges(model, whole, size):
    """Relative error of each edge of a change of this size, for each example; edges that cannot act are left out.

    An edge whose source is the same in both runs, or is not seen from the last position, has a score of exactly 0:
    its exact effect must be 0 up to the rounding of the metric.
    """
    edges = np.argwhere(whole.graph.edges)
    contrast = replace(whole, corrupted=whole.clean + size * whole.difference)
    exact = patch_edges(model, contrast, metric_of(2), edges).T
    found = attribute(model, contrast, metric_of(2), EAP).values[:, edges[:, 0], edges[:, 1]]
    dead = found == 0
    assert dead.mean() < 0.2 and np.abs(exact[dead]).max() < 1e-14
    return np.abs(found - exact)[~dead] / np.abs(exact)[~dead]


def test_every_edge_of_a_small_change_is_exact_patching_to_first_order(exact_model):
    """Edge by edge, down to effects a million times smaller than the largest: the worst error falls with the step."""
    whole = pair_contrast(exact_model, CLEAN, CORRUPTED)
    errors = np.stack([errors_of_edges(exact_model, whole, size) for size in (1e-3, 1e-4, 1e-5)])
    worst, usual = errors.max(1), np.quantile(errors, 0.99, axis=1)
    assert worst[2] < 5e-3 and usual[2] < 5e-4
    assert (0.08 < usual[1:] / usual[:-1]).all() and (usual[1:] / usual[:-1] < 0.125).all()
    assert worst[1] < 0.2 * worst[0] and 0.05 < worst[2] / worst[1] < 0.125  # second order would be 0.01


def test_rounding_of_norms_and_softmax_as_shipped_hides_the_exactness_of_small_changes(any_model):
    """Hugging Face's float32 inside a float64 model: percents a step of 1e-3, where float64 has hundredths of them."""
    prompts = [text[:16] for text in CLEAN], [text[:16] for text in CORRUPTED]  # eager float64 needs no padding
    hf = copy.deepcopy(any_model.hf).double()
    hf.config._attn_implementation = "eager"
    shipped = ChatModel(hf, any_model.tokenizer, any_model.name, "as shipped")
    usual = np.median(errors_of_edges(shipped, pair_contrast(shipped, *prompts), 1e-3))
    with float64_softmax():
        exact = true_float64(any_model)
        exact_usual = np.median(errors_of_edges(exact, pair_contrast(exact, *prompts), 1e-3))
    assert 10 * exact_usual < usual < 0.04


def test_padding_and_batch_change_nothing(any_model):
    short, long = ("Say a b", "Say a c"), ("Please tell me more of x", "Please tell me more of y")
    both = attribute(any_model, pair_contrast(any_model, [short[0], long[0]], [short[1], long[1]]), metric_of(2))
    for row, pair in enumerate((short, long)):
        alone = attribute(any_model, pair_contrast(any_model, pair[:1], pair[1:]), metric_of(1))
        np.testing.assert_allclose(both.values[row], alone.values[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("along", ["inputs", "activations"])
def test_running_the_shared_first_tokens_once_changes_nothing(any_model, along, monkeypatch):
    pair = ["How do I bake it?", "Who was in a car?"], ["How do I burn it?", "Who was in a bus?"]
    shared = pair_contrast(any_model, *pair, "span")
    monkeypatch.setattr(attribution, "_shared_columns", lambda *_: 0)
    whole = pair_contrast(any_model, *pair, "span")
    assert shared.clean.shape[1] < whole.clean.shape[1]
    one, other = (attribute(any_model, contrast, metric_of(2), left(2), along).values for contrast in (shared, whole))
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
    edges = np.argwhere(shared.graph.edges)[::7]
    one, other = (patch_edges(any_model, contrast, metric_of(2), edges) for contrast in (shared, whole))
    np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


def test_a_vector_that_counts_columns_sees_whole_prompts(llama, monkeypatch):
    """Inside `steer` at the prompt's positions the shared first tokens are no pass of their own."""
    vector = SteeringVector(torch.ones(llama.d_model), 1, "toy", llama.name, llama.revision)
    with steer(llama, vector, 2.0, "prompt"):
        found = attribute(llama, pair_contrast(llama, ["Say a b"], ["Say c b"]), score, left(2)).values
        monkeypatch.setattr(attribution, "_shared_columns", lambda *_: 0)
        whole = attribute(llama, pair_contrast(llama, ["Say a b"], ["Say c b"]), score, left(2)).values
    plain = attribute(llama, pair_contrast(llama, ["Say a b"], ["Say c b"]), score, left(2)).values
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert not np.allclose(found, plain, atol=1e-4)


def test_spans_and_positions_add_up_to_the_whole(any_model):
    whole, span, last = (
        attribute(any_model, pair_contrast(any_model, CLEAN, CORRUPTED, where), metric_of(2)).values
        for where in ("all", "span", "last")
    )
    rest = pair_contrast(any_model, CLEAN, CORRUPTED)
    inside = pair_contrast(any_model, CLEAN, CORRUPTED, "span").positions
    rest = attribute(any_model, replace(rest, positions=~inside), metric_of(2)).values
    np.testing.assert_allclose(span + rest, whole, atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(rest[:, 0], 0)  # outside the span the embeddings are the same
    assert np.abs(last).sum() < np.abs(whole).sum() and not last[:, 0].any()


def vector_of(model, layer, scale=1.0):
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3), dtype=model.dtype)
    return SteeringVector(scale * direction, layer, "toy", model.name, model.revision)


def test_steering_runs_are_those_of_steer_and_begin_at_the_vectors_block(any_model):
    batch, vector = encode(any_model.tokenizer, CLEAN), vector_of(any_model, 2)
    contrast = steering_contrast(any_model, batch, vector, 0.5)
    with torch.no_grad(), steer(any_model, vector, 0.5):
        steered = any_model.hf(**batch.inputs(), use_cache=False).logits[:, -1]
    found = any_model.unembed(resume(any_model, contrast.tape, 2, contrast.corrupted)[:, -1])
    torch.testing.assert_close(found, steered, atol=1e-5, rtol=1e-5)
    assert contrast.graph.first == 2
    scores = attribute(any_model, contrast, metric_of(2), midpoint(32)).values
    with torch.no_grad():
        base = any_model.hf(**batch.inputs(), use_cache=False).logits[:, -1]
    change = metric_of(2)(steered[:, None]) - metric_of(2)(base[:, None])
    np.testing.assert_allclose(scores[:, 0].sum(-1), change.numpy(), rtol=0.05, atol=0.05 * change.abs().max().item())


def test_blocks_below_a_vector_run_once_a_batch_until_weights_change_or_hooks_act():
    model = tiny_model("llama")
    batch, vector, seen = encode(model.tokenizer, CLEAN), vector_of(model, 2), []
    forward = model.blocks[0].mlp.forward
    model.blocks[0].mlp.forward = lambda h: seen.append(0) or forward(h)
    first, again = (steering_contrast(model, batch, vector, strength) for strength in (0.5, 0.5))
    assert len(seen) == 1
    torch.testing.assert_close(again.clean, first.clean, rtol=0, atol=0)
    torch.testing.assert_close(again.tape.final, first.tape.final, rtol=0, atol=0)
    for layer in (2, 3):
        for kind in ("heads", "mlps"):
            one, other = (getattr(contrast.clean_run, kind)[layer] for contrast in (first, again))
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    with edit(model, [("block_input", 0, lambda h: 2 * h)]):
        assert not torch.equal(steering_contrast(model, batch, vector).clean, first.clean)
    assert torch.equal(steering_contrast(model, batch, vector).clean, first.clean) and len(seen) == 2
    steering_contrast(model, encode(model.tokenizer, CORRUPTED), vector)
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight.mul_(2)
    assert not torch.equal(steering_contrast(model, batch, vector).clean, first.clean) and len(seen) == 4


def test_many_response_tokens_are_one_metric(any_model):
    batch = encode(any_model.tokenizer, CLEAN, ["Yes, so", "No"])
    width = batch.input_ids.shape[1] - batch.prompt_length
    contrast = steering_contrast(any_model, batch, vector_of(any_model, 1), keep=width + 1)
    metric = response_log_probability(batch)
    scores = attribute(any_model, contrast, metric, midpoint(32)).values
    values = []
    for h in (contrast.corrupted, contrast.clean):
        logits = any_model.unembed(resume(any_model, contrast.tape, 1, h)).log_softmax(-1)
        rows = [sum(logits[row, batch.prompt_length - 1 + i, batch.input_ids[row, batch.prompt_length + i]]
                    for i in range(int(batch.response_mask[row].sum()))) for row in range(2)]  # fmt: skip
        values.append(torch.stack(rows))
    change = (values[0] - values[1]).numpy()
    np.testing.assert_allclose(scores[:, 0].sum(-1), change, rtol=0.05, atol=0.05 * np.abs(change).max())


def test_divergence_has_no_gradient_where_the_runs_agree_and_some_elsewhere(llama):
    contrast = pair_contrast(llama, CLEAN, CORRUPTED)
    with torch.no_grad():
        reference = llama.unembed(resume(llama, contrast.tape, 0, contrast.clean)[:, -1:])
    metric = divergence_from(reference)
    assert np.abs(attribute(llama, contrast, metric, EAP).values).max() < 1e-5
    assert attribute(llama, contrast, metric, midpoint(16)).values[:, 0].sum() > 0


def test_along_activations_each_row_adds_up_to_its_own_patch(exact_model):
    """A head-free check: with only an MLP moved, its row over all readers is the metric's change by that move."""
    contrast, metric = pair_contrast(exact_model, CLEAN, CORRUPTED), metric_of(2)
    scores = attribute(exact_model, contrast, metric, midpoint(16), "activations").values
    changes = source_changes(exact_model, contrast)
    residuals = clean_residuals(exact_model, contrast)
    clean = metric(exact_model.unembed(residuals[4][:, -1:]))
    for layer in (0, 1, 2):
        start = residuals[layer + 1] + changes[contrast.graph.mlp(layer)]
        moved = metric(exact_model.unembed(resume(exact_model, contrast.tape, layer + 1, start)[:, -1:]))
        found = scores[:, contrast.graph.mlp(layer)].sum(-1)
        np.testing.assert_allclose(found, (moved - clean).numpy(), rtol=0.03, atol=2e-3)


def test_along_activations_heads_of_a_block_together_add_up_to_its_attention(exact_model):
    if exact_model.has_post_norms:
        pytest.skip("the path through the post-norm is a curve: covered to first order by the small-change test")
    contrast, metric = pair_contrast(exact_model, CLEAN, CORRUPTED), metric_of(2)
    scores = attribute(exact_model, contrast, metric, midpoint(16), "activations").values
    changes, graph = source_changes(exact_model, contrast), contrast.graph
    residuals = clean_residuals(exact_model, contrast)
    clean = metric(exact_model.unembed(residuals[4][:, -1:]))
    for layer in (0, 2):
        shift = changes[graph.heads(layer)].sum(0)
        with torch.no_grad(), edit(exact_model, [("attention_write", layer, lambda h, shift=shift: h + shift)]):
            final = resume(exact_model, contrast.tape, layer, residuals[layer])
        moved = metric(exact_model.unembed(final[:, -1:]))
        found = scores[:, graph.heads(layer)].sum((1, 2))
        np.testing.assert_allclose(found, (moved - clean).numpy(), rtol=0.03, atol=2e-3)


# --- many pairs ---------------------------------------------------------------------------------------------

PAIRS = [("Say a b", "Say c b"), ("Please tell me of x", "Please sell me of x"), ("Say d e", "Say d f")]


def score(logits):
    return logits[:, -1, 5] - logits[:, -1, 77]


def kept(graph, values):
    return np.abs(values).sum((1, 2))


def test_many_pairs_are_the_sum_of_each_alone_in_their_own_order(llama):
    found = attribute_pairs(llama, PAIRS, score, left(2), each=kept)
    alone = [attribute(llama, pair_contrast(llama, [a], [b]), score, left(2)).values[0] for a, b in PAIRS]
    np.testing.assert_allclose(found.signed.values, sum(alone), atol=1e-4)
    np.testing.assert_allclose(found.absolute.values, sum(map(np.abs, alone)), atol=1e-4)
    np.testing.assert_allclose(found.each, [np.abs(values).sum() for values in alone], rtol=1e-4)
    assert found.n_examples == 3 and found.signed.about["n"] == 3


def test_an_interrupted_run_keeps_what_it_finished_and_goes_on(llama, tmp_path, monkeypatch, capsys):
    whole = attribute_pairs(llama, PAIRS, score, left(2), each=kept)
    path, calls = tmp_path / "run.npz", []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attribute(*args)

    monkeypatch.setattr(attribution, "attribute", killed)
    with pytest.raises(KeyboardInterrupt):
        attribute_pairs(llama, PAIRS, score, left(2), each=kept, path=path)
    found = attribute_pairs(llama, PAIRS, score, left(2), each=kept, path=path)
    assert len(calls) == 3 and "going on after 2 examples" in capsys.readouterr().err
    np.testing.assert_allclose(found.absolute.values, whole.absolute.values, atol=1e-6)
    np.testing.assert_allclose(found.each, whole.each, rtol=1e-6)
    with pytest.raises(AttributionError, match="another run"):
        attribute_pairs(llama, PAIRS[:2], score, left(2), path=path)


@pytest.mark.parametrize("before, after", [(1, 8), (8, 1)])
def test_a_run_goes_on_under_another_budget_without_losing_or_repeating_an_example(
    llama, tmp_path, monkeypatch, before, after
):
    pairs = [*PAIRS, ("Say g h", "Say g i"), ("Please tell me of y", "Please yell me of y"), ("Say k l", "Say m l")]
    whole = attribute_pairs(llama, pairs, score, left(2), each=kept)
    path, sizes, stop = tmp_path / "run.npz", [], 2 if before == 1 else 1

    def killed(model, contrast, *args):
        if len(sizes) == stop:
            raise KeyboardInterrupt
        sizes.append(len(contrast.clean))
        return attribute(model, contrast, *args)

    monkeypatch.setattr(attribution, "attribute", killed)
    monkeypatch.setattr(attribution, "batch_within", lambda *_: before)
    with pytest.raises(KeyboardInterrupt):
        attribute_pairs(llama, pairs, score, left(2), each=kept, path=path)
    stop = None
    monkeypatch.setattr(attribution, "batch_within", lambda *_: after)
    found = attribute_pairs(llama, pairs, score, left(2), each=kept, path=path)
    assert sum(sizes) == len(pairs)
    np.testing.assert_allclose(found.signed.values, whole.signed.values, atol=1e-5)
    np.testing.assert_allclose(found.absolute.values, whole.absolute.values, atol=1e-5)
    np.testing.assert_allclose(found.each, whole.each, rtol=1e-5)


def test_a_file_of_another_metric_is_refused_and_of_the_same_one_is_not(llama, tmp_path):
    def between(good, bad):
        return lambda logits: logits[:, -1, good] - logits[:, -1, bad]

    path = tmp_path / "run.npz"
    first = attribute_pairs(llama, PAIRS, between(5, 77), left(2), each=kept, path=path)
    for metric, each, words in [
        (between(5, 78), kept, "other metric"),  # of the same name
        (score, kept, "other metric"),
        (between(5, 77), None, "other each"),
    ]:
        with pytest.raises(AttributionError, match=f"another run: {words}"):
            attribute_pairs(llama, PAIRS, metric, left(2), each=each, path=path)
    again = attribute_pairs(llama, PAIRS, between(5, 77), left(2), each=kept, path=path)
    np.testing.assert_array_equal(again.signed.values, first.signed.values)


def test_a_half_finished_run_does_not_go_on_in_another_precision(llama, tmp_path):
    path = tmp_path / "run.npz"
    narrow = ChatModel(copy.deepcopy(llama.hf).to(torch.bfloat16), llama.tokenizer, llama.name, llama.revision)
    attribute_pairs(narrow, PAIRS, score, left(2), path=path)
    with pytest.raises(AttributionError, match="another run: other dtype"):
        attribute_pairs(llama, PAIRS, score, left(2), path=path)


def test_errors_of_many_pairs_name_a_pair_by_its_index(llama):
    def broken(logits):  # for the pair that comes second of its length
        values = score(logits)
        return values if len(values) == 1 else values + torch.tensor([0.0, float("nan")])

    with pytest.raises(AttributionError, match="metric of example 2 is not finite"):
        attribute_pairs(llama, PAIRS, broken, left(2))
    with pytest.raises(PromptError, match="pair 3 does not align"):
        attribute_pairs(llama, [*PAIRS, ("say be", "say c")], score)


def test_a_batch_shrinks_to_its_budget_aloud_and_one_that_cannot_fit_is_refused(llama, capsys):
    sizes = [bytes_of_batch(llama, 50, n) for n in range(9)]
    assert batch_within(llama, 50, sizes[8]) == 8 and capsys.readouterr().err == ""
    assert batch_within(llama, 50, sizes[4] - 1) == 3 and "batches of 3 instead of 8" in capsys.readouterr().err
    with pytest.raises(AttributionError, match="raise the budget or shorten the prompts"):
        batch_within(llama, 50, sizes[1] - 1)
    with pytest.raises(AttributionError, match="no pairs"):
        attribute_pairs(llama, [], score)


def peak_bytes(run) -> int:
    """The most memory that tensors made during a call take at once, by torch's own account of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("n", [1, 6])  # the messages' share of the peak is larger in small batches
def test_the_estimate_of_memory_is_near_what_a_batch_takes(family, n):
    model = tiny_model(family, hidden_size=96, intermediate_size=256, num_attention_heads=6, head_dim=16)
    clean, corrupted = ["a" * 40] * n, ["b" * 40] * n
    n_tokens = encode(model.tokenizer, clean).input_ids.shape[1]
    measured = peak_bytes(lambda: attribute(model, pair_contrast(model, clean, corrupted), score, left(3)))
    assert 0.75 * measured < bytes_of_batch(model, n_tokens, n) < 1.5 * measured


# --- errors ------------------------------------------------------------------------------------------------


def test_spans_of_unequal_length_show_both_token_lists(llama):
    with pytest.raises(PromptError, match=r"pair 1 does not align: .*'b', 'e'.* on the clean .*'c'"):
        pair_contrast(llama, ["say a", "say be"], ["say d", "say c"])
    with pytest.raises(PromptError, match="in pairs"):
        pair_contrast(llama, ["say a", "say b"], ["say d"])
    with pytest.raises(PromptError, match="empty"):
        pair_contrast(llama, [], [])


def test_bad_settings_and_metrics_say_what_to_do(llama):
    contrast = pair_contrast(llama, CLEAN, CORRUPTED)
    for call, words in [
        (lambda: left(0), "at least 1"),
        (lambda: midpoint(-1), "at least 1"),
        (lambda: attribute(llama, contrast, metric_of(2), ()), "no integration points"),
        (lambda: attribute(llama, contrast, metric_of(2), (-0.5, 0.0)), "from 0 to 1"),
        (lambda: attribute(llama, contrast, metric_of(2), (0.5, 1.1)), "from 0 to 1"),
        (lambda: attribute(llama, contrast, metric_of(2), along="time"), "unknown path 'time'"),
        (lambda: attribute(llama, contrast, lambda logits: logits.sum()), r"shape \(\) for 2 examples"),
        (lambda: pair_contrast(llama, CLEAN, CORRUPTED, "middle"), "unknown positions 'middle'"),
        (lambda: steering_contrast(llama, encode(llama.tokenizer, CLEAN), vector_of(llama, 4)), "out of range"),
        (lambda: steering_contrast(llama, encode(llama.tokenizer, CLEAN), ablating(vector_of(llama, 1))), "'ablate'"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()

    def broken(logits):
        return logits[:, -1, 5] + torch.tensor([0.0, float("nan")])

    with pytest.raises(AttributionError, match="metric of example 1 is not finite"):
        attribute(llama, contrast, broken)


def test_columns_that_mean_different_positions_are_refused(llama):
    ids = torch.ones(1, 4, dtype=torch.long)
    one, other = Batch(ids, torch.ones_like(ids), 4), Batch(ids, torch.tensor([[0, 1, 1, 1]]), 4)
    with pytest.raises(AttributionError, match="differ in length or padding"):
        token_contrast(llama, one, other)


def test_train_mode_is_refused():
    model = tiny_model("llama", seed=9)
    contrast = pair_contrast(model, CLEAN, CORRUPTED)
    model.hf.train()
    with pytest.raises(AttributionError, match="train mode"):
        attribute(model, contrast, metric_of(2))


def test_no_edge_is_patched_that_is_none(llama):
    contrast = pair_contrast(llama, CLEAN, CORRUPTED)
    with pytest.raises(ValueError, match="are no edge"):
        patch_edges(llama, contrast, metric_of(2), np.array([[contrast.graph.mlp(3), 0]]))
