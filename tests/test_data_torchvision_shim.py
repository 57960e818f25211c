"""torchvision imports beside any build of torch; each case in a process of its own."""

import subprocess
import sys

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


# Forks of an interpreter that has imported torch, and nothing of torchvision.
FORKED = """
import os, sys
import fastadv.engine.torchvision_shim as shim
from fastadv.engine.torchvision_shim import *
import_torchvision = shim.import_torchvision
assert "torchvision" not in sys.modules
for number, case in enumerate(sys.argv[1:], 1):
    child = os.fork()
    if child == 0:
        exec(case)
        os._exit(0)  # an error leaves by another way, with its traceback and code 1
    if os.waitpid(child, 0)[1]:
        sys.exit(f"case {number}")
print("imported", number)
"""


def test_import():
    cases = [case + CHECKS for case in CASES.values()]
    done = subprocess.run([sys.executable, "-c", FORKED, *cases], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"imported {len(CASES)}\n"), done.stderr


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
