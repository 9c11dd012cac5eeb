import json

import pytest

from steerutils import check_parameters, record, run_metadata
from steerutils.record import write_json


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


def test_a_parameter_of_the_wrong_type_is_an_error_and_whole_numbers_serve_as_floats():
    with pytest.raises(ValueError, match="steps = 'five' should be int"):
        check_parameters(parameters(steps="five"))
    assert check_parameters(parameters(strength=2))["strength"] == 2.0


def test_an_unknown_profile_is_an_error():
    with pytest.raises(ValueError, match="choose 'smoke'"):
        check_parameters(parameters(profile="fast"))


def test_record_keeps_the_exact_value_and_shows_a_rounded_one(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: shown.append((data, metadata)))
    record("share", 1 / 3, 0.2, 0.5)
    record("layer", 18)
    (first, meta), (second, _) = shown
    assert first["text/plain"] == "0.33 (0.20 to 0.50)" and second["text/plain"] == "18"
    assert meta["steerutils"] == {"name": "share", "value": {"value": 1 / 3, "low": 0.2, "high": 0.5}}
    assert meta["scrapbook"]["name"] == "share"


def test_a_value_that_is_not_a_number_is_not_recorded():
    with pytest.raises(ValueError, match="not a number"):
        record("share", float("nan"))


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_run_metadata_names_versions_and_parameters():
    about = run_metadata(seed=3)
    assert about["parameters"] == {"seed": 3} and {"torch", "transformers", "steerutils"} <= set(about["versions"])
