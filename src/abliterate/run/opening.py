"""How a job begins: the model and the prompts as the settings say, looked at before any work."""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.common.reporting import Reporter, Silent
from abliterate.measure.decode import decode
from abliterate.models.handle import Handle, find_prefill
from abliterate.models.loading import load
from abliterate.prompts.behaviour import Behaviour
from abliterate.prompts.behaviour_prompts import behaviour_sides
from abliterate.prompts.sets import Sides, load_sides
from abliterate.settings.run import LoadSettings, PromptSettings


def open_model(source: str, settings: LoadSettings) -> Handle:
    """Load a model as the settings say."""
    return load(
        source,
        dtype=settings.dtype,
        device_map=settings.device_map,
        quantise=settings.quantise,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        chat_template=settings.chat_template,
        system_prompt=settings.system_prompt,
        prefill=settings.prefill,
    )


def open_prompts(settings: PromptSettings, seed: int, behaviour: Behaviour | None = None) -> Sides:
    """Load both sides' prompts as the settings say, or else the behaviour."""
    if behaviour is not None and behaviour.name != "refusal":
        return behaviour_sides(behaviour, settings, seed)
    return load_sides(
        settings.target,
        settings.baseline,
        target_column=settings.target_column,
        baseline_column=settings.baseline_column,
        seed=seed,
        limit_train=settings.train_prompts,
        limit_validation=settings.validation_prompts,
        limit_test=settings.test_prompts,
    )


def set_prefill(handle: Handle, prompts: Sequence[str], reporter: Reporter | None = None) -> None:
    """When every answer opens with one reasoning mark, close it at once by a prefill."""
    if handle.prefill is not None:
        return
    ids = handle.prompt_ids(prompts[:4])
    openings = decode(handle, ids, max_new_tokens=8, keep_special=True)
    texts = [handle.tokenizer.decode(row) for row in ids]
    prefill = find_prefill([a.text for a in openings], texts)
    if prefill:
        handle.prefill = prefill
        (reporter or Silent()).say(f"answers open with a reasoning mark; prefilling {prefill!r} (--prefill to change)")


def check_lengths(handle: Handle, sides: Sides) -> None:
    """Raise PromptError, before the work, when a prompt of any split is longer than the context."""
    for side in (sides.target, sides.baseline):
        for part in side:
            handle.prompt_ids(part.texts)


def described(handle: Handle) -> str:
    """A loaded model in one line: class, size, shape, dtype and device."""
    size = sum(p.numel() for p in handle.model.parameters())
    return (
        f"{type(handle.model).__name__}, {size / 1e6:,.0f} M parameters, {handle.layers} layers, "
        f"d_model {handle.d_model}, {str(handle.dtype).removeprefix('torch.')} on {handle.device}"
    )
