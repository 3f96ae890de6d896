"""Writing a report: HTML, still pictures, Markdown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from abliterate.common.errors import AbliterateError
from abliterate.common.files import whole_folder, write_text
from abliterate.report.charts import Figure
from abliterate.report.document import Loaded, load_run
from abliterate.report.headline import headline
from abliterate.report.story import title

HTML, PICTURES, MARKDOWN = "report.html", "report-png", "report.md"
INSTALL = "pip install 'abliterate[report]'"


def write_html(out: str | Path, file: str | Path | None = None, *, show_completions: bool = False) -> Path:
    """Write the report of a run as one HTML file.

    Args:
        out: the run's folder, or a results.json.
        file: where to; report.html in the folder by default.
        show_completions: put in, folded away, the answers to target prompts that the run kept.

    Returns:
        The file written.

    Raises:
        AbliterateError: when the folder isn't a run's.
    """
    from abliterate.report.page import page

    loaded = load_run(out, show_completions=show_completions)
    path = Path(file) if file is not None else loaded.folder / HTML
    text = page(loaded)
    write_text(path, text)
    return path


def write_stills(out: str | Path, folder: str | Path | None = None, *, overwrite: bool = True) -> Path:
    """Write every chart as a PNG into a folder, report-png in the run's by default; returns the folder.

    Raises:
        AbliterateError: when matplotlib isn't installed, or the folder isn't a run's.
        OutputError: when the folder named isn't empty and `overwrite` is off.
    """
    missing = pictures_missing()
    if missing:
        raise AbliterateError(f"no pictures were drawn: {missing}")
    from abliterate.report.figures import all_figures
    from abliterate.report.stills import draw

    loaded = load_run(out)
    path = Path(folder) if folder is not None else loaded.folder / PICTURES
    with whole_folder(path, overwrite=overwrite) as temporary:
        for name, figure in all_figures(loaded).items():
            shared = _shared(loaded, figure) if name == "outcome" else {}
            draw(figure, temporary / f"{name}.png", **shared)
    return path


def _shared(loaded: Loaded, figure: Figure) -> dict[str, Any]:
    """The picture that people share says of itself which model it is of, and its numbers."""
    numbers = [[text.partition(": ")[2].partition(" = ")[0] for text in trace["text"]] for trace in figure.data]
    return {"title": title(loaded), "said": headline(loaded), "numbers": numbers}


def write_markdown(out: str | Path, file: str | Path | None = None) -> Path:
    """Write the report as Markdown, for cards; its pictures go to report-png beside it. Returns the file.

    Cards are published: no answer to a target prompt is ever in it. Without matplotlib the tables stand alone, and
    a line says so.

    Raises:
        AbliterateError: when the folder isn't a run's.
    """
    from abliterate.report.markdown import markdown

    loaded = load_run(out)
    path = Path(file) if file is not None else loaded.folder / MARKDOWN
    missing = pictures_missing()
    pictures = None if missing else write_stills(out, path.parent / PICTURES)
    text = markdown(loaded, pictures.name if pictures else None, missing)
    write_text(path, text)
    return path


def pictures_missing() -> str | None:
    """What still pictures need and isn't installed, with what to do; None when it is there."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return f"it needs matplotlib, which isn't installed; {INSTALL}, then: abliterate report OUT"
