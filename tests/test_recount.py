import json

import pytest
from recount import merged, recount
from results import OUT
from run_chapters import ChapterError

from steerutils.record import read_json, result_name

STORED = OUT / f"{result_name('05-steering-circuits', 'smollm2-135m-refusal')}.json"


def test_what_a_stored_run_lacks_comes_back_from_its_rows_and_nothing_else_changes(tmp_path):
    whole, path = read_json(STORED), tmp_path / STORED.name
    last = max(int(name.removeprefix("claim_")) for name in whole["values"] if name.startswith("claim_"))
    dropped = {"carried_twice", "gap_own_NTP", "cpr_random_vector", "strength", f"claim_{last}", f"verdict_{last}"}
    values = {name: value for name, value in whole["values"].items() if name not in dropped}
    path.write_text(json.dumps(whole | {"values": values}))
    new = recount(path)
    found = read_json(path)
    assert {"carried_twice", "gap_own_NTP", "cpr_random_vector", whole["values"][f"claim_{last}"]} == {*new}
    assert {*new} <= {*found["recounted"]}
    assert found["rows"] == whole["rows"] and found["values"].keys() == whole["values"].keys()
    for name, value in whole["values"].items():
        assert found["values"][name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))
    before = path.read_bytes()
    assert recount(path) == [] and path.read_bytes() == before


def claims(**verdicts):
    names = [name for i in range(len(verdicts)) for name in (f"claim_{i}", f"verdict_{i}")]
    return dict(zip(names, (text for pair in verdicts.items() for text in pair)))


def test_a_number_that_comes_out_differently_is_an_error_and_nothing_is_written():
    with pytest.raises(ChapterError, match="gap is 0.3 from the raw rows, but the run recorded 0.2"):
        merged({"gap": 0.2}, {"gap": 0.3})
    interval = {"value": 0.2, "low": 0.1, "high": 0.4}
    assert merged({"gap": {"value": 0.2, "low": 0.15, "high": 0.3}}, {"gap": interval}) == ({"gap": interval}, ["gap"])


def test_the_verdict_of_a_run_stays_and_a_claim_that_is_no_longer_made_goes():
    values, new = merged(claims(old="holds", kept="holds") | {"n": 3}, claims(kept="not settled", new="does not hold"))
    assert values == claims(kept="holds", new="does not hold") | {"n": 3} and new == ["new"]
