"""One of several processes that hold a model together: every stage is that of one process. Started by torchrun."""

from __future__ import annotations

import sys

import numpy as np
import torch

import abliterate.api  # noqa: F401
from abliterate.common.errors import ModelError
from abliterate.edit.edit import Edit
from abliterate.models.loading import load
from abliterate.models.writers import find_writers
from stages import same, seen


def main(folder):
    torch.set_num_threads(1)
    together, alone = load(folder, dtype="float32", tensor_parallel=True), load(folder, dtype="float32")
    same(seen(together), seen(alone), rtol=1e-3, atol=1e-4)
    try:
        Edit.uniform(find_writers(together), np.ones(together.d_model), 1.0).bake(together)
    except ModelError as error:
        assert "spread over processes" in str(error)
    else:
        raise AssertionError("weights spread over processes were changed in memory")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
