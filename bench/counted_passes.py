"""Counts what attacks ask of a network: passes of images, and multiplications."""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Counted(nn.Module):
    """``model``, with the images of its passes counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)  # a hook on a leaf would stay for the passes after this one
            x.register_hook(self._back)
        logits: Tensor = self.model(x)
        return logits

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


class Multiplications(TorchDispatchMode):
    """Counts those of convolutions and matrix products, in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.count += count(*args, **(kwargs or {}), out_val=found)
        return found
