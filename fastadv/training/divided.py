"""The calls of several processes that share one batch (``bn="global"``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from fastadv.data.view import View
from fastadv.engine.model.fused_norm import is_compiled
from fastadv.engine.process import distributed
from fastadv.engine.process.division import Division
from fastadv.errors import UserError
from fastadv.training import checks
from fastadv.training.inputs import Given
from fastadv.training.settings import Execution


def division_of(execution: Execution, model: nn.Module) -> Division | None:
    """How the processes divide a batch; None if there is one process or each has its own batch.
    Raises ``UserError`` for a mode and a model in which BatchNorm cannot see all processes."""
    if distributed.world_size() == 1:
        return None
    if execution.bn != "global":
        _require_no_sync_norm_on_a_cpu(model)
        return None
    if execution.mode not in ("auto", "eager"):
        raise UserError(
            f"bn='global' sends messages inside of every pass, which mode={execution.mode!r} does "
            "not do with several processes: use mode='eager' or bn='local'."
        )
    modules = list(model.modules())
    if is_compiled(modules) or any(isinstance(module, ScriptModule) for module in modules):
        raise UserError(
            "bn='global' cannot look into a model that torch.compile or TorchScript has compiled: "
            "give the model as it was before, or use bn='local'."
        )
    return Division()


def _require_no_sync_norm_on_a_cpu(model: nn.Module) -> None:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError(
            "The model has a SyncBatchNorm, which torch runs on GPUs only: bn='global' "
            "synchronises every BatchNorm, on a CPU also."
        )


def require_group_before(division: Division | None, bn: str) -> None:
    """Raise ``UserError`` if several processes were to share a batch and the step, which was built
    before they met, does not know of them."""
    if division is None and bn == "global":
        raise UserError(
            "This step with bn='global' was built before the group of processes: build it after "
            "torch.distributed.init_process_group."
        )


def put_together(
    division: Division, given: Given, view: View | None, update: bool, device: torch.device
) -> tuple[Given, View | None]:
    """The whole batch of a call from what each process was given, the first process's images
    first. Raises ``UserError`` for tensors that are not on ``device``, and in every process if the
    parts do not fit together."""
    if division.processes != distributed.world_size():
        raise UserError(
            "The group of processes is not the one in which this step was built: build it again."
        )
    named = {name: each for name, each in given._asdict().items() if each is not None}
    named |= {} if view is None else {f"view.{name}": each for name, each in view._asdict().items()}
    for name, each in named.items():
        if not isinstance(each, Tensor):
            raise UserError(f"{name} must be a torch.Tensor, not {type(each).__name__}.")
    checks.check_devices(device, **named)
    x, mask = given.x, given.mask
    if mask is not None and mask.dim() == 4 and len(mask) == 1:
        given = given._replace(mask=mask.expand(len(x) if x.dim() else 1, -1, -1, -1))
        named["mask"] = x
    for name, each in named.items():
        if not each.dim() or len(each) != len(x):
            raise UserError(f"{name} needs one row for each of the images x, not {each.shape}.")
    views = [] if view is None else list(view)
    whole = division.put_together([*given, *views], (view is None, update))
    count = len(Given._fields)
    return Given(*whole[:count]), None if view is None else View(*whole[count:])
