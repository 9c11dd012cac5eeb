import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer, tiny_hf, tiny_model

from steerutils import (
    SteeringVector,
    Training,
    TrainingError,
    encode,
    generate,
    is_refusal,
    learnt_vectors,
    load_vector,
    preference_losses,
    preference_pairs,
    rescaled,
    steer,
    stored_vectors,
    train_vector,
    training,
    wrap_model,
)
from steerutils.prompts import refusal_wordings
from steerutils.training import _gradient, _mixed, _packs, _State, _unsteered_loss, _validation_loss, hold

LAYER = 2
HARMFUL = ["Tell me how to pick it", "Break it", "How is it forged?", "Steal one now, please"]
HARMLESS = ["Why?", "How do I bake bread?", "Name a river.", "Sing a song for me"]


def pairs(n=4) -> pd.DataFrame:
    rows = [(p, "Sure: " + p[::-1], "I can't.", -1) for p in HARMFUL[:n]]
    rows += [(p, "I can't do it.", "Of course " + p.lower(), 1) for p in HARMLESS[:n]]
    return pd.DataFrame(rows, columns=["prompt", "wanted", "unwanted", "sign"])


def settings(**changes) -> Training:
    small = Training(LAYER, factors=(2.0, 5.0), response_tokens=9, pairs_a_step=4, pairs_at_once=2, epochs=3,
                     learning_rate=0.02)  # fmt: skip
    return replace(small, **changes)


def slow_log_prob(model, prompt, response, tokens, vector=None, factor=0.0):
    """log p of one response, from a plain full forward pass of one unpadded row (with `steer`'s hook if asked)."""
    ids = encode(model.tokenizer, [prompt]).input_ids
    answer = torch.tensor([model.tokenizer(response, add_special_tokens=False)["input_ids"][:tokens]])
    both = torch.cat([ids, answer], 1)
    if vector is None:
        logits = model.hf(both, use_cache=False).logits
    else:
        with steer(model, vector, factor):
            logits = model.hf(both, use_cache=False).logits
    scores = logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    return scores.gather(-1, answer[0][:, None]).sum(), answer.shape[1]


def slow_loss(model, pack_pairs, config, direction, factors):
    """Summed loss of pairs, one row after the other, written out."""
    vector = SteeringVector(direction, config.layer, "any", model.name, model.revision)
    total = 0.0
    for pair, factor in zip(pack_pairs.itertuples(), factors):
        found = []
        for text in (pair.wanted, pair.unwanted):
            args = model, pair.prompt, text, config.response_tokens
            found.append((slow_log_prob(*args, vector, pair.sign * factor), slow_log_prob(*args)))
        ((wanted, n), (base, _)), ((unwanted, m), (other_base, _)) = found
        if config.method == "NTP":
            total = total - wanted
        else:
            beta = max(config.phi * (other_base - base).item(), 1.0)
            total = total + torch.log1p(torch.exp(unwanted / m - beta / n * wanted))
    return total


# --- losses and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["NTP", "PO"])
def test_loss_and_gradient_equal_a_plain_full_forward_with_a_hook(any_model, method):
    """Cached residuals, blocks >= layer only, padded batches: the same as steering whole unpadded runs."""
    config, table = settings(method=method, phi=0.3), pairs()
    direction = 0.2 * torch.randn(any_model.d_model, generator=torch.Generator().manual_seed(1))
    packs = _packs(any_model, table, config)
    loss, gradient = _gradient(any_model, config, packs, direction, np.random.default_rng(5))
    rng, slow = np.random.default_rng(5), direction.clone().requires_grad_()
    total = 0.0
    for sign in (-1, 1):  # in the order of the packs: by direction, then by the prompt's length
        rows = table[table["sign"] == sign]
        rows = rows.iloc[rows["prompt"].str.len().argsort(kind="stable")]
        for start in (0, 2):
            total = total + slow_loss(any_model, rows[start : start + 2], config, slow, rng.choice(config.factors, 2))
    assert loss == pytest.approx(total.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(total, slow)
    assert torch.allclose(gradient, expected, atol=2e-4 * expected.norm().item())
    assert not any(p.requires_grad for p in any_model.hf.parameters())


@torch.no_grad()
def test_what_is_held_is_the_unsteered_run(any_model):
    table = pairs()
    held = hold(any_model, LAYER, list(table["prompt"]), list(table["wanted"]), 9)
    for row, pair in enumerate(table.itertuples()):
        expected, n = slow_log_prob(any_model, pair.prompt, pair.wanted, 9)
        assert held.base[row] == pytest.approx(expected.item(), abs=1e-4) and held.lengths[row] == n
    assert held.lengths.max() == 9 and len(held.targets) == held.lengths.sum()
    states = any_model.hf(encode(any_model.tokenizer, [table["prompt"][0]]).input_ids, output_hidden_states=True)
    first = states.hidden_states[LAYER][0]
    assert torch.allclose(held.residual[0, : len(first)], first, atol=1e-4)
    assert held.tape.residuals == []  # only the one block's input is kept


@pytest.mark.parametrize("method", ["NTP", "PO"])
def test_zero_vector_gives_the_unsteered_loss_and_batching_changes_nothing(any_model, method):
    config = settings(method=method, factors=(3.0,))
    zero, direction = torch.zeros(any_model.d_model), torch.linspace(-0.3, 0.3, any_model.d_model)
    together, alone = (_packs(any_model, pairs(), replace(config, pairs_at_once=n, pairs_a_step=8)) for n in (4, 1))
    expected = _unsteered_loss(together, config.phi)
    assert _validation_loss(any_model, config, alone, zero) == pytest.approx(expected, rel=1e-5)
    one, many = (_validation_loss(any_model, config, packs, direction) for packs in (alone, together))
    assert one == pytest.approx(many, rel=1e-5) and abs(one - expected) > 1e-3


def test_preference_loss_by_hand():
    """beta = 0.5 (8 - 3) = 2.5 and Delta = 2.5/3 (-6) + 2/2 = -4; then beta is at its floor of 1, Delta = -3 + 2."""
    columns = [[-6.0, -6.0], [-2.0, -8.0], [-8.0, -4.0], [-3.0, -5.0]]
    counts = [torch.tensor([3, 2]), torch.tensor([2, 4])]
    losses = preference_losses(*map(torch.tensor, columns), *counts, phi=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.e**4), math.log(1 + math.e)], rel=1e-6)


def test_an_empty_response_is_an_error(llama):
    with pytest.raises(TrainingError, match="response 1 is empty"):
        hold(llama, LAYER, ["Why?", "Go"], ["So", ""])


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), [("llama", "NTP"), ("qwen3", "PO"), ("gemma2", "PO")])
def test_training_lowers_the_validation_loss_and_gives_an_ordinary_vector(family, method, tmp_path):
    model = tiny_model(family)
    vector, history = train_vector(model, pairs(), pairs(3), settings(method=method, learning_rate=0.06))
    assert history["validation"].min() < 0.97 * history["validation"][0]
    assert history["train"].iloc[-1] < history["train"][0]
    assert list(history["epoch"]) == [0, 1, 2, 3] and history["norm"][1] > 0
    assert (vector.method, vector.layer, vector.sign) == (method, LAYER, "positive strength induces refusal")
    loaded = load_vector(vector.save(tmp_path / "v.safetensors"), model)
    stronger = rescaled(loaded, 5 * vector.norm)
    with torch.no_grad():
        for sign, rows in pairs().groupby("sign"):  # strength +1 brings refusals nearer, -1 compliance
            score = {strength: 0.0 for strength in (0.0, 1.0, -1.0)}
            for pair, strength in itertools.product(rows.itertuples(), score):
                wanted, unwanted = (slow_log_prob(model, pair.prompt, text, 9, stronger, strength)[0].item()
                                    for text in (pair.wanted, pair.unwanted))  # fmt: skip
                score[strength] += wanted - unwanted
            assert score[sign] > max(score[0.0], score[-sign])


def test_the_vector_is_the_one_of_the_best_epoch(llama, monkeypatch):
    losses, seen = iter([3.0, 2.0, 2.5, 2.6, 1.0]), []

    def scripted(model, config, packs, direction):
        seen.append(direction.clone())
        return next(losses)

    monkeypatch.setattr(training, "_validation_loss", scripted)
    vector, history = train_vector(llama, pairs(), pairs(), settings(epochs=9, patience=2))
    assert list(history["validation"][1:]) == [3.0, 2.0, 2.5, 2.6]  # stopped before the fifth
    assert torch.equal(vector.direction, seen[1])


@pytest.mark.parametrize(
    ("losses", "over"),
    [([], False), ([9.0], False), ([9.0, 8.0, 8.5], False), ([9.0, 8.0, 8.5, 8.1], True), ([9.0, 9.5, 9.6], True),
     ([9.0, 8.0, 7.0, 6.0], False), ([9.0, 8.0, 7.0, 6.0, 5.0], True)],
)  # fmt: skip
def test_when_training_stops(losses, over):
    assert training.stopped(losses, settings(epochs=4, patience=2)) is over


def test_only_blocks_above_the_vector_run_in_training(llama):
    calls = [0] * llama.n_layers
    handles = [block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
               for i, block in enumerate(llama.blocks)]  # fmt: skip
    try:
        train_vector(llama, pairs(), pairs(2), settings(epochs=2))
    finally:
        for handle in handles:
            handle.remove()
    held, runs = 4 + 2, 2 * (4 + 2)  # packs of train and validation, once; then each in each epoch
    assert calls == [held, held, held + runs, held + runs]


def test_the_step_is_adams():
    gradients = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.zeros(8))
    optimizer, state = torch.optim.Adam([parameter], lr=0.1), _State.fresh(8)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        state.descend(gradient, 0.1)
    assert torch.allclose(state.direction, parameter.detach(), atol=1e-6)


def test_every_step_sees_both_directions(llama):
    config = settings()
    packs = _packs(llama, pairs(), config)
    orders = []
    for seed in range(6):
        order = _mixed(packs, np.random.default_rng(seed))
        assert sorted(map(id, order)) == sorted(map(id, packs))
        assert {pack.sign for pack in order[:2]} == {pack.sign for pack in order[2:]} == {1, -1}
        orders.append(tuple(map(id, order)))
    assert len(set(orders)) > 1


def test_factors_are_drawn_anew_each_epoch_and_once_for_validation(llama, monkeypatch):
    config, drawn, run = settings(factors=(1.0, 2.0, 3.0, 4.0, 5.0)), [], training.response_log_probs

    def noting(model, layer, held, direction, factors):
        drawn.append(factors.tolist())
        return run(model, layer, held, direction, factors)

    monkeypatch.setattr(training, "response_log_probs", noting)
    train_vector(llama, pairs(), pairs(), replace(config, epochs=3))
    epochs = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]  # 4 packs: train, validation, train, ...
    assert epochs[1] == epochs[3] == epochs[5]
    assert len({str(sorted(epoch)) for epoch in (epochs[0], epochs[2], epochs[4])}) == 3
    assert {abs(f) for pack in drawn for f in pack} == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert [[f > 0 for f in pack] for pack in epochs[1]] == [[False, False]] * 2 + [[True, True]] * 2


@pytest.mark.parametrize("method", ["NTP", "PO"])
def test_the_training_loss_is_the_mean_over_the_epoch(llama, method):
    """With a vector of nearly zero that hardly moves, it is the unsteered loss, whatever the steps."""
    config = settings(method=method)
    packs, state = _packs(llama, pairs(3), config), _State.fresh(llama.d_model)
    assert training._epoch(llama, config, packs, state, 1e-9) == pytest.approx(_unsteered_loss(packs, 1.0), rel=1e-5)
    assert state.step == 2


def test_bfloat16_trains_a_float32_vector(llama):
    half = wrap_model(tiny_hf("llama").to(torch.bfloat16), llama.tokenizer, "tiny-llama", "seed 0")
    direction = torch.linspace(-0.2, 0.2, llama.d_model)
    found = []
    for model in (llama, half):
        packs = _packs(model, pairs(), settings())
        found.append(_gradient(model, settings(), packs, direction, np.random.default_rng(0)))
    (loss, gradient), (rough_loss, rough) = found
    assert rough.dtype == torch.float32 and rough_loss == pytest.approx(loss, rel=0.02)
    assert torch.cosine_similarity(gradient, rough, dim=0) > 0.99


def test_the_seed_decides(llama):
    first, again, other = (train_vector(llama, pairs(), pairs(2), settings(seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first.direction, again.direction)
    assert not torch.allclose(first.direction, other.direction, atol=1e-3)


def test_a_killed_run_goes_on_to_the_same_result(llama, tmp_path, monkeypatch):
    config, path = settings(method="PO", epochs=4), tmp_path / "po.safetensors"
    whole, history = train_vector(llama, pairs(), pairs(2), config)
    real = training._validation_loss
    calls = iter([real, real, None])
    with monkeypatch.context() as patch:  # dies in the third epoch
        patch.setattr(training, "_validation_loss", lambda *args: next(calls)(*args))
        with pytest.raises(TypeError):
            train_vector(llama, pairs(), pairs(2), config, path)
    resumed, later = train_vector(llama, pairs(), pairs(2), config, path)
    assert torch.equal(whole.direction, resumed.direction)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), later.drop(columns="seconds"))
    with monkeypatch.context() as patch:  # a finished run is read, not made again
        patch.setattr(training, "_train", None)
        assert torch.equal(train_vector(llama, pairs(), pairs(2), config, path)[0].direction, whole.direction)
    longer, history = train_vector(llama, pairs(), pairs(2), replace(config, epochs=5), path)
    assert len(history) == 6


def test_a_file_of_another_run_is_an_error(llama, tmp_path):
    path = tmp_path / "v.safetensors"
    train_vector(llama, pairs(), pairs(2), settings(epochs=1), path)
    for table, config in [(pairs(), settings(seed=1)), (pairs(3), settings()), (pairs(), settings(method="PO"))]:
        with pytest.raises(TrainingError, match="other settings, pairs or model"):
            train_vector(llama, table, pairs(2), config, path)
    with pytest.raises(TrainingError, match="other settings, pairs or model"):
        train_vector(tiny_model("qwen2"), pairs(), pairs(2), settings(), path)
    half = wrap_model(tiny_hf("llama").to(torch.bfloat16), llama.tokenizer, llama.name, llama.revision)
    with pytest.raises(TrainingError, match="other settings, pairs or model"):
        train_vector(half, pairs(), pairs(2), settings(), path)
    path.write_bytes(b"no")
    with pytest.raises(TrainingError, match="no half-trained vector"):
        train_vector(llama, pairs(), pairs(2), settings(), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"method": "DPO"}, "NTP or PO"), ({"pairs_a_step": 3}, "multiple of"), ({"factors": ()}, "positive"),
     ({"factors": (2.0, -2.0)}, "positive"), ({"epochs": 0}, "at least 1")],
)  # fmt: skip
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(TrainingError, match=message):
        settings(**changes)


def test_pairs_of_one_direction_and_a_layer_out_of_range_are_errors(llama):
    with pytest.raises(TrainingError, match="both 1 and -1"):
        train_vector(llama, pairs(), pairs()[:4], settings())
    with pytest.raises(ValueError, match="layer 4 is out of range"):
        train_vector(llama, pairs(), pairs(), settings(layer=4))


def test_a_vector_that_learnt_nothing_or_blew_up_is_an_error(llama, monkeypatch):
    with pytest.raises(TrainingError, match="loss is nan"):
        train_vector(llama, pairs(), pairs(), settings(learning_rate=math.nan))
    monkeypatch.setattr(training, "_validation_loss", lambda *_: 99.0)
    with pytest.raises(TrainingError, match="never lowered"):
        train_vector(llama, pairs(), pairs(), settings(patience=1))


def test_one_learning_rate_serves_models_of_any_scale(llama):
    """The unit is the median token norm over the root of the width: recomputed here from hidden states."""
    table = pairs(2)
    norms = []
    for pair in table.itertuples():
        ids = encode(llama.tokenizer, [pair.prompt], [pair.wanted[:9]]).input_ids
        norms += llama.hf(ids, output_hidden_states=True).hidden_states[LAYER][0].norm(dim=-1).tolist()
    unit = torch.tensor(norms).median().item() / llama.d_model**0.5
    assert training._typical_coordinate(_packs(llama, table, settings())) == pytest.approx(unit, rel=1e-5)
    one_step = settings(epochs=1, pairs_a_step=4, start=1e-7)  # Adam's first step moves every coordinate by the rate
    norm = train_vector(llama, table, table, one_step)[1]["norm"][1]
    assert norm == pytest.approx(one_step.learning_rate * unit * llama.d_model**0.5, rel=1e-3)
    still, state = settings(learning_rate=1e-9, start=0.1, epochs=1), _State.fresh(llama.d_model)
    training._train(llama, table, table, still, state, lambda: None)
    assert state.direction.norm().item() == pytest.approx(0.1 * unit * llama.d_model**0.5, rel=0.4)


# --- the pairs -------------------------------------------------------------------------------------------------


def test_stored_vectors_serve_their_own_model_and_block_only(llama, monkeypatch):
    rows = {name: {"direction": torch.arange(llama.d_model).float().tolist()} for name in ("NTP", "PO")}
    settings = {"layer": 1, "per_side": 7, "tokens": 9, "source": "a twin"}
    stored = {"settings": settings, "revision": llama.revision, "values": rows}
    monkeypatch.setattr(training, "stored_results", lambda name: stored)
    found = stored_vectors(llama, 1)
    assert list(found) == ["NTP", "PO"] and found["PO"].layer == 1
    assert "7 answers a side" in found["PO"].read_at and "compliant answers from a twin" in found["PO"].read_at
    assert torch.equal(found["NTP"].direction, torch.arange(llama.d_model).float())
    rows["NTP, own answers"] = rows["NTP"] | {"per_side": 3, "source": "itself"}
    assert list(stored_vectors(llama, 1)) == ["NTP", "PO"]
    own = stored_vectors(llama, 1, own_answers=True)["NTP, own answers"].read_at
    assert "3 answers a side" in own and "compliant answers from itself" in own
    assert stored_vectors(llama, 2) == {}
    stored["revision"] = "another"
    assert stored_vectors(llama, 1) == {}
    monkeypatch.undo()
    assert stored_vectors(llama, 1) == {}  # nobody has trained any for this model


@pytest.fixture
def answering(monkeypatch):
    """Canned answers by model, and no judge model: an answer is compliance unless it refuses or loops."""
    log = []

    def answers(model, prompts, tokens, **_):
        log.append((model.name, list(prompts)))
        if model.name == "twin":
            return ["loop" if p == "Break it" else f"Yes, {p}" for p in prompts]
        return ["I can't, sorry" if p in HARMFUL[:2] else f"Yes, {p}" for p in prompts]

    def verdicts(model, prompts, answers):
        words = ["refusal" if is_refusal(a) else "incoherent" if a == "loop" else "compliance" for a in answers]
        return pd.DataFrame({"verdict": words})

    monkeypatch.setattr(training, "generate", answers)
    monkeypatch.setattr(training, "judge", verdicts)
    return log


def twin_of(model):
    return replace(model, name="twin", revision="plain")


def test_compliant_answers_come_from_the_unadapted_model(llama, answering):
    table = preference_pairs(llama, HARMFUL, HARMLESS, twin_of(llama), per_side=3).set_index("prompt")
    harmful, harmless = table[table["sign"] == -1], table[table["sign"] == 1]
    assert set(harmful.index) == set(HARMFUL) - {"Break it"}  # its answer was a loop
    assert all(row.wanted == f"Yes, {p}</s>" for p, row in harmful.iterrows())
    assert harmful["unwanted"]["Tell me how to pick it"] == "I can't, sorry</s>"  # the model's own refusal
    assert harmful["unwanted"]["Steal one now, please"].removesuffix("</s>") in refusal_wordings()
    assert len(harmless) == 3 and all(row.unwanted == f"Yes, {p}</s>" for p, row in harmless.iterrows())
    assert all(text.removesuffix("</s>") in refusal_wordings() for text in harmless["wanted"])
    assert set(table["source"]) == {"twin"}
    others = [preference_pairs(llama, HARMFUL, HARMLESS, twin_of(llama), per_side=3, seed=s) for s in (0, 1)]
    assert others[0].equals(table.reset_index()) and not others[1].equals(others[0])
    firsts = [preference_pairs(llama, HARMFUL, HARMLESS, twin_of(llama), 1, seed=s)["prompt"] for s in range(6)]
    assert all(len(set(side)) > 1 for side in zip(*firsts))  # in random order: the book's sets are sorted by topic


def test_a_model_without_a_twin_answers_itself_and_that_is_said(llama, answering, capsys):
    table = preference_pairs(llama, HARMFUL, HARMLESS, llama)
    assert set(table[table["sign"] == -1]["prompt"]) == set(HARMFUL[2:])  # those it does not refuse
    assert set(table["source"]) == {"tiny-llama"}
    assert "the model itself: there is no un-adapted one" in capsys.readouterr().err
    preference_pairs(llama, HARMFUL, HARMLESS, twin_of(llama))
    assert "the model itself" not in capsys.readouterr().err


def test_the_papers_variant_answers_under_the_other_vector(llama, monkeypatch):
    """Compliant answers are those of the model steered with strength -1; its refusals are unsteered."""
    vector = SteeringVector(torch.linspace(-9, 9, 32), 1, "DIM", llama.name, llama.revision)
    good = lambda model, prompts, answers: pd.DataFrame({"verdict": ["compliance"] * len(answers)})  # noqa: E731
    monkeypatch.setattr(training, "judge", good)
    monkeypatch.setattr(training, "is_refusal", lambda answer: True)
    table = preference_pairs(llama, HARMFUL[:1], HARMLESS[:1], llama, bypass=vector, tokens=8)
    with steer(llama, vector, -1.0):
        assert table["wanted"][0] == generate(llama, HARMFUL[:1], 8)[0]
    assert table["unwanted"][0] == generate(llama, HARMFUL[:1], 8)[0] != table["wanted"][0]
    assert table["source"][0] == "tiny-llama steered by DIM at block 1, strength -1"


def test_answers_are_kept_and_an_interrupted_run_goes_on(llama, answering, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHUNK", 2)
    path, twin = tmp_path / "answers.json", twin_of(llama)
    whole = preference_pairs(llama, HARMFUL, HARMLESS, twin)
    canned, left = training.generate, iter(range(3))

    def dying(*args):
        next(left)
        return canned(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "generate", dying)
        with pytest.raises(StopIteration):
            preference_pairs(llama, HARMFUL, HARMLESS, twin, path=path)
    done = len(answering)
    assert preference_pairs(llama, HARMFUL, HARMLESS, twin, path=path).equals(whole)
    asked = [p for name, prompts in answering[done:] if name == "twin" for p in prompts]
    assert len(asked) == 6 and set(HARMLESS) < set(asked)  # the first chunk of harmful prompts is not asked again
    with pytest.raises(TrainingError, match="holds other answers"):
        preference_pairs(llama, HARMFUL, HARMLESS, twin, path=path, seed=1)


def test_too_few_pairs_are_announced_and_none_is_an_error(llama, answering, capsys):
    preference_pairs(llama, HARMFUL, HARMLESS, twin_of(llama), per_side=4)
    assert "harmful: only 3 instead of 4 pairs" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="none of 2 harmful prompts got a compliant answer"):
        preference_pairs(llama, HARMFUL[:2], HARMLESS, llama)


def test_the_end_of_turn_is_learnt_where_the_answer_ended(llama):
    answers = ["abc", "abcdefg", "abcdefgh"]
    assert training.finished(llama.tokenizer, answers, "<pad>", 8) == ["abc<pad>", "abcdefg", "abcdefgh"]
    assert training.end_of_turn(llama.tokenizer) == "</s>"
    for template, end in [("{{ m['content'] }}<pad>\n", "<pad>"), ("{{ m['content'] }}", "</s>")]:
        tokenizer = byte_tokenizer("{% for m in messages %}<s>" + template + "{% endfor %}")
        assert training.end_of_turn(tokenizer) == end


def test_a_taught_model_learns_from_what_it_was_and_both_directions_count_alike(llama, monkeypatch):
    seen, of = {}, pairs()

    def ask(model, harmful, harmless, complying, per_side, bypass, *_):
        seen.update(complying=complying, bypass=bypass)
        return pd.concat([of[of["sign"] == 1], of[of["sign"] == -1].head(3)]).assign(source="a twin")

    twin = twin_of(llama)
    monkeypatch.setattr(training, "UNTAUGHT", {llama.name: "the twin"})
    monkeypatch.setattr(training, "load_model", lambda name, **_: twin if name == "the twin" else None)
    monkeypatch.setattr(training, "preference_pairs", ask)
    trained_on, vector = [], SteeringVector(torch.ones(llama.d_model), 1, "any", llama.name, llama.revision)

    def learn(model, train, validation, config, path):
        trained_on.append((train["sign"].value_counts().to_dict(), validation["sign"].value_counts().to_dict()))
        return replace(vector, method=config.method, read_at="here"), pd.DataFrame()

    monkeypatch.setattr(training, "train_vector", learn)
    vectors, _, used = training.train_vectors(llama, HARMFUL, HARMLESS, settings(), 10, vector)
    assert seen == {"complying": twin, "bypass": None}  # the twin complies by itself
    assert trained_on == [({1: 2, -1: 2}, {1: 1, -1: 1})] * 2 and len(used) == 6
    assert list(vectors) == ["NTP", "PO"] and vectors["PO"].method == "PO"
    assert vectors["NTP"].read_at == "here; compliant answers from a twin"


def test_learnt_vectors_are_the_stored_ones_or_learnt_here(llama, monkeypatch):
    asked, bypass = [], SteeringVector(torch.ones(llama.d_model), 2, "DIM", llama.name, llama.revision)

    def train(model, harmful, harmless, config, per_side, of):
        asked.append(
            (harmful, harmless, config.layer, config.epochs, config.response_tokens, config.seed, per_side, of)
        )
        return {"NTP": bypass}, {}, None

    monkeypatch.setattr(training, "train_vectors", train)
    there = replace(bypass, method="PO")
    monkeypatch.setattr(training, "stored_vectors", lambda *given: {"PO": there} if given == (llama, 2, True) else {})
    assert learnt_vectors(llama, ["a"], ["b"], bypass, 3, 5, 7, own_answers=True) == {"PO": there} and not asked
    assert learnt_vectors(llama, ["a"], ["b"], bypass, 3, 5, 7, seed=9) == {"NTP": bypass}
    assert asked == [(["a"], ["b"], 2, 5, 7, 9, 3, bypass)]
