"""The forms a recipe is applied in. A new form is one function in one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.common.errors import AbliterateError

if TYPE_CHECKING:
    from abliterate.common.reporting import Reporter
    from abliterate.edit.recipe import Recipe

FORMS: dict[str, str] = {
    "checkpoint": "abliterate.apply.checkpoint.form:apply_checkpoint",
    "adapter": "abliterate.apply.adapter.form:apply_adapter",
    "gguf": "abliterate.apply.gguf.form:apply_gguf",
    "gguf-adapter": "abliterate.apply.gguf.adapter:apply_gguf_adapter",
    "control-vector": "abliterate.apply.gguf.control_vector:apply_control_vector",
}


@dataclass(frozen=True)
class ApplyOptions:
    """What `abliterate apply` was asked for. A form that can't honour an option says so in an AbliterateError.

    Attributes:
        strength: factor on the recipe's edit. `apply_recipe` has multiplied it into `recipe.edit` (strengths and
            shifts) before a form is called: a form uses `recipe.edit` as it is and reads this only to report it.
        skip_unsupported: leave out writers the form can't hold, and list them, instead of stopping.
        norm_preserving: keep the norms of the weights' columns (Lai 2025).
        overwrite: replace what is at the output path.
        in_place: change the model's own files; only `checkpoint` can.
        keep_tied: edit a tied embedding and head together instead of untying them.
        force: apply although the model's config isn't the recipe's.
        dtype: dtype of what is written, where a form can choose ("bfloat16", "float16", "float32"); None keeps
            the model's, or the form's own default.
        plan: say what would be read, written and needed, and write nothing.
        revision: Hub commit, branch or tag of the model.
    """

    strength: float = 1.0
    skip_unsupported: bool = False
    norm_preserving: bool = False
    overwrite: bool = False
    in_place: bool = False
    keep_tied: bool = False
    force: bool = False
    dtype: str | None = None
    plan: bool = False
    revision: str | None = None


Form = Callable[[Any, str, Path, ApplyOptions, "Reporter"], dict[str, Any]]


def form_named(name: str) -> Form:
    """The function that applies a recipe in the form of this name.

    Raises:
        AbliterateError: when there is no such form; the text lists those there are.
    """
    if name == "hooks":
        raise AbliterateError(
            "the form hooks is live and leaves no file: use `abliterate chat MODEL --recipe RECIPE`, "
            "or edit.attached(handle) in Python"
        )
    if name not in FORMS:
        raise AbliterateError(
            f"there is no form {name!r}; --as takes {', '.join(FORMS)} (hooks is live: abliterate chat)"
        )
    module, function = FORMS[name].split(":")
    form: Form = getattr(import_module(module), function)
    return form


def apply_recipe(
    recipe: Recipe, model: str, out: Path, form: str, options: ApplyOptions, reporter: Reporter
) -> dict[str, Any]:
    """Apply a recipe to a model in a form.

    Args:
        recipe: what to take out of which parameters, from `recipe.load_recipe`. Its edit is
            multiplied by `options.strength` here.
        model: Hub id, folder or GGUF file, as the form takes it.
        out: file or folder to write.
        form: a name of `FORMS`.
        options: see `ApplyOptions`.
        reporter: told how it goes.

    Returns:
        A summary for JSON: `form`, `out`, `bytes`, `writers`, `seconds`, `notes`, and what the form adds.

    Raises:
        AbliterateError: when there is no such form, or the form can't do what is asked.
    """
    apply = form_named(form)
    return apply(replace(recipe, edit=recipe.edit * options.strength), model, out, options, reporter)
