"""Figures that a reader can work (a table of heads, a graph of edges), and the graph's drawing."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from graphs import small_graph
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from steerutils import plots

VALUES = np.array([[0.5, -0.1, 0.0], [0.02, 0.1, -0.25]])
TOKENS = [[[f"w{row}{head}", "<b>bad</b>"] for head in range(3)] for row in range(2)]


def heads() -> BeautifulSoup:
    marked = np.zeros((2, 3, 2), dtype=bool)
    marked[1, 2, 0] = True
    page = plots.interactive_heads(VALUES, 7, TOKENS, marked, "share").data.replace("template", "section")
    return BeautifulSoup(page, "html.parser")  # whose selectors do not look into templates


def test_every_head_has_a_button_that_opens_its_own_tokens():
    page = heads()
    buttons = page.select("button")
    assert [button.text for button in buttons] == ["50.0", "-10.0", "0", "2.0", "10.0", "-25.0"]
    for button, (row, head) in zip(buttons, np.ndindex(2, 3)):
        opened = page.select(f'section[data-of="{button["data-head"]}"]')
        assert len(opened) == 1
        assert opened[0].find("b").text == f"block {7 + row}, head {head}: share {VALUES[row, head]:+.3f}"
        assert [span.text for span in opened[0].select("span")] == TOKENS[row][head]
        assert f"w{row}{head}" in button["title"]


def test_words_of_the_list_are_marked_and_tokens_are_escaped():
    page = heads()
    assert [span.text for span in page.select("span.hit")] == ["w12"]
    assert page.select_one(".read").text.startswith("block 7, head 0")  # the largest is open
    assert [button["data-head"] for button in page.select("button.at")] == ["0.0"]
    assert not any(span.find("b") for span in page.select("span"))  # the token <b> is text


def test_no_effect_at_all_has_a_colour():
    page = plots.interactive_heads(np.zeros((1, 1)), 0, [[["a"]]], np.zeros((1, 1, 1), bool), "share").data
    assert "rgb(" in page and "nan" not in page


def test_a_figure_is_drawn_on_new_axes_or_on_those_given():
    table = pd.DataFrame({"value": [0.5], "low": [0.4], "high": [0.6], "x": ["a"]})
    first = plots.rates_with_intervals(table, "x")
    second = plots.cosine_map(pd.DataFrame({"a": {"a": 1.0}}))
    assert first.figure is not second.figure
    assert plots.cosine_map(pd.DataFrame({"a": {"a": 1.0}}), ax=first) is first
    plt.close("all")


@pytest.fixture
def drawing():
    """The graph, its strongest 12 edges and the Axes with their drawing."""
    graph, edges = small_graph(12)
    _, ax = plt.subplots()
    yield graph, edges, plots.attribution_graph(edges, graph, ax)
    plt.close()


def test_every_edge_is_drawn_in_the_colour_of_its_reader(drawing):
    _, edges, ax = drawing
    curves = [patch for patch in ax.patches if isinstance(patch, PathPatch)][::-1]  # the strongest is drawn last
    assert [to_hex(curve.get_edgecolor()) for curve in curves] == [plots.KIND_COLOURS[kind] for kind in edges["kind"]]
    assert set(edges["kind"]) == set(plots.KIND_COLOURS)
    widths = np.array([curve.get_linewidth() for curve in curves])
    np.testing.assert_allclose((widths - 0.6) / 3.4, edges["score"].abs() / edges["score"].abs().max())
    assert [curve.get_linestyle() == "-" for curve in curves] == (edges["score"] > 0).tolist()


def test_edges_go_from_left_to_right_within_the_drawing(drawing):
    graph, _, ax = drawing
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    for patch in ax.patches:
        ends, box = patch.get_path().vertices[[0, -1]], patch.get_path().get_extents()
        assert ends[0, 0] < ends[1, 0]
        assert left < box.x0 and box.x1 < right and high < box.y0 and box.y1 < low  # heads' rows count downwards
    assert {text.get_text() for text in ax.texts} == {"input", "logits"}
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [*(f"head {h}" for h in range(graph.n_heads)), "MLP"]


def test_the_graph_page_holds_every_edge_and_shows_the_strongest():
    graph, edges = small_graph(12)
    page = BeautifulSoup(plots.interactive_graph(edges, graph, n_shown=5).data, "html.parser")
    drawn = {int(group["data-rank"]): group for group in page.select("g.e")}
    assert sorted(drawn) == list(range(12))
    for rank, row in enumerate(edges.itertuples()):
        title, curve = drawn[rank].find("title").text, drawn[rank].select_one("path:not(.hit)")
        assert title == f"{rank + 1}. {row.source} → {row.reader} ({row.kind}): {row.score:+.4g} nats"
        assert curve["stroke"] == plots.KIND_COLOURS[row.kind]
        assert curve.has_attr("stroke-dasharray") == (row.score < 0)
        assert drawn[rank].has_attr("style") == (rank >= 5)
        assert drawn[rank].select_one("path.hit")["d"] == curve["d"]
    slider = page.select_one("input[type=range]")
    assert (slider["min"], slider["max"], slider["value"], page.select_one(".count").text) == ("1", "12", "5", "5")


def test_the_graph_page_needs_nothing_from_outside_and_its_script_finds_it():
    graph, edges = small_graph(12)
    pages = [plots.interactive_graph(edges[:n], graph).data for n in (11, 12)]
    keys = [BeautifulSoup(page, "html.parser").select_one(".steer-graph")["data-steer-graph"] for page in pages]
    assert keys[0] != keys[1]  # of two drawings on a page, each script finds its own
    for page, key in zip(pages, keys):
        assert f'[data-steer-graph="{key}"]' in BeautifulSoup(page, "html.parser").find("script").text
        assert not re.search(r"https?:|src=|href=|import|fetch", page)


def test_names_in_the_graph_page_are_escaped(monkeypatch):
    graph, edges = small_graph(3)
    monkeypatch.setattr(plots, "_place", lambda name, graph: (0.0 if "<" in name else 1.0, 2.0))
    edges["source"] = "<b>bad</b>"
    page = BeautifulSoup(plots.interactive_graph(edges, graph).data, "html.parser")
    assert not page.find("b") and "<b>bad</b>" in page.find("title").text


def test_blocks_show_what_circuits_carry_and_the_size_needed():
    carried = pd.DataFrame({"layer": [3, 5, 3], "value": [0.9, 0.8, 0.1], "low": [0.8, 0.7, np.nan],
                            "high": [1.0, 0.9, np.nan], "group": ["first", "first", "others"]})  # fmt: skip
    needed = pd.DataFrame({"layer": [3, 5], "value": [0.1, 0.2], "low": [0.05, 0.1], "high": [0.2, 0.5]})
    left, right = plots.faithfulness_by_block(carried, needed, target=0.7).axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["first"].get_xydata().tolist() == [[3, 0.9], [5, 0.8]]
    assert lines["others"].get_xydata().tolist() == [[3, 0.1]]
    assert [*left.lines[-1].get_ydata()] == [0.7, 0.7] and "0.7" in right.get_ylabel()
    assert right.lines[0].get_xydata().tolist() == [[3, 0.1], [5, 0.2]]
    heights = right.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.05, 0.5)
    plt.close("all")


def test_losses_stand_beside_the_published_ones_where_there_are_any():
    interval = (0.5, 0.4, 0.6)
    lost = pd.DataFrame(
        [(name, tuple(100 * x for x in interval), interval, (0.25, 0.2, 0.3), task)
         for task in ("induce", "bypass") for name in ("patterns frozen", "svv removed", "steered values only")],
        columns=["intervention", "points", "share", "first_token", "task"],
    )  # fmt: skip
    published = pd.DataFrame({"model": ["m"], "task": ["bypass"], "intervention": ["svv removed"], "points": [30.0],
                              "share": [0.3]})  # fmt: skip
    figure = plots.loss_panels(lost, published, "lost")
    assert figure.get_suptitle() == "lost"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["patterns frozen", "svv removed"]
    for ax, ours, theirs in zip(figure.axes, (50, 0.5, 0.25), (30, 0.3, None)):
        drawn = {line.get_label(): list(line.get_xdata()) for line in ax.lines if "," in line.get_label()}
        assert drawn.pop("bypass, m", [None]) == [theirs]
        assert drawn == {"induce, here": [ours, ours], "bypass, here": [ours, ours]}
    plt.close("all")


def test_mean_and_spread_are_drawn_by_block():
    table = pd.DataFrame({"mean": [1.0, -2.0], "spread": [0.5, 0.25]}, index=[3, 7])
    ax = plots.mean_and_spread({"a": table, "b": table + 1}, "nats")
    first = ax.containers[0]
    assert first.get_label() == "a" and len(ax.containers) == 2
    assert first.lines[0].get_xydata().tolist() == [[3, 1], [7, -2]]
    assert [bar[:, 1].tolist() for bar in first.lines[2][0].get_segments()] == [[0.5, 1.5], [-2.25, -1.75]]
    plt.close("all")


def test_a_panel_a_measure_and_place_has_its_own_rows_and_nulls():
    rows = [(name, measure, place, i + j, 0.5, -1.0, 0.0, 9.0)
            for i, measure in enumerate(("share", "standing")) for j, place in enumerate(("vector", "svvs", "sum"))
            for name in ("DIM", "PO")]  # fmt: skip
    columns = ["method", "measure", "place", "value", "p", "null_low", "null_mean", "null_high"]
    figure = plots.dots_by_measure_and_place(pd.DataFrame(rows, columns=columns), {"share": "S", "standing": "T"})
    panels = [(ax.get_xlabel(), ax.get_title(), ax.lines[2].get_xdata().tolist()) for ax in figure.axes]
    assert panels == [
        (label if place == "sum" else "", place, [i + j, i + j])  # the axis is named below the last row
        for j, place in enumerate(("vector", "svvs", "sum"))
        for i, label in enumerate("ST")
    ]
    assert len(figure.legends) == 1
    plt.close(figure)


def test_dots_are_filled_below_the_bar_that_is_asked_for():
    columns = ["method", "value", "p", "null_low", "null_mean", "null_high"]
    table = pd.DataFrame([("DIM", 3, 0.01, -1, 0, 2), ("PO", 1, 0.001, -1, 0, 2)], columns=columns)
    for bar, filled in ((0.05, [3, 1]), (0.005, [1])):
        ax = plots.dots_against_band(table, "x", bar=bar)
        faces = {line.get_markerfacecolor(): list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o"}
        assert faces["#c1442e"] == filled
        assert f"p < {bar}" in ax.collections[0].get_label()
    plt.close("all")


def test_a_table_of_words_is_escaped_and_marks_those_on_the_list():
    columns = ["method", "read", "share", "listed", "1", "2"]
    rows = pd.DataFrame(
        [("DIM", "sum", np.nan, "01", "<b>", " sorry"), ("PO", "head", -0.25, "00", "a", "b")], columns=columns
    )
    page = BeautifulSoup(plots.token_table(rows, "A <title>").data, "html.parser")
    assert [span.text for span in page.select("span")] == ["<b>", " sorry", "a", "b"] and not page.select("b")
    assert [span.text for span in page.select("span.hit")] == [" sorry"]
    assert [cell.text for cell in page.select("th")] == ["DIM", "sum", "", "PO", "head", "-25.0 %"]


def test_maps_of_heads_share_one_scale():
    figure = plots.head_maps({"one": VALUES, "two": 3 * VALUES}, 7)
    maps = figure.axes[:2]
    assert [ax.get_title() for ax in maps] == ["one", "two"]
    assert [ax.collections[0].get_clim() for ax in maps] == [(-1.5, 1.5)] * 2
    plt.close(figure)


def test_every_curve_of_a_panel_is_drawn_with_its_band():
    rows = [(panel, f"method {i}", x, i / 10, i / 10 - 0.1, i / 10 + 0.1)
            for panel in ("one", "two") for i in range(7) for x in (1, 10)]  # fmt: skip
    figure = plots.curve_panels(pd.DataFrame(rows, columns=["panel", "method", "x", "value", "low", "high"]))
    assert [ax.get_title() for ax in figure.axes] == ["one", "two"]
    for ax in figure.axes:
        assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, i / 10], [10, i / 10]] for i in range(7)]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"method {i}" for i in range(7)]
        assert len(ax.collections) == 7 and ax.get_xscale() == "log" and ax.get_ylim()[0] == pytest.approx(-0.1)
    plt.close(figure)


def test_curve_panels_stand_three_in_a_row():
    rows = [(str(panel), "method", x, 0.5, 0.4, 0.6) for panel in range(4) for x in (1, 10)]
    figure = plots.curve_panels(pd.DataFrame(rows, columns=["panel", "method", "x", "value", "low", "high"]))
    assert [ax.get_visible() for ax in figure.axes] == [True] * 4 + [False] * 2
    assert figure.axes[3].get_subplotspec().rowspan.start == 1 and figure.get_size_inches()[0] < 13
    plt.close(figure)
