import pytest
import torch
import transformers
from conftest import byte_tokenizer, tiny_hf, tiny_model

from steerutils import (
    ModelError,
    block_at,
    capture,
    edit,
    encode,
    in_format,
    load_model,
    resume,
    self_check,
    tape,
    wrap_model,
)
from steerutils.models import SITES, sum_of_sources
from steerutils.prompts import chat_text, template_length

PROMPTS = ["Why?", "How do I bake bread?", "Name a river."]


def batch_of(model, prompts=PROMPTS):
    return encode(model.tokenizer, prompts)


@torch.no_grad()
def test_sources_sum_to_the_final_residual(any_model):
    total, final = sum_of_sources(any_model, batch_of(any_model, ["Why is it so?"]).input_ids)
    assert (total - final).norm() < 1e-5 * final.norm()


@torch.no_grad()
@pytest.mark.parametrize("site", list(SITES))
def test_every_site_can_be_read_and_written_in_every_block(any_model, site):
    inputs = batch_of(any_model).inputs()
    plain = any_model.hf(**inputs).logits
    for layer in range(any_model.n_layers):
        with edit(any_model, [(site, layer, lambda h: None)]):
            assert torch.equal(any_model.hf(**inputs).logits, plain)
        noise = torch.randn(any_model.config.intermediate_size)
        with edit(any_model, [(site, layer, lambda h, noise=noise: h + noise[: h.shape[-1]])]):
            assert not torch.allclose(any_model.hf(**inputs).logits, plain, atol=1e-4)
    assert torch.equal(any_model.hf(**inputs).logits, plain), "an edit outlived its with block"


@torch.no_grad()
def test_block_input_is_the_residual_stream_hugging_face_reports(any_model):
    inputs = batch_of(any_model).inputs()
    with capture(any_model, "block_input") as taken:
        states = any_model.hf(**inputs, output_hidden_states=True).hidden_states
    for layer in range(any_model.n_layers):
        assert torch.equal(taken[layer], states[layer])


@torch.no_grad()
def test_resuming_at_any_block_gives_the_same_logits(any_model):
    inputs = batch_of(any_model).inputs()
    plain = any_model.hf(**inputs).logits
    taken = tape(any_model, inputs)
    for layer in range(any_model.n_layers):
        logits = any_model.unembed(resume(any_model, taken, layer, taken.residuals[layer]))
        assert torch.allclose(logits, plain, atol=1e-5)


@torch.no_grad()
def test_the_last_column_of_a_batch_is_unembedded_in_one_product(any_model):
    """A product with a slice of columns would copy, or read, the whole vocabulary once a prompt."""
    given = []
    hook = any_model.hf.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        logits = any_model.hf(**batch_of(any_model).inputs(), use_cache=False, logits_to_keep=1).logits
    finally:
        hook.remove()
    assert len(given) == 1 and given[0].shape[1] == 1 and given[0].is_contiguous()
    assert torch.allclose(logits, any_model.hf(**batch_of(any_model).inputs()).logits[:, -1:], atol=1e-5)


@torch.no_grad()
def test_logits_of_a_few_words_are_those_of_the_whole_vocabulary(any_model):
    residual = 3 * torch.randn(2, 4, any_model.d_model, generator=torch.Generator().manual_seed(0))
    words = torch.arange(24).reshape(2, 4, 3) * 5
    few = any_model.unembed(residual, words)
    assert few.shape == words.shape and few.std() > 0.05
    torch.testing.assert_close(few, any_model.unembed(residual).gather(-1, words), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(any_model):
    together = any_model.hf(**batch_of(any_model).inputs()).logits[:, -1]
    for row, prompt in zip(together, PROMPTS):
        alone = any_model.hf(batch_of(any_model, [prompt]).input_ids).logits[0, -1]  # positions left to Hugging Face
        assert torch.allclose(row, alone, atol=2e-5)


def test_parameters_are_frozen_and_the_model_is_in_eval_mode(any_model):
    assert not any_model.hf.training
    assert not any(p.requires_grad for p in any_model.hf.parameters())


def test_train_mode_is_refused():
    model = tiny_model("llama")
    model.hf.train()
    with pytest.raises(ModelError, match=r"train mode.*model.hf.eval\(\)"), edit(model, []):
        pass


def test_the_self_check_notices_a_site_without_effect(monkeypatch):
    model = tiny_model("llama")
    dead = torch.nn.Linear(32, 32)
    real = type(model).site
    monkeypatch.setattr(
        type(model),
        "site",
        lambda self, name, layer=0: (dead, "in") if name == "heads" else real(self, name, layer),
    )
    with pytest.raises(ModelError, match="site heads had no effect"):
        self_check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_self_check_notices_a_component_that_it_does_not_know(monkeypatch, dtype):
    hf = tiny_hf("llama").to(dtype)
    model = wrap_model(hf, byte_tokenizer(), "tiny", "0")  # as it is, it passes
    block = model.blocks[1]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda h, **kw: forward(h, **kw) + 0.1 * h)
    with pytest.raises(ModelError, match="components miss the final residual"):
        self_check(model)


def test_an_unknown_architecture_says_what_is_supported():
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="'gpt_neox', which is not supported.*Llama"):
        wrap_model(hf, byte_tokenizer(), "neox", "0")


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(ModelError, match="no chat template.*instruct"):
        wrap_model(tiny_hf("llama"), byte_tokenizer(template=None), "base", "0")


def test_a_layer_or_site_out_of_range_says_the_range(llama):
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        llama.site("q", 4)
    with pytest.raises(ValueError, match="unknown site.*block_input"):
        llama.site("resid_pre", 0)


def test_template_length_counts_the_tokens_after_the_prompt(llama):
    text = chat_text(llama.tokenizer, "PROMPT")
    after = text.split("PROMPT")[1]
    assert template_length(llama.tokenizer) == len(llama.tokenizer(after, add_special_tokens=False)["input_ids"])


def test_the_nnsight_handle_sees_and_edits_the_same_model(llama):
    import nnsight

    inputs = batch_of(llama).inputs()
    added = torch.ones(32)
    with edit(llama, [("block_input", 2, lambda h: h + added)]), torch.no_grad():
        expected = llama.hf(**inputs).logits
    with torch.no_grad(), llama.nnsight.trace(inputs["input_ids"], attention_mask=inputs["attention_mask"]):
        llama.nnsight.model.layers[1].output = llama.nnsight.model.layers[1].output + added
        logits = nnsight.save(llama.nnsight.lm_head.output)
    assert torch.allclose(logits[:, -1], expected[:, -1], atol=1e-4)


def test_a_fused_projection_is_named_in_the_error():
    config = transformers.Phi3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                     vocab_size=260, pad_token_id=0, num_key_value_heads=2)  # fmt: skip
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="queries, keys and values in one matrix, qkv_proj"):
        wrap_model(hf, byte_tokenizer(), "phi", "0")


def test_a_folder_without_a_tokenizer_says_what_cannot_be_loaded(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"transformers cannot load {tmp_path}"):
        load_model(str(tmp_path))


def test_a_block_is_given_by_its_number_or_by_the_depth(llama):
    assert [block_at(llama, layer, 0.6) for layer in (-1, 0, 3)] == [2, 0, 3]
    for wrong in (-2, 4):
        with pytest.raises(ValueError, match=f"layer {wrong} is out of range.*blocks 0 to 3.*60% of the depth"):
            block_at(llama, wrong, 0.6)


def test_another_number_format_is_loaded_only_where_it_is_another(llama, monkeypatch):
    asked = []
    monkeypatch.setattr("steerutils.models.load_model", lambda *given: asked.append(given) or llama)
    assert in_format(llama, "float32") is llama and not asked
    in_format(llama, "bfloat16")
    assert asked == [(llama.name, "cpu", torch.bfloat16)]
    with pytest.raises(ValueError, match="number format 'half': give one of float32, bfloat16, float16"):
        in_format(llama, "half")
