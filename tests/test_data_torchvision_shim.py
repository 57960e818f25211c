"""torchvision imports beside any build of torch; each case in a fresh interpreter."""

import subprocess
import sys

import pytest

CASES = {
    "twice": "import_torchvision(); torchvision = import_torchvision()",
    # A user's own plain import may have failed half-way before.
    "after a plain import": """
try:
    import torchvision
except RuntimeError as error:
    assert "does not exist" in str(error)
torchvision = import_torchvision()
""",
}
CHECKS = """
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
import torch
assert resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
loads = torchvision.extension._has_ops()
assert bool(shim._declared) == (not loads), "schemas are declared only where the operators are not"
"""


@pytest.mark.parametrize("case", CASES)
def test_import(case):
    head = "import fastadv.engine.torchvision_shim as shim\n"
    head += "from fastadv.engine.torchvision_shim import *\n"
    head += "import_torchvision = shim.import_torchvision\n"
    done = subprocess.run(
        [sys.executable, "-c", head + CASES[case] + CHECKS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_that_exists():
    code = """
import torch
mine = torch.library.Library("torchvision", "DEF")
mine.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import fastadv.engine.torchvision_shim as shim
shim._declare_missing()
shim._declare_missing()
assert len(shim._declared) == 1
assert hasattr(torch.ops.torchvision, "qnms")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
