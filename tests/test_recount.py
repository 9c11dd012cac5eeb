import json

import pytest
from recount import distinct, merged, recount
from results import OUT
from run_chapters import ChapterError

from steerutils.record import read_json, result_name

CHAPTER = "05-steering-circuits"
STORED = OUT / f"{result_name(CHAPTER, 'smollm2-135m-refusal')}.json"


def test_what_a_stored_run_lacks_comes_back_from_its_rows_and_nothing_else_changes(tmp_path):
    whole, path = read_json(STORED), tmp_path / STORED.name
    last = max(int(name.removeprefix("claim_")) for name in whole["values"] if name.startswith("claim_"))
    dropped = {"carried_twice", "gap_own_NTP", "cpr_random_vector", "strength", f"claim_{last}", f"verdict_{last}"}
    values = {name: value for name, value in whole["values"].items() if name not in dropped}
    path.write_text(json.dumps(whole | {"values": values}))
    new = recount(CHAPTER, path)
    found = read_json(path)
    assert {"carried_twice", "gap_own_NTP", "cpr_random_vector", whole["values"][f"claim_{last}"]} == {*new}
    assert {*new} <= {*found["recounted"]}
    assert found["rows"] == whole["rows"] and found["values"].keys() == whole["values"].keys()
    for name, value in whole["values"].items():
        assert found["values"][name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))
    before = path.read_bytes()
    assert recount(CHAPTER, path) == [] and path.read_bytes() == before


def claims(**verdicts):
    names = [name for i in range(len(verdicts)) for name in (f"claim_{i}", f"verdict_{i}")]
    return dict(zip(names, (text for pair in verdicts.items() for text in pair)))


def test_a_number_that_comes_out_differently_is_an_error_and_nothing_is_written():
    with pytest.raises(ChapterError, match="gap is 0.3 from the raw rows, but the run recorded 0.2"):
        merged({"gap": 0.2}, {"gap": 0.3})
    interval = {"value": 0.2, "low": 0.1, "high": 0.4}
    assert merged({"gap": {"value": 0.2, "low": 0.15, "high": 0.3}}, {"gap": interval}) == ({"gap": interval}, ["gap"])


def test_verdicts_are_those_of_today_but_for_one_from_answers_and_a_claim_that_is_no_longer_made_goes():
    answers = "the three methods steer alike"
    told = claims(**{"old": "holds", answers: "holds", "kept": "holds", "other": "holds"}) | {"n": 3}
    found = claims(**{answers: "not settled", "kept": "holds", "other": "not settled", "new": "does not hold"})
    values, new = merged(told, found)
    verdict_now = {answers: "holds", "kept": "holds", "other": "not settled", "new": "does not hold"}
    assert values == claims(**verdict_now) | {"n": 3} and {*new} == {"new", "other"}


def test_what_the_rows_do_not_tell_stays_blank():
    assert merged({"n": 3}, {"one": "not measured", "other": "10 %"}) == ({"n": 3, "other": "10 %"}, ["other"])
    assert merged({"gap": 0.2}, {"gap": "not measured"}) == ({"gap": 0.2}, [])


def test_prompts_that_a_run_asked_twice_count_once():
    columns = ["side", "run", "prompt", "flipped", "base", "steered", "0.1"]
    data = [
        [side, run, prompt, 1, 0.5 * of, 2.0 * of + (run == "base"), 1.0]
        for side, numbers in (("harmful", (1, 2, 1)), ("harmless", (1, 2, 3)))  # the third harmful one is the first
        for run in ("base", "steered")
        for prompt, of in enumerate(numbers)
    ]
    rows = {f"carried of {name}": {"columns": columns, "data": data} for name in ("DIM", "DIM, held out")}
    untold = dict(flipped_DIM=0.1, carried_harmful_base=0.8) | {"needed_block_+2": 0.1}
    values = dict(n_prompts=6, n_prompts_harmful=3, n_prompts_harmless=3, n_responses=12, n_wanted=3, n_positions=30)
    found = distinct({"values": values | untold | {"fell_short": "none"}, "rows": rows | {"other": {}, "by block": {}}})
    once = [row for row in data if row[:1] + row[2:3] != ["harmful", 2]]
    assert [found["rows"][name]["data"] for name in rows] == [once, once]
    assert found["rows"].keys() == {*rows, "other"}
    assert found["values"] == dict(n_prompts=5, n_prompts_harmful=2, n_prompts_harmless=3, n_responses=10, n_wanted=3,
                                   fell_short="2 harmful ones", repeated="1 harmful ones")  # fmt: skip
    assert distinct(found) is found


def test_after_prompts_went_numbers_and_verdicts_may_change_but_not_those_from_answers():
    told = {"gap": 0.2} | claims(**{"kept": "holds", "the three methods steer alike": "holds"})
    found = {"gap": 0.3} | claims(**{"kept": "not settled", "the three methods steer alike": "not settled"})
    values, new = merged(told, found, same=False)
    assert values == {"gap": 0.3} | claims(**{"kept": "not settled", "the three methods steer alike": "holds"})
    assert {*new} == {"gap", "kept"}


def test_answers_that_are_stored_say_how_far_methods_are_behind(tmp_path):
    name = result_name("06-attention-freezing", "smollm2-135m-refusal")
    whole, path = read_json(OUT / f"{name}.json"), tmp_path / f"{name}.json"
    values = {name: value for name, value in whole["values"].items() if not name.endswith("_behind")}
    path.write_text(json.dumps(whole | {"values": values}))
    new = recount("06-attention-freezing", path)
    assert {*new} == {f"{task}_{name}_behind" for task in ("induce", "bypass") for name in ("NTP", "PO")}
    found = read_json(path)["values"]
    assert {name: found[name] for name in values} == values
    for task, name in [("induce", "NTP"), ("bypass", "NTP"), ("induce", "PO"), ("bypass", "PO")]:
        dim, other = (found[f"{task}_{who}_steered_answers"]["value"] for who in ("DIM", name))
        assert found[f"{task}_{name}_behind"]["value"] == pytest.approx(dim - other)
