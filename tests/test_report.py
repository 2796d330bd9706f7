"""The report: everything in one file, whole in a real browser, at two widths, in light and dark."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.stages.report import rebuild, report
from tests.runs import copy_of, finished

EXPECTED = {
    "classes": {"scores", "reliability", "selective", "uncertainty", "radius", "walks", "plane", "learning"},
    "plane": {"scores", "reliability", "selective", "uncertainty", "radius", "walks", "plane", "learning", "map"},
    "curve": {"scores", "band", "coverage", "uncertainty", "radius", "walks", "plane", "learning"},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of the three kinds of runs."""
    return {name: Path(report(copy_of(name, tmp_path_factory.mktemp(name)))) for name in EXPECTED}


class _Page(HTMLParser):
    """Collects what a page refers to, its figures, and text alternatives."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.figures: set[str] = set()
        self.alternatives: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]
        if tag == "figure":
            self.figures.add((named.get("id") or "").removeprefix("figure-"))
        if tag in ("svg", "img"):
            self.alternatives.append(named.get("aria-label") or named.get("alt"))


@pytest.mark.parametrize("name", EXPECTED)
def test_page_has_all_figures_and_refers_to_nothing_outside(name, pages):
    text = pages[name].read_text(encoding="utf-8")
    page = _Page(text)
    assert page.figures == EXPECTED[name]
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "@import" not in text and not re.search(r"url\((?!#|['\"]?data:)", text)
    assert page.alternatives and all(page.alternatives)


def test_ids_are_unique(pages):
    for path in pages.values():
        ids = re.findall(r'\sid="([^"]+)"', path.read_text(encoding="utf-8"))
        assert ids and len(ids) == len(set(ids))


def test_page_is_rebuilt_from_the_store_alone_and_equal(pages, tmp_path):
    run = copy_of("curve", tmp_path)
    shutil.copy(report(run), tmp_path / "first.html")
    Path(run.uri, "report.html").unlink()
    again = report(run)
    assert Path(again).read_bytes() == (tmp_path / "first.html").read_bytes()


def test_page_is_rebuilt_where_neither_data_nor_code_are(tmp_path):
    run = copy_of("plane", tmp_path)
    first = Path(report(run)).read_bytes()
    config = Path(run.uri, "config.yaml")
    elsewhere = config.read_text(encoding="utf-8").replace("python:tests.runs:moons", "python:nowhere:to_be_found")
    assert "nowhere" in elsewhere
    config.write_text(elsewhere, encoding="utf-8")
    again = Path(rebuild(run.uri)).read_bytes()
    # All but the last line, which holds the checksum of the rest.
    pages = [page.rstrip(b"\n").rpartition(b"\n")[0] for page in (again, first)]
    assert pages[0].replace(b"nowhere:to_be_found", b"tests.runs:moons") == pages[1]


def test_page_names_every_method_and_says_a_verdict(pages):
    text = pages["classes"].read_text(encoding="utf-8")
    for words in ("fiber walk", "MAP, temperature", "ensemble, temperature", "Laplace, linearised", "SWAG"):
        assert words in text
    assert re.search(r"<h1>The fiber walk .* nats a row\.</h1>", text)


def test_report_of_an_unfinished_run_says_what_to_do(tmp_path):
    run = copy_of("curve", tmp_path, "evaluation.json")
    with pytest.raises(InputError, match="fiberwalk run"):
        report(run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium with a profile of its own and a log of the network."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (test extra)")
    from selenium.webdriver.chrome.service import Service

    profile = tempfile.mkdtemp(prefix="fwchrome-")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()
    shutil.rmtree(profile, ignore_errors=True)


def requests(browser: Any) -> list[str]:
    """Addresses that were asked for since the last call, data URIs left out."""
    import json

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:")]


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", EXPECTED)
def test_page_in_a_browser(name, width, pages, browser, tmp_path):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    requests(browser)
    browser.get_log("browser")
    browser.get(pages[name].as_uri())
    assert requests(browser) == [pages[name].as_uri()]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight])"
    )
    assert len(sizes) == len(EXPECTED[name])
    assert all(w >= 250 and h >= 100 for w, h in sizes)
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.save_screenshot(str(tmp_path / "page.png"))


def test_text_is_readable_in_light_and_dark(pages, browser):
    browser.get(pages["curve"].as_uri())
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        colours = browser.execute_script(
            "return [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('figure svg text')).fill]"
        )
        ink, paper, label = (_luminance(colour) for colour in colours)
        for front in (ink, label):
            assert (max(front, paper) + 0.05) / (min(front, paper) + 0.05) > 7  # WCAG AAA
        assert (paper > 0.5) == (scheme == "light")


def _luminance(colour: str) -> float:
    """Relative luminance of a CSS colour `rgb(r, g, b)` (WCAG 2)."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_finished_runs_are_left_alone():
    assert not finished("curve").storage.exists("report.html")
