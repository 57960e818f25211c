"""Several processes on one batch: the results of their parts of it are averaged here.

A step runs several forward passes per backward pass and takes gradients without ``backward()``,
which the hooks of DDP do not see. (With TRADES they would even fail: DDP's buffer broadcast changes
tensors that the backward pass needs.) So the inner module runs in each process, and this package
averages the results. After every update all processes hold the same weights, buffers and state.
Quantities that are taken over a batch, or carried from one batch to the next, stay local to each
process: the batch statistics of BatchNorm, the largest entries of AdvLC, the normalised weights of
SAT and GAIRAT, Free's perturbation, the masks of dropout. With ``bn="global"`` all of them but
dropout's masks are those of the whole batch: nothing is averaged here then, see ``division.py``.

Gradients, statistics, loss and accuracy are the mean over the images of all processes, whatever the
sizes of their batches; DDP would give each process the same weight. All processes must make equally
many calls. The gradients of calls with ``update=False`` stay in their process until the update, as
in DDP's ``no_sync``.

``group.py`` says which process this is, ``joining.py`` makes the group, ``messages.py`` sends
tensors, ``agreement.py`` words that nobody waits for a device to read, and ``failures.py`` ends
those that would wait for a process that has failed or is gone.
"""

from fastadv.engine.process.distributed.agreement import (
    AGREEMENT_TIMEOUT,
    Signal,
    in_step_after_error,
    told_by_all,
)
from fastadv.engine.process.distributed.failures import failure_told
from fastadv.engine.process.distributed.group import (
    alone,
    local_rank,
    rank,
    sharing,
    speaks,
    world_size,
)
from fastadv.engine.process.distributed.joining import (
    GROUP_TIMEOUT,
    TRAINING_TIMEOUT,
    joined,
    leave,
    short_timeout,
)
from fastadv.engine.process.distributed.messages import (
    add_up,
    any_process,
    average,
    collected,
    every_part,
    every_row,
    first_alone,
    most,
    share_rows,
    wait,
)

__all__ = [
    "AGREEMENT_TIMEOUT",
    "GROUP_TIMEOUT",
    "TRAINING_TIMEOUT",
    "Signal",
    "add_up",
    "alone",
    "any_process",
    "average",
    "collected",
    "every_part",
    "every_row",
    "failure_told",
    "first_alone",
    "in_step_after_error",
    "joined",
    "leave",
    "local_rank",
    "most",
    "rank",
    "share_rows",
    "sharing",
    "short_timeout",
    "speaks",
    "told_by_all",
    "wait",
    "world_size",
]
