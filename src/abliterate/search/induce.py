"""Inducing a behaviour: the block, the direction and the size at which adding it makes the model show it everywhere.

The converse of removing (Arditi et al. 2024, section 3.2): h <- h + c r at the output of one block, at every token, and
the model refuses what it used to answer. Two directions are tried at every block: the difference of means at the
prompts' last token, and the same along the answers (refusals' tokens less answers' tokens), which is what the stream
should hold while a refusal is being written. c is counted in the difference's own norm, so that 1 puts the baseline
mean where the target's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.common.errors import AbliterateError
from abliterate.common.reporting import SILENT, Reporter, each
from abliterate.directions.means import Directions
from abliterate.edit.edit import Edit, normalised
from abliterate.measure import judged
from abliterate.measure.decode import Answer
from abliterate.measure.judges import Judge, LexicalJudge
from abliterate.measure.rates import Rate
from abliterate.models.batches import Prefix, in_passes, inputs
from abliterate.models.handle import Handle
from abliterate.models.writers import SITES, watch_sites
from abliterate.search import objectives
from abliterate.search.examples import Examples
from abliterate.search.sweep import LAST_LAYERS_LEFT_OUT
from abliterate.search.turning import REFUSAL_TOKENS, WHOLE_TOKENS, Descent, RefusalScorer

SITE = "post"
SOURCES = ("prompt", "answer")


@dataclass(frozen=True)
class InduceSettings:
    """Sizes of the sweep.

    Attributes:
        sizes: what is added, in norms of the difference of means, smallest first.
        layers: blocks tried; by default `most_layers` of them, spread over all but the first sixth and the last fifth.
        scored: baseline prompts behind which refusals are scored.
        decoded: how many of the best have their answers decoded.
        prompts: most prompts decoded for each.
        decode_tokens: longest answer decoded.
        enough: share of answers that must refuse in whole sentences; below it, vectors are turned.
        steps: gradient steps of that turning; 0 leaves it at the sweep.
        turning: most baseline prompts behind which refusals are made likelier by it.
        seed: of the draw of refusals.
    """

    sizes: tuple[float, ...] = (0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    layers: range | None = None
    most_layers: int = 12
    scored: int = 16
    decoded: int = 3
    prompts: int = 48
    decode_tokens: int = 48
    enough: float = 0.95
    steps: int = 48
    turning: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Induced:
    """What adding a vector at a block's output does to baseline prompts.

    Attributes:
        layer: the block.
        source: where its direction was found: "prompt", at the prompts' last token; "answer", along the answers;
            "turned", by gradient steps from one of these.
        size: what is added, in norms of the difference of means of that source.
        loss: negative log-likelihood of the model's own refusals behind baseline prompts, in nats per token.
        cosine: with the difference of means at the prompts' last token.
        refused: of decoded answers; None where none were decoded.
        coherent: of them, refusals that are neither empty, nor loop, nor end in mid-sentence.
        degenerate: answers of any kind that are one of these.
        note: why it won.
    """

    layer: int
    source: str
    size: float
    loss: float
    cosine: float
    vector: Float[Tensor, " d_model"] = field(repr=False, compare=False)
    refused: Rate | None = None
    coherent: Rate | None = None
    degenerate: Rate | None = None
    note: str = ""

    @property
    def edit(self) -> Edit:
        """The shift, as an edit."""
        return Edit.shifting(self.layer, self.vector, float(self.vector.double().norm()))

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "site": SITE,
            "source": self.source,
            "size": self.size,
            "loss": self.loss,
            "cosine": self.cosine,
            "refusal": self.refused.to_json("refused") if self.refused else None,
            "coherent_refusal": self.coherent.to_json("refused") if self.coherent else None,
            "degenerate": self.degenerate.to_json() if self.degenerate else None,
            "note": self.note,
        }

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.source}, size {self.size:.2f}"


@dataclass(frozen=True)
class Inducing:
    """What the sweep gives: the edit, the candidate behind it, and all that were tried, best first."""

    edit: Edit
    winner: Induced
    candidates: list[Induced]


def induce(
    handle: Handle,
    directions: Directions,
    train: Examples,
    baseline: Sequence[str],
    judge: Judge | None = None,
    settings: InduceSettings | None = None,
    *,
    reporter: Reporter = SILENT,
) -> Inducing:
    """Choose a shift that makes the model refuse baseline prompts in whole sentences.

    1. Score: for both directions of every block tried, at growing sizes for as long as it helps, how likely the
       model's own refusals are behind training baseline prompts. Forward passes only, a few prompts.
    2. Decode: validation answers for the best, to their end.
    3. Turn, where none makes `enough` refuse: a few gradient steps on the vectors of these, so that refusals become
       likelier still; the one that gets farthest goes on. Its cosine with the difference of means says how far it went.
    4. Choose: most refusals that are whole sentences; of equals the one that makes the model's own likeliest.

    Args:
        handle: the loaded original; it is not changed.
        directions: of the training split.
        train: training prompts with the model's own refusals and answers.
        baseline: validation prompts that the original answers.
        judge: decides what a refusal is.
        settings: sizes of the sweep.
        reporter: told about stages and progress.

    Raises:
        AbliterateError: when there is nothing to add, or nothing makes it refuse.
    """
    settings, judge = settings or InduceSettings(), judge or LexicalJudge()
    layers = layers_to_try(directions, settings)
    if not layers:
        raise AbliterateError("no layer left to add at; widen --layers (the first and the last fifth are never used)")
    if not train.refusals or not train.baseline:
        raise AbliterateError("inducing needs prompts that the model refuses and prompts that it answers")
    along = difference_along_answers(handle, train)
    scorer = RefusalScorer(handle, train, settings.scored, layers, settings.seed)
    tried: list[Induced] = []
    for layer in each(reporter, "scoring where to add", layers):
        at_prompt = _difference(directions, layer)
        for source, vector in zip(SOURCES, (at_prompt, along[layer]), strict=True):
            if bool(vector.isfinite().all()) and bool(vector.norm() > 0):
                tried += _scored(scorer, layer, source, vector, at_prompt, settings.sizes)
    best = _best_of_each_layer(tried)[: settings.decoded]
    prompts = list(baseline[: settings.prompts])
    decoded = [
        counted(handle, candidate, prompts, judge, settings.decode_tokens)
        for candidate in each(reporter, "decoding with it added", best)
    ]
    winner = max(decoded, key=_merit)
    if _share(winner) < settings.enough and settings.steps:
        reporter.say(f"{winner} makes {_of(winner)} refuse in whole sentences; turning its vector by gradients")
        scorer.take_in(train.baseline[: settings.turning], _whole_refusals(handle, train, judge, settings))
        turned = _turned(scorer, best, directions, settings, reporter)
        decoded += [counted(handle, c, prompts, judge, settings.decode_tokens) for c in turned]
        winner = max(decoded, key=_merit)
    if not winner.refused or not winner.refused.count:
        raise AbliterateError(
            f"adding the direction makes {handle.source} refuse nothing, whatever the layer and size; "
            "give other target prompts, or other --layers"
        )
    note = f"refuses {_of(winner)} in whole sentences, the most; of equals the likeliest"
    winner = replace(winner, note=note)
    reporter.say(f"chose {winner}: {note}")
    done = {(c.layer, c.source, c.size): c for c in (*tried, *decoded, winner)}
    return Inducing(winner.edit, winner, sorted(done.values(), key=_merit, reverse=True))


def _difference(directions: Directions, layer: int) -> Float[Tensor, " d_model"]:
    """The difference of means at a block's output, at the prompts' last token, unnormalised."""
    row = SITES.index(SITE)
    return (directions.unit[layer, row, -1] * directions.length[layer, row, -1]).float()


def layers_to_try(directions: Directions, settings: InduceSettings) -> list[int]:
    """Blocks spread over the depth; not the first sixth, where a prompt isn't read yet, nor the last fifth."""
    count = directions.unit.shape[0]
    last = max(2, int(count * (1 - LAST_LAYERS_LEFT_OUT)))
    finite = directions.unit[:, SITES.index(SITE), -1].isfinite().all(-1)
    allowed = [i for i in range(1, min(last, count)) if bool(finite[i])]  # llama.cpp has no control vector for block 0
    if settings.layers is not None:
        return [i for i in allowed if i in settings.layers]
    allowed = [i for i in allowed if i >= count // 6]
    step = max(1, -(-len(allowed) // settings.most_layers))
    return allowed[::-1][::step][::-1]


@torch.inference_mode()
def difference_along_answers(
    handle: Handle, examples: Examples, *, tokens: int = REFUSAL_TOKENS, batch_size: int = 16
) -> Float[Tensor, "layer d_model"]:
    """Mean stream along the refusals of target prompts less that along the answers to baseline prompts.

    At blocks' outputs, from the prompt's last token to the answer's last but one: the tokens at which the answer is
    decided. As in contrastive activation addition (Rimsky et al. 2024), but with the model's own answers.

    Args:
        handle: the loaded original.
        examples: prompts with the model's own refusals and answers.
        tokens: of each answer that count.
        batch_size: rows at a time.
    """
    means = []
    for prompts, answers in ((examples.target, examples.refusals), (examples.baseline, examples.answers)):
        ids = handle.prompt_ids(prompts)
        pairs = [(row, answer.whole[:tokens]) for row, answer in zip(ids, answers, strict=True) if answer.whole]
        means.append(_mean_along(handle, pairs, batch_size))
    return (means[0] - means[1]).float()


def counted(handle: Handle, candidate: Induced, prompts: Sequence[str], judge: Judge, tokens: int) -> Induced:
    """The candidate with answers decoded to their end and counted: a verdict doesn't tell a loop from a sentence."""
    found, _ = objectives.tried(handle, candidate.edit, prompts, judge, max_new_tokens=tokens, stop_on=())
    return replace(candidate, refused=found.rate, coherent=found.coherent, degenerate=found.degenerate)


def _whole_refusals(handle: Handle, train: Examples, judge: Judge, settings: InduceSettings) -> list[Answer]:
    """The original's refusals to their end; what the filter kept of them stops where the verdict was clear."""
    answers, refused = judged(
        handle, train.target[: settings.prompts], judge, max_new_tokens=WHOLE_TOKENS, stop_on=(False,)
    )
    ended = [a for a, r in zip(answers, refused, strict=True) if r and a.finished]
    return ended or list(train.refusals)


def _scored(
    scorer: RefusalScorer, layer: int, source: str, vector: Tensor, at_prompt: Tensor, sizes: Sequence[float]
) -> list[Induced]:
    """One direction at growing sizes, up to the first that makes refusals less likely again."""
    found: list[Induced] = []
    cosine = float(normalised(vector) @ normalised(at_prompt))
    for size in sizes:
        loss = scorer.score(layer, size * vector)
        found.append(Induced(layer, source, size, loss, cosine, size * vector))
        if len(found) > 1 and loss > found[-2].loss:
            break
    return found


def _turned(
    scorer: RefusalScorer, starts: Sequence[Induced], directions: Directions, settings: InduceSettings,
    reporter: Reporter,
) -> list[Induced]:  # fmt: skip
    """The vector that gradient steps bring farthest, whole and a little more and less of it.

    Every start goes a third of the way; the one with the lowest loss there goes on.
    """
    first = max(1, settings.steps // 3)
    tick = reporter.progress("turning the vector", first * len(starts) + settings.steps - first)
    descents = [Descent(scorer, start.layer, start.vector) for start in starts]
    losses = [descent.go(first, tick) for descent in descents]
    farthest = losses.index(min(losses))
    best, start = descents[farthest], starts[farthest]
    best.go(settings.steps - first, tick)
    layer, vector = best.layer, best.vector.detach()
    unit = float(start.vector.norm()) / start.size
    cosine = float(normalised(vector) @ normalised(_difference(directions, layer)))
    return [
        Induced(layer, "turned", factor * float(vector.norm()) / unit, scorer.score(layer, factor * vector), cosine,
                factor * vector)
        for factor in (0.85, 1.0, 1.2)
    ]  # fmt: skip


def _best_of_each_layer(tried: Sequence[Induced]) -> list[Induced]:
    """Of each block the direction and size at which refusals are likeliest; likeliest first."""
    best: dict[int, Induced] = {}
    for candidate in tried:
        if candidate.layer not in best or candidate.loss < best[candidate.layer].loss:
            best[candidate.layer] = candidate
    return sorted(best.values(), key=lambda c: c.loss)


def _share(candidate: Induced) -> float:
    return candidate.coherent.rate if candidate.coherent else -1.0


def _merit(candidate: Induced) -> tuple[float, float]:
    return _share(candidate), -candidate.loss


def _of(candidate: Induced) -> str:
    return f"{candidate.coherent.count} of {candidate.coherent.total}" if candidate.coherent else "?"


def _mean_along(handle: Handle, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int) -> Tensor:
    """[layer, d_model] float64: mean stream at blocks' outputs over each row's answer tokens, then over rows."""
    rows = [[*prompt, *answer[:-1]] for prompt, answer in pairs]
    total = torch.zeros(handle.layers, handle.d_model, dtype=torch.float64)

    def run(part: Sequence[int]) -> Tensor:
        means = torch.zeros_like(total)

        def look(layer: int, site: str, stream: Tensor) -> None:
            if site != SITE:
                return
            for place, index in enumerate(part):
                means[layer] += stream[place, -len(pairs[index][1]) :].double().mean(0).cpu()

        with watch_sites(handle, look):
            handle.hidden_states(**inputs(handle, [rows[i] for i in part], Prefix(0)))
        return means

    for _, means in in_passes(handle, rows, batch_size, 0, run):
        total += means
    return total / len(rows)
