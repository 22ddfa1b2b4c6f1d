"""What `make docs` would refuse: pages that the site leaves out, and links that lead out of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def test_the_site_has_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["strict"] is True
    listed = [file for entry in site["nav"] for file in entry.values()]
    assert sorted(listed) == [page.name for page in PAGES]


def test_the_first_page_leads_to_all_others() -> None:
    found = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert found == {page.name for page in PAGES} - {"index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_stay_in_the_site(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        assert target.is_relative_to(ROOT / "docs"), f"{page.name}: {link} is not in the site"
        assert target.is_file(), f"{page.name}: {link}"
