"""`make results` on a tiny model: whole, resumable, without a word of any answer; and the benchmark's arithmetic."""

import json
import sys
import types
from dataclasses import replace

import bench
import numpy as np
import pandas as pd
import pytest
import results
import run_chapters
import torch
from conftest import byte_tokenizer, tiny_hf

from steerutils import (
    Graph,
    SteeringVector,
    dim_vectors,
    generate,
    instructions,
    last_logits,
    load_model,
    make_study,
    order_of,
    rank_gains,
    refusal_score,
    refusal_tokens,
    steer,
    stored_results,
    training,
)
from steerutils.ranking import verdict_table


def run(config):
    return results.ranking_results(load_model(config.model_name), config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a tiny model: its settings, its result, and where its parts lie."""
    root = tmp_path_factory.mktemp("results")
    tiny_hf("llama").save_pretrained(root / "tiny")
    byte_tokenizer().save_pretrained(root / "tiny")
    patch = pytest.MonkeyPatch()
    patch.setattr(results, "ROOT", root)
    small = dict(
        train=12, validation=2, test=3, tokens=3, pairs=3, points=2, seeds=2, patched_pairs=2, strengths=(0.5, 1),
        reach=1, steered_prompts=2,
    )  # fmt: skip
    config = results.Ranking(model_name=str(root / "tiny"), **small)
    yield config, run(config), patch
    patch.undo()


def test_a_finished_part_is_not_run_again(finished):
    config, found, patch = finished
    with patch.context() as context:
        for name in ("attribute_pairs", "layer_patching", "probe_accuracy", "unsteered"):
            context.setattr(results, name, lambda *_, **__: pytest.fail("run again"))
        again = run(config)
    assert again["values"] == json.loads(json.dumps(found["values"]))


def test_only_the_validation_grid_goes_beyond_its_strengths(finished):
    config, _, patch = finished
    reaches, judged = {}, results.judged_rows

    def noted(model, settings, prompts, tokens, path, reach):
        reaches[path.name.split("-")[1]] = reach
        return judged(model, settings, prompts, tokens, path, reach)

    with patch.context() as context:
        context.setattr(results, "judged_rows", noted)
        run(config)
    assert reaches == {"validation": config.reach, "test": 0}


def test_results_hold_every_layer_and_no_answer(finished):
    config, found, _ = finished
    values = found["values"]
    assert [row["layer"] for row in values["induce"]["test"]] == [1, 2, 3]  # block 0: see results.py
    assert len(values["bypass"]["validation"]) == 3 * 2 and len(values["bypass"]["test"][0]["verdicts"]) == 3
    assert np.array(values["attribution-1"]["in"]).shape == (3, 4)
    assert found["settings"]["pairs"] == 3 and found["versions"] and found["seconds"].keys() >= {"attribution-0"}
    model, text = load_model(config.model_name), json.dumps(found)
    answers = generate(model, instructions("harmful", "test", limit=3), 3)
    assert not any(answer in text for answer in answers if len(answer) > 2)


def test_a_study_is_put_together_from_the_stored_parts(finished):
    values = finished[1]["values"]
    graph = Graph(4, 4, 2)
    tables = [verdict_table(values["induce"][split]) for split in ("validation", "test")]
    parts = [values["attribution-0"], values["attribution-1"]]
    study = make_study(graph, parts, values["baselines"], *tables, "refusal")
    into, out = (np.array(parts[1][side]).sum(0)[1:] for side in ("in", "out"))
    np.testing.assert_allclose(study.methods["Ratio"][1], out / into, rtol=1e-6)
    np.testing.assert_allclose(study.methods["Out per edge"][1], out / parts[1]["edges_out"][1:], rtol=1e-6)
    assert study.test.shape == (3, 3) and study.methods["probe"].shape == (2, 3)
    assert rank_gains(study.test.mean(1)).sum() == pytest.approx(2 - 2**-2)


def test_a_stored_ranking_is_taken_up_and_only_what_is_new_is_run(finished, monkeypatch, tmp_path):
    config, found, _ = finished
    found = json.loads(json.dumps(found))
    monkeypatch.setattr(results, "ROOT", tmp_path)  # no parts of an unfinished run there
    monkeypatch.setattr(results, "OUT", tmp_path / "stored")
    found["seconds"]["induce-validation"] = 300
    results.write_json(tmp_path / "stored" / "ranking-tiny.json", found)
    asked, verdicts = [], results.steered_verdicts

    def counted(model, settings, prompts, tokens, path=None):
        known = results.read_json(path)["rows"] if path and path.exists() else {}
        new = [(v, s) for v, s in settings if results.place_of(v.layer, v.method, v.norm, s) not in known]
        asked.extend((v.layer, abs(s)) for v, s in new)
        return verdicts(model, settings, prompts, tokens, path)

    monkeypatch.setattr(results, "steered_verdicts", counted)
    seeds, attribution = [], results.attributions
    monkeypatch.setattr(results, "attributions", lambda m, c, seed, w: seeds.append(seed) or attribution(m, c, seed, w))
    again = run(replace(config, seeds=3))
    assert not asked and seeds == [2]
    assert again["values"]["induce"] == found["values"]["induce"]
    assert again["seconds"]["attribution-0"] == found["seconds"]["attribution-0"]
    groups, at_once = [], results.together
    monkeypatch.setattr(
        results, "together", lambda m, group, *rest: groups.append(len(group)) or at_once(m, group, *rest)
    )
    run(replace(config, pairs=2))
    assert not groups  # Total's order is the same by two pairs
    monkeypatch.setattr(results, "order_of", lambda scores: order_of(scores)[::-1])
    run(replace(config, pairs=2))
    assert groups == [3, 3]  # Total's in another order, for two tasks; not all blocks
    monkeypatch.setattr(results, "order_of", order_of)
    wider = run(replace(config, strengths=(0.5, 1, 2), reach=2))
    on_validation = [(layer, 2) for layer in (1, 2, 3)] * len(results.TASKS)
    assert all(strength == 2 for _, strength in asked) and len(asked) >= len(on_validation)
    assert len(wider["values"]["induce"]["validation"]) == 3 * 3
    known = [row for row in wider["values"]["induce"]["validation"] if row["strength"] < 2]
    assert known == found["values"]["induce"]["validation"]
    narrower = run(replace(config, strengths=(1,)))["seconds"]
    assert narrower["induce-validation"] == 150  # of the rows that it uses
    asked.clear()
    run(replace(config, grid_dtype="bfloat16", validation=1))  # beside the stored one of another format
    assert {layer for layer, _ in asked} == {1, 2, 3}


def test_a_block_is_tried_more_strongly_until_its_answers_fall_apart(llama):
    one, two = (SteeringVector(torch.ones(32), layer, "m", llama.name, llama.revision) for layer in (1, 2))
    settings = [(one, -0.5), (one, -1.0), (two, -1.0), (two, -0.5)]
    rows = [(1, -0.5, "ii"), (1, -1.0, "ci"), (2, -0.5, "cc"), (2, -1.0, "ii")]
    table = verdict_table([dict(layer=i, strength=s, verdicts=v, scores=[0.0, 0.0]) for i, s, v in rows])
    assert results.farther(settings, table, reach=2.0) == [(one, -2.0)]  # half of block 1's hold together
    assert results.farther(settings, table, reach=1.9) == []


def test_answers_in_another_number_format_are_checked_against_float32(finished, monkeypatch, tmp_path):
    config, found, _ = finished
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "OUT", tmp_path / "stored")
    half = run(replace(config, grid_dtype="bfloat16", seeds=1))
    both = half["values"]["induce"]["float32 check"]
    assert both.keys() == {"float32", "bfloat16"}
    assert [row["layer"] for row in both["bfloat16"]["rows"]] == [1, 2, 3]
    exact = {row["layer"]: row for row in found["values"]["induce"]["validation"] if row["strength"] == 1}
    assert all(row["verdicts"] == exact[row["layer"]]["verdicts"] for row in both["float32"]["rows"])
    assert half["values"]["induce"]["test"][0]["scores"] != found["values"]["induce"]["test"][0]["scores"]


def test_steering_scores_add_up_to_the_change_of_the_first_tokens_score(finished):
    """Completeness: with many points the signed sums over what leaves the steering node are exact."""
    config, found, _ = finished
    model = load_model(config.model_name)
    taken = [results.residuals(model, instructions(s, "train", limit=4), last=1)
             for s in ("harmful", "harmless")]  # fmt: skip
    vector, prompts = dim_vectors(model, *taken)[2], instructions("harmless", "test", limit=2)
    rows = results.steering_scores(model, [(vector, 1.0)], prompts, 200)
    tokens = refusal_tokens(model.tokenizer)
    before = refusal_score(last_logits(model, prompts), tokens)
    with steer(model, vector, 1.0):
        after = refusal_score(last_logits(model, prompts), tokens)
    np.testing.assert_allclose(rows["signed"][0], (after - before).numpy(), rtol=0.05, atol=2e-3)
    assert (np.array(rows["absolute"]) >= np.abs(rows["signed"])).all()
    assert np.array(found["values"]["bypass"]["steering contrast"]["absolute"]).shape == (3, 2)


def test_graph_measures_are_those_of_the_ranking_without_a_grid(finished, monkeypatch, tmp_path):
    config, found, _ = finished
    monkeypatch.setattr(results, "ROOT", tmp_path)  # nothing is taken from the ranking's parts
    for name in ("steered_verdicts", "generate", "unsteered"):
        monkeypatch.setattr(results, name, lambda *_, **__: pytest.fail("a base model is not steered"))
    alone = results.graph_results(load_model(config.model_name), config)
    for part in ("attribution-0", "attribution-1", "baselines"):
        assert alone["values"][part] == json.loads(json.dumps(found["values"][part]))
    assert alone["settings"] == {name: getattr(config, name) for name in results.GRAPH} | {
        "metric": "refusal score of the next token", "template": byte_tokenizer().chat_template}  # fmt: skip
    scores, model = alone["values"]["metric"], load_model(config.model_name)
    prompts = instructions("harmful", "train", limit=config.train)
    direct = refusal_score(last_logits(model, prompts), refusal_tokens(model.tokenizer))
    np.testing.assert_allclose(scores["harmful"], direct.numpy(), rtol=1e-3, atol=1e-4)


def tiny_on_cpu(device):
    return types.SimpleNamespace(n_layers=5, revision="r", device=torch.device(device))


def test_graph_measures_are_made_only_when_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(results, "make", lambda name, asked, revision, work: made.append((name, asked)))
    monkeypatch.setattr(results, "load_model", lambda name, device: tiny_on_cpu(device))
    monkeypatch.setattr(sys, "argv", ["results.py", "models/base", "--only", "graph", "--pairs", "7"])
    results.main()
    assert [name for name, _ in made] == ["graph-base"] and made[0][1]["pairs"] == 7
    made.clear()
    monkeypatch.setattr(results, "find", lambda name: types.SimpleNamespace(revision="r"))
    monkeypatch.setattr(results, "ranking_results", lambda *_: {})
    monkeypatch.setattr(results, "write_bytes", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["results.py", "models/base"])
    results.main()
    assert "graph-base" not in dict(made) and "trained-base" in dict(made)


def test_the_stored_graph_measures_have_what_the_chapter_reads():
    stored = stored_results("graph-gemma-3-270m")
    part, n_pairs = stored["values"]["attribution-0"], stored["settings"]["pairs"]
    for side in ("in", "out"):
        assert np.array(part[side]).shape == (n_pairs, 18) and len(part[f"edges_{side}"]) == 18
        assert np.isfinite(part[side]).all() and (np.array(part[side]) >= 0).all()
    assert np.array(part["layer_patching"]).shape == (stored["settings"]["patched_pairs"], 18)
    seeds = stored["settings"]["seeds"]
    assert all(np.array(rows).shape == (seeds, 18) for rows in stored["values"]["baselines"].values())
    assert stored["values"]["metric"].keys() == {"harmless", "harmful"}
    assert stored["settings"]["template"].count("Question: ") == 7


def test_training_at_full_size_learns_from_other_prompts_than_dim(finished, monkeypatch, tmp_path):
    config, _, _ = finished
    model, seen = load_model(config.model_name), []
    monkeypatch.setenv("STEERUTILS_CACHE", str(tmp_path))
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def pairs(model, harmful, harmless, complying, per_side, bypass, tokens, seed, path):
        seen.append((harmful, harmless, complying, bypass, path))
        rows = [
            (p, f"Yes {p}", "I can't.", sign, "x") for sign in (1, -1) for p in (harmful if sign < 0 else harmless)[:5]
        ]
        return pd.DataFrame(rows, columns=["prompt", "wanted", "unwanted", "sign", "source"])

    monkeypatch.setattr(training, "preference_pairs", pairs)
    settings = results.Trained(1, per_side=128, held_out=1, tokens=4, epochs=1, learning_rate=0.05, for_dim=6)
    found = results.trained_results(model, settings)
    harmful, harmless, complying, bypass, path = seen[0]
    train = {side: instructions(side, "train") for side in ("harmful", "harmless")}
    assert harmful == train["harmful"][6:] and harmless == train["harmless"][6:]
    assert complying is model and bypass.layer == 1 and bypass.method == "DIM"  # a model without a twin
    assert found["settings"]["per_side"] == 4 and found["settings"]["source"] == "x"  # four fifths of five
    assert {len(row["direction"]) for row in found["values"].values()} == {model.d_model}
    assert list(found["values"]) == ["NTP", "PO", "NTP, own answers", "PO, own answers"]  # with DIM's help and without
    assert len(seen) == 2 and seen[1][2] is model and seen[1][3] is None and seen[1][4] != path


def test_a_stored_result_is_made_again_only_for_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "OUT", tmp_path)
    made = []

    def work():
        made.append(1)
        return {"values": {"n": len(made)}}

    for settings, revision, times in (
        ({"a": (1,)}, "r", 1),
        ({"a": (1,)}, "r", 1),
        ({"a": (2,)}, "r", 2),
        ({"a": (2,)}, "s", 3),
    ):
        results.make("x-m", settings, revision, work)
        assert len(made) == times
    stored = json.loads((tmp_path / "x-m.json").read_text())
    assert stored["values"] == {"n": 3} and stored["versions"] and stored["seconds"] >= 0
    assert stored["asked"] == {"a": [2]} and "parameters" not in stored  # what was asked for stands in one place


def test_a_full_size_run_is_not_replaced_by_a_smaller_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "OUT", tmp_path)
    for profile, found in (("book", 1), ("full", 2), ("book", 2)):
        results.make("x-m", {"profile": profile, "model": "m"}, "r", lambda: {"values": {"n": found}})  # noqa: B023
        assert json.loads((tmp_path / "x-m.json").read_text())["values"] == {"n": found}


def test_vectors_from_own_answers_are_left_out_where_they_cannot_be_had(finished, monkeypatch, tmp_path):
    config, _, _ = finished
    model = load_model(config.model_name)
    monkeypatch.setenv("STEERUTILS_CACHE", str(tmp_path))

    def learn(model, harmful, harmless, settings, per_side, bypass, answers, folder):
        if bypass is None:
            raise training.TrainingError("none of its answers comply")
        history = pd.DataFrame({"epoch": [0, 1]})
        return {"NTP": bypass, "PO": bypass}, {"NTP": history, "PO": history}, pd.DataFrame({"source": ["x"] * 10})

    monkeypatch.setattr(results, "train_vectors", learn)
    found = results.trained_results(model, results.Trained(1, for_dim=6))
    assert list(found["values"]) == ["NTP", "PO"] and found["settings"]["per_side"] == 4


def test_the_chapters_of_a_run_are_asked_for_in_their_profile_and_personality_without_the_adapter(monkeypatch):
    made = []
    monkeypatch.setattr(results, "make", lambda name, asked, revision, work: made.append((name, asked["profile"])))
    monkeypatch.setattr(results, "find", lambda name: types.SimpleNamespace(revision="r"))
    monkeypatch.setattr(results, "load_model", lambda name, device: tiny_on_cpu(device))
    for profile, size in (([], "full"), (["--profile", "book"], "book")):
        made.clear()
        only = ["--only", "01-steering-vectors", "04-personality", "06-attention-freezing"]
        monkeypatch.setattr(sys, "argv", ["results.py", "smollm2-135m-refusal", *only, *profile])
        results.main()
        assert made == [("01-steering-vectors-smollm2-135m-refusal", "book"),
                        ("06-attention-freezing-smollm2-135m-refusal", size),
                        ("04-personality-smollm2-135m", size)]  # fmt: skip


def test_chapters_with_whole_answers_are_asked_for_in_the_format_of_the_rankings(monkeypatch):
    ran, made = [], {}
    run = lambda *given, **more: ran.append((given[0], more))  # noqa: E731
    monkeypatch.setattr(results, "chapter_results", run)
    monkeypatch.setattr(results, "make", lambda name, asked, revision, work: (made.update({name: asked}), work()))
    monkeypatch.setattr(results, "find", lambda name: types.SimpleNamespace(revision="r"))
    monkeypatch.setattr(results, "load_model", lambda name, device: tiny_on_cpu(device))
    chapters = ["04-personality", "06-attention-freezing", "07-ov-decomposition"]
    only = ["--only", *chapters, "--grid_dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["results.py", "some/model", *only])
    results.main()
    in_bfloat16 = {"answer_dtype": "bfloat16"}
    assert ran == [("06-attention-freezing", in_bfloat16), ("07-ov-decomposition", {}), ("04-personality", in_bfloat16)]
    assert made["04-personality-model"] == {"profile": "full", "model": "some/model", "answer_dtype": "bfloat16"}
    assert made["06-attention-freezing-model"]["answer_dtype"] == "bfloat16"
    assert "answer_dtype" not in made["07-ov-decomposition-model"]  # it gives no whole answers


def test_a_result_says_how_many_of_its_parts_were_there_before_it_ran(tmp_path, monkeypatch):
    """Their seconds are not among those of the run that finished it. What a chapter does is not asked here."""
    given = {}
    monkeypatch.setattr(results, "ROOT", run_chapters.ROOT)
    monkeypatch.setattr(results, "parts_of", lambda name: tmp_path)
    monkeypatch.setattr(results, "execute", lambda *args: (given.update(args[2]), (None, 1.0))[1])
    for name in ("records", "rows"):
        monkeypatch.setattr(results, name, lambda path: {})
    asked = "05-steering-circuits", "m", "full", "cpu"
    assert results.chapter_results(*asked)["parts_there"] == 0
    for i in range(2):
        (tmp_path / "05-steering-circuits").mkdir(exist_ok=True)
        np.savez(tmp_path / "05-steering-circuits" / f"{i}.npz", x=i)
    assert results.chapter_results(*asked)["parts_there"] == 2
    assert given["folder"] == str(tmp_path / "05-steering-circuits")
    assert results.chapter_results("02-attribution-graphs", "m", "book", "cpu")["parts_there"] == 0


def test_results_that_nobody_made_say_how_to_make_them():
    with pytest.raises(ValueError, match="make results MODEL="):
        stored_results("ranking-no-such-model")


def test_a_benchmark_over_its_limit_is_named():
    assert bench.over_limits({"response_ratio": 1.5, "circuit_ratio": 3.0}) == []
    (told,) = bench.over_limits({"response_ratio": 1.2, "circuit_ratio": 3.01})
    assert told.startswith("one circuit patched exactly: 3.01")


def test_tasks_take_turns_and_medians_are_kept():
    calls = []
    found = bench.interleaved(3, one=lambda: calls.append("one"), other=lambda: calls.append("other"))
    assert calls == ["one", "other"] * 4 and set(found) == {"one", "other"}


def test_the_bare_pass_and_eap_ig_are_the_same_work_on_any_shape():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = bench.random_llama(**shape, num_key_value_heads=2, vocab_size=100)
    found = bench.attribution_cost(model, 2, 6, rounds=1)
    assert found["ratio"] == pytest.approx(found["eap_ig"] / (5 * found["bare"]))
    assert bench.memory_above_model("bare", 4, 64) > 50 * 2**20  # activations and logits of 256 tokens


def test_responses_and_circuits_are_timed_against_their_own_bare_passes():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = bench.random_llama(**shape, num_key_value_heads=2, vocab_size=100)
    found = bench.response_cost(model, rounds=1, examples=2, prompt=4, response=3)
    assert found["layer"] == 1
    assert found["attribution_ratio"] == pytest.approx(found["attribution"] / (10 * found["bare_part"]))
    assert found["circuit_ratio"] == pytest.approx(found["circuit"] / found["bare_forward"])
