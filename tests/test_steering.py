import os
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

from steerutils import (
    PromptError,
    SteeringError,
    SteeringVector,
    ablating,
    dim_vectors,
    edit,
    encode,
    generate,
    generate_grid,
    last_logits,
    load_vector,
    random_like,
    residuals,
    steer,
    steered_answers,
    sweep,
)
from steerutils.models import tape
from steerutils.prompts import encode_rows
from steerutils.steering import ablate, add, prompt_inputs

PROMPTS = ["Why?", "How do I bake bread?", "Name a river in the far north."]
N = 10


def vector_for(model, layer=1, scale=3.0, seed=1):
    direction = scale * torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(direction, layer, "random", model.name, model.revision)


@torch.no_grad()
def slow_steered_answer(model, prompt, vector, strength, first=None, last=None):
    """Greedy decoding without a cache, written out: the whole text again for every token, one prompt, no padding.

    Columns first <= c < last, counted from the end of the prompt, are steered.
    """
    ids = encode(model.tokenizer, [prompt]).input_ids
    length = ids.shape[1]

    def hook(_, args):
        columns = torch.arange(args[0].shape[1]) - length
        chosen = torch.ones_like(columns, dtype=torch.bool)
        chosen &= columns >= first if first is not None else True
        chosen &= columns < last if last is not None else True
        return (args[0] + strength * vector.direction * chosen[None, :, None], *args[1:])

    handle = model.blocks[vector.layer].register_forward_pre_hook(hook)
    for _ in range(N):
        token = model.hf(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() == model.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token], 1)
    handle.remove()
    return model.tokenizer.decode(ids[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("positions", "first", "last"),
    [("all", None, None), ("prompt", None, 0), ("generated", 0, None), (slice(-1, None), -1, None)],
)
def test_steered_generation_equals_a_slow_reference_without_a_cache(any_model, positions, first, last):
    vector = vector_for(any_model)
    with steer(any_model, vector, 2.0, positions):
        together = generate(any_model, PROMPTS, N)
    with steer(any_model, vector, 2.0, positions):
        alone = [generate(any_model, [prompt], N)[0] for prompt in PROMPTS]
    slow = [slow_steered_answer(any_model, prompt, vector, 2.0, first, last) for prompt in PROMPTS]
    assert together == slow
    assert alone == slow
    assert slow != [slow_steered_answer(any_model, prompt, vector, 0.0) for prompt in PROMPTS], "steering did nothing"


def test_the_embedded_model_steers_like_the_slow_reference(embedded):
    direction = torch.randn(embedded.d_model, generator=torch.Generator().manual_seed(0)) * 2
    vector = SteeringVector(direction, 14, "random", embedded.name, embedded.revision)
    with steer(embedded, vector, 1.0):
        answers = generate(embedded, PROMPTS[:2], N)
    assert answers == [slow_steered_answer(embedded, prompt, vector, 1.0) for prompt in PROMPTS[:2]]


@torch.no_grad()
def test_teacher_forced_positions_follow_the_prompt_length(llama):
    vector = vector_for(llama, layer=2)
    batch = encode(llama.tokenizer, PROMPTS, ["An answer", "Another one", "A third"])
    with steer(llama, vector, 1.0, "generated", prompt_length=batch.prompt_length):
        steered = llama.hf(**batch.inputs()).logits
    plain = llama.hf(**batch.inputs()).logits
    assert torch.equal(steered[:, : batch.prompt_length], plain[:, : batch.prompt_length])
    assert not torch.allclose(steered[:, batch.prompt_length], plain[:, batch.prompt_length])


@torch.no_grad()
def test_zero_strength_changes_no_bit(any_model):
    plain = last_logits(any_model, PROMPTS)
    with steer(any_model, vector_for(any_model), 0.0):
        assert torch.equal(last_logits(any_model, PROMPTS), plain)


@torch.no_grad()
def test_a_strength_per_row_steers_each_row_alone(llama):
    vector = vector_for(llama)
    with steer(llama, vector, [0.0, 1.0, -2.0]):
        together = last_logits(llama, PROMPTS)
    for row, prompt, strength in zip(together, PROMPTS, [0.0, 1.0, -2.0]):
        with steer(llama, vector, strength):
            assert torch.allclose(row, last_logits(llama, [prompt])[0], atol=2e-5)


@pytest.mark.parametrize("given", [[1.0], [1.0] * 4])
def test_strengths_of_another_number_of_rows_are_an_error(llama, given):
    with pytest.raises(SteeringError, match=f"{len(given)} strengths for a batch of 3 rows"):
        with steer(llama, vector_for(llama), given):
            last_logits(llama, PROMPTS)


@torch.no_grad()
def test_ablation_leaves_no_component_anywhere(any_model):
    vector = ablating(vector_for(any_model))
    unit = vector.direction / vector.direction.norm()
    seen = []
    read = [
        (site, layer, lambda h: seen.append((h @ unit).abs().max()))
        for layer in range(any_model.n_layers)
        for site in ("block_input", "attention_write", "mlp_write")
    ]
    from steerutils import edit

    with steer(any_model, vector), edit(any_model, read):
        last_logits(any_model, PROMPTS)
    assert len(seen) == 3 * any_model.n_layers and max(seen) < 1e-5


def test_steering_that_touches_no_token_is_an_error(llama):
    with (
        pytest.raises(SteeringError, match="touched no token.*prompt_length"),
        steer(llama, vector_for(llama), 1.0),
    ):
        pass
    with (
        pytest.raises(SteeringError, match="touched no token"),
        steer(llama, vector_for(llama), 1.0, "generated"),
    ):
        last_logits(llama, PROMPTS)


@torch.no_grad()
def test_answers_over_a_grid_are_those_of_separate_generation(any_model):
    settings = [(vector_for(any_model, layer), s) for layer in (any_model.n_layers - 1, 0, 1) for s in (0.3, -2.0)]
    separate = []
    for vector, strength in settings:
        with steer(any_model, vector, strength):
            separate.append((generate(any_model, PROMPTS, 9, batch_size=2), last_logits(any_model, PROMPTS)))
    assert len({tuple(answers) for answers, _ in separate}) > 1  # steering does something
    for batch_size in (2, 12):  # one setting at a time, in two batches; four settings at a time, of several blocks
        found = list(steered_answers(any_model, PROMPTS, settings, 9, batch_size))
        for (answers, logits), (wanted, first) in zip(found, separate, strict=True):
            assert answers == wanted and torch.allclose(logits, first, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_prompts_share_their_beginning_where_a_sliding_window_is_wide_enough(family):
    model, seen = tiny_model(family, sliding_window=512), []
    vector = vector_for(model, 2)
    prompts = [PROMPTS[1], *PROMPTS, PROMPTS[1]]  # one of them three times
    with steer(model, vector, 1.5):
        wanted, logits = generate(model, prompts, 9), last_logits(model, prompts)
    count = model.blocks[0].register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    ((answers, first),) = steered_answers(model, prompts, [(vector, 1.5)], 9)
    count.remove()
    assert seen[:2] == [1, len(prompts)]  # the shared first tokens, the rest
    assert answers == wanted and torch.allclose(first, logits, atol=2e-5)


def test_shared_first_tokens_run_once_unless_hooks_may_count_columns(llama):
    batch = encode(llama.tokenizer, PROMPTS)
    wide = batch.input_ids.shape[1]
    assert prompt_inputs(llama, batch)["input_ids"].shape[1] < wide
    with edit(llama, [("block_input", 2, lambda h: None)]):
        assert prompt_inputs(llama, batch)["input_ids"].shape[1] == wide


def test_a_grid_of_one_prompt_is_answered_and_one_of_none_is_an_error(llama):
    vector = vector_for(llama)
    with steer(llama, vector, 2.0):
        wanted = generate(llama, PROMPTS[:1], 5)
    assert generate_grid(llama, PROMPTS[:1], [(vector, 2.0)], 5)["answer"].tolist() == wanted
    with pytest.raises(PromptError, match="no prompts"):
        generate_grid(llama, [], [(vector, 2.0)])


def test_a_rows_strength_is_not_rounded_to_the_models_number_format(llama):
    h, direction = torch.ones(2, 1, 4, dtype=torch.bfloat16), torch.full((4,), 3.0, dtype=torch.bfloat16)
    rows = add(h, direction, torch.tensor([0.7, 0.0])[:, None, None])
    assert rows.dtype == torch.bfloat16 and torch.equal(rows[:1], add(h[:1], direction, 0.7))


def test_answers_over_a_grid_run_the_blocks_below_a_vector_once_and_shared_tokens_in_one_row(llama):
    seen = []  # (rows, tokens) of every pass through block 0
    count = llama.blocks[0].register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape[:2])))
    try:
        settings = [(vector_for(llama, 2), s) for s in (1.0, 2.0, 3.0)]
        list(steered_answers(llama, PROMPTS, settings, 2))
    finally:
        count.remove()
    texts = encode(llama.tokenizer, PROMPTS)
    (one, first), (rows, rest), *others = seen
    assert one == 1 and rows == len(PROMPTS) and first + rest == texts.input_ids.shape[1] - 1  # generation has the last
    assert first == len(os.path.commonprefix(encode_rows(llama.tokenizer, PROMPTS))) > 3
    assert all(width == 1 for _, width in others)  # one new token at a time
    with pytest.raises(SteeringError, match="generate inside steer"):
        next(steered_answers(llama, PROMPTS, [(replace(vector_for(llama), operation="ablate"), 1.0)]))


def test_greedy_is_greedy_though_the_model_asks_for_a_penalty(llama, monkeypatch):
    plain = generate(llama, PROMPTS, 8)
    monkeypatch.setattr(llama.hf.generation_config, "repetition_penalty", 50.0)
    monkeypatch.setattr(llama.hf.generation_config, "no_repeat_ngram_size", 1)
    monkeypatch.setattr(llama.hf.generation_config, "num_beams", 3)
    assert generate(llama, PROMPTS, 8) == plain


def test_hooks_are_gone_after_an_error_in_the_body(llama):
    before = last_logits(llama, PROMPTS)
    with pytest.raises(KeyError), steer(llama, vector_for(llama), 5.0):
        raise KeyError
    assert torch.equal(last_logits(llama, PROMPTS), before)


@torch.no_grad()
def test_what_steers_by_itself_is_refused_inside_steer(llama):
    vector = vector_for(llama)
    with steer(llama, vector, 1.0):
        for run in (lambda: sweep(llama, [vector], PROMPTS, [1.0], lambda logits: logits[:, 5]),
                    lambda: next(steered_answers(llama, PROMPTS, [(vector, 1.0)], 2))):  # fmt: skip
            with pytest.raises(SteeringError, match="outside the `with steer"):
                run()
        last_logits(llama, PROMPTS)  # or `steer` says that it steered nothing


def test_the_sweep_agrees_with_separate_runs(any_model):
    vectors = [vector_for(any_model, layer) for layer in range(any_model.n_layers)]

    def score(logits):
        return logits.log_softmax(-1)[:, 5]

    table = sweep(any_model, vectors, PROMPTS, [-1.0, 2.0], score, batch_size=2)
    assert len(table) == len(vectors) * 2 * len(PROMPTS)
    for row in table.itertuples():
        with steer(any_model, vectors[row.layer], row.strength):
            separate = score(last_logits(any_model, [PROMPTS[row.prompt]]))[0].item()
        assert row.score == pytest.approx(separate, abs=2e-4)


def test_grid_generation_agrees_with_one_setting_at_a_time(any_model):
    settings = [
        (vector_for(any_model, 0), 1.0),
        (vector_for(any_model, 2), -2.0),
        (vector_for(any_model, 2, seed=2), 1.5),
    ]
    table = generate_grid(any_model, PROMPTS, settings, N, batch_size=7)
    for row in table.itertuples():
        vector, strength = settings[row.setting]
        with steer(any_model, vector, strength):
            assert row.answer == generate(any_model, [PROMPTS[row.prompt]], N)[0]
    assert list(table["layer"].unique()) == [0, 2]


def test_a_saved_vector_comes_back_with_its_meaning(llama, tmp_path):
    vector = vector_for(llama, layer=3)
    loaded = load_vector(vector.save(tmp_path / "v.safetensors"), llama)
    assert torch.equal(loaded.direction, vector.direction)
    assert (loaded.layer, loaded.method, loaded.sign, loaded.operation) == (3, "random", vector.sign, "add")
    from safetensors import safe_open

    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        words = file.metadata()
    assert float(words["norm"]) == pytest.approx(vector.norm) and words["dtype"] == "torch.float32"
    assert {"model", "revision", "site", "read_at"} <= set(words)


def test_a_vector_of_another_model_or_width_is_refused(llama, tmp_path):
    path = vector_for(llama).save(tmp_path / "v.safetensors")
    with pytest.raises(SteeringError, match="made on tiny-llama.*not on tiny-qwen2"):
        load_vector(path, tiny_model("qwen2"))
    with pytest.raises(SteeringError, match="seed 0.*seed 1"):
        load_vector(path, tiny_model("llama", seed=1))
    moved = replace(llama, name=f"/elsewhere/{llama.name}/")  # the same weights in another folder
    assert load_vector(path, moved).layer == load_vector(path, llama).layer
    wide = SteeringVector(torch.ones(40), 1, "m", llama.name, llama.revision)
    with pytest.raises(SteeringError, match=r"shape \(40,\).*needs \(32,\)"), steer(llama, wide):
        pass
    (tmp_path / "bad.safetensors").write_bytes(b"not a vector")
    with pytest.raises(SteeringError, match="not a steering vector file"):
        load_vector(tmp_path / "bad.safetensors", llama)


def test_bad_settings_say_what_to_do(llama):
    vector = vector_for(llama)
    with pytest.raises(ValueError, match="blocks 0 to 3"), steer(llama, vector.at(4)):
        pass
    with (
        pytest.raises(SteeringError, match="give all, prompt, generated"),
        steer(llama, vector, 1.0, "response"),
    ):
        pass
    zero = SteeringVector(torch.zeros(32), 1, "m", llama.name, llama.revision)
    with pytest.raises(SteeringError, match="zero or not finite"), steer(llama, zero):
        pass
    with pytest.raises(SteeringError, match="ablation"):
        sweep(llama, [ablating(vector)], PROMPTS, [1.0], lambda logits: logits[:, 0])


def test_no_prompts_are_an_error_that_says_so(llama):
    vector = vector_for(llama)
    for call in (
        lambda: last_logits(llama, []),
        lambda: residuals(llama, []),
        lambda: sweep(llama, [vector], [], [1.0], lambda logits: logits[:, 0]),
    ):
        with pytest.raises(PromptError, match="no prompts: the list is empty"):
            call()
    with pytest.raises(SteeringError, match="at least one vector"):
        sweep(llama, [], PROMPTS, [1.0], lambda logits: logits[:, 0])
    some = residuals(llama, PROMPTS, last=1)
    with pytest.raises(SteeringError, match="3 prompts on one side and 0 on the other"):
        dim_vectors(llama, some, some[:0])


def test_an_ablation_in_bfloat16_is_computed_in_float32():
    h = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    direction = torch.randn(256, generator=torch.Generator().manual_seed(1)).bfloat16()
    r = direction.float() / direction.float().norm()
    exact = h.float() - (h.float() @ r)[:, None] * r
    assert torch.equal(ablate(h, direction, 1.0), exact.bfloat16())


def test_a_random_control_has_the_same_norm_and_another_direction(llama):
    vector = vector_for(llama)
    control = random_like(vector, 3)
    assert control.norm == pytest.approx(vector.norm)
    assert abs(torch.cosine_similarity(control.direction, vector.direction, dim=0)) < 0.9


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_prompts_that_begin_alike_run_that_beginning_in_one_row_unless_hooks_act(family):
    model, seen = tiny_model(family, sliding_window=512), []
    states = torch.cat([torch.stack(tape(model, {"input_ids": encode(model.tokenizer, [p]).input_ids}).residuals, 1)
                        [:, :, -4:] for p in PROMPTS])  # [prompt, layer, 4, d_model]  # fmt: skip
    forward = model.decoder.embed_tokens.forward
    model.decoder.embed_tokens.forward = lambda ids: seen.append(tuple(ids.shape)) or forward(ids)
    assert torch.allclose(residuals(model, PROMPTS, last=4), states, atol=2e-5)
    whole = encode(model.tokenizer, PROMPTS).input_ids.shape[1]
    (one, first), (rows, rest) = seen
    assert (one, rows) == (1, 3) and first + rest == whole and rest >= 4
    seen.clear()
    with edit(model, [("block_input", 1, lambda h: None)]):
        assert torch.allclose(residuals(model, PROMPTS, last=4), states, atol=2e-5)
    assert seen == [(3, whole)]
