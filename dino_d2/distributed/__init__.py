"""Many workers: `launch.py` starts them, in `sharing.py` they share a model."""

from .launch import WORKER_VARIABLES, check_gpus, is_worker, join, launch, work, world_size
from .sharing import (
    distribute,
    gather,
    load_optimizer,
    local_shard,
    mean_over_workers,
    replicate,
    scatter,
    shard,
    share_buffers,
    suspend_sync,
    unsharded,
    unwrap,
)
