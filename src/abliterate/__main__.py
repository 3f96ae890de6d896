"""`python -m abliterate`; of several processes that torchrun starts, the first alone speaks and writes."""

from __future__ import annotations

import os
import sys

from abliterate.cli import main
from abliterate.common.files import only_read

if __name__ == "__main__":
    if int(os.environ.get("RANK", "0")):
        only_read()
        sys.argv.append("--quiet")
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end)
    main()
