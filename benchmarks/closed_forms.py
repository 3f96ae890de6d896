"""Closed forms of an edit, side by side: what each leaves refused, and what it costs (docs/fit.md, "Closed forms").

    python benchmarks/closed_forms.py demo

Each changes the outputs of the same few writers, those below the block whose difference of means the fit starts from,
by what activations at the last token of prompts and the first tokens of answers say; strengths blend it with doing
nothing. Judged on validation prompts by the panel that a run chooses with, divergence on baseline prompts.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import abliterate as ab
from abliterate.measure import judged, reference_of
from abliterate.measure.divergence import compare
from abliterate.measure.judges import LexicalJudge
from abliterate.measure.verdicts import Panel
from abliterate.models.batches import Prefix, inputs
from abliterate.models.handle import Handle
from abliterate.run.showing import Shown, showing

READ = 4  # positions of a row that count: the prompt's last token and the answer's first three
BATCH = 16
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
Form = Callable[[Tensor, Tensor], Tensor]  # (what goes into a writer, what comes out) -> what is added at strength 1


class Read(NamedTuple):
    """What goes into a writer and comes out, [row * position, width] float64, behind target and baseline prompts."""

    target_in: Tensor
    target_out: Tensor
    baseline_in: Tensor
    baseline_out: Tensor


def read(handle: Handle, modules: dict[str, nn.Module], shown: Shown) -> dict[str, Read]:
    """Inputs and outputs of some modules, of the original's own answers."""
    assert shown.examples is not None
    sides = ((shown.target, shown.examples.refusals), (shown.baseline, shown.examples.answers))
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for prompts, answers in sides:
        rows = [[*p, *a.whole[: READ - 1]] for p, a in zip(handle.prompt_ids(prompts), answers, strict=True)]
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
        with contextlib.ExitStack() as stack:
            for name, module in modules.items():

                def keep(_: nn.Module, given: tuple[Tensor, ...], out: Tensor, own: list[Any] = parts[name]) -> None:
                    own.append((given[0][:, -READ:].detach(), out[:, -READ:].detach()))

                stack.callback(module.register_forward_hook(keep).remove)
            with torch.no_grad():
                for start in range(0, len(rows), BATCH):
                    handle.hidden_states(**inputs(handle, rows[start : start + BATCH], Prefix(0)))
        for name, pairs in parts.items():
            found[name] += [torch.cat([p[i].flatten(0, 1) for p in pairs]).double() for i in (0, 1)]
    return {name: Read(*tensors) for name, tensors in found.items()}


@contextlib.contextmanager
def attached(modules: dict[str, nn.Module], forms: dict[str, Form], strength: float) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():

            def change(_: nn.Module, given: tuple[Tensor, ...], out: Tensor, form: Form = forms[name]) -> Tensor:
                return out + strength * form(given[0], out)

            stack.callback(module.register_forward_hook(change).remove)
        yield


def root(matrix: Tensor, power: float) -> Tensor:
    """A symmetric positive matrix to a power."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-12) ** power) @ vectors.T


def covariance(rows: Tensor, shrink: float = 0.1) -> Tensor:
    """Of centred rows, shrunk towards a multiple of the identity: there are fewer rows than features."""
    centred = rows - rows.mean(0)
    found = centred.T @ centred / len(rows)
    return (1 - shrink) * found + shrink * found.diagonal().mean() * torch.eye(len(found), dtype=found.dtype)


def taken_out(basis: Tensor, mean: Tensor | None = None) -> Form:
    """Out of the span of some orthonormal directions; to a mean instead of to zero with one."""
    basis, mean = basis.float(), None if mean is None else mean.float()
    return lambda given, out: -((out if mean is None else out - mean) @ basis.T) @ basis


def erased(seen: Read, to_mean: bool = True) -> Form:
    """Optimal linear erasure (LEACE, Belrose et al. 2023): the oblique projection that leaves no linear trace.

    Of two classes it is d (S^-1 d)^T, divided by its trace: d the difference of means, S the covariance within the
    classes (that of all rows gives the same projection). It moves what it erases to the baseline's mean; to zero,
    which weights without a bias can hold, for comparison.
    """
    pooled = torch.cat([seen.target_out - seen.target_out.mean(0), seen.baseline_out - seen.baseline_out.mean(0)])
    delta = seen.target_out.mean(0) - seen.baseline_out.mean(0)
    reading = torch.linalg.solve(covariance(pooled), delta)
    left, right = delta.float(), (reading / (reading @ delta)).float()
    mean = seen.baseline_out.mean(0).float() * to_mean
    return lambda given, out: -((out - mean) @ right)[..., None] * left


def transported(seen: Read, size: int) -> Form:
    """Gaussian optimal transport of target outputs to baseline outputs, in their first principal components."""
    t, b = seen.target_out, seen.baseline_out
    centred = torch.cat([t, b]) - torch.cat([t, b]).mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:size]
    inner_t, inner_b = covariance(t @ basis.T, 0.01), covariance(b @ basis.T, 0.01)
    half, back = root(inner_t, 0.5), root(inner_t, -0.5)
    turn = back @ root(half @ inner_b @ half, 0.5) @ back
    basis, turn, t_mean, b_mean = (x.float() for x in (basis, turn, t.mean(0), b.mean(0)))

    def form(given: Tensor, out: Tensor) -> Tensor:
        inner = (out - t_mean) @ basis.T
        return (inner @ turn.T - inner + (b_mean - t_mean) @ basis.T) @ basis

    return form


def least_squares(seen: Read, rank: int, ridge: float = 0.1) -> Form:
    """A low-rank change of the writer's weight that moves target outputs to the baseline's mean, and no others."""
    x = torch.cat([seen.target_in, seen.baseline_in])
    wanted = torch.cat([seen.baseline_out.mean(0) - seen.target_out, torch.zeros_like(seen.baseline_out)])
    gram = x.T @ x / len(x)
    eye = torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * eye, x.T @ wanted / len(x))
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    first, second = (u[:, :rank] * s[:rank]).float(), vh[:rank].float()
    return lambda given, out: given @ first @ second


def forms(seen: dict[str, Read], direction: Tensor) -> dict[str, dict[str, Form]]:
    """Each form for every writer; `direction` is the difference of means of the stream above them."""

    def by(make: Callable[[Read], Form]) -> dict[str, Form]:
        return {name: make(one) for name, one in seen.items()}

    def several(one: Read, count: int) -> Tensor:
        apart = one.target_out - one.baseline_out.mean(0)
        rest = apart - (apart @ direction)[:, None] * direction
        return torch.cat([direction[None], torch.linalg.svd(rest, full_matrices=False).Vh[: count - 1]])

    return {
        "direction to zero (the fit's start)": by(lambda one: taken_out(direction[None])),
        "direction to the baseline's mean (ACE)": by(lambda one: taken_out(direction[None], one.baseline_out.mean(0))),
        "2 directions to zero": by(lambda one: taken_out(several(one, 2))),
        "4 directions to zero": by(lambda one: taken_out(several(one, 4))),
        "4 directions to the baseline's mean": by(lambda one: taken_out(several(one, 4), one.baseline_out.mean(0))),
        "optimal erasure (LEACE), to the baseline's mean": by(erased),
        "optimal erasure, to zero": by(lambda one: erased(one, to_mean=False)),
        "Gaussian transport, 2 components": by(lambda one: transported(one, 2)),
        "least squares on inputs, rank 1": by(lambda one: least_squares(one, 1)),
        "least squares on inputs, rank 4": by(lambda one: least_squares(one, 4)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="'demo', a folder or a GGUF file")
    parser.add_argument(
        "--layer", type=int, help="whose difference of means; the best separated of the middle if left out"
    )
    parser.add_argument("--target", default="bundled")
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--validation", type=int, default=32)
    options = parser.parse_args()
    handle = ab.load(ab.demo_model() if options.model == "demo" else options.model, dtype="float32")
    sides = ab.load_sides(
        options.target, "bundled", limit_train=options.train, limit_validation=options.validation, limit_test=8
    )
    panel = Panel(LexicalJudge())
    train, validation = (
        showing(handle, list(getattr(sides.target, part)), list(getattr(sides.baseline, part)), panel)
        for part in ("train", "validation")
    )
    directions = ab.difference_of_means(ab.collect(handle, train.target, train.baseline))
    middle = range(handle.layers // 3, 2 * handle.layers // 3)
    layer = options.layer or max(middle, key=lambda i: float(directions.separation[i, 0, -1]))
    direction = directions.unit[layer, 0, -1].double()
    below = range(max(0, layer - handle.layers // 8 - 1), layer)
    by_name = {name: module for module, name in handle.module_names.items()}
    modules = {w.module: by_name[w.module] for w in ab.find_writers(handle) if w.layer in below}
    assert validation.examples is not None
    reference = reference_of(handle, validation.baseline, validation.examples.answers, tokens=8)
    assert reference is not None
    print(f"direction at block {layer}, {len(modules)} writers of blocks {below[0]} to {below[-1]}")
    print("| form | strength | refused | not answered | of | first token | along |\n|---|---|---|---|---|---|---|")
    seen = read(handle, modules, train)
    for name, made in forms(seen, direction).items():
        for strength in STRENGTHS:
            with attached(modules, made, strength):
                answers, missing = judged(handle, validation.target, panel.strict, max_new_tokens=32)
                drift = compare(handle, reference)
            verdicts = panel.verdicts(validation.target, [a.text for a in answers])
            row = (name, strength, verdicts.count("refused"), sum(missing), len(missing))
            print("| " + " | ".join(map(str, row)) + f" | {drift.first_token:.3f} | {drift.answer:.3f} |", flush=True)


if __name__ == "__main__":
    main()
