"""What the README and the pages under docs/ link to is there; the README stays short; what is generated is whole."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import typer

import abliterate as ab
from abliterate.cli import app
from abliterate.common import toml

ROOT = Path(__file__).parents[1]
URLS = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
_spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "scripts" / "docs_pages.py")
HOOK = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(HOOK)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that its headings have on the usual sites."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readmes_links_work_on_pypi_too() -> None:
    """They are absolute; those into the repository lead to files that are there."""
    text = PAGES[0].read_text(encoding="utf-8")
    inside = URLS["Repository"], URLS["Repository"].replace("github.com", "raw.githubusercontent.com")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert re.match(r"https://", target), target
        for repository, branch in zip(inside, ("/blob/main/", "/main/"), strict=True):
            if target.startswith(repository + branch):
                assert (ROOT / target.removeprefix(repository + branch).partition("#")[0]).exists(), target
        if target.startswith(URLS["Documentation"]):
            page, _, anchor = target.removeprefix(URLS["Documentation"]).partition("#")
            source = ROOT / "docs" / (page or "index.html").replace(".html", ".md")
            made = page.removeprefix("commands/").removesuffix(".html") in HOOK.command_pages()
            assert source.is_file() or made, target
            assert not anchor or anchor in anchors(source), target


def test_the_site_is_where_the_package_says() -> None:
    assert f"site_url: {URLS['Documentation']}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"repo_url: {URLS['Repository']}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_command_has_a_page_with_all_its_options() -> None:
    pages = HOOK.command_pages()
    assert {"run", "demo", "apply", "heal"} <= set(pages)
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            shown = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
            assert parameter.hidden or all(f"`{flag}`" in pages[name] for flag in shown), (name, shown)
    assert "| `--seed` | Seed of every shuffle and sample. Default: `0`. |" in pages["run"]


def test_every_type_of_results_json_is_described() -> None:
    schema = json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8"))
    page = HOOK.results_tables(schema)
    assert all(f"\n## {name}\n" in page for name in schema["$defs"])
    assert "| `frontier` | list of [FrontierPoint](#frontierpoint) |" in page


def test_the_reference_names_all_that_is_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [n for n, room in ab._PUBLIC.items() if f"\n::: abliterate.{room}.{n}\n" not in page]
    assert missing == []
