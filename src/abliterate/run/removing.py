"""Whether an edit has taken out what it says: each of its directions, measured before it and after."""

from __future__ import annotations

from typing import Any

from abliterate.apply.hooks import attached
from abliterate.apply.proof import InStream, Proof, in_stream, tolerance
from abliterate.common.errors import WriterError
from abliterate.edit.edit import Edit
from abliterate.models.handle import Handle
from abliterate.models.writers import find_writers


class Removal:
    """What the stream held of an edit's directions, and what it is to hold; made before the edit, nothing attached.

    An edit of strength a at a writer leaves 1 - a of what that writer writes along the direction. What this comes to
    in the stream is measured on the original with the edit attached live, in the stream's own precision.

    Args:
        handle: the original.
        edit: what will be taken out of it.
    """

    def __init__(self, handle: Handle, edit: Edit) -> None:
        self.edit = edit
        self.writers = {w.name: w for w in find_writers(handle)}
        self.before: InStream = in_stream(handle, list(edit.directions))
        with attached(handle, edit):
            self.expected: InStream = in_stream(handle, list(self.edit.directions))

    def check(self, handle: Handle) -> list[dict[str, Any]]:
        """Measure what is left, with the edit baked or attached: an entry of results.json for each direction.

        Raises:
            WriterError: when a direction that is taken out whole is still there, or, in float32, when there is more or
                less of one than its strengths leave.
        """
        left = in_stream(handle, list(self.edit.directions))
        # a direction that the weights are large along leaves more of their rounding than a random one: in half
        # precision the bound is what tells it from a missed writer, which leaves 1/sqrt(d_model)
        missed, half = 0.4 * handle.d_model**-0.5, handle.dtype.itemsize < 4
        bound = max(tolerance(handle), missed if half else 0.0)
        off = (left.share - self.expected.share).abs().amax((0, 1))
        found = []
        for row in range(len(self.edit.directions)):
            used = self.edit.strengths[:, row] != 0
            if not used.any():
                continue
            proof = left.largest(row, tolerance(handle))
            if self._is_whole(row) and proof.component > bound:
                raise WriterError(
                    f"after baking, a component of {proof.component:.1e} is left at {proof.where}; nothing was written"
                )
            if not half and float(off[row]) > max(tolerance(handle), missed):
                raise WriterError(
                    f"after baking, the stream's component along direction {row + 1} of the edit is off by "
                    f"{float(off[row]):.1e} from what its strengths leave; nothing was written"
                )
            writers = [self.writers[w] for w, is_used in zip(self.edit.writers, used, strict=True) if is_used]
            strengths = self.edit.strengths[used, row]
            found.append(
                {
                    "writers": len(writers),
                    "layers": sorted({w.layer for w in writers if w.layer is not None}),
                    "sides": list(dict.fromkeys(w.side for w in writers)),
                    "strength": {"min": float(strengths.min()), "max": float(strengths.max())},
                    "before": self.before.largest(row).component,
                    "left": proof.component,
                    "expected": self.expected.largest(row).component,
                    "where": proof.where,
                }
            )
        return found

    def _is_whole(self, row: int) -> bool:
        """Whether a direction is taken out of every writer at strength 1."""
        return len(self.edit.writers) == len(self.writers) and bool((self.edit.strengths[:, row] == 1).all())


def proofs(writers: Proof, removed: list[dict[str, Any]]) -> dict[str, Any]:
    """`proof` of results.json: what is left of a random direction, and of that of the edit of which most is left."""
    most = max(removed, key=lambda one: one["left"], default=None)
    return {
        "writers": {"component": writers.component, "where": writers.where},
        "edited": most and {"component": most["left"], "where": most["where"]},
    }
