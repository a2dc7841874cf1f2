"""The documentation site builds without a warning, tells of every command, option and public name, and loads nothing remote."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer

import laserlm
from laserlm.cli import app

ROOT = Path(__file__).parents[1]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = {"canonical", "next", "prev", "edit"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


class Assets(HTMLParser):
    """The addresses of all that a page loads by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        options = dict(attrs)
        if tag in LOADED and options.get("rel") not in NOT_LOADED:
            self.addresses.append(options.get(LOADED[tag]) or "")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        for address in Assets(page.read_text(encoding="utf-8")).addresses:
            assert not re.match(r"(https?:)?//", address), f"{page.relative_to(site)} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every command with its whole name."""
    yield name, command
    for child, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name} {child}")


def test_the_reference_has_every_command_argument_and_option(site: Path) -> None:
    page = unescape(re.sub("<[^>]+>", "", (site / "cli" / "index.html").read_text(encoding="utf-8")))
    names = list(commands(typer.main.get_command(app), "laser"))
    assert len(names) > 35
    for name, command in names:
        if command.hidden:
            continue
        heading = name if name != "laser" else "Command line"
        start = re.search(rf"(?m)^{re.escape(heading)}¶?$", page)
        assert start, f"{name} is not in the reference"
        own = re.split(r"(?m)^laser [a-z -]+¶$", page[start.end() :])[0]
        for parameter in (p for p in command.params if not getattr(p, "hidden", False)):
            for option in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]:
                assert option in own, f"{name}: {option} is not in the reference"


def test_the_reference_of_python_has_every_public_name(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in laserlm.__all__:
        assert re.search(rf'id="laserlm\.[a-z_.]*{name}"', page) or name == "LaserError", name


def test_the_home_page_is_the_readme_with_links_of_the_site(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="images/report.png"' in page
    assert 'href="quickstart/"' in page
    assert "docs/" not in re.findall(r'(?:href|src)="([^"]+)"', page)
