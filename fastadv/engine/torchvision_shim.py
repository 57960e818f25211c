"""Makes ``import torchvision`` work beside a CPU build of torch.

torchvision's wheel on the package index is compiled against the CUDA build of torch. Beside a CPU
build its C library ``_C`` cannot be loaded. torchvision tolerates that, but its import registers
two of that library's operators with ``torch.library`` and stops with "operator torchvision::nms
does not exist" (then ``qnms``). It is enough to declare their schemas before: the data readers need
none of these operators, and calling one still fails with torch's own message.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from fastadv.errors import UserError

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# torch.library drops the declarations of a Library when the object is deleted.
_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, imported so that it also works with a CPU build of torch.

    Schemas are declared only if they are missing and torchvision's own C operators cannot be
    loaded. Raises ``UserError`` if torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise UserError(
            "This needs torchvision, which is not installed; run `pip install torchvision`."
        )
    if not _c_operators_load(Path(spec.origin).parent):
        _declare_missing()
    return importlib.import_module("torchvision")


def _c_operators_load(package: Path) -> bool:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        library = package / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return True
    return False


def _declare_missing() -> None:
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(_SCHEMAS[name])
        _declared.append(library)
