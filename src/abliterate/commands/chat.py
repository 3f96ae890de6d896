"""`abliterate chat`: talk to a model, its edit attached live, in any terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from abliterate.commands.common import Model, source_of
from abliterate.commands.options import Given, Output, command
from abliterate.common.errors import AbliterateError
from abliterate.settings.run import RunSettings

if TYPE_CHECKING:
    from abliterate.studio.conversation import Conversation

HELP = """\
/strength 0.5   scale the edit: 0 is the original, 1 the recipe as it is
/original       the same as /strength 0; /edited goes back to 1
/compare        answer the next message twice, original and edited; not remembered
/system TEXT    start anew with a system prompt (nothing: the template's own)
/reset          start anew
/save FILE      write the conversation to a JSON file
/help, /quit    or Ctrl-D; Ctrl-C stops an answer"""


@command(
    "load -load.tensor_parallel",
    "abliterate chat ./model --recipe recipe.safetensors --strength 0.8",
    "echo 'Why is the sky blue?' | abliterate chat ./model",
    shares="log_file quiet",
)
def chat(
    model: Model,
    *,
    recipe: Annotated[Path | None, "Recipe to attach live."] = None,
    strength: Annotated[float, "How much of it: 0 none, 1 all."] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest that hold this.")] = 1.0,
    seed: Annotated[int, "Of what is drawn."] = 0,
    force: Annotated[bool, "Use a recipe that was made for another model."] = False,
    given: Given[RunSettings],
    io: Output,
) -> None:
    """Talk to a model in the terminal, a recipe attached live; a prompt piped in prints only the answer."""
    piped = not sys.stdin.isatty()
    text = sys.stdin.read().strip() if piped else ""
    if piped and not text:
        raise AbliterateError("standard input is empty; pipe a prompt in, or run this in a terminal")
    with replace(io, quiet=io.quiet or piped).reported() as terminal:
        settings = given.settings()
        from abliterate.apply.hooks import attached
        from abliterate.edit.recipe import check_model, load_recipe
        from abliterate.run.opening import open_model
        from abliterate.studio.conversation import Conversation, Sampling

        stored = load_recipe(recipe) if recipe else None
        source = source_of(model)
        terminal.say(f"loading {source}")
        handle = open_model(source, settings.load)
        if stored:
            check_model(stored, handle.config_hash, force=force)
        talk = Conversation(
            handle,
            stored.edit if stored else None,
            strength,
            Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed),
        )
        talk.system(settings.load.system_prompt)
        if stored:
            with attached(handle, stored.edit):
                pass  # a recipe that doesn't fit is said before anything is typed
        if piped:
            _answer(talk, text)
        else:
            _talk(talk, terminal.stream)


@contextlib.contextmanager
def _unechoed() -> Iterator[None]:
    """What is typed meanwhile waits for the next prompt, instead of showing in the answer."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        file, before = sys.stdin.fileno(), termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(file, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def _answer(talk: Conversation, text: str) -> None:
    """Stream one answer to standard output."""

    def emit(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    talk.reply(text, emit)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _talk(talk: Conversation, err: TextIO) -> None:
    """Read lines until the end; what isn't an answer goes to `err`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history at the prompt
    typer.echo("/help lists what can be typed; Ctrl-D ends", err)
    compare = False
    while True:
        try:
            line = input(_prompt(talk, compare)).strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            continue
        if not line:
            continue
        try:
            if line in ("/quit", "/exit"):
                return
            with _unechoed():
                if line.startswith("/"):
                    compare = _command(talk, line, compare, err)
                elif compare:
                    compare = False
                    _compare(talk, line)
                else:
                    _answer(talk, line)
        except KeyboardInterrupt:
            typer.echo("\n(stopped)", err)
        except AbliterateError as error:
            typer.echo(f"abliterate: {error}", err)


def _prompt(talk: Conversation, compare: bool) -> str:
    mark = "compare" if compare else "original" if talk.edit is None or talk.strength == 0 else f"{talk.strength:g}"
    return f"[{mark}] > "


def _command(talk: Conversation, line: str, compare: bool, err: TextIO) -> bool:
    """Do what a line that starts with a slash says; returns whether the next answer is a comparison."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/strength":
        talk.strength = talk.check_strength(rest)
    elif name in ("/original", "/edited"):
        talk.strength = talk.check_strength("0" if name == "/original" else "1")
    elif name == "/compare":
        talk.check_strength("1")
        if not rest:
            return True
        _compare(talk, rest)
    elif name == "/system":
        talk.system(rest)
    elif name == "/reset":
        talk.system(next((m["content"] for m in talk.messages if m["role"] == "system"), None))
    elif name == "/save":
        if not rest:
            raise AbliterateError("/save needs a file's name: /save talk.json")
        talk.save(Path(rest).expanduser())
        typer.echo(f"saved {rest}", err)
    elif name == "/help":
        typer.echo(HELP)
    else:
        raise AbliterateError(f"{name} is not known; /help lists what is")
    return compare


def _compare(talk: Conversation, text: str) -> None:
    """Two answers, one after the other, each under its name."""
    current = ""

    def emit(name: str, piece: str) -> None:
        nonlocal current
        if name != current:
            sys.stdout.write(("\n\n" if current else "") + f"--- {name} ---\n")
            current = name
        sys.stdout.write(piece)
        sys.stdout.flush()

    talk.compare(text, emit)
    sys.stdout.write("\n")
