"""`abliterate studio`: a web page on which an edit is tried, compared, chosen and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.commands.common import source_of
from abliterate.commands.options import Given, Output, command
from abliterate.common.errors import AbliterateError
from abliterate.settings.run import RunSettings


@command(
    "load.dtype load.device load.device_map load.max_memory load.offload_folder load.quantise load.at_stream",
    "abliterate studio ./model --recipe recipe.safetensors",
    "abliterate studio demo",
    "ABLITERATE_STUDIO_PASSWORD=... abliterate studio --host 0.0.0.0 --folder ./shared --no-browser",
    shares="log_file quiet",
)
def studio(
    model: Annotated[str | None, "Hub id, local folder, GGUF file, or 'demo'."] = None,
    *,
    recipe: Annotated[Path | None, "Recipe to start with."] = None,
    folder: Annotated[Path, "All that the page may read and write in."] = Path("."),
    host: Annotated[str, "Address to serve on; any but this machine's own needs a password."] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port. \\[default: the first free one from 7860]")
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(
            envvar="ABLITERATE_STUDIO_PASSWORD", show_envvar=True, show_default=False,
            help="Asked for on the page; better set in the environment, where other users don't see it.",
        ),
    ] = None,
    no_browser: Annotated[bool, "Don't open the page in a browser."] = False,
    given: Given[RunSettings],
    io: Output,
) -> None:  # fmt: skip
    """Open a web page to try an edit: live sliders, answers side by side, the frontier, runs. Ctrl-C ends it."""
    with io.reported() as terminal:
        from abliterate.studio.server import check_host, check_installed, serve

        check_installed()
        check_host(host, password)
        if recipe and not model:
            raise AbliterateError("--recipe needs the model it is for: abliterate studio MODEL --recipe RECIPE")
        settings = given.settings()
        from abliterate.run.opening import open_model

        if model:
            terminal.say(f"loading {model}")

        def ready(address: str) -> None:
            typer.echo(f"studio: {address} (Ctrl-C ends it)")
            if not no_browser:
                typer.launch(address)

        serve(
            folder,
            lambda source: open_model(source_of(source), settings.load),
            model=(_name(model, folder), source_of(model)) if model else None,
            recipe=(_name(str(recipe), folder), str(recipe)) if recipe else None,
            host=host,
            port=port,
            password=password,
            granted={"demo": "demo"},
            ready=ready,
        )


def _name(source: str, folder: Path) -> str:
    """A source as the page shows it: relative to the folder if it lies there, else without its path."""
    from abliterate.common.names import public_name

    path = Path(source).expanduser().resolve()
    if path.exists() and path.is_relative_to(folder.expanduser().resolve()):
        return path.relative_to(folder.expanduser().resolve()).as_posix()
    return "demo" if source == "demo" else public_name(source)
