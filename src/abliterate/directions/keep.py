"""`--keep`: directions, or prompts whose behaviour must not change; taken out of an edit's directions and watched.

Where r is orthogonal to k, the edit W - a r (r^T W) writes the same along k as before: k^T W' = k^T W. So the stream's
component along what is kept changes only through what blocks read, not through what they write. (Behind a norm with a
gain this holds up to the gain.) Prompts are kept by the span of their difference of means from the baseline prompts.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError, PromptError
from abliterate.common.reporting import Reporter, Silent
from abliterate.directions.activations import collect
from abliterate.directions.means import Directions, difference_of_means
from abliterate.edit.edit import Edit, orthonormal
from abliterate.measure import judged
from abliterate.measure.decode import Answer, decode
from abliterate.measure.divergence import ANSWER_TOKENS, Reference, compare, make_reference
from abliterate.measure.judges import Judge
from abliterate.measure.rates import Rate
from abliterate.models.handle import Handle
from abliterate.prompts.sets import PromptSet, load_prompts

ENERGY = 0.9  # of the differences of means over the layers that the span holds
MOST_DIRECTIONS = 8
LEAST_PROMPTS = 8
LEAST_LEFT = 0.05  # of a direction outside the span, below which nothing is left to edit with


@dataclass(frozen=True)
class Keep:
    """What must not change: directions, or prompts, half of them to find their span and half held out.

    Attributes:
        source: the file.
        directions: [k, d_model], orthonormal; None where the file holds prompts.
        train, test: prompts.
    """

    source: str
    directions: Float[Tensor, "k d_model"] | None = None
    train: PromptSet = field(default_factory=lambda: PromptSet("", ()))
    test: PromptSet = field(default_factory=lambda: PromptSet("", ()))


def read_keep(path: str | os.PathLike[str], seed: int = 0) -> Keep:
    """Read what is to be kept: a recipe, another safetensors file of directions, or a file of prompts.

    Raises:
        AbliterateError: when the file isn't there or holds neither.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise AbliterateError(
            f"--keep {path}: file not found; give prompts (.txt, .jsonl, ...) or directions (.safetensors)"
        )
    if file.suffix == ".safetensors":
        return Keep(str(path), _read_directions(file))
    texts = list(load_prompts(str(path), role="baseline"))
    if len(texts) < LEAST_PROMPTS:
        raise PromptError(f"--keep {path} has {len(texts)} prompts; at least {LEAST_PROMPTS} are needed")
    random.Random(seed).shuffle(texts)
    half = len(texts) // 2
    train, test = PromptSet(f"{path} (train)", tuple(texts[:half])), PromptSet(f"{path} (test)", tuple(texts[half:]))
    return Keep(str(path), None, train, test)


def check_keep(handle: Handle, keep: Keep) -> None:
    """See, before any work, that what is to be kept is for this model.

    Raises:
        AbliterateError: when the directions are of another width.
        PromptError: when a prompt is longer than the context.
    """
    if keep.directions is not None and keep.directions.shape[1] != handle.d_model:
        raise AbliterateError(
            f"--keep {keep.source} holds directions of width {keep.directions.shape[1]}, {handle.source} has "
            f"d_model {handle.d_model}; is it for another model?"
        )
    handle.prompt_ids([*keep.train, *keep.test])


def kept_span(
    handle: Handle, keep: Keep, baseline: Sequence[str], reporter: Reporter | None = None
) -> Float[Tensor, "k d_model"]:
    """Orthonormal directions that an edit must leave alone.

    For prompts: the differences of means from baseline prompts at every layer and site, at the last position, as the
    least number of singular vectors that hold 90% of them (at most 8).

    Args:
        handle: the loaded original.
        keep: from `read_keep`.
        baseline: prompts to tell the kept ones apart from.
        reporter: told how it goes.
    """
    if keep.directions is not None:
        return keep.directions
    reporter = reporter or Silent()
    tick = reporter.progress("reading what is kept", len(keep.train) + len(baseline))
    found = difference_of_means(collect(handle, keep.train, baseline, positions=1, tick=tick))
    rows = found.unit.flatten(0, 2)
    rows = rows[(rows.isfinite().all(-1)) & (found.length.flatten() > 1e-6)].double()
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    rank = min(MOST_DIRECTIONS, int((share < ENERGY).sum()) + 1)
    return vectors[:rank].float()


def keeping(
    handle: Handle, keep: Keep | None, directions: Directions, baseline: Sequence[str], reporter: Reporter
) -> tuple[Directions, Kept | None]:
    """Directions without what `--keep` names, and what that is; as they were, and None, without it."""
    if keep is None:
        return directions, None
    span = kept_span(handle, keep, baseline, reporter)
    directions, share = without(directions, span)
    reporter.say(f"kept: {len(span)} directions taken out of the edit's; at most {share:.0%} of a direction is left")
    return directions, Kept(keep, span, share)


def without(directions: Directions, kept: Float[Tensor, "k d_model"]) -> tuple[Directions, float]:
    """Directions with the kept span taken out of each, normalised again; and the largest share left of any.

    Args:
        directions: from `difference_of_means`.
        kept: orthonormal.

    Raises:
        AbliterateError: when nearly nothing is left of any direction.
    """
    basis = kept.double()
    unit = directions.unit.double()
    left = unit - (unit @ basis.T) @ basis
    left = left - (left @ basis.T) @ basis  # twice: orthogonal to rounding
    share = left.norm(dim=-1)
    there = directions.length > 1e-6 * directions.length.nan_to_num(0.0).max()
    most = float(share[there & share.isfinite()].max())
    if most < LEAST_LEFT:
        raise AbliterateError(
            f"what --keep names holds all of the direction but {most:.1%}: the behaviour to change is the one to keep"
        )
    factor = share.to(directions.length.dtype)
    return Directions(
        unit=(left / share.clamp_min(1e-30)[..., None]).float(),
        length=directions.length * factor,
        separation=directions.separation * factor.square(),
    ), most


@dataclass
class Kept:
    """What is kept of a loaded model; and the original on the kept prompts held out, to compare the edited with.

    Attributes:
        keep: what is kept.
        span: orthonormal.
        share: largest share of a direction left after the span was taken out.
        reference: the original's distributions along its own answers, once `watch` has looked; None for directions.
        verdicts: which of its answers show the behaviour.
    """

    keep: Keep
    span: Float[Tensor, "k d_model"]
    share: float
    reference: Reference | None = None
    verdicts: list[bool] | None = None

    @property
    def sha256(self) -> str:
        """Hash of what is kept: of the span, which the prompts and the model make."""
        return hashlib.sha256(self.span.numpy().tobytes()).hexdigest()

    def watch(self, handle: Handle, judge: Judge, *, max_new_tokens: int, batch_size: int) -> None:
        """Look at the original on the kept prompts that are held out, before the edit."""
        if self.keep.directions is not None:
            return
        answers, self.verdicts = judged(
            handle, self.keep.test, judge, max_new_tokens=max_new_tokens, batch_size=batch_size, stop_on=()
        )
        self.reference = _along(handle, handle.prompt_ids(self.keep.test), answers)

    def to_json(
        self, handle: Handle, edit: Edit, judge: Judge, *, max_new_tokens: int, batch_size: int
    ) -> dict[str, Any]:
        """What results.json says under `kept`: call it with the edit attached or baked.

        Args:
            handle: the edited model.
            edit: the edit, for the component of its directions along the span.
            judge: the behaviour's.
        """
        rows = torch.from_numpy(np.stack([*edit.directions, *(shift.direction for shift in edit.shifts)])).double()
        document: dict[str, Any] = {
            "source": Path(self.keep.source).name,
            "kind": "prompts" if self.keep.directions is None else "directions",
            "directions": len(self.span),
            "share_left": self.share,
            "component": float((rows @ self.span.double().T).abs().max()) if len(rows) else 0.0,
        }
        if self.reference is None or self.verdicts is None:
            return document
        _, after = judged(handle, self.keep.test, judge, max_new_tokens=max_new_tokens, batch_size=batch_size)
        total = len(after)
        return {
            **document,
            "prompts": {"train": len(self.keep.train), "test": len(self.keep.test), "sha256": self.keep.test.sha256},
            "divergence": compare(handle, self.reference).to_json(),
            "original": Rate(sum(self.verdicts), total).to_json("refused"),
            "edited": Rate(sum(after), total).to_json("refused"),
            "changed": sum(a != b for a, b in zip(self.verdicts, after, strict=True)),
        }  # fmt: skip


def kept_reference(handle: Handle, keep: Keep, tokens: int) -> Reference | None:
    """The original's distributions on the kept prompts of the training half, for a search that stays close to them."""
    if keep.directions is not None:
        return None
    ids = handle.prompt_ids(keep.train)
    return _along(handle, ids, decode(handle, ids, max_new_tokens=min(tokens, ANSWER_TOKENS)), tokens)


def _along(
    handle: Handle, ids: Sequence[Sequence[int]], answers: Sequence[Answer], tokens: int = ANSWER_TOKENS
) -> Reference:
    said = [i for i, answer in enumerate(answers) if answer.ids]
    return make_reference(handle, [ids[i] for i in said], [answers[i] for i in said], answer_tokens=tokens)


def _read_directions(file: Path) -> Float[Tensor, "k d_model"]:
    from safetensors import SafetensorError, safe_open

    from abliterate.edit.recipe import KEY, load_recipe

    try:
        with safe_open(str(file), framework="pt") as opened:
            is_recipe = KEY in (opened.metadata() or {})
            tensors = {} if is_recipe else {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AbliterateError(f"--keep {file} is not a readable safetensors file: {error}") from error
    if is_recipe:
        edit = load_recipe(file).edit
        rows = [torch.from_numpy(r) for r in (*edit.directions, *(shift.direction for shift in edit.shifts))]
    else:
        widths = {t.shape[-1] if t.ndim else 0 for t in tensors.values()}
        if len(widths) != 1 or not all(t.is_floating_point() and t.ndim in (1, 2) for t in tensors.values()):
            raise AbliterateError(
                f"--keep {file}: a file of directions holds tensors [d_model] or [k, d_model] of one width and nothing "
                f"else; it has: {', '.join(f'{n} {tuple(t.shape)}' for n, t in tensors.items()) or 'none'}"
            )
        rows = [row for t in tensors.values() for row in t.reshape(-1, t.shape[-1]).float()]
    if not rows or not all(bool(row.isfinite().all()) and float(row.norm()) > 0 for row in rows):
        raise AbliterateError(f"--keep {file}: directions must be finite and not zero, and there must be one")
    return torch.from_numpy(orthonormal(rows))
