"""What the chapters took: `python book/tools/times.py` after `make book` writes `book/results/times.json`."""

import json
import sys

from results import OUT
from run_chapters import chapters, result_path

from steerutils.record import run_metadata, write_json


def times(profile: str) -> dict:
    """Seconds, peak memory in GiB and threads of each chapter's last run in a profile, by chapter.

    Raises FileNotFoundError for a chapter that has not run.
    """
    notes = {name: json.loads(result_path(name, profile).with_suffix(".json").read_text()) for name in chapters()}
    return {name: {key: note[key] for key in ("seconds", "gib", "threads")} for name, note in notes.items()}


if __name__ == "__main__":
    try:
        write_json(OUT / "times.json", {"chapters": times("book")} | run_metadata())
    except (FileNotFoundError, KeyError) as error:
        sys.exit(f"not every chapter has run: {error}. Run `make book` first.")
