"""A worker that trains under FSDP on the CPU: accelerate has it for GPUs only, though torch can."""

import sys

import accelerate.state
from accelerate.utils import DistributedType

set_up = accelerate.state.PartialState.__init__


def as_on_gpus(self, *arguments, **options):
    set_up(self, *arguments, **options)  # gloo, on the CPU
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


accelerate.state.PartialState.__init__ = as_on_gpus

if __name__ == "__main__":
    from abliterate.heal import worker

    sys.exit(worker.main(sys.argv[1:]))
