"""What a healing starts from: the edited model, its original, and what the run that edited it left; checked first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from abliterate.common.errors import AbliterateError, ModelError, PromptError
from abliterate.common.files import check_apart, check_folder
from abliterate.heal.surroundings import check_packages
from abliterate.measure.document import RunDocument, SettingsUsed, load_document
from abliterate.models.folders import check_here, model_folder
from abliterate.models.handle import config_hash
from abliterate.prompts.chat import format_prompts
from abliterate.settings.heal import HealRunSettings

Part = TypeVar("Part", bound=BaseModel)
RESULTS = "results.json"
OF_PROMPTS = ("system_prompt", "chat_template", "prefill")
"""What of loading a model says how it reads prompts."""
SAME_TEXTS = ("A question about rivers.", "Wie geht es dir?\nGut!")


@dataclass(frozen=True)
class Sources:
    """Where the models come from.

    Attributes:
        model: the edited model's folder, Hub id or file.
        original: the original's; None where none is known.
        run: results.json of the run that made the edited model, where it lies beside it.
        folder: that run's output folder.
    """

    model: str
    original: str | None
    run: RunDocument | None = None
    folder: Path | None = None


def find_sources(model: str, original: str | None) -> Sources:
    """The edited model and its original, for a model or for the output folder of `abliterate run`.

    Raises:
        ModelError: when the folder of a run is given and holds no model.
    """
    path = Path(model).expanduser()
    folder = path if (path / RESULTS).is_file() else path.parent if path.name == "model" else None
    run = _read_results(folder) if folder else None
    if folder is None or run is None:
        return Sources(model, original)
    if not (folder / "model").is_dir():
        raise ModelError(f"{model} holds {RESULTS} but no model/; name the folder of the edited model")
    named = run.model.source
    if original is None and named and (Path(named).expanduser().exists() or _is_hub_id(named)):
        original = named
    return Sources(str(folder / "model"), original, run, folder)


def with_settings_of_run(settings: HealRunSettings, run: RunDocument | None) -> HealRunSettings:
    """The settings with the run's prompts, seed, conversation format and way of measuring where none were named.

    What directions were found on and what is reported on stay apart only if the prompts are split as they were.
    """
    old = run.settings if run else SettingsUsed()

    def merged(part: Part, of_run: dict[str, Any]) -> Part:
        return type(part).model_validate({**of_run, **part.model_dump(include=part.model_fields_set)})

    shared = {name: old.load[name] for name in OF_PROMPTS if old.load.get(name) is not None}
    return settings.model_copy(
        update={
            "seed": settings.seed if "seed" in settings.model_fields_set or old.seed is None else old.seed,
            "prompts": merged(settings.prompts, old.prompts),
            "load": merged(settings.load, shared),
            "measure": merged(settings.measure, old.measure.model_dump(exclude_unset=True)),
        }
    )


def check(sources: Sources, out: str | Path, settings: HealRunSettings, *, overwrite: bool) -> None:
    """Everything that can be seen to be wrong before any work.

    Raises:
        AbliterateError: no original for `self`, a missing package, unreadable data, an output that isn't free, or two
            models that aren't of one kind.
    """
    options = settings.heal
    for source in filter(None, (sources.model, sources.original)):
        check_here(source)
    check_folder(out, overwrite=overwrite)
    check_apart(out, sources.model, sources.original)
    if options.preset == "self" and sources.original is None:
        raise AbliterateError(
            f"--preset self needs the original model, which teaches; {sources.model} doesn't say which it is: name it "
            "with --original"
        )
    run = sources.run or RunDocument()
    behaviour = run.about.name
    if options.preset == "self" and (behaviour != "refusal" or run.induced):
        what = "makes the model refuse" if run.induced else f"is about {behaviour}"
        raise AbliterateError(
            f"--preset self wins quality back where refusals were taken out, and the run in {sources.folder} {what}: "
            "the original would teach that away; use --preset dpo"
        )
    check_packages(options)
    if options.preset == "dpo":
        from abliterate.heal.preferences import read_pairs
        from abliterate.prompts.tables import kind_of

        file = Path(options.data).expanduser()
        if kind_of(file) and not file.is_file():
            raise PromptError(f"preference file {options.data} not found; give another with --data")
        if file.is_file():
            read_pairs(options)
    if options.launch is not None:
        from abliterate.heal.launch import check_launch

        check_launch(options.launch, options.processes, options.preset)
    if sources.original is not None:
        check_same_kind(sources.model, sources.original, settings)


def check_same_kind(model: str, original: str, settings: HealRunSettings) -> None:
    """Raise ModelError when two models have other shapes, or read prompts as other tokens; loads no weights."""
    from abliterate.models.loading import load_config, load_tokenizer

    seen = []
    for source in (model, original):
        folder = model_folder(source, settings.load.revision, dtype=settings.load.dtype)
        shape = config_hash(load_config(source, folder, settings.load.trust_remote_code).to_dict())
        tokenizer = load_tokenizer(source, folder, settings.load.trust_remote_code)
        template = settings.load.chat_template or (None if tokenizer.chat_template else "chatml")
        seen.append((shape, format_prompts(tokenizer, list(SAME_TEXTS), chat_template=template)))
    if seen[0][0] != seen[1][0]:
        raise ModelError(f"{model} and {original} have configurations of other shapes; name the model it was made from")
    if seen[0][1] != seen[1][1]:
        raise ModelError(f"{model} reads prompts as other tokens than {original}; name the model it was made from")


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _read_results(folder: Path) -> RunDocument | None:
    """results.json of a run; None when it isn't one."""
    try:
        run = load_document(folder / RESULTS)
    except AbliterateError:
        return None
    return run if "model" in run.model_fields_set else None
