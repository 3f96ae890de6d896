"""Options of the commands: made from the settings' models, or shared by all that report and print."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

from abliterate.commands.common import app
from abliterate.common.errors import AbliterateError, InterruptedByUserError, OutputError
from abliterate.settings.options import Option, options_of
from abliterate.settings.run import RunSettings, resolve

if TYPE_CHECKING:
    from rich.console import RenderableType

    from abliterate.commands.terminal import Terminal

Settings = TypeVar("Settings", bound=RunSettings)
Command = TypeVar("Command", bound=Callable[..., None])

Config = Annotated[Path | None, typer.Option(help="TOML file with settings, a table per stage.")]


@dataclass(frozen=True)
class Given(Generic[Settings]):
    """The settings that a command line gives.

    Attributes:
        flags: dotted names to values, of the options that were given.
        config: the file of --config.
        kind: the settings wanted.
    """

    flags: Mapping[str, Any]
    config: Path | None
    kind: type[Settings]

    def settings(self, under: Mapping[str, Any] | None = None) -> Settings:
        """All of them, checked; flags over `under` over the environment over the file.

        Raises:
            AbliterateError: on an unreadable file, an unknown name or a value out of range; names it.
        """
        return resolve({**(under or {}), **self.flags}, self.config, kind=self.kind)


@dataclass(frozen=True)
class Output:
    """How a command tells how it goes and what came of it: options that commands share."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False
    log_file: Annotated[
        Path | None,
        typer.Option(help="Write the log to this file too; it is added to."),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False

    @contextmanager
    def reported(self, out: Path | None = None) -> Iterator[Terminal]:
        """A terminal for progress; what libraries write on standard error goes to the log file alone.

        Args:
            out: the output of a long run, whose progress `abliterate watch` can then show.
        """
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TQDM_DISABLE", "1")
        from abliterate.commands.terminal import Terminal
        from abliterate.common.files import writes
        from abliterate.common.reporting import libraries_told, told_by_default
        from abliterate.common.watching import ProgressFile, progress_file

        with ExitStack() as stack:
            log = stack.enter_context(_log(self.log_file)) if self.log_file and writes() else None
            published = ProgressFile(progress_file(out)) if out and writes() else None
            try:
                with (
                    Terminal(quiet=self.quiet, log=log, published=published) as terminal,
                    libraries_told(terminal.note),
                    told_by_default(terminal),
                ):
                    try:
                        yield terminal
                    except AbliterateError as error:
                        if log:
                            log.write(f"error: {error}\n")
                        raise
            except KeyboardInterrupt:  # before typer sees it, whose exit code and text depend on its version
                raise InterruptedByUserError("interrupted; nothing half-written is left") from None

    def result(self, document: Any, *shown: RenderableType) -> None:
        """Print a result: as JSON if that is wanted, else what people read of it, texts as they are."""
        if self.json:
            typer.echo(json.dumps(document, indent=2))
            return
        for part in shown:
            if isinstance(part, str):
                typer.echo(part)
            else:
                from abliterate.commands.terminal import output

                output().print(part)


def command(
    takes: str = "",
    *examples: str,
    kind: type[RunSettings] = RunSettings,
    shares: str = "overwrite log_file quiet json",
    under: Mapping[str, Any] | None = None,
) -> Callable[[Command], Command]:
    """Make a function a command: a parameter `Given` becomes options of settings, `Output` the shared ones.

    What else it takes is its own: arguments before the `*`, options after it, each `Annotated` with its help (and its
    heading), or with typer's own description.

    Args:
        takes: the settings it has options for, in the order of --help: dotted names; a table stands for all of its
            options, "-name" leaves one out, "name=other" calls its flag otherwise, "config" is --config.
        examples: command lines that --help ends with.
        kind: the model of the settings.
        shares: the fields of `Output` that it has options for.
        under: defaults of its own.
    """
    options = _taken(kind, takes)

    def register(function: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        given = told = ""
        for name, annotation in get_type_hints(function, include_extras=True).items():
            if get_origin(annotation) is Given:
                given = name
                parameters += [_parameter(n, option, (under or {}).get(option.path)) for n, option in options.items()]
                parameters += [_keyword("config", Config, None)] if "config" in takes.split() else []
            elif annotation is Output:
                told = name
                hints = get_type_hints(Output, include_extras=True)
                parameters += [_keyword(n, hints[n], getattr(Output, n)) for n in shares.split()]
            elif name != "return":
                parameters.append(_own(inspect.signature(function).parameters[name], annotation))

        @functools.wraps(function)
        def called(**values: Any) -> None:
            if told:
                values[told] = Output(**{name: values.pop(name) for name in shares.split()})
            if given:
                flags = {option.path: _one(option, values.pop(name)) for name, option in options.items()}
                flags = {**(under or {}), **{path: value for path, value in flags.items() if value is not None}}
                values[given] = Given(flags, values.pop("config", None), kind)
            function(**values)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        shown = (line if line.startswith("Example") else f"Example: {line}" for line in examples)
        app.command(epilog="\n\n".join(shown))(called)
        return function

    return register


def _taken(kind: type[RunSettings], takes: str) -> dict[str, Option]:
    """The options by the names of their flags."""
    known, taken = options_of(kind), dict[str, Option]()
    for word in takes.split():
        path, _, name = word.removeprefix("-").partition("=")
        paths = [p for p in known if p == path or p.startswith(f"{path}.")]
        assert paths or word == "config", f"no setting {word}"
        for found in paths:
            if word.startswith("-"):
                del taken[known[found].name]
            else:
                taken[name or known[found].name] = known[found]
    return taken


def _parameter(name: str, option: Option, own: Any) -> inspect.Parameter:
    """An option for typer: None where it isn't given, so that the environment and the file count."""
    flag = name.replace("_", "-")
    declared = f"--{flag}/--no-{flag}" if option.default is True else f"--{flag}"
    default = option.default_said(own)
    text = f"{option.help} [default: {default}]".strip() if default else option.help
    info = typer.Option(declared, help=_escaped(text), rich_help_panel=option.panel, show_default=False)
    kind: Any = list[str] if option.several is not None else option.kind
    return _keyword(name, Annotated[kind | None, info], None)


def _one(option: Option, value: Any) -> Any:
    """An option's value; of one given several times, its values together."""
    return value if option.several is None or value is None else option.several.join(value) or None


def _own(parameter: inspect.Parameter, annotation: Any) -> inspect.Parameter:
    """A command's own argument or, after the `*`, option; texts are its help and its panel."""
    kind, *metadata = get_args(annotation)
    if isinstance(metadata[0], str):
        text, panel = _escaped(metadata[0]), metadata[1] if metadata[1:] else None
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            info: Any = typer.Argument(help=text, show_default=False)
        else:
            names = [f"--{parameter.name.rstrip('_').replace('_', '-')}"] if kind is bool else []
            info = typer.Option(*names, help=text, rich_help_panel=panel)
        annotation = Annotated[kind, info]
    return _keyword(parameter.name, annotation, parameter.default)


def _escaped(text: str) -> str:
    """For rich, which takes [default ...] for a style, and [/subset] for the end of one."""
    return re.sub(r"\[(?=[a-z/])", r"\\[", text)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _log(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"log file {path} can't be written: {error.strerror}") from error
