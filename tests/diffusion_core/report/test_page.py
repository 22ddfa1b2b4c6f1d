"""The page and the Markdown: what they show, and that nothing in a study becomes markup or a connection."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from diffusion_core.report import contents
from diffusion_core.report.blocks import blocks_of
from diffusion_core.report.contents import plot_data, ranking, script_json
from diffusion_core.report.findings import candidates, front_of
from diffusion_core.report.page import plotly_source, render, write_page
from diffusion_core.report.pictures import MOST_PIXELS, animation_uri, grid_uri, shrunk
from diffusion_core.report.study import RUNS, Study, Trial
from diffusion_core.report.words import notes

METRIC = "eval/class_agreement"
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\" onclick=alert(1) x='",
    "{{ 7 * 7 }}{% raw %}",
    "a\u2028b\u2029c & <b>d</b>",
    "`code` | pipe *star* [link](javascript:alert(1)) ![x](http://example.com/x.png)",
    "# head\n\n- item",
]
SECRET = "hf_" + "a1B2c3D4" * 4


class Reader(HTMLParser):
    """Collects elements, their attributes, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    def data(self) -> Any:
        return json.loads(self.scripts[0])

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def read(study: Study) -> Reader:
    """The page without the script of plotly.js, which takes long to parse and holds no text of the study."""
    return Reader(render(study).replace(plotly_source(), ""))


def hostile(study: Study, text: str) -> Study:
    """The study with a text in all places that a user or a server can fill."""
    first, *others = study.trials
    bad = replace(
        first,
        name=text,
        state=text,
        settings={**first.settings, text: text, "train.lr": text},
        protocols={METRIC: text},
        links={text: f"javascript:{text}"},
        parent=text,
        reproduce=text,
        sample=text,
    )
    searched = {text: text, **study.searched}
    return replace(study, trials=[bad, *others], title=text, method=text, searched=searched,
                   varied=[*study.varied, text])  # fmt: skip


@pytest.fixture(scope="module")
def memory() -> dict[str, Any]:
    """What is computed once for all hostile texts."""
    return {}


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_never_markup(study_of: Callable[..., Study], text: str, memory: dict[str, Any]) -> None:
    plain = memory.get("page") or memory.setdefault("page", read(hostile(study_of(12), "harmless")))
    bad = read(hostile(study_of(12), text))
    assert bad.tags() == plain.tags()
    attributes = [sorted(given) for _, given in bad.elements]
    assert attributes == [sorted(given) for _, given in plain.elements]
    assert bad.scripts[1:] == plain.scripts[1:], "only the data differ"
    assert bad.data()["trials"][0]["name"] == text
    assert any(" ".join(text.split()) in " ".join(shown.split()) for shown in bad.texts)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_never_markdown(
    study_of: Callable[..., Study], tmp_path: Path, text: str, memory: dict[str, Any]
) -> None:
    def kinds(given: str) -> list[str]:
        write_page(hostile(study_of(12), given), tmp_path / "r.md", markdown=True)
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse((tmp_path / "r.md").read_text())
        inner = [child.type for token in tokens for child in token.children or []]
        return [token.type for token in tokens] + [kind for kind in inner if kind not in ("text", "text_special")]

    plain = memory.get("kinds") or memory.setdefault("kinds", kinds("harmless"))
    assert kinds(text) == plain


def test_json_in_a_script_ends_nothing() -> None:
    text = script_json({text: [text] for text in HOSTILE})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {text: [text] for text in HOSTILE}


def test_the_policy_allows_the_scripts_of_the_page_and_no_connection(study_of: Callable[..., Study]) -> None:
    addresses = {"bad": "javascript:alert(1)", "good": "https://wandb.ai/x"}
    page = Reader(render(replace(study_of(5), links=addresses)))
    named = {given["http-equiv"]: given["content"] or "" for _, given in page.elements if "http-equiv" in given}
    policy = named["Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    loaded = [given[name] or "" for _, given in page.elements for name in ("src", "href") if name in given]
    assert [address for address in loaded if not address.startswith("data:")] == ["https://wandb.ai/x"], "a link"


def test_secrets_are_blanked_out(study_of: Callable[..., Study], tmp_path: Path) -> None:
    study = hostile(study_of(6), f"token {SECRET}")
    write_page(study, tmp_path / "r.md", markdown=True)
    for text in (render(study), (tmp_path / "r.md").read_text().replace("\\", "")):
        assert SECRET not in text
        assert "[redacted]" in text


def test_a_page_of_200_trials_shows_them_all(study_of: Callable[..., Study]) -> None:
    study = study_of(200)
    text = render(study)
    page = Reader(text.replace(plotly_source(), ""))
    data = page.data()
    rows = [int(given["data-i"] or "") for tag, given in page.elements if tag == "tr" and "data-i" in given]
    assert sorted(rows) == list(range(200))
    shown = [study.trials[index] for index in rows]
    for states in (("finished", "stopped"), ("running",)):
        values = [trial.figures[METRIC] for trial in shown if trial.state in states]
        assert values == sorted(values, reverse=True)
    groups = ["ended" if trial.state in ("finished", "stopped") else trial.state for trial in shown]
    assert list(dict.fromkeys(groups)) == ["ended", "running", "failed"]
    assert groups == sorted(groups, key=["ended", "running", "failed"].index)
    assert rows == ranking(study)
    assert data["fronts"][f"{METRIC}|model/macs"] == front_of(study, METRIC, "model/macs")
    assert data["trials"][3]["figures"]["val/loss"] == pytest.approx(study.trials[3].figures["val/loss"], rel=1e-5)
    for trial in data["trials"]:
        for steps, curve in trial["curves"].values():
            assert len(steps) == len(curve) <= 200
    assert sum(map(len, data["common"])) > 0
    assert data["common"]["train.steps"] == "100"
    rates = [json.loads(trial["settings"]["train.lr"]) for trial in data["trials"]]
    assert rates == [trial.settings["train.lr"] for trial in study.trials], "in full"
    assert text == render(study_of(200)), "equal studies have equal pages"


def test_500_trials_fit_into_6_mb(study_of: Callable[..., Study]) -> None:
    text = render(study_of(500))
    assert len(plotly_source()) < len(text) < 6_000_000


def test_values_that_are_not_finite_are_shown_and_not_plotted(study_of: Callable[..., Study]) -> None:
    first, *others = study_of(6).trials
    figures = {METRIC: float("nan"), "val/loss": float("inf")}
    history = [{"step": 1, METRIC: float("nan")}, {"step": 2, METRIC: 0.5}]
    study = replace(study_of(6), trials=[replace(first, figures=figures, history=history), *others])
    page = read(study)
    trial = page.data()["trials"][0]
    assert trial["figures"] == {METRIC: None, "val/loss": None}
    assert trial["curves"][METRIC] == [[1, 2], [None, 0.5]]
    assert {"nan", "inf"} <= set(page.texts)


@pytest.mark.parametrize(
    "study",
    [
        Study("empty", []),
        Study("nothing measured", [Trial("a", "running")], running=True),
        Study("one", [Trial("a", "finished", {"seed": 0}, {"val/loss": 0.5})], metric="val/loss",
              goals={"val/loss": "minimize"}),
    ],
    ids=lambda study: study.title,
)  # fmt: skip
@pytest.mark.parametrize("markdown", [False, True])
def test_small_studies_have_pages(study: Study, markdown: bool, tmp_path: Path) -> None:
    write_page(study, tmp_path / "sub" / "page", markdown=markdown)
    text = (tmp_path / "sub" / "page").read_text()
    assert study.title in text
    assert ('http-equiv="refresh"' in text) == (study.running and not markdown)


def test_two_runs_are_compared(study_of: Callable[..., Study]) -> None:
    pair = replace(study_of(2), kind=RUNS, trials=study_of(2).trials[:2])
    text = re.sub(r"<[^>]+>", " ", render(pair).split('id="pair"')[1].split("</section>")[0])
    for trial in pair.trials:
        assert trial.name in text
        assert f"{trial.settings['train.lr']:.4g}" in text
    assert "seed" not in text.split(), "it does not differ"
    assert 'id="pair"' not in render(study_of(3))


def test_a_chain_has_a_plot_of_its_tickets(chain_of_tickets: Study, study_of: Callable[..., Study]) -> None:
    assert 'id="ticket-plot"' in render(chain_of_tickets)
    assert 'id="ticket-plot"' not in render(study_of(4))


def test_the_page_markdown_and_the_report_on_wandb_say_the_same(study_of: Callable[..., Study], tmp_path: Path) -> None:
    study = study_of(40)
    ranked = candidates(study)
    said = notes(study, ranked[0], ranked)
    assert f" of the {len(ranked) - 1} others" in said[0]
    write_page(study, tmp_path / "r.md", markdown=True)
    # It only holds the texts here: tests/agent/tracking/test_wandb_report.py has the real one.
    package = MagicMock(ParallelCoordinatesPlotColumn=MagicMock)
    blocks_of(package, "entity/project/sweep", study)
    on_wandb = package.MarkdownBlock.call_args_list[0].kwargs["text"]
    plain = [text.replace("\\", "") for text in (on_wandb, (tmp_path / "r.md").read_text())]
    for text in (*plain, " ".join(read(study).texts)):
        assert [note for note in said if note not in text] == []


def test_markdown_holds_the_table_and_its_pictures(study_of: Callable[..., Study], tmp_path: Path) -> None:
    study = study_of(60, tmp_path)
    write_page(study, tmp_path / "my report.md", markdown=True)
    text = (tmp_path / "my report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures == ["my-report-front.png", *(f"my-report-samples-{number}.png" for number in (1, 2, 3))]
    for name in pictures:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
    assert text.count("\n| trial-") == 50
    assert "10 more trials are not listed" in text
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(("size", "shown"), [((1000, 500), (360, 180)), ((40, 20), (160, 80)), ((200, 100), (200, 100)),
                                             ((1, 1), (160, 160)), ((3, 100), (6, 200))])  # fmt: skip
def test_grids_are_shrunk_or_enlarged(tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = shrunk(tmp_path / "a.png")
    assert image.size == shown
    assert max(image.size) <= MOST_PIXELS
    if shown[0] > size[0]:
        factor = shown[0] // size[0]
        assert (np.asarray(image) == pixels.repeat(factor, axis=0).repeat(factor, axis=1)).all()


def test_what_is_no_picture_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (tmp_path / "a.gif").write_bytes(b"<script>")
    assert grid_uri(tmp_path / "a.png") is None
    assert grid_uri(tmp_path / "missing.png") is None
    assert animation_uri(tmp_path / "a.gif") is None
    assert animation_uri(tmp_path / "missing.gif") is None


def test_the_best_trials_have_pictures_if_not_all_can(
    tmp_path: Path, study_of: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MOST_PICTURE_BYTES", 300_000)
    noise = np.random.default_rng(0).integers(0, 255, (360, 360, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    files = {"samples": tmp_path / "noise.png"}
    study = replace(study_of(20), trials=[replace(trial, pictures=files) for trial in study_of(20).trials])
    order = ranking(study)
    pictures = plot_data(study, order)["pictures"]
    size = len(next(iter(pictures.values())))
    assert len(pictures) == -(-300_000 // size) < 20
    assert set(pictures) == {str(index) for index in order[: len(pictures)]}
