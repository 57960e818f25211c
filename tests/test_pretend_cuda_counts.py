"""Names and kinds of the kernels that are counted on the pretended CUDA runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastadv.algorithms.contract.passes import INPUT_GRADIENT
from fastadv.benchmark.geometry import geometry
from fastadv.models import build_model

TOOL = Path(__file__).resolve().parents[1] / "tools" / "pretend_cuda"
sys.path.insert(0, str(TOOL))

import records  # noqa: E402
from counts import kernels, kind, kinds, short  # noqa: E402

NATIVE = "void at::native::"
MEAN = (
    f"{NATIVE}reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::MeanOps<float, "
    "float, float, c10::BFloat16>, unsigned int, c10::BFloat16, 4, 4> >(int)"
)
WHERE = (
    f"{NATIVE}elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::(anonymous "
    "namespace)::where_kernel_impl(at::TensorIterator&)::{lambda()#1}>(int)"
)
LARGEST = (
    f"{NATIVE}(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "TensorListMetadata<1>, at::native::LpNormFunctor<float, (at::native::NormType)1>>()"
)


@pytest.mark.parametrize(
    ("name", "told", "is_a"),
    [
        (MEAN, "reduce_kernel MeanOps", "reduction"),
        (WHERE, "elementwise_kernel where_kernel_impl", "elementwise"),
        (LARGEST, "multi_tensor_apply_kernel LpNormFunctor", "foreach"),
        ("memcpy DtoD", "memcpy DtoD", "copy"),
        ("cudnn fprop", "cudnn fprop", "convolution"),
        ("triton:triton_red_fused_add_3", "inductor reduction", "inductor reduction"),
        ("triton:_linf_kernel", "_linf_kernel", "_linf_kernel"),
    ],
)
def test_a_kernel_has_a_short_name_and_a_kind(name: str, told: str, is_a: str) -> None:
    assert (short(name), kind(name)) == (told, is_a)


def test_no_launch_is_lost() -> None:
    census = {MEAN: 3, MEAN.replace("128", "512"): 2, WHERE: 9, "triton_poi_fused_1": 1}
    census["triton_poi_fused_22"] = 4
    told = kernels(census)
    assert list(told.items()) == [
        ("elementwise_kernel where_kernel_impl", 9),
        ("inductor pointwise", 5),
        ("reduce_kernel MeanOps", 5),
    ]
    assert sum(told.values()) == sum(kinds(census).values()) == sum(census.values())


@pytest.mark.parametrize("section", ["generated", "steps"])
def test_no_counted_pass_moves_fewer_bytes_than_the_model_of_the_least(section: str) -> None:
    """Two independent counts: Inductor's scheduler and the arguments of the own kernels, and the
    table of ``fastadv/benchmark/traffic.py``. A megabyte may be rounded away."""
    network = geometry(build_model("preact_resnet18"), (3, 32, 32))
    for name, found in records.read_golden(section).items():
        # The scheduler counts what a cooperative kernel reads twice once.
        if not name.startswith("pgd") or "cooperative" in name:
            continue
        method, _, size, *_ = name.split()
        for each in found.get("passes", []):
            bn = "eval" if "attack_bn=eval" in method and each["pass"] == "ascend" else "train"
            least = int(size) * network.other_bytes(INPUT_GRADIENT, bn, 2) / 1e6
            counted = each["megabytes"] + each.get("own_megabytes", 0)
            assert least - 1 <= counted <= 1.5 * least, (name, each["pass"])
            if "fused_norm=on" in method and bn == "train":
                assert counted <= 1.08 * least, (name, each["pass"])
