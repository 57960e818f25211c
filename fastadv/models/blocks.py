"""Finds the convolutions whose input APART perturbs, in our networks and in the user's."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fastadv.errors import UserError, unknown
from fastadv.models.wrapped import inner_module


def perturbable_blocks(
    model: nn.Module, names: str | Sequence[str] | None = None, at: str = "conv1"
) -> list[tuple[str, nn.Module]]:
    """The first convolution of every residual block, with its name, in the model's order.

    The tensor entering that convolution gets APART's layer-wise noise (h_b = ReLU(BN1(x_b)) in a
    pre-activation block; Alg. 1 line 4 as released). A block is a module that is not the network
    itself and has convolutions ``conv1`` and ``conv2`` and no linear layer of its own: the blocks
    here, torchvision's and timm's ResNets, DLA's, and DenseNet's layers, whose skip path is the
    concatenation. ``names`` selects other modules: a full name selects that module of any type
    (the noise is added to its first input), a pattern with ``*`` selects the matching convolutions
    and linear layers. Names are those inside ``torch.compile`` and DDP.

    ``at="input"`` selects the first module of the block's branch, so that noise is added to x_b as
    printed in Alg. 1 line 4: in a pre-activation block the BatchNorm registered before ``conv1``,
    elsewhere ``conv1`` itself. A projection that reads that BatchNorm's output (PreActResNet with
    ``shortcut="preact"``, the first block of a stage) then sees the noise too.

    Raises ``UserError`` if nothing is found or a name matches nothing.
    """
    inner = inner_module(model)
    if names is None:
        blocks = _residual_blocks(inner, at)
        if not blocks:
            raise UserError(
                f"{type(inner).__name__} has no residual blocks that can be recognised; name the "
                'modules whose input is perturbed, blocks=["layer1.0.conv1", "layer2.*.conv1"], '
                "or use method fgsm-plus, which needs none."
            )
        return blocks
    patterns = [names] if isinstance(names, str) else list(names)
    if not patterns:
        raise UserError("The list of perturbed blocks is empty; name at least one module.")
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        chosen.update(_matches(inner, pattern))
    # Registration order, not the order of the patterns: step sizes are stored by position.
    return [(name, module) for name, module in inner.named_modules() if name in chosen]


def _residual_blocks(model: nn.Module, at: str) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in model.named_modules():
        if name and _is_residual_block(module):
            first = _branch_start(module) if at == "input" else "conv1"
            found.append((f"{name}.{first}", module.get_submodule(first)))
    return found


def _branch_start(block: nn.Module) -> str:
    """The name of the branch's first module: a norm counts only if it is before ``conv1``."""
    children = dict(block.named_children())
    before = list(children)[: list(children).index("conv1")]
    norms = [name for name in before if isinstance(children[name], nn.BatchNorm2d)]
    return norms[0] if norms else "conv1"


def _is_residual_block(module: nn.Module) -> bool:
    children = dict(module.named_children())
    has_two = all(isinstance(children.get(name), nn.Conv2d) for name in ("conv1", "conv2"))
    # conv1, conv2 and a linear layer side by side are a whole small network, not a block.
    return has_two and not any(isinstance(child, nn.Linear) for child in children.values())


def _matches(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    if pattern in modules:
        return {pattern: modules[pattern]}
    matching: dict[str, nn.Module] = {
        name: module
        for name, module in modules.items()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        and fnmatchcase(name, pattern)
    }
    if not matching:
        outermost = [name for name, _ in model.named_children()]
        raise unknown(f"module of {type(model).__name__}", pattern, modules, outermost)
    return matching
