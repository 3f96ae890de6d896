"""A setting that is an option of the command line: declared once, in its model, with all that the line says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

KINDS = (bool, int, float, str)


class Stage(BaseModel):
    """A table of settings: unknown names are errors, values don't change.

    Attributes:
        panel: heading of its options in --help; None for the plain one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # --help needs no validator
    panel: ClassVar[str | None] = None


class Option(NamedTuple):
    """What the command line needs of a setting.

    Attributes:
        path: its dotted name, "measure.max_new_tokens".
        kind: bool, int, float or str; what a Literal allows is checked by its model.
        default: None for one that a behaviour, the model or the machine gives.
        help: what it does.
        said: of its default, in other words than its value; None for the value.
        panel: heading under which --help lists it.
        several: what stands between values where it may be given several times; None where it may not.
    """

    path: str
    kind: type
    default: Any
    help: str
    said: str | None
    panel: str | None
    several: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    def default_said(self, default: Any = None) -> str:
        """The default as --help shows it, "" where there is none; of a command with a default of its own: that."""
        if default is None and self.said is not None:
            return self.said
        value = self.default if default is None else default
        if value is None or value is False:
            return ""
        return self.name.replace("_", "-") if value is True else number(value)


def option(
    default: Any, help: str = "", *, said: str | None = None, own: Any = None, panel: str | None = None,
    several: str | None = None, **checks: Any,
) -> Any:  # fmt: skip
    """A field that is an option too: its flag is its name.

    Args:
        default: its value where nothing gives another.
        help: what it does, for --help.
        said: how --help calls the default, where that isn't its value.
        own: the default of heal's preset `self`, where it has another.
        panel: heading in --help, if not that of its table.
        several: what is put between the values of an option that may be given several times.
        checks: pydantic's, such as ge=1.
    """
    if own is not None and said is None:
        said = f"{number(default)}; self {number(own)}"
    return Field(
        default,
        description=help,
        json_schema_extra={"said": said, "own": own, "panel": panel, "several": several},
        **checks,
    )


def options_of(model: type[Stage], prefix: str = "") -> dict[str, Option]:
    """Every option of a model and of the tables in it, by its dotted name."""
    return {found.path: found for found in _options(model, prefix)}


def extras(model: type[Stage], what: str) -> dict[str, Any]:
    """What the model's options have under a name of `option`'s ("own"), by field."""
    stated = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {
        name: said[what] for name, said in stated.items() if isinstance(said, Mapping) and said.get(what) is not None
    }


def is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def number(value: Any) -> str:
    """A value as one writes it: 5e-6 rather than 5e-06, 2e-3 rather than 0.002."""
    if not isinstance(value, float):
        return str(value)
    digits, power = f"{value:e}".split("e")
    return min(f"{value:g}", f"{float(digits):g}e{int(power)}", key=lambda text: (len(text), "e" in text))


def _options(model: type[Stage], prefix: str) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        annotation, stated = field.annotation, field.json_schema_extra
        if is_table(annotation):
            yield from _options(cast("type[Stage]", annotation), f"{prefix}{name}.")
        elif isinstance(stated, Mapping) and "said" in stated:
            kind = next((part for part in (annotation, *get_args(annotation)) if part in KINDS), str)
            said: dict[str, Any] = {key: stated[key] for key in ("said", "several")}
            panel, help = stated["panel"] or model.panel, field.description or ""
            yield Option(f"{prefix}{name}", kind, field.default, help, panel=panel, **said)  # type: ignore[arg-type]
