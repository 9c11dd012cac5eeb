"""Exact patching of whole circuits, against a run that rebuilds every reader's residual stream by itself."""

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_hf

from steerutils import (
    Batch,
    SteeringVector,
    encode,
    layer_patching,
    pair_contrast,
    patch_edges,
    share_of_all,
    steering_contrast,
    wrap_model,
)
from steerutils.circuits import circuit_logits
from steerutils.models import capture, resume
from steerutils.subgraphs import CircuitError, complement, random_circuit

PROMPTS, ANSWERS = ["How do I bake it?", "Name a fruit now, please"], ["Yes, so", "No"]
KEEP = 8


def contrast_of(model, layer=1, prompts=PROMPTS, answers=ANSWERS):
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(5))
    vector = SteeringVector(direction, layer, "toy", model.name, model.revision)
    return steering_contrast(model, encode(model.tokenizer, prompts, answers), vector, 1.0, keep=KEEP)


def one(model, contrast, circuit):
    return next(iter(circuit_logits(model, contrast, [circuit])))


@torch.no_grad()
def ends(model, contrast):
    """Logits of the clean and the corrupted run."""
    first = contrast.graph.first
    return [model.unembed(resume(model, contrast.tape, first, h)[:, -contrast.keep :])
            for h in (contrast.clean, contrast.corrupted)]  # fmt: skip


@torch.no_grad()
def literal(model, contrast, circuit):
    """The same by definition: each reader adds up its own residual stream, every part from one run or the other."""
    graph, n_heads, dim = contrast.graph, model.n_heads, model.blocks[0].self_attn.head_dim
    with capture(model, "heads") as base_heads, capture(model, "mlp_write") as base_mlps:
        resume(model, contrast.tape, graph.first, contrast.clean)
    heads, mlps = {}, {}

    def stream(reader):
        here, reach = circuit[:, reader], graph.reach[reader]
        x = contrast.corrupted if here[0] else contrast.clean
        for layer in graph.layers:
            if graph.heads(layer).stop > reach:
                break
            mixed = base_heads[layer].clone()
            for h in range(n_heads):
                if here[graph.heads(layer).start + h]:
                    mixed[..., h * dim : (h + 1) * dim] = heads[layer][..., h * dim : (h + 1) * dim]
            block = model.blocks[layer]
            written = block.self_attn.o_proj(mixed)
            x = x + (block.post_attention_layernorm(written) if model.has_post_norms else written)
            if graph.mlp(layer) < reach:
                x = x + (mlps if here[graph.mlp(layer)] else base_mlps)[layer]
        return x

    for layer in graph.layers:
        block, projected = model.blocks[layer], {}
        for kind, name in (("Q", "q_proj"), ("K", "k_proj"), ("V", "v_proj")):
            place, parts = graph.readers(layer, kind), []
            for i, reader in enumerate(range(place.start, place.stop)):
                whole = getattr(block.self_attn, name)(block.input_layernorm(stream(reader)))
                parts.append(whole[..., i * dim : (i + 1) * dim])
            projected[name] = torch.cat(parts, -1)
        with ExitStack() as stack:
            for name, value in projected.items():
                module = getattr(block.self_attn, name)
                stack.enter_context(mock.patch.object(module, "forward", lambda _, value=value: value))
            taken = stack.enter_context(capture(model, "heads", [layer]))
            block(contrast.clean, **contrast.tape.arguments[layer])
        heads[layer] = taken[layer]
        middle = stream(graph.readers(layer, "MLP").start)
        if model.has_post_norms:
            mlps[layer] = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(middle)))
        else:
            mlps[layer] = block.mlp(block.post_attention_layernorm(middle))
    return model.unembed(stream(graph.n_readers - 1)[:, -contrast.keep :])


@pytest.mark.parametrize("layer", [0, 2])
def test_all_edges_give_the_steered_run_and_none_the_base_run(any_model, layer):
    contrast = contrast_of(any_model, layer)
    base, steered = ends(any_model, contrast)
    none, full = circuit_logits(any_model, contrast, [contrast.graph.edges & False, contrast.graph.edges])
    assert (steered - base).abs().max() > 0.5
    torch.testing.assert_close(none, base, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full, steered, atol=1e-5, rtol=1e-5)


def test_all_edges_of_a_prompt_pair_with_shared_first_tokens_give_the_corrupted_run(any_model):
    contrast = pair_contrast(any_model, ["Say a b", "Say c d"], ["Say e b", "Say f d"])
    clean, corrupted = ends(any_model, contrast)
    none, full = circuit_logits(any_model, contrast, [contrast.graph.edges & False, contrast.graph.edges])
    torch.testing.assert_close(none, clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full, corrupted, atol=1e-5, rtol=1e-5)


def test_random_circuits_of_many_edges_are_a_literal_patch(any_model):
    contrast, rng = contrast_of(any_model), np.random.default_rng(0)
    base, _ = ends(any_model, contrast)
    shares = np.linspace(0.05, 0.95, 10).tolist() * 2
    circuits = [contrast.graph.edges & (rng.random(contrast.graph.edges.shape) < share) for share in shares]
    for circuit, found in zip(circuits, circuit_logits(any_model, contrast, circuits)):
        expected = literal(any_model, contrast, circuit)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (expected - base).abs().max() > 1e-2 or circuit.sum() < 60


def test_a_contrast_with_words_reads_only_their_logits(any_model):
    contrast = contrast_of(any_model)
    graph = contrast.graph
    words = torch.tensor([5, 77, 5]) + torch.arange(2 * KEEP).reshape(2, KEEP, 1)  # others at each place
    narrow = replace(contrast, words=words)
    circuits = [random_circuit(graph, graph.n_edges // 3, seed) for seed in range(2)]
    every = circuit_logits(any_model, contrast, circuits)
    for found, logits in zip(circuit_logits(any_model, narrow, circuits), every, strict=True):
        torch.testing.assert_close(found, logits.gather(-1, words), atol=1e-4, rtol=1e-4)
    edges = np.argwhere(graph.edges)[::40]
    found = patch_edges(any_model, narrow, lambda logits: (logits[..., 0] - logits[..., 1]).sum(-1), edges)

    def whole(logits):
        taken = logits.gather(-1, words.expand(*logits.shape[:-1], -1))
        return (taken[..., 0] - taken[..., 1]).sum(-1)

    expected = patch_edges(any_model, contrast, whole, edges)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4)


def score(logits):
    return (logits[..., 5] - logits[..., 77]).sum(-1)


def test_one_edge_from_the_steering_node_with_all_that_follows_is_the_patched_edge(any_model):
    contrast = contrast_of(any_model)
    edges = np.stack([np.zeros(contrast.graph.n_readers, int), np.arange(contrast.graph.n_readers)], 1)
    later, circuits = contrast.graph.edges.copy(), []
    later[0] = False
    for _, reader in edges:
        circuits.append(later.copy())
        circuits[-1][0, reader] = True
    base = score(ends(any_model, contrast)[0])
    found = [(score(logits) - base).numpy() for logits in circuit_logits(any_model, contrast, circuits)]
    expected = patch_edges(any_model, contrast, score, edges)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_all_edges_but_one_is_that_edge_patched_back_in_the_steered_run(any_model):
    contrast = contrast_of(any_model)
    back = replace(contrast, clean=contrast.corrupted, corrupted=contrast.clean, clean_run=None)
    edges = np.argwhere(contrast.graph.edges)[::9]
    circuits = [contrast.graph.edges.copy() for _ in edges]
    for circuit, edge in zip(circuits, edges):
        circuit[tuple(edge)] = False
    whole = score(ends(any_model, contrast)[1])
    found = [(score(logits) - whole).numpy() for logits in circuit_logits(any_model, contrast, circuits)]
    expected = patch_edges(any_model, back, score, edges)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_padding_and_batch_change_nothing(any_model):
    contrast = contrast_of(any_model)
    circuit = random_circuit(contrast.graph, 100, seed=1)
    both = one(any_model, contrast, circuit)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        alone = contrast_of(any_model, prompts=[prompt], answers=[answer])
        assert alone.clean.shape[1] < contrast.clean.shape[1]
        found = one(any_model, replace(alone, keep=len(answer) + 1), circuit)
        start = KEEP - max(map(len, ANSWERS)) - 1
        torch.testing.assert_close(both[row, start : start + len(answer) + 1], found[0], atol=1e-5, rtol=1e-4)


def test_sources_count_only_where_they_are_asked_to(llama):
    contrast = contrast_of(llama)
    base, steered = ends(llama, contrast)
    everywhere = torch.ones(contrast.clean.shape[:2], dtype=torch.bool)
    last = everywhere & False
    last[:, -1] = True
    for positions, expected in ((everywhere, steered), (~everywhere, base)):
        found = one(llama, replace(contrast, positions=positions), contrast.graph.edges)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found = one(llama, replace(contrast, positions=last), contrast.graph.edges)
    torch.testing.assert_close(found[:, :-1], base[:, :-1], atol=1e-5, rtol=1e-5)
    assert (found[:, -1] - base[:, -1]).abs().max() > 0.1


def test_a_circuit_and_its_complement_leave_no_trace_in_each_others_run(llama):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.hf.modules())

    contrast, there = contrast_of(llama), hooks()  # other tests may have traced the model
    circuit = random_circuit(contrast.graph, 60, seed=0)
    before = one(llama, contrast, circuit)
    pair = list(circuit_logits(llama, contrast, [complement(contrast.graph, circuit), circuit]))
    assert torch.equal(pair[1], before)  # nothing of the run before is left in the shared room
    assert hooks() == there
    assert not before.requires_grad


def test_a_circuit_of_another_graph_is_refused(llama):
    contrast = contrast_of(llama)
    with pytest.raises(CircuitError, match="another model or another steering layer"):
        one(llama, contrast, contrast_of(llama, layer=2).graph.edges)
    with pytest.raises(CircuitError, match="no edges"):
        one(llama, contrast, ~contrast.graph.edges)


def test_memory_holds_the_changes_once_and_readers_of_one_block(llama):
    """No tensor of the run is larger than the room for all sources' changes."""
    ids = torch.ones(1, 64, dtype=torch.long)
    direction = torch.ones(llama.d_model)
    vector = SteeringVector(direction, 0, "toy", llama.name, llama.revision)
    contrast = steering_contrast(llama, Batch(ids, ids, 60), vector, keep=1)
    largest, room = [], contrast.clean.numel() * (1 + contrast.graph.n_sources)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t))
            return out

    with Watch():
        one(llama, contrast, contrast.graph.edges)
    assert contrast.clean.numel() * contrast.graph.n_readers > room >= max(largest)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_and_a_metric_of_bare_logits_give_numbers(family):
    """numpy knows no bfloat16: what leaves torch is widened first."""
    model = wrap_model(tiny_hf(family).to(torch.bfloat16), byte_tokenizer(), family, "0")
    contrast = contrast_of(model)

    def metric(logits):
        return logits[:, -1, 5] - logits[:, -1, 7]

    edges = np.argwhere(contrast.graph.edges)[-4:]
    for found in (patch_edges(model, contrast, metric, edges), layer_patching(model, contrast, metric)):
        assert np.isfinite(found).all() and found.any()
    vector = SteeringVector(torch.randn(model.d_model), 1, "toy", model.name, model.revision)
    share = share_of_all(model, PROMPTS, vector, metric)
    assert np.isfinite(share).all()
