"""The book as built from smoke runs: whole, quoting recorded values, agreeing with the files around it."""

import copy
import json
import re
import tomllib
from urllib.parse import unquote, urldefrag

import build_pages
import environment
import nbformat
import pytest
import repository
import run_chapters
import times
import yaml
from bs4 import BeautifulSoup
from docutils.nodes import make_id
from rattler import MatchSpec

ROOT = run_chapters.ROOT
CHAPTERS = run_chapters.chapters()


@pytest.fixture(scope="module")
def pages() -> dict[str, BeautifulSoup]:
    """Every built page of the smoke book, parsed, by its path."""
    html = build_pages.build("smoke")
    found = {path.relative_to(html).as_posix(): path for path in html.rglob("*.html") if "_static" not in path.parts}
    return {name: BeautifulSoup(path.read_text(), "html.parser") for name, path in found.items()}


def words(text: str) -> str:
    """A text with single plain spaces."""
    return " ".join(text.split())


def article(page: BeautifulSoup) -> str:
    """The text of a page's body, without the bars around it."""
    return words(page.find("article").get_text(" "))


def test_the_contents_name_every_chapter_and_page(pages):
    listed = build_pages.toc_pages()
    prose = [path.stem for path in build_pages.BOOK.glob("*.md")]
    assert sorted(listed) == sorted([f"notebooks/{name}" for name in CHAPTERS] + prose)
    assert all(f"{page}.html" in pages for page in listed)
    assert (build_pages.build("smoke") / ".nojekyll").exists()


def test_the_book_has_its_first_chapters():
    assert {"00-quickstart", "01-steering-vectors", "A1-teaching-refusal"} <= set(CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_shows_figures_values_and_parameters(pages, name):
    page = pages[f"notebooks/{name}.html"]
    text = article(page)
    assert page.select("article img[src*=_images]"), "no figure"
    for value in run_chapters.records(run_chapters.result_path(name, "smoke")):
        assert f"{value} = " in text, f"the recorded {value} is not shown"
    assert 'profile = "smoke"' in text, "the page does not say with which parameters it ran"
    prose = copy.copy(page.find("article"))
    for code in prose.select("div.highlight"):  # where braces mean something else
        code.decompose()
    assert "{glue" not in prose.get_text() and "{{" not in prose.get_text()


@pytest.mark.parametrize("name", CHAPTERS)
def test_figures_are_named_for_who_cannot_see_them(pages, name):
    page = pages[f"notebooks/{name}.html"].find("article")
    headings = {words(heading.get_text()).rstrip("#").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
                for heading in page.select("h1, h2, h3")}  # fmt: skip
    texts = [image["alt"] for image in page.select(".cell_output img[src*=_images]")]
    assert texts and all(text.removeprefix("Figure of the section: ") in headings for text in texts), texts


def test_prose_quotes_recorded_values(pages):
    """Each value that the landing page quotes is on it, and follows the record when that changes."""
    results = {name: run_chapters.result_path(name, "smoke") for name in CHAPTERS}
    quotes = {name: run_chapters.records(path) for name, path in results.items()}
    source = (build_pages.BOOK / "index.md").read_text()
    names = re.findall(r'\b(steering|taught)\["(\w+)"\](?: \| (\w+))?', source)
    rows = re.findall(r'shares\("[^"]*", steering, "(\w+)"\)', source)
    names += [
        ("steering", f"turned_{side}_{who}", "percent") for side in rows for who in ("unsteered", "DIM", "random")
    ]
    assert len(names) >= 10
    chapter_of = {"steering": "01-steering-vectors", "taught": "A1-teaching-refusal"}
    shown = article(pages["index.html"])
    for variable, name, form in names:
        write = build_pages.percent if form == "percent" else build_pages.as_text
        assert words(write(quotes[chapter_of[variable]][name])) in shown
    changed = json.loads(json.dumps(quotes))
    changed["01-steering-vectors"]["turned_harmless_DIM"] = {"value": 0.1234, "low": 0.1, "high": 0.2}
    assert "12 % (10 to 20)" in words(build_pages.prose("smoke", changed)["index.md"])


def test_quoting_an_unrecorded_value_is_an_error():
    with pytest.raises(build_pages.BookError, match="no_such_value"):
        build_pages.fill('{{ q["a"]["no_such_value"] | number }}', "page.md", {"q": {"a": {}}})


def test_a_page_quotes_stored_runs_before_the_live_one(monkeypatch):
    runs = {}
    monkeypatch.setattr(build_pages, "stored_runs", lambda chapter: runs)
    live = {"model": "ours", "kind": "live", "values": {"n": 1}}
    assert build_pages.runs_of("05-x", {"n": 1}, "ours") == [live]
    runs["book size", "other"] = {"n": 3}
    other = {"model": "other", "kind": "book size", "values": {"n": 3}}
    assert build_pages.runs_of("05-x", {"n": 1}, "ours") == [live, other]
    runs["full size", "ours"] = {"n": 2}
    assert build_pages.runs_of("05-x", {"n": 1}, "ours") == [live | {"kind": "full size", "values": {"n": 2}}, other]


def expected_values() -> dict[str, dict]:
    """What the smoke runs record, by chapter and name, as it is stored with the tests."""
    paths = (ROOT / "tests" / "expected").glob("*.json")
    found = {path.stem: json.loads(path.read_text())["values"] for path in paths}
    return {chapter: {name: entry["value"] for name, entry in values.items()} for chapter, values in found.items()}


def scorecard_rows(quotes: dict, short: bool = False) -> list[list[str]]:
    """The cells of the scorecard's rows, or of its short table's, without the heads of the tables."""
    parts = build_pages.prose("book", quotes)["scorecard.md"].split("## Where to steer")
    lines = [line for line in parts[0 if short else 1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("claim", "central claim") and set(row[0]) != {"-"}]


def test_the_scorecard_in_short_repeats_verdicts_of_its_rows(monkeypatch):
    monkeypatch.setattr(build_pages, "stored_runs", lambda chapter: {})
    quotes = expected_values()
    for number, values in enumerate(quotes.values()):  # so that every chapter's verdicts can be told from another's
        told = [name for name in values if name.startswith(("verdict_", "control_verdict_"))]
        values |= {name: f"verdict {number}" for name in told}
    rows = scorecard_rows(quotes, short=True)
    assert len(rows) == 15 and all(re.search(r"verdict \d", verdict) for _, verdict in rows)
    verdicts = {row[4] for row in scorecard_rows(quotes)}
    assert {re.search(r"verdict \d+", verdict)[0] for _, verdict in rows} <= {
        verdict for cell in verdicts for verdict in re.findall(r"verdict \d+", cell)
    }


def test_scorecard_leaves_the_cells_of_an_older_run_empty(monkeypatch):
    runs = {("full size", model): {} for model in ("smollm2-135m", "smollm2-135m-refusal")}
    monkeypatch.setattr(build_pages, "stored_runs", lambda chapter: runs)
    rows = scorecard_rows(expected_values())
    assert len(rows) > 100 and all(len(row) == 6 for row in rows)
    none = "of 0 models: holds on 0, does not hold on 0, not settled or differs by task on 0"
    assert {row[3] for row in rows} == {"", none} and {row[4] for row in rows} == {""}


def test_scorecard_quotes_no_name_that_a_chapter_does_not_record(monkeypatch):
    monkeypatch.setattr(build_pages, "stored_runs", lambda chapter: {})
    quotes = expected_values()
    assert scorecard_rows(quotes)  # live values do for every row
    del quotes["03-layer-ranking"]["induce_mean_ndcg_In"]
    with pytest.raises(build_pages.BookError, match="induce_mean_ndcg_In"):
        scorecard_rows(quotes)


def test_scorecard_leads_to_the_section_that_makes_each_number(monkeypatch):
    monkeypatch.setattr(build_pages, "stored_runs", lambda chapter: {("full size", "smollm2-135m"): {}})
    monkeypatch.setattr(build_pages, "declared_parameters", lambda notebook: {"model_name": "smollm2-135m"})
    for claim, *_, link in scorecard_rows(expected_values()):
        if not claim:  # another model's run of the claim above
            continue
        chapter, anchor = re.search(r'href="notebooks/([\w-]+)\.html#([\w-]+)"', link).groups()
        cells = nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", as_version=4).cells
        heads = [head for c in cells if c.cell_type == "markdown" for head in re.findall("^#+ (.*)$", c.source, re.M)]
        assert anchor in map(make_id, heads), link


def test_each_word_of_a_verdict_is_marked():
    both = build_pages.coloured("does not hold (induce), not settled (bypass)")
    assert both == (
        '<span class="verdict does-not-hold">does not hold</span> (induce)<br>'
        '<span class="verdict not-settled">not settled</span> (bypass)'
    )
    assert build_pages.coloured("holds") == '<span class="verdict holds">holds</span>'
    assert build_pages.coloured("") == ""


def test_numbers_are_written_with_their_intervals():
    assert build_pages.as_text({"value": 0.934, "low": 0.9, "high": 0.97}) == "0.93 (0.90 to 0.97)"
    assert build_pages.as_text({"value": -0.001, "low": -0.2, "high": 0.0}) == "0.00 (-0.20 to 0.00)"
    assert words(build_pages.percent({"value": 0.934, "low": 0.9, "high": 0.97})) == "93 % (90 to 97)"
    assert build_pages.as_text(18) == "18" and words(build_pages.percent(0.5)) == "50 %"


def test_landing_page_shows_the_figure(pages):
    picture = pages["index.html"].select_one("article figure img")
    chapter, tag = build_pages.LANDING
    drawn = build_pages.landing_picture(run_chapters.result_path(chapter, "smoke"), tag)
    assert (build_pages.build("smoke") / picture["src"]).read_bytes() == drawn


def test_api_page_describes_every_public_name(pages):
    described = {entry.get("id") for entry in pages["api.html"].select("dt.sig")}
    assert {f"steerutils.{name}" for name, _, _ in build_pages.public_names()} <= described
    tags = pages["api.html"].select('[id="steerutils.TRAITS"]')
    assert "'extraversion'" in tags[0].get_text() and not tags[0].find_next("dd").get_text(strip=True)  # not a tuple's


def test_internal_links_lead_somewhere(pages):
    """Every link within the book names a file that is there, and a fragment that the page has."""
    html, dead = build_pages.build("smoke"), []
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    for name, page in pages.items():
        for link in page.select("a[href]"):
            target, fragment = urldefrag(unquote(link["href"]))
            if re.match(r"[a-z]+:", target):
                continue
            path = (html / name).parent.joinpath(target).resolve() if target else html / name
            known = anchors.get(path.relative_to(html.resolve()).as_posix())
            if not path.exists() or (fragment and known is not None and fragment not in known):
                dead.append(f"{name} -> {link['href']}")
    assert dead == []


def test_pages_load_nothing_from_outside(pages):
    loading = "script[src], link[rel=stylesheet], link[rel=preload], img[src], iframe[src], source[src]"
    for name, page in pages.items():
        for tag in page.select(loading):
            assert not re.match("(https?:)?//", tag.get("src") or tag.get("href")), f"{name}: {tag}"


def test_badges_buttons_and_install_cells_follow_the_one_setting(pages):
    slug = repository.slug()
    for path in repository.files():
        assert repository.carried(path.read_text()) == path.read_text(), "run python book/tools/repository.py"
    for name in CHAPTERS:
        source = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
        colab = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}.ipynb"
        assert source.count(colab) == 1, "the chapter's badge"
        assert f"git+https://github.com/{slug}" in source, "the chapter's install cell"
        page = pages[f"notebooks/{name}.html"]
        assert page.select_one(f'.dropdown-launch-buttons a[href="{colab}"]'), "the page's button"
    assert pages["index.html"].select_one(f'a.btn[href="{build_pages.repository()}"]')


def test_another_repository_changes_every_link(monkeypatch):
    monkeypatch.setattr(repository, "repository", lambda: "https://github.com/some-one/a.fork")
    for path in repository.files():
        text, old = repository.carried(path.read_text()), build_pages.repository().removeprefix("https://github.com/")
        assert "some-one/a.fork" in text and f"/{old}" not in text


def test_environment_agrees_with_pyproject():
    path = ROOT / "environment.yml"
    assert path.read_text() == environment.environment(), "run python book/tools/environment.py"
    *packages, pip = yaml.safe_load(path.read_text())["dependencies"]
    names = [MatchSpec(line).name.normalized for line in packages]
    assert {"python", "pytorch", "transformers", "jupyter-book"} <= set(names)
    assert "-e ." in pip["pip"]


def test_constraints_lie_within_the_bounds():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    built_with = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for line in project["dependencies"] + sum(project["optional-dependencies"].values(), []):
        requirement = Requirement(line)
        assert requirement.specifier.contains(built_with[requirement.name]), line


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http")]
    assert targets and all((ROOT / target).exists() for target in targets), targets


def test_what_a_chapter_took_is_noted_with_its_run(pages):
    for name, took in times.times("smoke").items():
        assert 0 < took["seconds"] < run_chapters.CELL_SECONDS and took["threads"] >= 1, name
        assert 0 < took["gib"] < run_chapters.CHAPTER_BYTES / 2**30, name


def test_each_chapter_states_what_it_took():
    """Minutes on one core and memory in a chapter's head are those of the stored `make book`, within one."""
    took = json.loads((ROOT / "book" / "results" / "times.json").read_text())["chapters"]
    assert sorted(took) == CHAPTERS
    for name, of in took.items():
        head = nbformat.read(ROOT / run_chapters.source(name), 4).cells[0].source
        minutes = int(re.search(r"Run time \| about (\d+) minutes? on one core", head)[1])
        memory = int(re.search(r"Memory \| about (\d+) GB", head)[1])
        assert of["threads"] == 1, "make book runs one chapter a core"
        assert abs(minutes - of["seconds"] / 60) <= 1 and abs(memory - of["gib"]) <= 1, (name, of)
    assert sum(of["seconds"] for of in took.values()) / 2 < 45 * 60  # on two cores
