import io
import json
import sys
from urllib.error import HTTPError, URLError

import numpy as np
import pandas as pd
import pytest
import run_chapters
from myst_nb.core.variables import format_plain_text

from steerutils import (
    above,
    all_of,
    below,
    check_parameters,
    findings,
    full_size,
    holds,
    kept_arrays,
    name_of,
    record,
    record_rows,
    record_sizes,
    result_name,
    run_metadata,
    settle,
    show_full_size,
    show_verdicts,
    stored_results,
    stored_rows,
)
from steerutils.record import RESULT_MODELS, write_bytes, write_json


def parameters(**given):
    kinds = {"model_name": str, "steps": int, "strength": float, "profile": str}
    values = {"model_name": "m", "steps": 5, "strength": 1.0, "profile": "smoke"}
    return (
        {"__annotations__": kinds, "__name__": "x", "json": json, "In": [], "check_parameters": print} | values | given
    )


def test_declared_parameters_pass():
    assert check_parameters(parameters(steps=7)) == {
        "model_name": "m",
        "steps": 7,
        "strength": 1.0,
        "profile": "smoke",
    }


def test_an_unknown_parameter_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown parameter stepz; this notebook takes: model_name, steps"):
        check_parameters(parameters(stepz=7))


def test_cells_may_be_run_again_with_a_changed_parameter():
    namespace = parameters()
    check_parameters(namespace)
    namespace |= {"steps": 9, "model": object(), "size": {"n": 3}}  # the chapter has run, a person changes a number
    assert check_parameters(namespace)["steps"] == 9
    with pytest.raises(ValueError, match="steps = 'nine' should be int"):
        check_parameters(namespace | {"steps": "nine"})


def test_a_parameter_of_the_wrong_type_is_an_error_and_whole_numbers_serve_as_floats():
    with pytest.raises(ValueError, match="steps = 'five' should be int"):
        check_parameters(parameters(steps="five"))
    assert check_parameters(parameters(strength=2))["strength"] == 2.0


def test_an_unknown_profile_is_an_error():
    with pytest.raises(ValueError, match=r"'fast': this notebook has 'smoke' \(quick\), 'book' \(minutes\)\."):
        check_parameters(parameters(profile="fast"))
    with pytest.raises(ValueError, match="'full'"):  # only the chapters with a full-size run have it
        check_parameters(parameters(profile="full"))
    assert check_parameters(parameters(profile="full"), ("book", "full"))["profile"] == "full"


def test_record_keeps_the_exact_value_and_shows_a_rounded_one(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: shown.append((data, metadata)))
    record("share", 1 / 3, 0.2, 0.5)
    record("layer", 18)
    record("half", 0.5)
    (first, meta), (second, _), (third, _) = shown
    pasted = [format_plain_text(data["text/plain"], "s") for data in (first, second, third)]  # as pages do it
    assert pasted == ["0.33 (0.20 to 0.50)", "18", "0.50"]
    assert meta["steerutils"] == {"name": "share", "value": {"value": 1 / 3, "low": 0.2, "high": 0.5}}
    assert meta["scrapbook"]["name"] == "share"


def test_a_label_becomes_a_name_without_spaces_and_commas():
    assert [name_of(label) for label in ("DIM", "shuffled DIM", "NTP, own answers")] == [
        "DIM", "shuffled_DIM", "NTP_own_answers"
    ]  # fmt: skip


def test_a_value_that_is_not_a_number_is_not_recorded():
    for given in ((float("nan"),), (np.float64("inf"),), (0.5, 0.2, float("nan"))):
        with pytest.raises(ValueError, match="share.*not a finite number"):
            record("share", *given)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_run_metadata_names_versions_and_parameters():
    about = run_metadata(seed=3)
    assert about["parameters"] == {"seed": 3} and {"torch", "transformers", "steerutils"} <= set(about["versions"])
    assert run_metadata().keys() == about.keys() - {"parameters"}  # no empty entry


@pytest.fixture
def stored(monkeypatch):
    """Full-size results of a chapter "05-x", for the second model only."""
    values = {"n": 40, "share": {"value": 0.5, "low": 0.25, "high": 0.75}, "claim_0": "it works",
              "verdict_0": "does not hold", "claim_1": "it is old", "verdict_1": "holds"}  # fmt: skip

    def found(name):
        if name != result_name("05-x", RESULT_MODELS[1]):
            raise ValueError("none")
        rows = {"answers": {"columns": ["prompt", "verdict"], "data": [[0, "refusal"], [1, "compliance"]]}}
        return {"values": values, "rows": rows, "asked": {"profile": "book"}}

    monkeypatch.setattr(sys.modules["steerutils.record"], "stored_results", found)  # the package shows the function


def test_full_size_values_stand_in_a_column_a_model(stored):
    table = full_size("05-x", {"prompts": "n", "share kept": "share", "newer": "not_there"})
    assert list(table.columns) == [f"book size, {RESULT_MODELS[1]}"]
    assert table.iloc[:, 0].to_dict() == {
        "prompts": "40",
        "share kept": "0.50 (0.25 to 0.75)",
    }  # what none has is left out
    assert full_size("06-y", {"prompts": "n"}).to_dict("list") == {"full size": ["not run yet for any model"]}


def test_tables_of_a_run_name_their_values_by_row_and_column(stored, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    rows = {"share kept": "share", "claim": "claim_0", "newer": "not_there"}
    columns = {"kept": "{}", "points": "{}", "newer": "{}_newer"}
    show_full_size("05-x", rows, columns, ", of {n} prompts", whole=["points"])
    heading, table = shown
    assert heading.data == f"**{RESULT_MODELS[1]}**, book size, of 40 prompts:"
    assert list(table.index) == ["share kept", "claim"]  # of the other nothing was recorded
    assert table["kept"].tolist() == ["0.50 (0.25 to 0.75)", "–"] and not table["newer"].any()  # a dash for a word
    assert table["points"].tolist() == ["0 (0 to 1)", "–"]
    show_full_size("05-x", {"share kept": "share"}, {"kept": "{}"}, ", of {newer} prompts")
    assert shown[-2].data == f"**{RESULT_MODELS[1]}**, book size:"  # of an older run
    show_full_size("05-x", {"a claim's verdict": "0"}, {"first": "n", "verdict": "verdict_{}"})
    assert shown[-1].to_dict("list") == {"first": ["40"], "verdict": ["–"]}
    show_full_size("06-y", rows, columns)
    assert "Not run" in shown[-1].data and len(shown) == 7


def test_stored_rows_are_a_table_a_run(stored):
    found = stored_rows("05-x", "answers")
    assert list(found) == [("book size", RESULT_MODELS[1])]
    assert found["book size", RESULT_MODELS[1]].to_dict("list") == {
        "prompt": [0, 1],
        "verdict": ["refusal", "compliance"],
    }
    assert stored_rows("05-x", "other") == stored_rows("06-y", "answers") == {}


def test_an_installed_copy_reads_the_results_from_the_web_once_and_says_when_it_cannot(monkeypatch, tmp_path, capfd):
    """As on Colab, where no clone lies around the package."""
    module, asked = sys.modules["steerutils.record"], []

    def urlopen(place, timeout):
        asked.append(place)
        if "there" in place:
            return io.BytesIO(b'{"values": {"n": 3}}')
        raise HTTPError(place, 404, "Not Found", {}, None) if "none" in place else URLError("no route")

    monkeypatch.setattr(module, "__file__", str(tmp_path / "site" / "steerutils" / "record.py"))
    monkeypatch.setattr(module.urllib.request, "urlopen", urlopen)
    module._fetched.cache_clear()
    assert [stored_results("there")["values"] for _ in range(2)] == [{"n": 3}] * 2
    assert len(asked) == 1 and asked[0].startswith("https://raw.githubusercontent.com/")
    assert asked[0].endswith("/main/book/results/there.json")
    for name in ("none", "far", "far"):
        with pytest.raises(ValueError, match=f"no stored results '{name}'.*make results"):
            stored_results(name)
    told = capfd.readouterr().err
    assert told.count("could not be reached") == 1 and "far.json" in told and "none.json" not in told
    module._fetched.cache_clear()


def test_findings_are_told_from_what_a_run_recorded(stored):
    told = findings("05-x", ["Of {n} prompts, {share}.", "Of {n}, {not_there}.", "No number."]).data
    assert told == f"**{RESULT_MODELS[1]}**, book size:\n\n- Of 40 prompts, 0.50 (0.25 to 0.75).\n- No number."
    assert "Not run" in findings("06-y", ["Of {n}."]).data


def test_a_value_is_above_a_bar_only_with_its_whole_interval():
    assert above((0.5, 0.4, 0.6), 0.3) is True and above((0.5, 0.4, 0.6), 0.7) is False
    assert above((0.5, 0.4, 0.6), 0.45) is None and above((0.5, 0.5, 0.5), 0.5) is None
    assert above((float("nan"),) * 3, 0.0) is None
    assert below((0.5, 0.4, 0.6), 0.7) is True and below((0.5, 0.4, 0.6), 0.3) is False
    assert below((0.5, 0.4, 0.6), 0.45) is None


def test_several_tests_make_one():
    assert all_of([True, True]) is True and all_of([]) is True
    assert all_of([True, None]) is None and all_of([None, False, True]) is False


def test_a_verdict_is_one_word_where_all_tests_agree():
    assert [holds({"a": test, "b": test}) for test in (True, False, None)] == ["holds", "does not hold", "not settled"]
    assert holds({"a": None, "b": np.bool_(True), "c": True}) == "holds (b, c), not settled (a)"
    assert holds({"a": np.bool_(False), "b": True}) == "holds (b), does not hold (a)"
    assert holds(dict(zip("abcd", (True, False, True, True)))) == "holds (3 of 4), does not hold (1 of 4)"
    with pytest.raises(ValueError, match="at least one test"):
        holds({})


def test_verdicts_are_recorded_and_matched_by_their_claim_and_not_by_their_number(stored, monkeypatch):
    recorded = {}
    module = sys.modules["steerutils.record"]  # the package shows the function
    monkeypatch.setattr(module, "record", lambda name, value: recorded.update({name: value}))
    table = settle("05-x", {"it is new": {"DIM": True, "NTP": None}, "it works": {"DIM": True}, "it is big": {}})
    assert table["live"].tolist() == ["holds (DIM), not settled (NTP)", "holds", "not run"]
    assert table[f"book size, {RESULT_MODELS[1]}"].tolist() == ["", "does not hold", ""]
    assert [recorded[f"claim_{i}"] for i in range(3)] == list(table.index)
    assert [recorded[f"verdict_{i}"] for i in range(3)] == table["live"].tolist() and len(recorded) == 6


def test_verdicts_are_shown_by_heading_and_a_live_run_that_settles_nothing_is_left_out(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    claims = ["values lose more", "it is big", "values are enough", "patterns lose more"]
    table = pd.DataFrame(
        {"live": ["not settled", "not run"] * 2, "full size, m": ["holds", "", "does not hold", ""]}, claims
    )
    show_verdicts(table, {"Values": ["values"], "Patterns": ["patterns", "values are"]}, "Others")
    told, *parts = shown
    assert "too small" in told.data and [part.data for part in parts[::2]] == [
        "**Values**",
        "**Patterns**",
        "**Others**",
    ]
    assert [list(part.index) for part in parts[1::2]] == [[claims[0], claims[2]], [claims[3]], [claims[1]]]
    assert parts[1].to_dict("list") == {"full size, m": ["holds", "does not hold"]}
    assert parts[-1]["full size, m"].tolist() == ["–"]  # an older run
    shown.clear()
    show_verdicts(table.assign(live=["holds", *["not run"] * 3]), {"Values": ["values"]})
    assert list(shown[1].columns) == ["live", "full size, m"] and len(shown) == 4
    shown.clear()
    show_verdicts(table[["live"]], {"Values": ["values"]})  # nothing is stored: the live run is all there is
    assert list(shown[1].columns) == ["live"]
    with pytest.raises(ValueError, match="begins with 'keys'"):
        show_verdicts(table, {"Values": ["values", "keys"]})


def test_rows_are_kept_with_the_chapter_and_hold_no_answer(monkeypatch, tmp_path):
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: outputs.append({"metadata": metadata}))
    table = pd.DataFrame({"side": ["harmful", "harmless"], "score": [0.12345678, 2.0]}, index=[7, 7])
    record_rows("answers", table)
    twice = {"cells": [{"outputs": outputs}, {"outputs": outputs}]}
    (tmp_path / "twice.ipynb").write_text(json.dumps(twice))
    with pytest.raises(run_chapters.ChapterError, match="one name twice"):
        run_chapters.rows(tmp_path / "twice.ipynb")
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [{"outputs": outputs}, {}]}))
    assert run_chapters.rows(tmp_path / "x.ipynb") == {
        "answers": {"columns": ["side", "score"], "data": [["harmful", 0.123457], ["harmless", 2.0]]}
    }
    assert run_chapters.records(tmp_path / "x.ipynb") == {}
    with pytest.raises(ValueError, match="not for answers"):
        record_rows("answers", pd.DataFrame({"answer": ["no", "a sentence that somebody said to a harmful prompt"]}))


def test_results_are_named_by_the_last_part_of_a_model():
    assert result_name("ranking", "Qwen/Qwen2.5-0.5B_Instruct") == "ranking-Qwen2.5-0.5B-Instruct"
    assert result_name("trained", "some/folder/") == "trained-folder"


def test_arrays_are_made_once_for_what_they_depend_on(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"in": np.arange(6.0).reshape(2, 3) + len(made), "out": np.ones(3, np.float32)}

    first, again = (kept_arrays(tmp_path, ["model", 3, 0], make) for _ in range(2))
    assert len(made) == 1 and list(first) == list(again) == ["in", "out"]
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        assert values.dtype == again[name].dtype
    assert first["in"][0, 0] == 1 and kept_arrays(tmp_path, ["model", 3, 1], make)["in"][0, 0] == 2
    assert kept_arrays("", ["model", 3, 0], make)["in"][0, 0] == 3 and len(list(tmp_path.iterdir())) == 2


def test_a_damaged_result_is_not_taken_for_none(monkeypatch, tmp_path):
    """A chapter would else say "not run yet" of a file that was cut off."""
    monkeypatch.setattr(sys.modules["steerutils.record"], "__file__", str(tmp_path / "steerutils" / "record.py"))
    path = tmp_path / "book" / "results" / f"{result_name('05-x', RESULT_MODELS[0])}.json"
    whole = json.dumps({"values": {"n": 40}, "asked": {"profile": "full"}}).encode()
    write_bytes(path, whole)
    assert findings("05-x", ["Of {n}."]).data.endswith("- Of 40.")
    write_bytes(path, whole[:-3])
    for show in (lambda: full_size("05-x", {"prompts": "n"}), lambda: findings("05-x", ["Of {n}."])):
        with pytest.raises(RuntimeError, match=f"{path.name} is damaged.*fetch the book's repository again"):
            show()


def test_sizes_are_kept_as_rows_of_texts_a_row_a_value(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: shown.append((data, metadata)))
    record_sizes({"train": 64, "steps": [0.0, 0.5, 0.999], "plain": True, "recipes": ("DIM", "NTP")})
    [(data, kept)] = shown
    assert data["text/plain"] == ""
    assert kept["steerutils_rows"]["name"] == "sizes"
    assert kept["steerutils_rows"]["data"] == [
        ["train", "64"], ["steps", "0.0"], ["steps", "0.5"], ["steps", "0.999"], ["plain", "True"],
        ["recipes", "DIM"], ["recipes", "NTP"],
    ]  # fmt: skip
