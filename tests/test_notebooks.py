"""Every chapter runs at its smallest size, and records the values that are stored in tests/expected."""

import json

import expected
import papermill
import pytest
import run_chapters


@pytest.mark.parametrize("name", run_chapters.chapters())
def test_chapter_records_the_expected_values(name):
    path = expected.expected_path(name)
    assert path.exists(), f"store the values once with: python book/tools/expected.py {name}"
    stored = json.loads(path.read_text())
    assert expected.smoke_parameters(name) == stored["parameters"]
    assert expected.differences(run_chapters.records(run_chapters.run(name, "smoke")), stored["values"]) == []


def test_every_expected_file_has_its_chapter():
    stored = sorted(path.stem for path in expected.expected_path("any").parent.glob("*.json"))
    assert stored == run_chapters.chapters()


def test_a_drift_fails():
    """A drift of 0.7 % is seen at a tolerance of 0.5 %, in a value and in either end of its interval."""
    stored = {"rate": {"value": {"value": 0.5, "low": 0.4, "high": 0.6}, "rel": 0.005}}
    exact = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert expected.differences({"rate": exact}, stored) == []
    for part in exact:
        assert expected.differences({"rate": exact | {part: exact[part] * 1.003}}, stored) == []
        assert expected.differences({"rate": exact | {part: exact[part] * 1.007}}, stored)
    assert expected.differences({"rate": exact | {"value": float("nan")}}, stored)


def test_missing_and_extra_values_fail():
    stored = {"n": {"value": 3, "abs": 0}, "name": {"value": "layer 3"}}
    assert expected.differences({"n": 3, "name": "layer 3"}, stored) == []
    assert expected.differences({"n": 3}, stored) == ["name is expected but was not recorded"]
    assert expected.differences({"n": 3, "name": "layer 3", "x": 1}, stored) == ["x is recorded but not expected"]
    assert len(expected.differences({"n": 4, "name": "layer 4"}, stored)) == 2


@pytest.mark.parametrize("name", run_chapters.chapters())
def test_chapter_takes_the_common_parameters(name):
    common = {"model_name": "m", "profile": "smoke", "seed": 1, "device": "cpu"}
    assert run_chapters.check_names(run_chapters.ROOT / run_chapters.source(name), common).items() >= common.items()
    with pytest.raises(ValueError, match="unknown parameter no_such"):
        run_chapters.check_names(run_chapters.ROOT / run_chapters.source(name), {"no_such": 1})


def test_bare_papermill_stops_at_an_unknown_parameter(tmp_path):
    """Papermill only prints a line about it; the notebook's own check makes it an error."""
    notebook = run_chapters.ROOT / run_chapters.source("00-quickstart")
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter no_such"):
        papermill.execute_notebook(notebook, tmp_path / "out.ipynb", {"no_such": 1}, kernel_name="python3")


def test_a_chapter_is_run_again_when_a_result_that_it_shows_is_stored(tmp_path, monkeypatch):
    for place in ("notebooks/01-x.ipynb", "steerutils/x.py", "book/results/bench.json", "book/results/02-y-m.json"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("{}")
    monkeypatch.setattr(run_chapters, "ROOT", tmp_path)
    notes = [run_chapters.wanted_note("01-x", {})]
    for place in ("book/results/02-y-m.json", "book/results/01-x-m.json", "book/results/bench.json"):
        (tmp_path / place).write_text('{"n": 2}')
        notes.append(run_chapters.wanted_note("01-x", {}))
    assert notes[0] == notes[1]  # another chapter's
    assert len(set(notes)) == 3  # its own; those of no chapter
