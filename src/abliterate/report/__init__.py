"""A run as people look at it: one self-contained HTML file, still pictures, or Markdown.

Nothing is measured here but what `gather` reads while the run has the model at hand; every number shown comes from
results.json, report-data.json and the recipes beside them.
"""

from abliterate.report.document import Loaded, load_run
from abliterate.report.write import write_html, write_markdown, write_stills

__all__ = ["Loaded", "load_run", "write_html", "write_markdown", "write_stills"]
