"""The HTML file: one page with its styles, its script, its numbers and plotly inside, and no address to fetch from."""

from __future__ import annotations

import base64
import gzip
import json
from functools import cache
from importlib import resources
from typing import Any

from abliterate.report import headline, story
from abliterate.report.document import Loaded
from abliterate.report.figures import all_figures
from abliterate.report.repeat import repeat_command

DRAWN = ("data", "layout", "frames", "shown", "picks", "ratio")  # what the page's script needs of a figure


def page(loaded: Loaded) -> str:
    """The report as HTML.

    plotly's script is packed (gzip, base64) and unpacked by the browser: 2 MB instead of 4.8. A content security
    policy in the page forbids it every request.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("abliterate.report", "assets"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = all_figures(loaded)
    return environment.get_template("report.html.j2").render(
        loaded=loaded,
        story=story,
        headline=headline,
        figures=figures,
        separation=[figures[name] for name in figures if name.startswith("separation-")],
        command=repeat_command(loaded),
        numbers=_in_script({name: {key: getattr(figure, key) for key in DRAWN} for name, figure in figures.items()}),
        style=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_packed_plotly(),
        plotly_notice="plotly.js, Copyright Plotly, Inc., MIT licence",
    )


def _in_script(value: Any) -> str:
    """JSON that can stand inside a script element, whatever prompts and names hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=vars)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (resources.files("abliterate.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
