"""Build the pages from executed chapters: `python book/tools/build_pages.py --profile smoke|book`.

The sources are brought together in `_build/PROFILE/source`: the prose pages with the numbers that they quote
filled in, the executed chapters, and the scripts that the pages load. The pages land in `_build/PROFILE/html`.
"""

import argparse
import base64
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import fetch_js
import jinja2
import nbformat
import yaml
from filelock import FileLock
from run_chapters import (
    PROFILES,
    ROOT,
    ChapterError,
    chapters,
    declared_parameters,
    fingerprint,
    library_files,
    records,
    run,
    source,
)

from steerutils.record import as_text, stored_runs

BOOK = ROOT / "book"
LANDING = ("01-steering-vectors", "landing-figure")  # the chapter and the cell tag of the landing page's picture


class BookError(RuntimeError):
    """Pages that could not be built; the message says which and what to do."""


def repository() -> str:
    """The URL of the repository, from the one setting that names it."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def toc_pages() -> list[str]:
    """The pages of the book, in its order."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    return [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def percent(recorded) -> str:
    """A recorded share as per cent, with its interval if it has one: `93 % (90 to 96)`."""
    if isinstance(recorded, dict):
        low, high = (f"{100 * recorded[end]:.0f}" for end in ("low", "high"))
        return f"{100 * recorded['value']:.0f}\N{NO-BREAK SPACE}% ({low} to {high})"
    return f"{100 * recorded:.0f}\N{NO-BREAK SPACE}%"


def together(text: str) -> str:
    """A text that no line break divides."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def verdict(run: dict, claim: str) -> str:
    """What a run says of the one claim that begins so, or of a verdict of that name; "" where a stored run is older."""
    values = run["values"]
    found = [name for name, text in values.items() if name.startswith("claim_") and text.startswith(claim)]
    if len(found) == 1:
        return values[found[0].replace("claim_", "verdict_", 1)]
    if claim in values or (not found and run["kind"] != "live"):
        return values.get(claim, "")
    raise jinja2.UndefinedError(f"{len(found)} claims of {run['model']} begin with {claim!r}")


def coloured(verdict: str) -> str:
    """A verdict of `steerutils.holds` as HTML: a mark for each of its words, which the page's style colours."""
    parts = re.findall(r"(holds|does not hold|not settled)( \([^)]*\))?", verdict)
    if not parts:  # none, or one that was not recorded
        return verdict
    marks = (f'<span class="verdict {word.replace(" ", "-")}">{word}</span>{of}' for word, of in parts)
    return "<br>".join(marks)


def fill(text: str, page: str, values: dict) -> str:
    """A prose page with its `{{ ... }}` filled in; BookError when it quotes a value that no chapter recorded."""
    markup = jinja2.Environment(undefined=jinja2.StrictUndefined, comment_start_string="<#", comment_end_string="#>")
    markup.globals["verdict"] = verdict
    markup.filters |= {"number": as_text, "percent": percent, "together": together, "coloured": coloured}
    try:
        return markup.from_string(text).render(values) + "\n"
    except jinja2.TemplateError as error:
        raise BookError(f"book/{page}: {error}; a page can quote only what a chapter records") from error


def landing_picture(notebook: Path, tag: str) -> bytes:
    """The PNG that the tagged cell of an executed notebook drew."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if tag in cell.metadata.get("tags", []):
            for output in cell.get("outputs", []):
                if png := output.get("data", {}).get("image/png"):
                    return base64.b64decode(png)
    raise BookError(f"{notebook.stem} has no cell tagged {tag} that draws a picture: the landing page needs it")


def with_figures_named(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook whose figures say, to who cannot see them, in which section they stand: the nearest heading above."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = next(reversed(re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)), heading)
        elif any("image/png" in output.get("data", {}) for output in cell.outputs):
            cell.metadata["mystnb"] = {"image": {"alt": f"Figure of the section: {heading}"}}
    return notebook


def public_names() -> list[tuple[str, str, str]]:
    """The public names of `steerutils`, each with its kind (class, function or data) and, of data, its value."""
    import steerutils

    found = [(name, getattr(steerutils, name)) for name in sorted(steerutils.__all__, key=str.lower)]
    return [(name, kind := _kind(thing), repr(thing) if kind == "data" else "") for name, thing in found]


def _kind(thing) -> str:
    return "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"


def prose(profile: str, quotes: dict) -> dict[str, str]:
    """The text of every prose page, by file name, with `quotes` (values by chapter and name) filled in."""
    facts = {"q": quotes, "profile": profile, "public_names": public_names(), "repository": repository()}
    facts["runs"] = {
        name: runs_of(name, values, declared_parameters(ROOT / source(name))["model_name"])
        for name, values in quotes.items()
    }
    return {path.name: fill(path.read_text(), path.name, facts) for path in sorted(BOOK.glob("*.md"))}


def runs_of(chapter: str, live: dict, default: str) -> list[dict]:
    """The runs of a chapter that a page may quote, its default model first: stored ones, and the live one if that model
    has none.
    """
    found = [{"model": model, "kind": kind, "values": values} for (kind, model), values in stored_runs(chapter).items()]
    if not any(run["model"] == default for run in found):
        found.append({"model": default, "kind": "live", "values": live})
    return sorted(found, key=lambda run: run["model"] != default)


def stage(profile: str, results: dict[str, Path], scripts: Path, source: Path) -> None:
    """Lay the sources of the pages, all that Jupyter Book reads, in a fresh folder."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "notebooks").mkdir(parents=True)
    for name, text in prose(profile, {name: records(path) for name, path in results.items()}).items():
        (source / name).write_text(text)
    for name, path in results.items():
        nbformat.write(with_figures_named(nbformat.read(path, as_version=4)), source / "notebooks" / f"{name}.ipynb")
    for name in ("_toc.yml", "references.bib"):
        shutil.copy(BOOK / name, source)
    config = yaml.safe_load((BOOK / "_config.yml").read_text())
    config["repository"]["url"] = repository()
    (source / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    # Not named _static: Jupyter Book would load every script in a folder of that name on every page.
    shutil.copytree(BOOK / "_static", source / "assets")
    shutil.copytree(scripts, source / "assets", dirs_exist_ok=True)
    chapter, tag = LANDING
    (source / "assets" / "landing.png").write_bytes(landing_picture(results[chapter], tag))


def jupyter_book(source: Path, out: Path) -> None:
    """Build the pages from nothing, warnings as errors; BookError when that fails.

    From nothing, because a second run would not repeat the warnings of pages that it does not read again.
    """
    shutil.rmtree(out, ignore_errors=True)
    script = (
        Path(sys.executable).parent / "jupyter-book"
    )  # `python -m jupyter_book` builds nothing, and says so to nobody
    command = [str(script), "build", "-q", "-W", "-n", "--keep-going", "--path-output", str(out), str(source)]
    out.mkdir(parents=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)  # colours
    (out / "log.txt").write_text(log)
    problems = [line for line in log.splitlines() if "WARNING" in line or "ERROR" in line]
    if done.returncode or problems:
        tail = "\n".join(problems or log.splitlines()[-15:])
        raise BookError(f"the pages could not be built (whole log: {out / 'log.txt'}):\n{tail}")


def build(profile: str) -> Path:
    """The folder of the built pages, made now unless it is up to date; BookError or ChapterError on failure."""
    results = {name: run(name, profile) for name in chapters()}
    home = ROOT / "_build" / profile
    html, stamp = home / "html", home / "pages.sha256"
    files = [path for path in BOOK.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [ROOT / "pyproject.toml", ROOT / "constraints.txt", *library_files(), *results.values()]
    wanted = fingerprint(sorted(files))
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "pages.lock"):  # of two processes that find stale pages, one builds them
        if not (stamp.exists() and stamp.read_text() == wanted and html.exists()):
            stage(profile, results, fetch_js.fetch(), home / "source")
            print(f"== the pages, profile {profile}", flush=True)
            jupyter_book(home / "source", home / "work")
            made = home / "work" / "_build" / "html"
            if missing := [page for page in toc_pages() if not (made / f"{page}.html").exists()]:
                raise BookError(f"these pages were not built: {', '.join(missing)}")
            shutil.rmtree(html, ignore_errors=True)
            os.replace(made, html)
            stamp.write_text(wanted)
    return html


def main() -> None:
    """Build the pages of a profile and print the path to open."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, required=True)
    try:
        html = build(parser.parse_args().profile)
    except (BookError, ChapterError, ValueError) as error:
        sys.exit(str(error))
    print(f"The book is built. Open {html / 'index.html'}")


if __name__ == "__main__":
    main()
