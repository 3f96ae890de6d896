"""How an edit was found, what it takes out of what, and what of it is left: what card, report and terminal say alike.

Sentences come as a card's list items, names between backticks; `plain` is for where those are no marks.
"""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.cards.tables import Table
from abliterate.cards.words import span
from abliterate.common.errors import counted
from abliterate.common.names import public_name, public_source
from abliterate.measure.document import HealFacts, RecipeFacts, Removed, RunDocument
from abliterate.measure.numbers import Candidate, PlaceOf

FEW_SHIFTS = 3
TIED = {
    "kept": "embedding and head stay tied, so the head is edited with the embedding",
    "untied": "the embedding, tied to the head in the base model, is untied: it is edited and the head is not",
}


def plain(sentence: str) -> str:
    """A list item as a sentence of its own."""
    text = sentence.replace("`", "")
    return f"{text[:1].upper()}{text[1:]}."


def place(found: Candidate | PlaceOf) -> str:
    """Where a direction was found."""
    position = "" if found.position is None else f", position {found.position}"
    second = getattr(found, "second", None)
    return f"layer {found.layer}, site `{found.site}`{position}" + (f", with {place(second)}" if second else "")


def was_learnt(recipe: RecipeFacts) -> bool:
    """Whether the directions themselves are an optimiser's, and not means of activations."""
    return recipe.method == "fit"


def how_found(recipe: RecipeFacts) -> list[str]:
    """How the directions and their strengths were found."""
    direction, method = recipe.direction, recipe.method
    if direction is None:
        return []
    if recipe.induced:
        return [
            f"direction: source `{direction.source}`, cosine {direction.cosine or 0:.2f} with the difference of means "
            f"at the prompts' last token; {direction.size or 0:.2f} of its own difference's norm; method `induce`"
        ]
    if was_learnt(recipe):
        return [
            "directions and strengths: learnt by gradients on training prompts, from differences of means on; method "
            f"`{method}`; the two sides part best at {place(direction)}"
        ]
    if method == "tpe":
        return [
            "directions: differences of means; which of them, and the strengths over depth, were searched by trials; "
            f"method `tpe`; the two sides part best at {place(direction)}"
        ]
    return [f"direction: difference of means at {place(direction)}; method `{method}`"]


def what_changed(recipe: RecipeFacts) -> list[str]:
    """What is taken out of which writers, and what is added where."""
    said = []
    if recipe.writers:
        what = f"{counted(len(recipe.removed), 'direction')} taken out of " if recipe.removed else "taken out of "
        strength = f", strength {span(recipe.strength)}" if recipe.strength else ""
        said.append(f"{what}{recipe.writers} writers{_where(recipe.removed)}{strength}")
    held = f", which `{recipe.switch}` in config.json gives the class" if recipe.switch else ""
    if len(recipe.shifts) > FEW_SHIFTS:
        layers, sizes = [s.layer for s in recipe.shifts], [s.size for s in recipe.shifts]
        biases = f"; biases hold them{held}" if recipe.weights_hold_it else ""
        said.append(
            f"a vector each added at the outputs of {len(layers)} blocks from {min(layers)} to {max(layers)} at every "
            f"token, of norms {min(sizes):.4g} to {max(sizes):.4g}{biases}"
        )
    for shift in recipe.shifts if len(recipe.shifts) <= FEW_SHIFTS else ():
        bias = f"; a bias holds it{held}" if recipe.weights_hold_it else ""
        where = f"the output of block {shift.layer} at every token"
        said.append(f"{shift.size:.4g} along one direction, added at {where}{bias}")
    if recipe.tied in TIED:
        said.append(TIED[recipe.tied])
    return said


def what_is_left(recipe: RecipeFacts) -> list[str]:
    """The proofs: that no writer was missed, and what the edited model's stream holds of each direction."""
    if recipe.proof is None:
        return []
    said = [
        "proof that no writer was missed: with a random direction taken out of every writer found, the largest "
        f"component left in the stream is {recipe.proof.writers.component:.1e}"
    ]
    if recipe.removed:
        most = max(recipe.removed, key=lambda one: one.left)
        off = max(abs(one.left - one.expected) for one in recipe.removed)
        whose = "the direction" if len(recipe.removed) == 1 else f"each of the {len(recipe.removed)} directions"
        at = f" (at {most.where})" if most.where else ""
        said += [
            "a strength a leaves 1 - a of what a writer writes along its direction; over 1 the rest is turned round",
            f"of {whose} the edited model's stream, to which the embedding and other blocks write too, "
            f"holds at most {most.left:.2g} of a vector's length{at}, {most.before:.2g} before; by the strengths "
            f"{most.expected:.2g} is left (off by at most {off:.0e})",
        ]
    elif recipe.proof.edited:
        left = recipe.proof.edited
        said.append(f"of the edit's first direction the edited model's stream holds at most {left.component:.2g}"
                    f" of a vector's length (at {left.where})")  # fmt: skip
    return said


def directions(recipe: RecipeFacts) -> Table:
    """Each direction taken out, and what is left of it; empty where there is but one."""
    header = ["direction", "taken out of", "strength", "left of what they write", "in the stream before", "and after"]
    several = recipe.removed if len(recipe.removed) > 1 else []
    return Table(header, [
        [str(n + 1), f"{counted(one.writers, 'writer')}{_where([one])}", span(one.strength), _kept(one),
         f"{one.before:.2g}", f"{one.left:.2g}"]
        for n, one in enumerate(several)
    ])  # fmt: skip


def _kept(one: Removed) -> str:
    """What strengths leave of what writers write along a direction, most first."""
    most, least = (f"{1 - strength:.0%}" for strength in (one.strength.min, one.strength.max))
    return most if most == least else f"{most} to {least}"


def said(document: RunDocument) -> list[str]:
    """All of it on a document's edit, as plain sentences."""
    recipe = document.recipe
    if recipe is None:
        return []
    return [plain(text) for text in (*how_found(recipe), *what_changed(recipe), *what_is_left(recipe))]


def how_healed(heal: HealFacts) -> list[str]:
    """How an edited model was trained back."""
    used = heal.settings
    lora = f"LoRA of rank {used['rank']}, alpha {used['alpha']:g}, merged; it lies beside the model in `adapter/`"
    if heal.preset == "self":
        how = (
            f"healed by the original model's teaching: its distributions along its own answers to {heal.lessons} "
            f"training baseline prompts, its refusals of {heal.held_away} prompts held away"
        )
    else:
        pairs = f" ({heal.data['train']} pairs)" if heal.data and heal.data.get("train") else ""
        data = public_source(public_name(str(used["data"])))
        how = f"healed by preference tuning (DPO, Rafailov et al. 2023) on `{data}`{pairs}"
    return [how, f"{lora}; learning rate {used['learning_rate']:g}, {heal.steps} steps"]


def _where(removed: Sequence[Removed]) -> str:
    """Of what kinds and in which blocks writers are: " (attention and mlp, blocks 4 to 27)"."""
    sides = list(dict.fromkeys(side for one in removed for side in one.sides))
    layers = sorted({layer for one in removed for layer in one.layers})
    if not sides:
        return ""
    if not layers:
        return f" ({' and '.join(sides)})"
    if len(layers) == 1:
        blocks = f"block {layers[0]}"
    elif layers == list(range(layers[0], layers[-1] + 1)):
        blocks = f"blocks {layers[0]} to {layers[-1]}"
    else:
        blocks = f"blocks {', '.join(map(str, layers))}"
    return f" ({' and '.join(sides)}, {blocks})"
