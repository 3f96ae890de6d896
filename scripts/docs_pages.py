"""MkDocs' hook for the site: pages that are made of the code, so that they can't go stale.

A page for each command is made from the typer app, and results.md gets the tables of the schema; links that leave docs/
lead to the repository. Needs no torch: `make docs`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


def on_config(config: MkDocsConfig) -> None:
    """Put the commands' pages into the navigation."""
    (commands,) = (entry["Commands"] for entry in config.nav or [] if "Commands" in entry)
    commands += [{name: f"commands/{name}.md"} for name in command_pages()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what is generated."""
    from mkdocs.structure.files import File

    for name, text in command_pages().items():
        files.append(File.generated(config, f"commands/{name}.md", content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The commands are listed, results.md has its tables, links to files outside docs/ lead to the repository."""
    if page.file.src_uri == "commands.md":
        markdown += commands_list()
    if page.file.src_uri == "results.md":
        markdown += results_tables(json.loads((ROOT / "docs" / "results.schema.json").read_text(encoding="utf-8")))
    outside = config.repo_url.rstrip("/") + "/blob/main"
    markdown = markdown.replace("](results.schema.json)", f"]({outside}/docs/results.schema.json)")
    return re.sub(r"\]\(\.\./([^)\s]+)\)", rf"]({outside}/\1)", markdown)


def commands_list() -> str:
    """A row for each command, with the first line of its help."""
    rows = [f"| [`{name}`](commands/{name}.md) | {text.splitlines()[2]} |" for name, text in command_pages().items()]
    return "\n".join(["", "## All of them", "", "| | |", "| --- | --- |", *rows])


def command_pages() -> dict[str, str]:
    """Name of each command -> its page in Markdown, in the order in which --help lists them."""
    import typer

    from abliterate.cli import app

    group = typer.main.get_command(app)
    return {name: _command_page(name, command) for name, command in group.commands.items() if not command.hidden}


def _command_page(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    shown = " ".join((a.metavar or a.name).upper() for a in arguments)
    lines = [f"# abliterate {name}", "", _plain(command.help or ""), "", f"    abliterate {name} {shown} [OPTIONS]", ""]
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            panels.setdefault(_panel(parameter), []).append(parameter)
    for panel, parameters in panels.items():
        lines += [f"## {panel}", "", "| | |", "| --- | --- |", *map(_row, parameters), ""]
    if command.epilog:
        lines += ["## Examples", "", *(f"    {line.partition(': ')[2]}" for line in command.epilog.split("\n\n")), ""]
    return "\n".join(lines)


def _panel(parameter: Any) -> str:
    own = getattr(parameter, "rich_help_panel", None)
    return own or ("Arguments" if parameter.param_type_name == "argument" else "Options")


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = (parameter.metavar or parameter.name).upper()
    else:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    text = _plain(parameter.help or "")
    default = parameter.default
    if "[default" not in text and default not in (None, False) and not callable(default) and not parameter.required:
        text += f" [default: {getattr(default, 'value', default)}]"
    text = re.sub(r"\s*\[default: (.*)\]", r" Default: `\1`.", text)
    return f"| {names} | {text.strip().replace('|', '&#124;').replace('[', '&#91;')} |"  # no table's end, no link


def _plain(text: str) -> str:
    """A help text without rich's marks."""
    return re.sub(r"\[/?(?:bold|dim|italic)\]", "", " ".join(text.split())).replace("\\[", "[")


def results_tables(schema: dict[str, Any]) -> str:
    """The document, then every type in it, a table each."""
    lines: list[str] = []
    for name, kind in [("The document", schema), *schema["$defs"].items()]:
        about, fields = _documented(kind.get("description", ""))
        lines += ["", f"## {name}", "", about, ""]
        if kind.get("properties"):
            lines += ["| field | type | |", "| --- | --- | --- |"]
            for field, of in kind["properties"].items():
                said = of.get("description") or fields.get(field, "")
                lines.append(f"| `{field}` | {_type_of(of)} | {said.replace('|', '&#124;')} |")
    return "\n".join(lines)


def _documented(docstring: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the type, and of each of its attributes."""
    about, _, attributes = docstring.partition("Attributes:")
    fields: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\S[^:\n]*): ((?:.|\n {8})*)", attributes, re.MULTILINE):
        fields |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return " ".join(about.split()), fields


def _type_of(of: dict[str, Any]) -> str:
    """A field's type in words; types of this page are links."""
    if "$ref" in of:
        name = of["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in of:
        return " or ".join(map(_type_of, of["anyOf"]))
    if "enum" in of or "const" in of:
        return " or ".join(f"`{value}`" for value in of.get("enum", [of.get("const")]))
    if of.get("type") == "array":
        inside = of.get("prefixItems") or [of.get("items") or {}]
        return "list of " + ", ".join(dict.fromkeys(map(_type_of, inside)))
    if of.get("type") == "object" and isinstance(of.get("additionalProperties"), dict):
        return f"object of {_type_of(of['additionalProperties'])}"
    return of.get("type", "anything")
