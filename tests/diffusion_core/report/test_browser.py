"""The page in Chromium: no errors, nothing wider than the screen, and tables and plots that do what they say."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_core.report.page import write_page
from diffusion_core.report.study import Study

_spec = importlib.util.spec_from_file_location("browser_of_reports", Path(__file__).with_name("browser.py"))
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
Browser: Any = _module.Browser

METRIC = "eval/class_agreement"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_module.CHROMIUM is None, reason="no chromium here (Debian: apt install chromium)"),
]
SHOWN = "[...document.querySelectorAll('#table tbody tr:not([hidden])')].map(row => Number(row.dataset.i))"
DRAWN = "document.documentElement.dataset.drawn"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def quiet(browser: Any) -> Iterator[None]:
    """Nothing is said on the console, whatever a test does."""
    browser.said.clear()
    yield
    browser.run("1")
    assert browser.said == []


def scrolled(browser: Any) -> None:
    """Bring each section into view once, so that all plots are drawn."""
    browser.run("""(async () => { for (const section of document.querySelectorAll("section")) {
        section.scrollIntoView(); await new Promise(done => setTimeout(done, 60)); } window.scrollTo(0, 0); })()""")
    browser.wait(
        "[...document.querySelectorAll('section:not([hidden]) .plot')].every(plot => plot.querySelector('svg'))"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(
    browser: Any, study_of: Callable[..., Study], chain_of_tickets: Study, tmp_path: Path, width: int, dark: bool
) -> None:
    for study in (study_of(40, tmp_path), chain_of_tickets):
        write_page(study, tmp_path / "r.html")
        browser.open(tmp_path / "r.html", width, dark=dark)
        scrolled(browser)
        assert browser.run(OVERFLOW) == 0
        boxes = "[...document.querySelectorAll('.plot svg.main-svg')].map(plot => "
        assert all(browser.run(f"{boxes} plot.clientWidth <= plot.closest('.plot').clientWidth)"))
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark


def test_a_study_of_500_trials_opens_at_once(browser: Any, study_of: Callable[..., Study], tmp_path: Path) -> None:
    """Work of the page's own scripts; how long the machine takes to parse plotly.js depends on what else it does."""
    write_page(study_of(500), tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    browser.wait(DRAWN)
    assert browser.run("rows.length") == 500
    assert float(browser.run("document.documentElement.dataset.took")) < 1000.0


def test_the_table_sorts_filters_hides_and_exports(
    browser: Any, study_of: Callable[..., Study], tmp_path: Path
) -> None:
    study = study_of(40)
    write_page(study, tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    rates = [trial.settings["train.lr"] for trial in study.trials]
    press = "[...document.querySelectorAll('thead button')].find(button => button.textContent === 'train.lr').click()"
    browser.run(press)
    assert browser.run(SHOWN) == sorted(range(40), key=lambda index: rates[index])
    browser.run(press)
    assert browser.run(SHOWN) == sorted(range(40), key=lambda index: -rates[index])

    def narrowed(text: str) -> set[int]:
        browser.run(f"byId('filter').value = {text!r}; applyFilter(); redraw.front()")
        return set(browser.run(SHOWN))

    expected = {
        i for i, trial in enumerate(study.trials) if rates[i] < 0.01 and trial.settings["prune.method"] == "none"
    }
    assert narrowed("lr<0.01 method=none") == expected
    assert narrowed("train.lr<0.01 prune.method=none") == expected
    assert narrowed("state!=finished") == {i for i, trial in enumerate(study.trials) if trial.state != "finished"}
    assert narrowed("trial-007") == {7}
    assert narrowed("nothing-like-it") == set()
    assert browser.run("byId('count').textContent") == "0 of 40 trials."
    assert len(narrowed(f"class_agreement>={0.9}")) == sum((t.value(METRIC) or 0) >= 0.9 for t in study.trials)
    kept = set(browser.run(SHOWN))
    browser.run("document.querySelector('[data-column=\"1\"]').click()")
    rows = list(csv.DictReader(io.StringIO(browser.run("csv()"))))
    assert {row["trial"] for row in rows} == {study.trials[index].name for index in kept}
    assert "train.lr" not in rows[0], "it was hidden"
    assert all(float(row[METRIC]) == study.trials[int(row["trial"][-3:])].figures[METRIC] for row in rows)
    browser.open(tmp_path / "r.html")
    assert set(browser.run(SHOWN)) == kept, "a page that loads itself again keeps its filter"


def test_spreadsheets_take_no_text_for_a_formula(browser: Any, study_of: Callable[..., Study], tmp_path: Path) -> None:
    first, *others = study_of(3).trials
    bad = replace(first, name='=HYPERLINK("http://x")', settings={**first.settings, "train.lr": "@SUM(1)"})
    write_page(replace(study_of(3), trials=[bad, *others]), tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    cells = [cell for row in csv.reader(io.StringIO(browser.run("csv()"))) for cell in row]
    assert """'=HYPERLINK("http://x")""" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]


def test_plots_show_what_was_measured(browser: Any, study_of: Callable[..., Study], tmp_path: Path) -> None:
    study = study_of(40, tmp_path)
    write_page(study, tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    scrolled(browser)
    points = browser.run("""byId("front-plot").data.filter(trace => trace.customdata)
        .flatMap(trace => trace.x.map((x, i) => [trace.customdata[i], x, trace.y[i]]))""")
    points = [point for point in points if point[0] is not None]
    titles = set(browser.run("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"))
    assert titles == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}, "no uploads"
    cost = browser.run("byId('front-cost').value")
    for index, x, y in points:
        assert x == pytest.approx(study.trials[index].figures[cost], rel=1e-5)
        assert y == pytest.approx(study.trials[index].figures[METRIC], rel=1e-5)
    assert {point[0] for point in points} == {i for i, trial in enumerate(study.trials) if trial.value(METRIC)}
    browser.run("byId('front-cost').value = 'seconds'; byId('front-cost').dispatchEvent(new Event('change'))")
    browser.wait("byId('front-plot').layout.xaxis.title.text.includes('wall time')")
    # Pointing at a trial shows its card; so does its button in the table.
    browser.run("byId('front-plot').emit('plotly_hover', {points: [{customdata: 5}]})")
    assert browser.run("document.querySelector('#detail h3').textContent") == "trial-005"
    browser.wait("document.querySelector('#detail img').naturalWidth > 0")
    browser.run("document.querySelector('#table [data-trial=\"trial-009\"]').click()")
    assert browser.run("document.querySelector('#detail h3').textContent") == "trial-009"
    assert "made from trial-008" in browser.run("byId('detail').textContent")
    assert browser.run("byId('front-plot').data.some(trace => trace.name === 'lineage')")
    labels = browser.run("[...document.querySelectorAll('#parallel-plot .xtick text')].map(label => label.textContent)")
    assert [label.removesuffix(" (log)") for label in labels] == [*study.varied, METRIC]
    # Ticking a trial adds its curve.
    before = browser.run("byId('curve-plot').data.length")
    browser.run("rowOf.get(data.order.at(-1)).querySelector('input').click()")
    browser.wait(f"byId('curve-plot').data.length > {before}")
    ended = browser.run("""byId("curve-plot").data.filter(trace => trace.marker?.symbol === "x")
        .map(trace => trace.customdata[0])""")
    chosen = browser.run("[...state.chosen]")
    assert set(ended) == {i for i in chosen if study.trials[i].state in ("stopped", "failed")}
    assert ended


def test_all_controls_are_reached_by_the_keyboard(browser: Any, study_of: Callable[..., Study], tmp_path: Path) -> None:
    write_page(study_of(3), tmp_path / "r.html")
    browser.open(tmp_path / "r.html")
    scrolled(browser)
    browser.run("document.querySelectorAll('details').forEach(box => { box.open = true; })")
    controls = "button, select, input, summary, a[href]"
    wanted = browser.run(f"[...document.querySelectorAll('{controls}')].filter(one => one.checkVisibility()).length")
    browser.run("document.body.setAttribute('tabindex', '-1'); document.body.focus(); window.seen = new Set()")
    for _ in range(wanted + 5):
        for kind in ("rawKeyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        browser.run(f"document.activeElement.matches('{controls}') && seen.add(document.activeElement); 1")
    assert browser.run("seen.size") == wanted
