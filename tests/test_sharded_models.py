"""A model whose weights are sharded over processes is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastadv
from fastadv.errors import UserError


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_fully_sharded_models_are_refused_in_one_sentence() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"sharded.*use DistributedDataParallel"):
        fastadv.step(model, optimizer, "pgd")


@pytest.mark.usefixtures("group")
def test_distributed_tensors_as_weights_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(model[1].weight.detach(), mesh, [Shard(0)])
    model[1].weight = nn.Parameter(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"sharded.*use DistributedDataParallel"):
        fastadv.step(model, optimizer, "pgd")
