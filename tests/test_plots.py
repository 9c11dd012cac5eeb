"""The figure that a reader can work: a table of heads that opens their tokens."""

import numpy as np
from bs4 import BeautifulSoup

from steerutils import plots

VALUES = np.array([[0.5, -0.1, 0.0], [0.02, 0.1, -0.25]])
TOKENS = [[[f"w{row}{head}", "<b>bad</b>"] for head in range(3)] for row in range(2)]


def heads() -> BeautifulSoup:
    marked = np.zeros((2, 3, 2), dtype=bool)
    marked[1, 2, 0] = True
    return BeautifulSoup(plots.interactive_heads(VALUES, 7, TOKENS, marked, "share").data, "html.parser")


def test_every_head_has_a_button_that_opens_its_own_tokens():
    page = heads()
    buttons = page.select("button")
    assert [button.text for button in buttons] == ["50.0", "-10.0", "0", "2.0", "10.0", "-25.0"]
    for button, (row, head) in zip(buttons, np.ndindex(2, 3)):
        opened = page.select(f'template[data-of="{button["data-head"]}"]')
        assert len(opened) == 1
        assert opened[0].find("b").text == f"block {7 + row}, head {head}: share {VALUES[row, head]:+.3f}"
        assert [span.text for span in opened[0].select("span")] == TOKENS[row][head]
        assert f"w{row}{head}" in button["title"]


def test_words_of_the_list_are_marked_and_tokens_are_escaped():
    page = heads()
    assert [span.text for span in page.select("span.hit")] == ["w12"]
    assert page.select_one(".read").text.startswith("block 7, head 0")  # the largest is open
    assert [button["data-head"] for button in page.select("button.at")] == ["0.0"]
    assert not page.find("span").find("b")  # the token <b> is text


def test_no_effect_at_all_has_a_colour():
    page = plots.interactive_heads(np.zeros((1, 1)), 0, [[["a"]]], np.zeros((1, 1, 1), bool), "share").data
    assert "rgb(" in page and "nan" not in page
