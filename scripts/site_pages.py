"""Pages of the documentation site that are made from what is there already; mkdocs calls ``on_files`` and ``on_page_markdown``.

The home page is the README; the changelog, the contributing guide and the notes on clusters are the repository's files; the
command line's reference comes from the code; the notebooks are shown with their stored outputs, the example as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from typer.cli import get_docs_for_click

from laserlm.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
    "examples/cluster/README.md": "cluster.md",
}
SCRIPTS = {"examples/laser_in_150_lines.py": "laser_in_150_lines.md"}
NOTEBOOKS = {f"examples/{name}.ipynb": f"{name}.md" for name in ("ten_minutes", "one_reduction")}


def command_line() -> str:
    """Return every command with all its arguments and options, as Markdown."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="laser", title="Command line")
    return re.sub(r"(?m)^Example: (.+)$", r"Example: `\1`", text)


def linked(text: str, folder: Path) -> str:
    """Return Markdown of a folder of the repository with its relative links leading to pages of the site."""

    def target(link: re.Match[str]) -> str:
        path, mark, anchor = link[1].partition("#")
        file = (folder / path).resolve()
        if file.is_relative_to(DOCS):
            path = str(file.relative_to(DOCS))
        elif file.is_relative_to(ROOT):
            path = (PAGES | SCRIPTS | NOTEBOOKS).get(str(file.relative_to(ROOT)), path)
        return f"]({path}{mark}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", target, text)


def notebook(source: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown with its stored outputs, and its pictures by name."""
    name = Path(source).stem
    cells = nbformat.read(ROOT / source, as_version=4)  # type: ignore[no-untyped-call]
    exporter = MarkdownExporter()  # type: ignore[no-untyped-call]
    text, resources = exporter.from_notebook_node(cells, {"unique_key": name, "output_files_dir": f"images/{name}"})
    return text, resources["outputs"]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let the pages of ``docs`` link to other files of the repository, as they do where it is browsed."""
    return markdown if page.file.generated_by else linked(markdown, DOCS)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those of the folder ``docs``."""
    made: dict[str, str | bytes] = {"cli.md": command_line()}
    for source, target in PAGES.items():
        made[target] = linked((ROOT / source).read_text(encoding="utf-8"), (ROOT / source).parent)
    for source, target in SCRIPTS.items():
        made[target] = f"# LASER in 150 lines\n\n```python\n{(ROOT / source).read_text(encoding='utf-8')}```\n"
    for source, target in NOTEBOOKS.items():
        text, pictures = notebook(source)
        made |= {target: text, Path(source).name: (ROOT / source).read_bytes(), **pictures}
    for target, content in made.items():
        files.append(File.generated(config, target, content=content))
    return files
