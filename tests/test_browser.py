"""Every page in a real browser, at desktop and phone width: nothing broken, nothing from outside, nothing cut off."""

import functools
import http.server
import json
import os
import shutil
import threading

import build_pages
import pytest
from graphs import small_graph

from steerutils import plots

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no chromium and chromedriver on this machine; with Debian: apt-get install chromium chromium-driver"

pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER) and os.environ.get("CI") != "true", reason=MISSING)

BROKEN_PICTURES = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
WIDGET_CELLS = "return document.querySelectorAll('script[type=\"application/vnd.jupyter.widget-view+json\"]').length"
WIDGETS = "return [...document.querySelectorAll('.jupyter-widgets')].filter(w => w.offsetHeight > 0).length"
OVERFLOW = """
const width = arguments[0], page = document.documentElement.scrollWidth;
const wide = [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > width + 1);
return page > width ? [`${page} px, window ${width}`, ...wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120))] : []
"""
CUT_FORMULAS = """
const cut = [...document.querySelectorAll('div.math')].filter(m => m.scrollWidth > m.clientWidth + 1);
return window.innerWidth < 600 ? [] : cut.map(m => m.textContent.slice(0, 120))
"""
SETTLED = """
const done = arguments[0];
document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager');
const maths = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
Promise.all([maths, document.fonts.ready]).then(() => setTimeout(done, 150), done);
"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line of log for each."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    """The address of the smoke pages, served on the loopback interface."""
    handler = functools.partial(QuietHandler, directory=build_pages.build("smoke"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that can reach this machine only, and that keeps its logs."""
    assert BROWSER and DRIVER, MISSING
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync disable-dev-shm-usage"
    for flag in flags.split() + [f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def requested(browser) -> list[str]:
    """The addresses asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def complaints(browser, site: str, address: str, width: int, height: int) -> dict:
    """What is wrong with one page at one size of window, by kind."""
    phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    requested(browser), browser.get_log("browser")  # forget the page before
    browser.get(f"{site}/{address}")
    browser.execute_async_script(SETTLED)
    cells, widgets = browser.execute_script(WIDGET_CELLS), browser.execute_script(WIDGETS)
    local = (site + "/", "data:", "blob:", "chrome:")  # the last: the browser's own first tab may still load
    return {
        "script errors": [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"],
        "outside requests": [url for url in requested(browser) if not url.startswith(local)],
        "broken pictures": browser.execute_script(BROKEN_PICTURES),
        "missing widgets": [f"{widgets} widgets for {cells} cells"] if widgets < cells else [],
        "wider than the window": browser.execute_script(OVERFLOW, width),
        "formulas cut off": browser.execute_script(CUT_FORMULAS),  # a phone may scroll them, a desktop need not
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", [*build_pages.toc_pages(), "search"])
def test_page_is_sound(browser, site, page, size):
    found = complaints(browser, site, f"{page}.html", *SIZES[size])
    assert not any(found.values()), {kind: what for kind, what in found.items() if what}


def test_the_check_sees_a_bad_page(browser, site):
    """A page with one fault of each kind is reported for each."""
    bad = build_pages.build("smoke") / "bad-page-for-the-test.html"
    bad.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><article>"
        "<img src=nowhere.png><script src='http://outside.invalid/x.js'></script><script>throw Error('x')</script>"
        "<script type='application/vnd.jupyter.widget-view+json'>{}</script>"
        "<div class=math style='width: 90px; overflow-x: auto'><div style='width: 99px'>x = y</div></div>"
        "<div style='width: 1900px'>wide</div></article>"
    )
    try:
        found = complaints(browser, site, bad.name, *SIZES["desktop"])
    finally:
        bad.unlink()
    assert all(found.values()), found


FOLDED = """
const fold = document.querySelector('.recorded-values'), seen = () => fold.querySelector('.recorded').checkVisibility();
const closed = seen();
fold.querySelector('summary').click();
return [fold.querySelector('summary').textContent, fold.querySelectorAll('.recorded').length, closed, seen()]
"""


def test_many_recorded_values_are_folded_until_asked_for(browser, site):
    browser.get(f"{site}/notebooks/07-ov-decomposition.html")
    words, n, closed, opened = browser.execute_script(FOLDED)
    assert words == f"{n} recorded values" and n > 4
    assert (closed, opened) == (False, True)


SHOWN = "return [...document.querySelectorAll('.e')].filter(e => e.getBoundingClientRect().width > 0).length"
SLIDE = """
const slider = document.querySelector('input[type=range]');
slider.value = arguments[0];
slider.dispatchEvent(new Event('input', {bubbles: true}));
return document.querySelector('.count').textContent
"""
POINT = """
const path = document.querySelector(`[data-rank="${arguments[0]}"] .hit`);
const middle = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM());
const top = document.elementFromPoint(middle.x, middle.y);
top.dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));
return [top.closest('.e').dataset.rank, document.querySelector('.read').textContent,
        [...document.querySelectorAll('.at')].map(e => e.dataset.rank).join()]
"""
LEAVE = """
document.querySelector('svg').dispatchEvent(new PointerEvent('pointerleave', {pointerType: 'mouse'}));
return document.querySelector('.read').textContent
"""


def test_the_graph_works_without_a_kernel(browser, tmp_path):
    """Its slider shows so many of the strongest edges, and pointing at one tells what it is."""
    graph, edges = small_graph(12)
    page = tmp_path / "graph.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{plots.interactive_graph(edges, graph, 5).data}")
    requested(browser), browser.get_log("browser")
    browser.get(page.as_uri())
    assert browser.execute_script(SHOWN) == 5
    assert browser.execute_script(SLIDE, 12) == "12" and browser.execute_script(SHOWN) == 12
    assert browser.execute_script(SLIDE, 2) == "2" and browser.execute_script(SHOWN) == 2
    rank, words, marked = browser.execute_script(POINT, 0)
    row = edges.iloc[int(rank)]
    assert words == f"{int(rank) + 1}. {row.source} → {row.reader} ({row.kind}): {row.score:+.4g} nats"
    assert marked == rank and int(rank) < 2
    assert browser.execute_script(LEAVE) == "Point at an edge, or tap it."
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [url for url in requested(browser) if url.startswith(("http", "ws"))]  # the rest is the browser's own
