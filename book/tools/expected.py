"""Stored values of the chapters' smoke runs: `python book/tools/expected.py NAME ...` writes them anew.

`tests/expected/NAME.json` holds the parameters of the run and, by name, each recorded value with its tolerance:
`rel` (a share of the value) or `abs`. Writing anew keeps the tolerances; a new value gets the default ones.
"""

import json
import sys
from pathlib import Path

from run_chapters import ROOT, chapters, check_names, records, run, source

DEFAULT_TOLERANCE = {int: {"abs": 0}, float: {"rel": 0.005}}


def expected_path(name: str) -> Path:
    """The file of a chapter's expected values."""
    return ROOT / "tests" / "expected" / f"{name}.json"


def smoke_parameters(name: str) -> dict:
    """All parameters of a chapter's smoke run, defaults included."""
    return check_names(ROOT / source(name), {"profile": "smoke"})


def numbers(value) -> dict:
    """The parts of a recorded value: itself, or the ends of its interval too."""
    return value if isinstance(value, dict) else {"value": value}


def agree(found, wanted, rel: float = 0.0, abs: float = 0.0) -> bool:
    """Whether a recorded value is the expected one, up to a tolerance; texts must be equal."""
    found, wanted = numbers(found), numbers(wanted)
    if found.keys() != wanted.keys():
        return False
    return all(
        found[part] == aim
        if isinstance(aim, str) or isinstance(found[part], str)
        else _distance(found[part], aim) <= abs + rel * _distance(aim, 0)
        for part, aim in wanted.items()
    )


def _distance(a, b) -> float:
    return max(a - b, b - a)


def differences(found: dict, expected: dict) -> list[str]:
    """What is wrong with a run's recorded values: missing, unexpected, or off by more than the tolerance."""
    lines = [f"{name} is recorded but not expected" for name in sorted(found.keys() - expected.keys())]
    for name, entry in expected.items():
        tolerance = {kind: entry[kind] for kind in ("rel", "abs") if kind in entry}
        if name not in found:
            lines.append(f"{name} is expected but was not recorded")
        elif not agree(found[name], entry["value"], **tolerance):
            lines.append(f"{name}: {found[name]}, expected {entry['value']} with tolerance {tolerance}")
    return lines


def renew(name: str) -> Path:
    """Write a chapter's present smoke values as the expected ones, with the tolerances of those known before."""
    path = expected_path(name)
    known = json.loads(path.read_text())["values"] if path.exists() else {}
    values = {}
    for key, value in records(run(name, "smoke")).items():
        tolerance = {kind: limit for kind, limit in known.get(key, {}).items() if kind in ("rel", "abs")}
        kind = type(numbers(value)["value"])
        values[key] = {"value": value} | (tolerance or DEFAULT_TOLERANCE.get(kind, {}))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"parameters": smoke_parameters(name), "values": values}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    for chapter in sys.argv[1:] or sys.exit(f"{__doc__}\nThe chapters are: {', '.join(chapters())}"):
        print(renew(chapter).relative_to(ROOT))
