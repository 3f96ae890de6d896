"""The page: its frame, and how an event is wired. What stands on it is in `tabs`, what all users share in `shared`."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from abliterate.common.errors import AbliterateError, shorten
from abliterate.studio.session import Session
from abliterate.studio.shared import Studio
from abliterate.studio.tabs.controls import Controls
from abliterate.studio.tabs.frontier import Frontier
from abliterate.studio.tabs.keep import Keep
from abliterate.studio.tabs.run import Run
from abliterate.studio.tabs.talk import Grid, Talk

STYLE = Path(__file__).parent / "studio.css"
logger = logging.getLogger(__name__)


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    with gr.Blocks(
        title="abliterate studio", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as blocks:
        session = gr.State(Session())
        gr.Markdown("# abliterate studio", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300, elem_id="controls"):
                controls = Controls(studio)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Talk", id="talk"):
                    talk = Talk()
                with gr.Tab("Grid", id="grid"):
                    grid = Grid()
                with gr.Tab("Frontier", id="frontier"):
                    frontier = Frontier(studio)
                with gr.Tab("Run", id="run"):
                    run = Run(studio)
                with gr.Tab("Keep", id="keep"):
                    keep = Keep(studio)
        on = functools.partial(_on, studio)
        taken = [controls.recipe, controls.status, *controls.sliders, *talk.shown]  # what another recipe changes
        lists = [controls.model, controls.recipe, frontier.out]
        asking = [controls.system, *controls.sampling]
        opened = on(blocks.load, run.opened, [session], [*lists, controls.status, run.progress, run.timer])
        loaded = controls.wire(on, session, taken)
        talk.wire(on, session, asking, controls.sliders)
        grid.wire(on, session, asking)
        frontier.wire(on, session, taken, [opened, loaded])
        run.wire(on, controls.model, lists)
        keep.wire(on, session, controls.recipe)
    return blocks


def _on(
    studio: Studio, event: Any, function: Callable[..., Any], inputs: Any = None, outputs: Any = None, **options: Any
) -> Any:
    """Wire an event: errors on one line, not offered as an API."""
    shown = {"show_progress": "minimal", **options}
    return event(told(function, studio.folder.public), inputs, outputs, api_visibility="private", **shown)


def told(function: Callable[..., Any], public: Callable[[str], str] = str) -> Callable[..., Any]:
    """The same event, an error shown as one line on the page; never a trace, and nothing of it in a log.

    Args:
        function: called with what the page holds.
        public: takes out of a text what isn't for those who use the page.
    """

    @functools.wraps(function)
    def streamed(*values: Any) -> Iterator[Any]:
        try:
            found = function(*values)
            if inspect.isgenerator(found):
                yield from found
            else:
                yield found
        except gr.Error:
            raise
        except Exception as error:
            if not isinstance(error, AbliterateError):
                logger.debug("an event of the studio failed", exc_info=error)
            said = str(error) if isinstance(error, AbliterateError) else f"{type(error).__name__}: {error}"
            raise gr.Error(escape(shorten(public(said), 400)), print_exception=False, duration=None) from None

    if inspect.isgeneratorfunction(function):
        return streamed
    return functools.wraps(function)(lambda *values: next(streamed(*values)))
