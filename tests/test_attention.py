"""Freezing against references without a cache and without AttentionInterface: literal products at named sites."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model

from steerutils import (
    SteeringError,
    SteeringVector,
    ablating,
    attention,
    capture,
    edit,
    encode,
    generate,
    judge,
    last_logits,
    paired_difference,
    refusal_score,
    refusal_tokens,
    share_of_answers,
    steer,
)
from steerutils.attention import (
    INTERVENTIONS,
    PARTS,
    attending,
    attention_patterns,
    control_losses,
    difference_of_shares,
    drops,
    freeze,
    intervene,
    intervened_scores,
    intervened_verdicts,
    losses,
    redundancy,
    remove_direct,
    share_lost,
)
from steerutils.models import ModelError, Prefix, prefix_of, resume, tape

PROMPTS = ["Why?", "How do I bake bread?"]
N = 3
STRENGTH = 2.0
PLACES = {"all": (None, None), "prompt": (None, 0), "generated": (0, None)}


def vector_for(model, layer=1, scale=3.0, seed=1):
    direction = scale * torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(direction, layer, "random", model.name, model.revision)


# --- the slow reference ----------------------------------------------------------------------------------


def in_eager_form(model):
    """Hugging Face's own switch, so that a reference can ask for the patterns and bits can be compared."""
    model.hf.config._attn_implementation = "eager"
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def eager(request):
    return in_eager_form(tiny_model(request.param))


def run(model, ids, edits=()):
    """One pass over the whole text: logits, patterns of every block, and what every value projection gave."""
    with edit(model, edits), capture(model, "v") as v:
        out = model.hf(ids, use_cache=False, output_attentions=True)
    return out.logits, out.attentions, v


def steering(vector):
    return [("block_input", vector.layer, lambda h: h + STRENGTH * vector.direction)]


def taking(model, giver, part, layers, chosen):
    """Edits that rebuild each head's output from the giver's pattern, or give o_proj's block the giver's values."""
    _, patterns, values = giver
    edits = []
    for layer in layers:
        own = {}

        def swap_values(v, layer=layer, own=own):
            if part != "patterns":
                v = torch.where(chosen[None, :, None], values[layer], v)
            own["v"] = v
            return v

        def swap_patterns(z, layer=layer, own=own):
            if part == "values":
                return None
            v = own["v"].unflatten(-1, (model.n_groups, -1))
            heads = []
            for h in range(model.n_heads):
                group = h * model.n_groups // model.n_heads
                heads.append(patterns[layer][:, h] @ v[:, :, group])
            return torch.where(chosen[None, :, None], torch.cat(heads, -1), z)

        edits += [("v", layer, swap_values), ("heads", layer, swap_patterns)]
    return edits


@torch.no_grad()
def slow_frozen(model, prompt, vector, part, layers, positions="all", reverse=False):
    """Greedy decoding of one prompt without a cache: every step runs base and steered on the whole text again.

    Returns the answer's tokens and the logits that chose them.
    """
    ids = encode(model.tokenizer, [prompt]).input_ids
    length, steps = ids.shape[1], []
    first, last = PLACES[positions]
    for _ in range(N):
        columns = torch.arange(ids.shape[1]) - length
        chosen = torch.ones_like(columns, dtype=torch.bool)
        chosen &= columns >= first if first is not None else True
        chosen &= columns < last if last is not None else True
        giver = run(model, ids, steering(vector) if reverse else [])
        edits = ([] if reverse else steering(vector)) + taking(model, giver, part, layers, chosen)
        steps.append(run(model, ids, edits)[0][:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], 1)
    return ids[0, length:], torch.cat(steps)


def generated(model, prompts):
    """Tokens and logits of `hf.generate`, which decodes with a cache: [prompt, step], [step, prompt, vocab]."""
    batch = encode(model.tokenizer, prompts)
    out = model.hf.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=N,
        min_new_tokens=N,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    return out.sequences[:, batch.prompt_length :], torch.stack(out.logits)


def assert_like_reference(model, part, layers, positions, reverse):
    vector = vector_for(model)
    with steer(model, vector, STRENGTH), freeze(model, part, layers, positions, reverse=reverse):
        tokens, logits = generated(model, PROMPTS)
    with nullcontext() if reverse else steer(model, vector, STRENGTH):  # the receiver with nothing exchanged
        _, unfrozen = generated(model, PROMPTS)
    blocks = range(model.n_layers) if layers is None else layers
    slow_tokens, slow = slow_frozen(model, PROMPTS[0], vector, part, blocks, positions, reverse)
    torch.testing.assert_close(logits[:, 0], slow, atol=1e-4, rtol=1e-3)  # the row with padding
    assert torch.equal(tokens[0], slow_tokens)
    assert (logits - unfrozen).abs().max() > 1e-3, "freezing did nothing"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_frozen_generation_equals_a_slow_reference_without_a_cache(eager, part, reverse):
    assert_like_reference(eager, part, None, "all", reverse)


@pytest.mark.parametrize(("positions", "layers"), [("prompt", None), ("generated", range(1, 3))])
@pytest.mark.parametrize("part", ["patterns", "values"])
def test_prompt_only_response_only_and_a_range_of_blocks(eager, part, positions, layers):
    assert_like_reference(eager, part, layers, positions, False)


REVERSED_PLACES = [("all", [2]), ("prompt", None), ("prompt", [0, 2]), ("generated", None), ("generated", range(1, 3))]


@pytest.mark.parametrize(("positions", "layers"), REVERSED_PLACES)
@pytest.mark.parametrize("part", PARTS)
def test_the_base_run_receives_at_some_blocks_and_positions(eager, part, positions, layers):
    assert_like_reference(eager, part, layers, positions, True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("reverse", [False, True])
def test_generating_longer_than_the_sliding_window(family, reverse):
    model = in_eager_form(tiny_model(family))
    vector, prompt = vector_for(model), "A prompt that is longer than sixteen tokens of one byte each."
    for part, positions in (("values", "prompt"), ("values", "generated"), ("patterns", "all")):
        with steer(model, vector, STRENGTH), freeze(model, part, positions=positions, reverse=reverse):
            tokens, logits = generated(model, [prompt])
        slow_tokens, slow = slow_frozen(model, prompt, vector, part, range(4), positions, reverse)
        assert torch.equal(tokens[0], slow_tokens)
        torch.testing.assert_close(logits[:, 0], slow, atol=1e-4, rtol=1e-3)


# --- invariants ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_freezing_to_itself_changes_no_bit(eager, part, reverse):
    plain, step = last_logits(eager, PROMPTS), generated(eager, PROMPTS)[1]
    with freeze(eager, part, reverse=reverse):
        assert torch.equal(last_logits(eager, PROMPTS), plain)
        assert torch.equal(generated(eager, PROMPTS)[1], step)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "reverse", "runs"),
    [([2], False, [1, 2, 2, 1]), (None, False, [1, 2, 2, 2]), ([2], True, [1, 2, 2, 2]), ([0], False, [1, 1, 1, 1])],
)
def test_the_base_run_is_made_only_where_it_can_differ_and_is_needed(monkeypatch, layers, reverse, runs):
    model, counted = tiny_model("llama"), [0] * 4
    for layer, block in enumerate(model.blocks):

        def counting(x, layer=layer, forward=block.mlp.forward):
            counted[layer] += 1
            return forward(x)

        monkeypatch.setattr(block.mlp, "forward", counting)
    with steer(model, vector_for(model), STRENGTH), freeze(model, "patterns", layers, reverse=reverse):
        last_logits(model, PROMPTS)
    assert vector_for(model).layer == 1 and counted == runs


@torch.no_grad()
def test_below_the_vector_there_is_nothing_to_freeze(eager):
    vector = vector_for(eager)
    with steer(eager, vector, STRENGTH):
        steered, plain = last_logits(eager, PROMPTS), generated(eager, PROMPTS)[1]
        with freeze(eager, "both", [0]):
            assert torch.equal(last_logits(eager, PROMPTS), steered)
            assert torch.equal(generated(eager, PROMPTS)[1], plain)
    base = last_logits(eager, PROMPTS)
    with steer(eager, vector, STRENGTH), freeze(eager, "both", [0], reverse=True):
        assert torch.equal(last_logits(eager, PROMPTS), base)


@torch.no_grad()
def test_freezing_to_itself_agrees_with_the_models_own_attention(any_model):
    plain = last_logits(any_model, PROMPTS)
    own = any_model.hf.config._attn_implementation  # sdpa; eager where it has a soft cap
    with freeze(any_model, "patterns"):
        torch.testing.assert_close(last_logits(any_model, PROMPTS), plain, atol=2e-5, rtol=1e-4)
    assert any_model.hf.config._attn_implementation == own
    assert torch.equal(last_logits(any_model, PROMPTS), plain)


@torch.no_grad()
def test_freezing_attention_is_causal(any_model):
    """A later token must not change an earlier logit, in either lane."""
    batch = encode(any_model.tokenizer, PROMPTS[1:], ["abc"])
    other = batch.input_ids.clone()
    other[:, -1] += 1
    rows = []
    for ids in (batch.input_ids, other):
        with steer(any_model, vector_for(any_model)), freeze(any_model, "patterns"):
            rows.append(any_model.hf(ids, use_cache=False).logits)
    assert torch.equal(rows[0][:, :-1], rows[1][:, :-1]) and not torch.equal(rows[0], rows[1])


@torch.no_grad()
def test_both_parts_frozen_leave_attention_as_the_base_run_had_it(any_model):
    vector = vector_for(any_model)
    with capture(any_model, "attention_output") as base:
        last_logits(any_model, PROMPTS)
    with steer(any_model, vector, STRENGTH), freeze(any_model, "both"), capture(any_model, "attention_output") as kept:
        frozen = last_logits(any_model, PROMPTS)
    for layer in range(any_model.n_layers):  # (nearly: sdpa before, eager now)
        torch.testing.assert_close(kept[layer][:, -1], base[layer][:, -1], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(frozen, last_logits(any_model, PROMPTS), atol=1e-2)


@torch.no_grad()
def test_the_order_of_the_contexts_does_not_matter(any_model):
    vector, found = vector_for(any_model), []
    with steer(any_model, vector), freeze(any_model, "patterns"):
        found.append(generated(any_model, PROMPTS)[1])
    with freeze(any_model, "patterns"), steer(any_model, vector):
        found.append(generated(any_model, PROMPTS)[1])
    for reader in ("values", "mlp"):
        with steer(any_model, vector), remove_direct(any_model, vector, 1.0, reader):
            found.append(last_logits(any_model, PROMPTS))
        with remove_direct(any_model, vector, 1.0, reader), steer(any_model, vector):
            found.append(last_logits(any_model, PROMPTS))
    for one, other in zip(found[::2], found[1::2]):
        assert torch.equal(one, other)


@torch.no_grad()
def test_padding_and_batch_change_nothing(any_model):
    vector = vector_for(any_model)
    with steer(any_model, vector, STRENGTH), freeze(any_model, "patterns"):
        together = last_logits(any_model, PROMPTS)
        alone = torch.cat([last_logits(any_model, [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_teacher_forced_passes_equal_decoding(llama):
    vector = vector_for(llama)
    for positions in PLACES:
        with steer(llama, vector, STRENGTH), freeze(llama, "values", positions=positions):
            tokens, logits = generated(llama, PROMPTS[1:])
        prompt = encode(llama.tokenizer, PROMPTS[1:]).input_ids
        n = prompt.shape[1]
        with steer(llama, vector, STRENGTH), freeze(llama, "values", None, positions, prompt_length=n):
            whole = llama.hf(torch.cat([prompt, tokens[:, :-1]], 1), use_cache=False).logits
        torch.testing.assert_close(whole[0, n - 1 :], logits[:, 0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_model_that_nnsight_has_wrapped_freezes_the_same():
    model, wrapped = tiny_model("llama"), tiny_model("llama")
    assert wrapped.nnsight is not None
    found = []
    for one in (model, wrapped):
        with steer(one, vector_for(one), STRENGTH), freeze(one, "patterns"):
            found.append(generated(one, PROMPTS)[1])
    assert torch.equal(*found)


@torch.no_grad()
def test_patterns_are_the_models_own(eager):
    ids = encode(eager.tokenizer, PROMPTS).input_ids
    with attention_patterns(eager, [1, 2]) as taken:
        eager.hf(ids, use_cache=False)
    expected = eager.hf(ids, use_cache=False, output_attentions=True).attentions
    assert sorted(taken) == [1, 2]
    for layer, patterns in taken.items():
        assert torch.equal(patterns, expected[layer])


# --- removing the direct path ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("reader", ["values", "mlp"])
def test_removal_equals_norms_written_out(any_model, reader):
    """The reader is given weight * (x - strength * s) / RMS(x), by the family's formula."""
    vector, seen, gemma = vector_for(any_model), {}, any_model.config.model_type.startswith("gemma")
    edits = []
    for layer in range(vector.layer, any_model.n_layers):
        block = any_model.blocks[layer]
        norm = block.input_layernorm if reader == "values" else any_model.site("mlp_residual", layer)[0]
        weight = 1 + norm.weight if gemma else norm.weight

        def rebuilt(x, weight=weight):
            rms = (x.pow(2).mean(-1, keepdim=True) + any_model.config.rms_norm_eps).sqrt()
            return weight * (x - STRENGTH * vector.direction) / rms

        site = "block_input" if reader == "values" else "mlp_residual"
        edits.append((site, layer, lambda x, layer=layer, f=rebuilt: seen.update({layer: f(x)})))
        if reader == "values":
            change = lambda _, layer=layer, m=block.self_attn.v_proj: torch.nn.functional.linear(  # noqa: E731
                seen[layer], m.weight, m.bias
            )
            edits.append(("v", layer, change))
        else:
            edits.append(("mlp_input", layer, lambda _, layer=layer: seen[layer]))
    with steer(any_model, vector, STRENGTH):
        steered = last_logits(any_model, PROMPTS)
        with edit(any_model, edits):
            expected = last_logits(any_model, PROMPTS)
    with steer(any_model, vector, STRENGTH), remove_direct(any_model, vector, STRENGTH, reader):
        found = last_logits(any_model, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found, steered, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("reader", ["values", "mlp"])
def test_removal_by_block_and_position(any_model, reader):
    vector = vector_for(any_model)
    batch = encode(any_model.tokenizer, PROMPTS[1:], ["An answer"])
    n = batch.prompt_length

    def read(**where):
        removal = remove_direct(any_model, vector, 1.0, reader, prompt_length=n, **where) if where else nullcontext()
        with steer(any_model, vector), removal:
            return any_model.hf(batch.input_ids, use_cache=False).logits

    plain = read()
    late = read(layers=[2], positions="generated")
    assert torch.equal(late[:, :n], plain[:, :n]) and not torch.allclose(late[:, n:], plain[:, n:], atol=1e-3)
    early = read(layers=[2], positions="prompt")
    assert not torch.allclose(early[:, n - 1], plain[:, n - 1], atol=1e-3)
    block = read(layers=[3])
    assert not torch.allclose(block, plain, atol=1e-3) and not torch.allclose(block, late, atol=1e-3)


@torch.no_grad()
def test_removal_decodes_with_a_cache_as_without(any_model):
    vector = vector_for(any_model)
    for reader in ("values", "mlp"):
        with steer(any_model, vector, STRENGTH), remove_direct(any_model, vector, STRENGTH, reader, positions="prompt"):
            tokens, logits = generated(any_model, PROMPTS[1:])
        prompt = encode(any_model.tokenizer, PROMPTS[1:]).input_ids
        n = prompt.shape[1]
        with (
            steer(any_model, vector, STRENGTH),
            remove_direct(any_model, vector, STRENGTH, reader, positions="prompt", prompt_length=n),
        ):
            whole = any_model.hf(torch.cat([prompt, tokens[:, :-1]], 1), use_cache=False).logits
        torch.testing.assert_close(whole[0, n - 1 :], logits[:, 0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["prompt", "generated", slice(-2, 1)])
def test_several_tokens_after_a_cache_are_told_apart_from_the_prompt(llama, positions):
    """The prompt in one pass, its answer in two of several tokens: as in one whole pass."""
    vector, batch = vector_for(llama), encode(llama.tokenizer, PROMPTS[1:], ["An answer"])
    ids, n = batch.input_ids, batch.prompt_length

    def contexts(**where):
        yield remove_direct(llama, vector, STRENGTH, "values", positions=positions, **where)
        yield remove_direct(llama, vector, STRENGTH, "mlp", positions=positions, **where)
        yield freeze(llama, "both", positions=positions, **where)

    for once, stepwise in zip(contexts(prompt_length=n), contexts()):
        with steer(llama, vector, STRENGTH), once:
            whole = llama.hf(ids, use_cache=False).logits
        with steer(llama, vector, STRENGTH), stepwise:
            run, pieces = None, []
            for piece in (ids[:, :n], ids[:, n : n + 4], ids[:, n + 4 :]):
                run = llama.hf(piece, past_key_values=run and run.past_key_values, use_cache=True)
                pieces.append(run.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-3)


# --- the table, the drops, the errors --------------------------------------------------------------------


@torch.no_grad()
def test_every_intervention_by_name_is_what_it_says(llama):
    vector, found = vector_for(llama), {}
    for name in INTERVENTIONS:
        with intervene(llama, vector, STRENGTH, name):
            found[name] = last_logits(llama, PROMPTS)
    by_hand = {
        "steered": nullcontext,
        "patterns frozen": partial(freeze, llama, "patterns"),
        "values frozen": partial(freeze, llama, "values"),
        "both frozen": partial(freeze, llama, "both"),
        "svv removed": partial(remove_direct, llama, vector, STRENGTH, "values"),
        "direct MLP removed": partial(remove_direct, llama, vector, STRENGTH, "mlp"),
        "steered patterns only": partial(freeze, llama, "patterns", reverse=True),
        "steered values only": partial(freeze, llama, "values", reverse=True),
    }
    assert by_hand.keys() == found.keys()
    for name, context in by_hand.items():
        with steer(llama, vector, STRENGTH), context():
            assert torch.equal(found[name], last_logits(llama, PROMPTS)), name
    rows = list(found.values())
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(rows) for b in rows[:i])
    with (
        pytest.raises(SteeringError, match="unknown intervention.*patterns frozen"),
        intervene(llama, vector, 1.0, "qk"),
    ):
        pass
    by_hand.pop("steered")  # which knows no blocks or positions
    where = {"layers": [2, 3], "positions": slice(-2, None)}
    for name, context in by_hand.items():
        with intervene(llama, vector, STRENGTH, name, **where):
            there = last_logits(llama, PROMPTS)
        with steer(llama, vector, STRENGTH), context(**where):
            assert torch.equal(there, last_logits(llama, PROMPTS)), name


def test_verdicts_by_setting_are_those_of_separate_runs(llama, tmp_path, monkeypatch):
    prompts, vector = [*PROMPTS, "Who am I?", "Sing a song.", "Tell me more.", "Is it late?"], vector_for(llama)
    strengths = [STRENGTH, -1.0, 0.5, -STRENGTH, 1.0, 3.0]
    settings = {"as it is": {}, "everywhere": {"name": "values frozen"},
                "late": {"name": "values frozen", "layers": [3], "positions": "prompt"}}  # fmt: skip
    answers = {}
    for name, setting in settings.items():
        with intervene(llama, vector, strengths, **setting) if setting else nullcontext():
            answers[name] = generate(llama, prompts, 6)
    middle = np.median(np.concatenate([judge(llama, prompts, texts)["nll"] for texts in answers.values()]))
    monkeypatch.setattr(sys.modules["steerutils.judges"], "MAX_NLL", middle)  # a random model's text is all unlikely
    expected = {name: judge(llama, prompts, texts)["verdict"].tolist() for name, texts in answers.items()}
    assert len(set(map(tuple, expected.values()))) == len(settings)
    found = intervened_verdicts(llama, prompts, vector, strengths, settings, 6, tmp_path)
    assert {name: verdicts.tolist() for name, verdicts in found.items()} == expected

    def files(strengths=strengths, **changed) -> int:
        late = settings | {"late": settings["late"] | changed}
        intervened_verdicts(llama, prompts, vector, strengths, late, 6, tmp_path)
        return len(list(tmp_path.iterdir()))

    # one a setting: two steered ones stay, the model as it is has no strengths
    assert [files(), files(layers=[2]), files(positions="all"), files(strengths=6 * [1.0])] == [3, 4, 5, 7]
    assert [files(layers=range(2, 3)), files(positions=slice(-1, None)), files(positions=slice(-1, 0))] == [7, 8, 9]
    intervened_verdicts(llama, prompts, vector, strengths, settings, 5, tmp_path)
    assert len(list(tmp_path.iterdir())) == 12  # three of another length
    monkeypatch.setattr(attention, "intervene", lambda *_, **__: pytest.fail("it was run again"))
    again = intervened_verdicts(llama, prompts, vector, strengths, settings, 6, tmp_path)
    assert {name: verdicts.tolist() for name, verdicts in again.items()} == expected


def test_scores_by_setting_are_those_of_separate_runs(llama, tmp_path):
    vector, settings = vector_for(llama), {"as it is": {}, "frozen": {"name": "values frozen", "positions": "prompt"}}
    found = intervened_scores(llama, PROMPTS, vector, [STRENGTH, -1.0], settings, tmp_path)
    tokens = refusal_tokens(llama.tokenizer)
    assert found["as it is"] == pytest.approx(refusal_score(last_logits(llama, PROMPTS), tokens).numpy(), abs=1e-5)
    with intervene(llama, vector, [STRENGTH, -1.0], "values frozen", positions="prompt"):
        expected = refusal_score(last_logits(llama, PROMPTS), tokens).numpy()
    assert (
        found["frozen"] == pytest.approx(expected, abs=1e-5) and abs(found["frozen"] - found["as it is"]).min() > 0.01
    )
    intervened_verdicts(llama, PROMPTS, vector, [STRENGTH, -1.0], settings, 3, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # verdicts are kept apart from scores


@torch.no_grad()
def test_an_ablation_acts_below_the_vectors_block_too(llama):
    vector = replace(vector_for(llama, layer=2), operation="ablate")
    found = intervened_scores(llama, PROMPTS, vector, [1.0, 1.0], {"ablated": {"name": "steered"}})
    with intervene(llama, vector, [1.0, 1.0], "steered"):
        expected = refusal_score(last_logits(llama, PROMPTS), refusal_tokens(llama.tokenizer)).numpy()
    assert found["ablated"] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("apart", [2, 3])  # two prompts have each strength: in two batches, in one
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_settings_that_share_the_run_below_the_vector_equal_whole_runs(any_model, name, apart, monkeypatch):
    monkeypatch.setattr(attention, "APART", apart)
    prompts, vector = ["Who am I?", "Why?", "How do I bake some bread?", "Is it late?"], vector_for(any_model)
    settings = {"all": {"name": name, "layers": None}, "late": {"name": name, "layers": [vector.layer + 1]}}
    if name == "steered":  # which reads no blocks
        settings.pop("late")
    strengths = [STRENGTH, -1.0, STRENGTH, -1.0]
    tokens = refusal_tokens(any_model.tokenizer)
    scores = intervened_scores(any_model, prompts, vector, strengths, settings)
    runs = attention._shared_runs(any_model, prompts, vector, strengths, 6, 1)
    assert len(runs(settings["all"])) == 4 - apart
    for label, setting in settings.items():
        answers = np.empty(len(prompts), object)
        for rows, strength, run in runs(setting):
            assert run is not None
            with intervene(any_model, vector, strength, **setting):
                answers[rows] = attention.answers_from(any_model, run, vector.layer, 6)[0]
        with intervene(any_model, vector, strengths, **setting):
            expected = refusal_score(last_logits(any_model, prompts), tokens).numpy()
            assert answers.tolist() == generate(any_model, prompts, 6)
        assert scores[label] == pytest.approx(expected, abs=2e-4), label


@torch.no_grad()
def test_a_pass_that_was_cut_off_does_not_spoil_the_next(llama):
    vector, batch = vector_for(llama), encode(llama.tokenizer, PROMPTS)
    for reverse in (False, True):
        with steer(llama, vector, STRENGTH), freeze(llama, "values", reverse=reverse):
            whole = last_logits(llama, PROMPTS)
            taken = tape(llama, batch.inputs())
            llama.blocks[1](taken.residuals[1], **taken.arguments[1])  # begun, and not gone on with
            torch.testing.assert_close(last_logits(llama, PROMPTS), whole)
    for reverse in (False, True):  # and one that fails in its first block
        first = vector_for(llama, layer=0)
        with steer(llama, first, [STRENGTH] * 2), freeze(llama, "values", reverse=reverse):
            expected = generate(llama, PROMPTS, 4)
            with pytest.raises(SteeringError, match="2 strengths for a batch of 3"):
                generate(llama, [*PROMPTS, "Who?"], 4)
            assert generate(llama, PROMPTS, 4) == expected


def test_verdicts_that_were_kept_are_not_those_of_another_operation(llama, tmp_path):
    vector, settings = vector_for(llama), {"steered": {"name": "steered"}}
    for one, files in ((vector, 1), (replace(vector, operation="ablate"), 2), (vector_for(llama, seed=2), 3)):
        intervened_verdicts(llama, PROMPTS, one, [1.0, 1.0], settings, 3, tmp_path)
        assert len(list(tmp_path.iterdir())) == files


def test_drops_by_hand():
    base, steered, changed = [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]
    found = drops(base, steered, changed)
    assert found["absolute"][0] == pytest.approx(0.4)  # 1.0 - 0.6
    assert found["relative"][0] == pytest.approx(0.5)  # 0.4 of 0.8
    for value, low, high in found.values():
        assert low <= value <= high and low < high
    flipped = drops(1 - np.array(base), 1 - np.array(steered), 1 - np.array(changed))  # the same as a rate of the rest
    assert flipped["absolute"][0] == pytest.approx(0.4) and flipped["relative"][0] == pytest.approx(0.5)
    assert drops(base, steered, steered)["relative"] == (0, 0, 0)
    with pytest.raises(ValueError, match="changed nothing"):
        drops(base, base, changed)


SETTINGS = ("unsteered", *INTERVENTIONS)


def settings_of(**given) -> pd.DataFrame:
    """A table with a column a setting, as steered where nothing is given: [prompt, setting]."""
    given = {name.replace("_", " "): column for name, column in given.items()}
    return pd.DataFrame({name: given.get(name, given["steered"]) for name in SETTINGS})


def test_the_share_that_is_lost_by_hand():
    scores = settings_of(unsteered=[1.0, 1.0, 2.0], steered=[3.0, 5.0, 5.0], values_frozen=[2.0, 1.0, 4.0])
    scores["patterns frozen"] = [3.0, 4.0, 5.0]
    lost = share_lost(scores, "values frozen", seed=3)
    assert lost[0] == pytest.approx(6 / 9)  # 1 + 4 + 1 of 2 + 4 + 3
    assert lost == pytest.approx(drops(scores["unsteered"], scores["steered"], scores["values frozen"], 3)["relative"])
    assert share_lost(scores, "values frozen", "patterns frozen")[0] == pytest.approx(5 / 9)  # 1 of 9 is lost there
    assert share_lost(scores, "unsteered") == pytest.approx((1, 1, 1))


def test_shares_of_two_effects_are_compared_by_prompts():
    one = settings_of(unsteered=[0.0, 0.0, 0.0], steered=[2.0, 4.0, 2.0], patterns_frozen=[1.0, 3.0, 0.0])  # 4 of 8
    other = settings_of(unsteered=[1.0, 1.0, 1.0], steered=[2.0, 3.0, 2.0], patterns_frozen=[2.0, 2.0, 2.0])  # 1 of 4
    value, low, high = difference_of_shares(one, other, "patterns frozen", 2)
    assert value == pytest.approx(0.25) and low < value < high
    assert difference_of_shares(other, one, "patterns frozen", 2) == pytest.approx((-value, -high, -low))
    twice = pd.DataFrame({name: 2 * column for name, column in one.items()})  # the same share of twice the effect
    assert difference_of_shares(twice, one, "patterns frozen") == pytest.approx((0, 0, 0))


def test_controls_by_hand_share_only_where_they_move_enough():
    beside = settings_of(unsteered=[0.0] * 3, steered=[10.0] * 3, patterns_frozen=[9.0] * 3)  # patterns take 0.1
    moving = settings_of(unsteered=[1.0] * 3, steered=[-3.0] * 3, patterns_frozen=[-2.0] * 3, values_frozen=[0.0] * 3,
                         svv_removed=[-1.0] * 3, direct_MLP_removed=[-2.5] * 3)  # fmt: skip
    still = settings_of(unsteered=[1.0] * 3, steered=[1.9] * 3)  # less than a tenth of 10
    unsure = settings_of(unsteered=[0.0] * 3, steered=[-4.0, 9.0, 4.0])  # 3 on average, and perhaps nothing
    nearby = settings_of(unsteered=[0.0] * 3, steered=[5.0] * 3, patterns_frozen=[4.5] * 3)  # 0.1 of a change like 4
    found = control_losses({"moving": moving, "still": still, "unsure": unsure}, [beside, nearby], seed=1)
    table = found.set_index("vector")
    assert table["enough"].tolist() == [True, False, False]
    row = table.loc["moving"]
    shares = row[["change", "patterns", "values", "both", "svv", "mlp", "ahead", "svv_ahead", "more"]].astype(float)
    assert shares.tolist() == pytest.approx([-4, 1 / 4, 3 / 4, 0, 2 / 4, 1 / 8, 2 / 4, 3 / 8, 1 / 4 - 1 / 10])
    assert row["more_low"] == row["more_high"] == pytest.approx(0.15)  # prompts do not differ
    assert table.loc[["still", "unsure"], "patterns":"mlp"].isna().all(axis=None) and table["change"].notna().all()
    assert table["values_nats"].tolist() == [-3, 0, 0] and table["patterns_nats"].tolist() == [-1, 0, 0]
    assert table.loc["unsure", "change_low"] < 1 < table.loc["unsure", "change_high"]
    assert control_losses({"still": still}, [beside], least=0.05)["enough"].all()
    weaker = settings_of(
        unsteered=[0.0] * len(beside), steered=[5.0] * len(beside), patterns_frozen=[3.0] * len(beside)
    )
    row = control_losses({"moving": moving}, [beside, weaker]).iloc[0]  # it moves the score by 4: the weaker is nearer
    assert row["more"] == pytest.approx(1 / 4 - 2 / 5) and row["ahead"] == pytest.approx(2 / 4)
    assert np.isnan(control_losses({"moving": moving}, [beside]).iloc[0]["more"])  # 10 is too far from 4


def test_losses_by_hand():
    flags = settings_of(unsteered=[0, 0, 0, 0, 1], steered=[1, 1, 1, 1, 1], values_frozen=[1, 1, 1, 0, 0]).astype(bool)
    scores = settings_of(unsteered=[0.0] * 5, steered=[4.0] * 5, values_frozen=[1.0] * 5)
    table = losses(flags, scores).set_index("intervention")
    assert list(table.index) == list(INTERVENTIONS[1:])
    points, share, first_token = table.loc["values frozen"]
    expected = np.array(paired_difference(flags["steered"], flags["values frozen"]))
    assert points == pytest.approx(tuple(100 * expected)) and points[0] == pytest.approx(40)
    value, low, high = share_of_answers(*(flags[name].to_numpy() for name in ("unsteered", "steered", "values frozen")))
    assert share == pytest.approx((1 - value, 1 - high, 1 - low)) and share[0] == pytest.approx(0.5)  # 0.4 of 0.8
    assert share[1] < share[0] < share[2]
    assert first_token == pytest.approx((0.75, 0.75, 0.75))
    assert table.loc["both frozen", "share"][0] == table.loc["both frozen", "first_token"][0] == 0
    for no_effect in (flags.assign(unsteered=True), flags.assign(steered=False)):  # none, or the other way round
        row = losses(no_effect, scores).set_index("intervention").loc["values frozen"]
        assert np.isnan(row["share"]).all() and np.isfinite(row["points"]).all()


def test_halves_are_redundant_where_either_is_enough():
    flags = settings_of(unsteered=[False] * 4, steered=[True] * 4, both_frozen=[False] * 4)
    scores = settings_of(unsteered=[0.0] * 4, steered=[4.0] * 4, patterns_frozen=[3.0] * 4, both_frozen=[1.0] * 4)
    found = redundancy(flags, scores)
    half = 1.96 * np.sqrt((1 - (4 / 6) ** 2) / 6)  # of 1, 1, 1, 1 and the two added: 1 and -1
    assert found["answers"] == pytest.approx((1, 4 / 6 - half, 4 / 6 + half))
    assert found["first token"] == pytest.approx((0.5, 0.5, 0.5))  # 3 of 4 instead of 1 of 4
    # each half does its own part: nothing is redundant, and the interval has a width all the same
    apart = settings_of(unsteered=[0] * 4, steered=[1] * 4, values_frozen=[0, 1, 1, 1], patterns_frozen=[1, 1, 0, 0],
                        both_frozen=[0, 1, 0, 0])  # fmt: skip
    value, low, high = redundancy(apart.astype(bool), scores)["answers"]
    assert value == 0 and low == -high < 0
    # values carry it all, and patterns nothing once they are gone: frozen patterns take less, not more
    taken = settings_of(unsteered=[0] * 4, steered=[1] * 4, patterns_frozen=[0] * 4, values_frozen=[0] * 4,
                        both_frozen=[0] * 4)  # fmt: skip
    assert redundancy(taken.astype(bool), scores)["answers"][0] == -1


@torch.no_grad()
def test_what_cannot_be_frozen_says_what_to_do(llama):
    vector, batch = vector_for(llama), encode(llama.tokenizer, PROMPTS)
    with pytest.raises(SteeringError, match="give patterns, values, both"), freeze(llama, "qk"):
        pass
    with pytest.raises(ValueError, match="blocks 0 to 3"), freeze(llama, "values", [4]):
        pass
    with pytest.raises(SteeringError, match="touched nothing.*prompt_length"), freeze(llama, "values"):
        pass
    with pytest.raises(SteeringError, match="touched nothing"), freeze(llama, "patterns", positions="generated"):
        last_logits(llama, PROMPTS)
    with pytest.raises(SteeringError, match="already"), freeze(llama, "values"), freeze(llama, "patterns"):
        pass
    prefix = prefix_of(llama, batch.input_ids[1:, :3])
    assert isinstance(prefix, Prefix)
    with pytest.raises(SteeringError, match="from its first token"), freeze(llama, "values"):
        llama.decoder(batch.input_ids[1:, 3:], past_key_values=prefix)
    taken = tape(llama, batch.inputs())
    frozen = partial(freeze, llama, "values", [1, 2])
    with pytest.raises(SteeringError, match="begin it inside"), frozen():
        resume(llama, taken, 1, taken.residuals[1])  # its masks are not the eager form's: the future would be seen
    with pytest.raises(SteeringError, match="began at block 2, and blocks from 1 on"), frozen():
        taken = tape(llama, batch.inputs())
        resume(llama, taken, 2, taken.residuals[2])
    for layer in (0, 1):
        with pytest.raises(SteeringError, match="at all positions"), frozen(positions="prompt"):
            taken = tape(llama, batch.inputs())
            resume(llama, taken, layer, taken.residuals[layer])
    with pytest.raises(SteeringError, match="attention was run alone"), frozen():
        llama.blocks[1].self_attn(taken.residuals[1], **taken.arguments[1])
    with pytest.raises(SteeringError, match="unknown reader"), remove_direct(llama, vector, 1.0, "q"):
        pass
    with pytest.raises(SteeringError, match="enters at block 1"), remove_direct(llama, vector, 1.0, "mlp", [0, 2]):
        pass
    with pytest.raises(SteeringError, match="ablates"), remove_direct(llama, ablating(vector), 1.0, "mlp"):
        pass
    with pytest.raises(SteeringError, match="touched no token"), remove_direct(llama, vector, 1.0, "mlp"):
        pass


def test_all_is_as_before_after_an_error_in_the_body():
    model = tiny_model("llama")
    before = last_logits(model, PROMPTS)
    with pytest.raises(KeyError), steer(model, vector_for(model), 5.0), freeze(model, "patterns"):
        raise KeyError
    assert torch.equal(last_logits(model, PROMPTS), before)
    model.hf.train()
    with pytest.raises(ModelError, match="train mode"), attending(model, lambda *_: None):
        pass


def test_a_strength_for_each_row_equals_separate_runs(any_model):
    vector, strengths = vector_for(any_model), (STRENGTH, -1.0)
    for name in INTERVENTIONS:
        with intervene(any_model, vector, strengths, name):
            together = last_logits(any_model, PROMPTS)
        for row, strength in enumerate(strengths):
            with intervene(any_model, vector, strength, name):
                alone = last_logits(any_model, PROMPTS)
            torch.testing.assert_close(together[row], alone[row], atol=1e-4, rtol=1e-3)
