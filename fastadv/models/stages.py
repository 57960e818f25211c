"""Layer groups: which parameters belong to which residual stage (RAT, AT-fix-param, AT-AWP-[k])."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import floor

from torch import nn

from fastadv.errors import UserError, unknown
from fastadv.models.wrapped import inner_module

SPLITS = ("stages", "quarters")
# Stage names of other libraries; tried in order, all names must be present.
_CONVENTIONS: tuple[tuple[str, ...], ...] = (
    ("layer3", "layer4", "layer5", "layer6"),  # DLA
    ("layer1", "layer2", "layer3", "layer4"),  # ResNets of torchvision and timm
    ("block1", "block2", "block3"),  # Wide ResNets
)


def stages(model: nn.Module, split: str = "stages") -> dict[str, list[str]]:
    """Parameter names by layer group: ``"1"`` to ``"4"``, and ``"rest"``; every parameter once.

    ``split="stages"``: group k is residual stage k with its convolutions and BN affines; stem,
    final BN and classifier are the rest. A Wide ResNet has three stages, DLA's are its layer3 to
    layer6, VGG-16's four ranges of its convolutions. A network of your own is read by its module
    names (layer1..layer4, block1..block3) or by a class attribute ``stage_prefixes``: for each
    stage, a tuple of module names.
    ``split="quarters"``: the four groups RAT's authors used for WRN-34-10, which are quarters of
    the list of weight matrices and cut through blocks; stem and classifier belong to 1 and 4, and
    the rest is empty.

    Names are those inside ``torch.compile`` and DDP: published code compared them with a
    "module." in front and silently selected nothing. Raises ``UserError`` when the network has no
    known stages or one is empty.
    """
    if split not in SPLITS:
        raise unknown("split of the layers", split, SPLITS)
    inner = inner_module(model)
    groups = _quarters(inner) if split == "quarters" else _by_prefix(inner, _prefixes(inner))
    for group, names in groups.items():
        if not names and group != "rest":
            raise UserError(
                f"Layer group {group} of {type(inner).__name__} holds no parameters; correct its "
                "stage_prefixes, or choose another split."
            )
    return groups


def stage_parameters(
    model: nn.Module, selection: Sequence[str | int], split: str = "stages"
) -> list[str]:
    """The parameter names of the selected groups (``["3", "4"]``), in the model's order.

    A number or "rest" is a group of ``stages``. Anything else is the name of a module or parameter,
    for networks whose stages are not known: ``"layer4"``, ``"blocks.3"``, or a pattern
    (``"blocks.1*"``). Raises ``UserError`` for an unknown group or name, and if the selection
    matches nothing: published code trained plain AT then.
    """
    wanted = [str(entry) for entry in selection]
    numbered = [entry for entry in wanted if entry.isdecimal() or entry == "rest"]
    # A network whose stages are not known is refused only where one is asked for.
    groups = stages(model, split) if numbered or not wanted else {}
    chosen: set[str] = set()
    for entry in wanted:
        if entry not in numbered:
            chosen.update(_below(inner_module(model), entry))
        elif entry in groups:
            chosen.update(groups[entry])
        else:
            way = "; split=quarters cuts any network into 1 to 4" if split == "stages" else ""
            raise UserError(f"Unknown layer group {entry!r}; known: {', '.join(groups)}{way}.")
    if not chosen:
        raise UserError(
            f"The layer selection {list(selection)} matches no parameter; choose among "
            f"{', '.join(group for group, names in groups.items() if names)}."
        )
    return [name for name, _ in inner_module(model).named_parameters() if name in chosen]


def _below(model: nn.Module, name: str) -> list[str]:
    """The parameters of the module ``name``, or of all that match it as a pattern."""
    names = [parameter for parameter, _ in model.named_parameters()]
    # The dot keeps layer1 from matching layer10.
    found = [each for each in names if fnmatchcase(each, name) or fnmatchcase(each, f"{name}.*")]
    if not found:
        kind = f"module or parameter of {type(model).__name__}"
        modules = [module for module, _ in model.named_modules() if module]
        raise unknown(kind, name, [*modules, *names], [each for each, _ in model.named_children()])
    return found


def _prefixes(model: nn.Module) -> Sequence[Sequence[str]]:
    declared = getattr(type(model), "stage_prefixes", None)
    if declared is not None:
        return declared
    children = {name for name, _ in model.named_children()}
    for names in _CONVENTIONS:
        if children.issuperset(names):
            return [(name,) for name in names]
    raise UserError(
        f"The residual stages of {type(model).__name__} are not known; name modules in place of "
        f"numbers, such as {_last_module(model)}, or give its class an attribute "
        'stage_prefixes = (("stage1",), ("stage2",), ...) with the module names of each stage.'
    )


def _last_module(model: nn.Module) -> str:
    """The last of the network's outermost modules, as an example."""
    return repr(next((name for name, _ in reversed(list(model.named_children()))), "layer4"))


def _by_prefix(model: nn.Module, prefixes: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {str(k): [] for k in range(1, len(prefixes) + 1)}
    groups["rest"] = []
    for name, _ in model.named_parameters():
        # The dot keeps layer1 from matching layer10.
        owners = [
            str(k)
            for k, owned in enumerate(prefixes, 1)
            if any(name.startswith(f"{prefix}.") for prefix in owned)
        ]
        if len(owners) > 1:
            raise UserError(f"Parameter {name} belongs to layer groups {' and '.join(owners)}.")
        groups[owners[0] if owners else "rest"].append(name)
    return groups


def _quarters(model: nn.Module) -> dict[str, list[str]]:
    """Cut the list of weight matrices (ndim > 1) at its rounded quarters.

    Vectors (BN affines, biases) go with the matrix before them. On WRN-34-10 this is exactly the
    published list: 25, 25, 22 and 26 tensors.
    """
    matrices = sum(parameter.ndim > 1 for parameter in model.parameters())
    ends = [floor(k * matrices / 4 + 0.5) for k in (1, 2, 3)]
    groups: dict[str, list[str]] = {group: [] for group in ("1", "2", "3", "4", "rest")}
    seen = 0
    for name, parameter in model.named_parameters():
        seen += parameter.ndim > 1
        groups[str(1 + sum(seen > end for end in ends))].append(name)
    return groups
