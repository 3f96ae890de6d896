"""A worker that trains under DeepSpeed on the CPU: DeepSpeed can, but accelerate has it for GPUs only."""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for one itself

import accelerate.state
import deepspeed.ops
from accelerate.utils import DeepSpeedPlugin, DistributedType

NO_SHARED_MEMORY_OP = {"deepspeed_shm_comm": False}  # it would be compiled first; gloo does without
# A tiny model's weights are otherwise small enough to stay whole in every process.
ALL_SPREAD = {"stage3_param_persistence_threshold": 0}

set_up = accelerate.state.PartialState.__init__
configure = DeepSpeedPlugin.__post_init__


def as_on_gpus(self, *arguments, **options):
    set_up(self, *arguments, **options)  # gloo, on the CPU
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.DEEPSPEED


def with_all_spread(self):
    configure(self)  # as the ready configuration says
    self.deepspeed_config["zero_optimization"].update(ALL_SPREAD)


accelerate.state.PartialState.__init__ = as_on_gpus
DeepSpeedPlugin.__post_init__ = with_all_spread
deepspeed.ops.__compatible_ops__.update(NO_SHARED_MEMORY_OP)

if __name__ == "__main__":
    from abliterate.heal import worker

    sys.exit(worker.main(sys.argv[1:]))
