"""`make results` on a tiny model: whole, resumable, without a word of any answer; and the benchmark's arithmetic."""

import json
import re
import shutil
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import bench
import numpy as np
import pandas as pd
import pytest
import results
import run_chapters
import torch
from conftest import byte_tokenizer, tiny_hf

from steerutils import (
    ChatModel,
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
    result_name,
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
    monkeypatch.setattr(results, "make", lambda name, asked, *_, **__: made.append((name, asked)))
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

    for given, revision, source, times in (
        ({"a": [1]}, "r", "x", 1),
        ({"a": [1]}, "r", "x", 1),
        ({"a": [2]}, "r", "x", 2),
        ({}, "r", "x", 2),  # whatever there is
        ({"a": [2]}, "s", "x", 3),
        ({"a": [2]}, "s", "y", 4),
        ({}, "s", "y", 4),
    ):
        results.make("x-m", {"a": [0], "b": 7} | given, given, revision, work, source=source)
        assert len(made) == times
    stored = json.loads((tmp_path / "x-m.json").read_text())
    assert stored["values"] == {"n": 4} and stored["versions"] and stored["seconds"] >= 0
    assert stored["asked"] == {"a": [2], "b": 7} and stored["source"] == "y"
    assert "parameters" not in stored  # what was asked for stands in one place


def test_a_full_size_run_is_not_replaced_by_a_smaller_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "OUT", tmp_path)
    for profile, found in (("book", 1), ("full", 2), ("book", 2)):
        given = {"profile": profile}
        results.make("x-m", given | {"model": "m"}, given, "r", lambda: {"values": {"n": found}})  # noqa: B023
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
    monkeypatch.setattr(results, "make", lambda name, asked, *_, **__: made.append((name, asked["profile"])))
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
    keep = lambda name, asked, given, revision, work: (made.update({name: asked}), work())  # noqa: E731
    monkeypatch.setattr(results, "make", keep)
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
    ran.clear()
    monkeypatch.setattr(sys, "argv", ["results.py", "some/model", "--only", *chapters[:2], "--share", "0.5"])
    results.main()
    assert ran == [("06-attention-freezing", {}), ("04-personality", {"share": 0.5})]
    assert made["04-personality-model"] == {"profile": "full", "model": "some/model", "share": 0.5}


def test_a_result_says_how_many_of_its_parts_were_there_before_it_ran(tmp_path, monkeypatch):
    """Their seconds are not among those of the run that finished it. What a chapter does is not asked here."""
    given = {}
    monkeypatch.setattr(results, "ROOT", run_chapters.ROOT)
    monkeypatch.setattr(results, "parts_of", lambda name: tmp_path)
    monkeypatch.setattr(results, "execute", lambda *args: (given.update(args[2]), (None, 1.0))[1])
    for name in ("records", "rows"):
        monkeypatch.setattr(results, name, lambda path: {})
    asked = "05-steering-circuits", "m", "r", "full", "cpu"
    assert results.chapter_results(*asked)["parts_there"] == 0
    for i in range(2):
        (tmp_path / "05-steering-circuits").mkdir(exist_ok=True)
        np.savez(tmp_path / "05-steering-circuits" / f"{i}.npz", x=i)
    assert results.chapter_results(*asked)["parts_there"] == 2
    assert given["folder"] == str(tmp_path / "05-steering-circuits")
    assert results.chapter_results("02-attribution-graphs", "m", "r", "book", "cpu")["parts_there"] == 0


@pytest.fixture
def by_the_clock(tmp_path, monkeypatch):
    """Lets a process work on a chapter for some seconds; it ends well, with a `problem`, or by Ctrl-C. What it says of
    the seconds of all processes, and how many these are.
    """
    now = [0.0]
    monkeypatch.setattr(results, "ROOT", run_chapters.ROOT)
    monkeypatch.setattr(results, "time", types.SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(results, "parts_of", lambda name: tmp_path)
    for name in ("records", "rows"):
        monkeypatch.setattr(results, name, lambda path: {})

    def run(seconds, chapter="05-steering-circuits", model="m", revision="r", profile="full", end="", beside=None):
        def execute(*_):
            now[0] += seconds
            if beside:
                beside()
            if end == "Ctrl-C":
                raise KeyboardInterrupt
            return end, 1.0

        monkeypatch.setattr(results, "execute", execute)
        found = results.chapter_results(chapter, model, revision, profile, "cpu")
        return found["seconds_of_all"], found["processes"]

    return run


def test_a_chapters_seconds_are_those_of_all_processes_that_worked_on_it(by_the_clock, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        by_the_clock(10, end="Ctrl-C")
    with pytest.raises(run_chapters.ChapterError, match="out of memory"):
        by_the_clock(20, end="out of memory")
    assert by_the_clock(30) == (60, 3)
    assert by_the_clock(4, profile="book") == by_the_clock(4, revision="s") == (4, 1)  # they have parts of their own
    assert by_the_clock(1, model="elsewhere/m") == (61, 4)  # the same model, and what was kept of it
    inner = []
    assert by_the_clock(2, beside=lambda: inner.append(by_the_clock(3))) == (61 + 3 + 2 + 3, 6)
    assert inner == [(64, 5)]  # the other one had not ended
    assert len([*(tmp_path / "05-steering-circuits").glob("seconds-*.json")]) == 3


def test_a_chapter_without_parts_begins_from_nothing_once_it_has_ended_well(by_the_clock, tmp_path):
    chapter = "02-attribution-graphs"
    with pytest.raises(run_chapters.ChapterError):
        by_the_clock(10, chapter, profile="book", end="out of memory")
    assert len([*tmp_path.glob(f"{chapter}-seconds-*.json")]) == 1
    assert by_the_clock(30, chapter, profile="book") == (40, 2)
    assert by_the_clock(30, chapter, profile="book") == (30, 1)


def test_processes_that_end_at_once_all_add_their_seconds(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda i: results.add_seconds(tmp_path / "s.json", i), range(24))]
    assert sorted(results.read_json(tmp_path / "s.json")) == [*range(24)]
    assert sorted(map(len, found)) == [*range(1, 25)]


@pytest.fixture
def asked_again(tmp_path, monkeypatch):
    """Runs `main` with the words of a command line over a copy of the committed results; what it makes anew."""
    committed, made = results.OUT, []
    monkeypatch.setattr(results, "OUT", shutil.copytree(committed, tmp_path / "stored"))

    def stored_model(name, **_):
        path = next(path for path in committed.glob(f"*{result_name('', name)}.json"))
        return types.SimpleNamespace(
            revision=results.read_json(path)["revision"], n_layers=30, device=torch.device("cpu")
        )

    def ranked(model, config):
        stored = results.read_json(committed / f"{result_name('ranking', config.model_name)}.json")
        return made.append("ranking") or stored | {"date": "later"}

    for name in ("load_model", "find"):
        monkeypatch.setattr(results, name, stored_model)
    monkeypatch.setattr(results, "ranking_results", ranked)
    for name in ("graph", "trained", "chapter"):
        work = lambda first, *_, name=name, **__: made.append(first if name == "chapter" else name) or {}  # noqa: E731
        monkeypatch.setattr(results, f"{name}_results", work)

    def again(*words):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["results.py", *words])
        results.main()
        return list(made)

    return again


COMMITTED = {  # what is committed of a model: the words that ask for all of it
    "smollm2-135m-refusal": [],
    "models/Qwen2.5-Coder-0.5B-Instruct": [],
    "models/gemma-3-270m": ["--only", "graph"],
}


@pytest.mark.parametrize("model", COMMITTED)
def test_what_is_committed_is_not_made_again(asked_again, model):
    assert asked_again(model, *COMMITTED[model]) == []
    assert asked_again(model, *COMMITTED[model], "--profile", "book") == []
    if "/" in model:
        assert asked_again(f"elsewhere/{Path(model).name}/", *COMMITTED[model]) == []


def test_another_revision_of_a_model_is_another_model(asked_again, monkeypatch):
    stored = results.load_model("smollm2-135m-refusal")
    other = types.SimpleNamespace(**vars(stored) | {"revision": "other"})
    for name in ("load_model", "find"):
        monkeypatch.setattr(results, name, lambda name, **_: other)
    assert asked_again("smollm2-135m-refusal") == ["ranking", "trained", *results.CHAPTERS]


@pytest.mark.parametrize("model", COMMITTED)
def test_a_setting_on_the_command_line_counts(asked_again, model):
    kind = "graph" if COMMITTED[model] else "ranking"
    settings = results.read_json(results.OUT / f"{result_name(kind, model)}.json")["settings"]
    for name in ("seeds", "pairs", "patched_pairs", "train"):
        assert asked_again(model, "--only", kind, f"--{name}", str(settings[name])) == []
        assert asked_again(model, "--only", kind, f"--{name}", str(settings[name] + 1)) == [kind]
        shutil.copy(run_chapters.ROOT / "book" / "results" / f"{result_name(kind, model)}.json", results.OUT)
    if kind == "ranking":
        strengths = [str(strength) for strength in settings["strengths"]]
        assert asked_again(model, "--only", kind, "--strengths", *strengths) == []
        for words in (["--strengths", *strengths, "16"], ["--reach", "300"], ["--steered_prompts", "0"]):
            assert asked_again(model, "--only", kind, *words) == [kind]


def test_a_share_of_a_chapter_is_made_again_only_for_a_larger_one(asked_again):
    model, only = "smollm2-135m-refusal", ["--only", "04-personality"]
    assert asked_again(model, *only, "--share", "0.5") == []  # the whole is there
    path = results.OUT / "04-personality-smollm2-135m.json"
    stored = results.read_json(path)
    results.write_json(path, stored | {"asked": stored["asked"] | {"share": 0.5}})
    assert asked_again(model, *only, "--share", "0.25") == asked_again(model, *only) == []
    assert asked_again(model, *only, "--share", "0.75") == ["04-personality"]
    assert results.read_json(path)["asked"]["share"] == 0.75


def test_only_chapters_of_another_number_format_or_a_smaller_profile_are_made_again(asked_again):
    model, again = "smollm2-135m-refusal", {}
    for dtype in ("float32", "bfloat16"):  # a run is in one of them
        again[dtype] = asked_again(model, "--only", *results.CHAPTERS, "--grid_dtype", dtype)
        assert asked_again(model, "--only", *results.CHAPTERS, "--grid_dtype", dtype) == []
    assert set(again["float32"] + again["bfloat16"]) == set(again["bfloat16"]) == set(results.ANSWERING)
    path = results.OUT / "06-attention-freezing-smollm2-135m-refusal.json"
    stored = results.read_json(path)
    results.write_json(path, stored | {"asked": stored["asked"] | {"profile": "book"}})
    assert asked_again(model) == []
    assert asked_again(model, "--profile", "full") == ["06-attention-freezing"]
    assert results.read_json(path)["asked"]["profile"] == "full"


def test_03_follows_a_ranking_that_was_made_anew(asked_again):
    model, chapter = "smollm2-135m-refusal", "03-layer-ranking"
    path, ranking = (results.OUT / f"{result_name(kind, model)}.json" for kind in (chapter, "ranking"))
    older = {key: value for key, value in results.read_json(path).items() if key != "ranking"}
    results.write_json(path, older)
    assert asked_again(model) == []  # it does not say of which ranking it is
    path.unlink()
    assert asked_again(model) == [chapter] and asked_again(model) == []
    ranking.write_bytes(ranking.read_bytes() + b"\n")
    assert asked_again(model, "--only", *results.CHAPTERS) == [chapter] and asked_again(model) == []
    assert asked_again(model, "--seeds", "9") == ["ranking", chapter]


def test_every_chapter_but_the_appendix_has_full_size_results():
    assert sorted(results.CHAPTERS) == [name for name in run_chapters.chapters() if name != "A1-teaching-refusal"]


# of what a result tells in words: names, and how such names begin
IN_WORDS = {"answer", "beyond_random", "gpu_text", "grid_cost", "here_cost", "late_elsewhere", "note", "number_format",
            "recounted", "seconds_text", "shape", "source", "strengths_tried", "template", "turned_round", "what",
            "worst_side"}  # fmt: skip
BEGIN_WORDS = ("better_", "by_tau_", "claim_", "likeness_", "needed", "trained_", "verdict_")


def texts(content, name=""):
    """Every text in a result, with the innermost name that it stands under."""
    if isinstance(content, str):
        yield name, content
    elif isinstance(content, dict | list):
        for key, part in content.items() if isinstance(content, dict) else ((name, part) for part in content):
            yield from texts(part, key)


@pytest.mark.parametrize("path", sorted(results.OUT.glob("*.json")), ids=lambda path: path.stem)
def test_no_committed_result_holds_a_text_that_may_be_an_answer(path):
    stored, letters_or_digest = (
        results.read_json(path),
        re.compile("[rci]*|(sha256:)?[0-9a-f+]*"),
    )  # verdicts
    rows = [*texts(stored.pop("rows", {}))]
    others = [(name, text) for name, text in texts(stored)
              if name not in IN_WORDS and not name.startswith(BEGIN_WORDS)
              and not letters_or_digest.fullmatch(text)]  # fmt: skip
    assert [name for name, text in rows + others if len(text) > 40] == []


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


def three_blocks():
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    return bench.random_llama(**shape, num_key_value_heads=2, vocab_size=100)


def count_work(model, monkeypatch) -> Counter:
    """Counts from here on the tokens that run through each block, forward and backward, and the logits.

    Without the blocks' hooks, since no base run is remembered where one acts.
    """
    done = Counter()

    def counting(x, *args, layer, forward, **kwargs):
        done["forward", layer] += x.shape[0] * x.shape[1]
        if x.requires_grad:
            x.register_hook(lambda gradient: done.update({("backward", layer): x.shape[0] * x.shape[1]}))
        return forward(x, *args, **kwargs)

    def head(read, forward=model.hf.lm_head.forward):
        logits = forward(read)
        done["logits"] += logits.numel()
        return logits

    def unembed(self, residual, words=None, original=ChatModel.unembed):
        logits = original(self, residual, words)
        done["logits"] += 0 if words is None else logits.numel()  # those of all words went through the head
        return logits

    for layer, block in enumerate(model.blocks):
        monkeypatch.setattr(block, "forward", partial(counting, layer=layer, forward=block.forward))
    monkeypatch.setattr(model.hf.lm_head, "forward", head)
    monkeypatch.setattr(ChatModel, "unembed", unembed)
    return done


def timed_by_work(model, tokens, monkeypatch) -> dict[str, tuple[list, list, int]]:
    """Let `bench` take a batch's way through a block, forward or backward, for a second.

    What each task does after the warm-up comes in as it is timed: such ways by block, forward and backward, and logits.
    """
    done, work = count_work(model, monkeypatch), {}

    def interleaved(rounds, **tasks):
        for name, task in [*tasks.items()] * 2:  # a warm-up, and once more
            done.clear()
            task()
            ways = ([done[way, i] / tokens for i in range(model.n_layers)] for way in ("forward", "backward"))
            work[name] = *ways, done["logits"]
        return {name: sum(forward) + sum(backward) for name, (forward, backward, _) in work.items()}

    monkeypatch.setattr(bench, "interleaved", interleaved)
    return work


def test_attribution_is_timed_against_bare_passes_of_the_same_work(monkeypatch):
    model = three_blocks()
    work = timed_by_work(model, 2 * 6, monkeypatch)
    found = bench.attribution_cost(model, 2, 6, rounds=1)
    assert work == {
        "bare": ([1] * 3, [1] * 3, 200),  # logits of 2 examples' last column
        "eap": ([3] * 3, [1] * 3, 200),  # the clean and the corrupted run, and the one point
        "eap_ig": ([6] * 3, [5] * 3, 1000),  # the first of 5 points is the corrupted run
        "eap_ig_midpoint": ([7] * 3, [5] * 3, 1000),
    }
    ratios = found["eap_ratio"], found["ratio"], found["midpoint_ratio"]
    assert ratios == pytest.approx((4 / 2, 11 / 10, 12 / 10))


def test_responses_and_circuits_are_timed_against_bare_passes_of_the_same_work(monkeypatch):
    model = three_blocks()
    work = timed_by_work(model, 2 * 7, monkeypatch)
    found = bench.response_cost(model, rounds=1, examples=2, prompt=4, response=3)
    assert found["layer"] == 1
    assert work == {
        "bare_part": ([0, 1, 1], [0, 1, 1], 16),  # two words at 4 columns of 2 examples
        "attribution": ([0, 12, 12], [0, 10, 10], 160),  # the base and the steered run, and 10 points
        "bare_forward": ([1, 1, 1], [0, 0, 0], 800),
        "circuit": ([0, 1, 1], [0, 0, 0], 16),
        "circuit_alone": ([0, 2, 2], [0, 0, 0], 16),  # its base run, too
    }
    ratios = found["attribution_ratio"], found["circuit_ratio"], found["circuit_alone_ratio"]
    assert ratios == pytest.approx((44 / 40, 2 / 3, 4 / 3))


def test_peak_memory_is_that_of_the_task():
    assert bench.memory_above_model("bare", 4, 64) > 50 * 2**20  # activations and logits of 256 tokens


def test_a_benchmark_without_a_gpu_keeps_the_figures_of_one(tmp_path):
    path, before = tmp_path / "bench.json", {"sweep_ratio": 0.5, "llama_2_7b_shape": {"ratio": 2.7}}
    assert bench.with_gpu_figures({"sweep_ratio": 0.4}, path) == {"sweep_ratio": 0.4}
    path.write_text(json.dumps(before))
    assert bench.with_gpu_figures({"sweep_ratio": 0.4}, path) == before | {"sweep_ratio": 0.4}
    on_gpu = {"sweep_ratio": 0.4, "llama_2_7b_shape": {"ratio": 2.6}}
    assert bench.with_gpu_figures(on_gpu, path) == on_gpu
