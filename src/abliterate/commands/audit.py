"""`abliterate audit`: how strongly a model's guard resists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from abliterate.commands.common import Model, source_of
from abliterate.commands.options import Given, Output, command
from abliterate.settings.audit import QUICK, AuditRunSettings


@command(
    "force resume seed config audit prompts collect.batch_size measure.judge load -load.tensor_parallel workers ray",
    "abliterate audit ./model --out model-audit",
    "abliterate audit ./model --target bad.txt --baseline good.txt --out model-audit --quick",
    kind=AuditRunSettings,
)
def audit(
    model: Model,
    *,
    out: Annotated[Path, "Output folder."],
    quick: Annotated[bool, "Fewer prompts, steps and points."] = False,
    given: Given[AuditRunSettings],
    io: Output,
) -> None:
    """Say how little it takes to undo a model's guard: divergence, directions, layers and prompts needed.

    For those who must defend a model. The model is not changed, no answer is kept, and nothing but numbers is written.
    """
    with io.reported(out) as terminal:
        from abliterate.audit import audit as run_audit
        from abliterate.audit.text import table_rows
        from abliterate.commands.terminal import places, rows_table

        settings = given.settings(QUICK if quick else None)
        document = run_audit(source_of(model), out, settings, overwrite=io.overwrite, reporter=terminal)
    table = rows_table(table_rows(document), ("", "", "refused"), "how strongly the guard resists", left=2)
    io.result(document, table, places(out, audit="audit.md", numbers="audit.json"))
