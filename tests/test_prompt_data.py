"""Checks of the published prompt sets. They need only the data files."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "steerutils" / "data" / "prompts"
SETS = ("harmful", "harmless", "hard_harmless")
SPLITS = ("train", "validation", "test")
FORMS = ("do", "write", "ask")
KEYS = {"id", "instruction", "topic", "category", "split", "form", "frame", "licence"}
SIZES = {
    "harmful": {"train": 540, "validation": 60, "test": 120},
    "harmless": {"train": 660, "validation": 60, "test": 120},
    "hard_harmless": {"train": 260, "validation": 20, "test": 40},
}
# Rows of each split in every category.
PER_CATEGORY = {
    "harmful": {"train": 45, "validation": 5, "test": 10},
    "harmless": {"train": 45, "validation": 5, "test": 10},
    "hard_harmless": {"train": 26, "validation": 2, "test": 4},
}
# Categories of harmless that only widen the train split: 20 rows each.
TRAIN_ONLY = {"health_sleep", "cars_bikes", "music_film", "parenting_play", "phones_computers", "law_civic"}
CATEGORIES = {"harmful": 12, "harmless": 18, "hard_harmless": 10}
MIN_FRAMES = {
    "train": {"do": 24, "write": 10, "ask": 10},
    "validation": {"do": 5, "write": 3, "ask": 3},
    "test": {"do": 8, "write": 4, "ask": 4},
}


def read(name):
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


ROWS = {name: read(name) for name in SETS}
EVERY = [row for name in SETS for row in ROWS[name]]
REFUSALS = json.loads((FOLDER / "refusals.json").read_text(encoding="utf-8"))


def squash(text):
    """Lower case, with letters and digits only."""
    return "".join(char for char in text.lower() if char.isalnum())


def mean_words(rows):
    return sum(len(row["instruction"].split()) for row in rows) / len(rows)


@pytest.mark.parametrize("name", SETS)
def test_counts_and_splits(name):
    rows = ROWS[name]
    assert Counter(row["split"] for row in rows) == SIZES[name]
    assert len({row["category"] for row in rows}) == CATEGORIES[name] >= 10
    per_category = defaultdict(Counter)
    for row in rows:
        per_category[row["category"]][row["split"]] += 1
    for category, counts in per_category.items():
        expected = {"train": 20} if category in TRAIN_ONLY else PER_CATEGORY[name]
        assert counts == expected, category


@pytest.mark.parametrize("name", SETS)
def test_every_line_is_well_formed(name):
    prefix = name.replace("_", "-")
    for number, row in enumerate(ROWS[name], start=1):
        assert set(row) == KEYS
        assert all(isinstance(value, str) and value for value in row.values())
        assert row["id"] == f"{prefix}-{number:04d}"
        assert row["split"] in SPLITS and row["form"] in FORMS
        assert row["licence"] == "CC0-1.0"
        assert row["frame"].count("{}") == 1
        assert row["instruction"] == row["frame"].replace("{}", row["topic"])
        assert row["instruction"][0].isupper() and row["instruction"][-1] in ".?"
        for text in (row["instruction"], row["topic"]):
            assert text == text.strip() and not re.search(r"\s\s|[\n\t{}]", text)
        assert 3 <= len(row["topic"].split()) <= 12


def test_no_duplicates_in_or_across_files():
    for key in ("id", "instruction", "topic"):
        counts = Counter(squash(row[key]) for row in EVERY)
        assert [text for text, count in counts.items() if count > 1] == []


def test_no_category_shared_between_files():
    owners = defaultdict(set)
    for name in SETS:
        for row in ROWS[name]:
            owners[row["category"]].add(name)
    assert all(len(names) == 1 for names in owners.values())


def test_no_frame_shared_between_splits_or_forms():
    places = defaultdict(set)
    for row in EVERY:
        places[squash(row["frame"])].add((row["split"], row["form"]))
    assert {frame: where for frame, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("form", FORMS)
def test_frames_tell_nothing_about_harm(split, form):
    counts = {
        name: Counter(row["frame"] for row in ROWS[name] if (row["split"], row["form"]) == (split, form))
        for name in SETS
    }
    assert len(counts["harmful"]) >= MIN_FRAMES[split][form]
    if split == "train":  # the sets differ in size there, so only the evenness can agree
        assert set(counts["harmful"]) == set(counts["harmless"])
    else:
        assert counts["harmful"] == counts["harmless"]
    assert set(counts["hard_harmless"]) <= set(counts["harmful"])
    shares = {name: {frame: n / sum(counts[name].values()) for frame, n in counts[name].items()} for name in SETS}
    for frame, share in shares["harmful"].items():
        assert abs(share - shares["harmless"][frame]) < 0.02
        assert abs(share - shares["hard_harmless"].get(frame, 0)) < (0.06 if split == "train" else 0.2)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_proportions_of_the_forms(name, split):
    rows = [row for row in ROWS[name] if row["split"] == split]
    counts = Counter(row["form"] for row in rows)
    for form, share in (("do", 0.65), ("write", 0.18), ("ask", 0.17)):
        assert abs(counts[form] / len(rows) - share) <= 0.03


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_match(split):
    means = {name: mean_words([row for row in ROWS[name] if row["split"] == split]) for name in SETS}
    assert abs(means["harmful"] - means["harmless"]) <= 0.25
    assert abs(means["harmful"] - means["hard_harmless"]) <= 0.75


def test_refusals():
    assert REFUSALS["licence"] == "CC0-1.0"
    refusals, phrases = REFUSALS["refusals"], REFUSALS["phrases"]
    assert len(refusals) == len(set(refusals)) == 12
    assert 25 <= len(phrases) == len(set(phrases)) <= 45
    assert all(phrase == phrase.lower().strip() for phrase in phrases)
    for refusal in refusals:
        assert 10 <= len(refusal.split()) <= 25
        assert any(phrase in refusal[:60].lower() for phrase in phrases), refusal
    others = [refusal for refusal in refusals if not re.match(r"I\b", refusal)]
    assert 3 <= len(others) < len(refusals) / 2


def test_no_prompt_looks_like_a_refusal():
    for row in EVERY:
        start = row["instruction"][:60].lower()
        assert not any(phrase in start for phrase in REFUSALS["phrases"])


def test_licence_file():
    assert "CC0-1.0" in (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
