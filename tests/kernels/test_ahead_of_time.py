"""Every kernel compiled for sm_80, sm_90 and sm_100 without a GPU, and its code inspected."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastadv.kernels.dispatch import OPERATORS, TRITON_INSTALLED, triton_function

if not TRITON_INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

from aot import Launch, compiled, recorded, registers, triton_compiled
from oracle import PARTS

# The operators, and the parts of those that are differentiated.
FUNCTIONS = {name: operator.triton for name, operator in OPERATORS.items()}
FUNCTIONS |= {name: triton_function(module, name) for name, (_, module) in PARTS.items()}

TARGETS = (80, 90, 100)


@dataclass(frozen=True)
class Layout:
    """Sizes and pointers of one compilation: all divisible by 16, or none."""

    even: bool

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = 1
        for side in shape:
            size *= side
        storage = torch.zeros(size + 1, dtype=dtype)
        start = 0 if self.even else 1
        return storage[start : start + size].view(shape)

    def images(self) -> Tensor:
        return self.tensor(*((4, 3, 32, 32) if self.even else (3, 3, 33, 31)))

    def medium(self) -> Tensor:
        """The most that one program of the L2 step holds, about."""
        return self.tensor(*((2, 4, 64, 64) if self.even else (2, 3, 53, 51)))

    def large(self) -> Tensor:
        return self.tensor(*((2, 3, 224, 224) if self.even else (2, 3, 223, 225)))

    def logits(self) -> Tensor:
        return self.tensor(*((128, 16) if self.even else (127, 10)))

    def many_logits(self) -> Tensor:
        return self.tensor(*((512, 1024) if self.even else (511, 1000)))

    def layers(self) -> list[Tensor]:
        shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (16, 512)]
        return [self.tensor(*s) if self.even else self.tensor(*s, 1)[:-1] for s in shapes]

    @property
    def channels(self) -> int:
        return 64 if self.even else 25

    def activations(self, dtype: torch.dtype) -> Tensor:
        """In channels_last."""
        places = (64, 32, 32) if self.even else (3, 9, 7)
        return self.tensor(*places, self.channels, dtype=dtype).permute(0, 3, 1, 2)

    def integers(self, count: int) -> Tensor:
        return self.tensor(count, dtype=torch.int64)

    def view(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*(self.integers(count) for _ in range(3)), self.tensor(count, dtype=torch.bool))


SEED, OFFSET = 7, 2**40
Call = Callable[[Layout], object]


def step(name: str, dtype: torch.dtype = torch.float32) -> Call:
    def call(layout: Layout) -> object:
        kind = name.removeprefix("l2_step_")
        made = {"medium": layout.medium, "large": layout.large}.get(kind, layout.images)
        x = made().to(dtype)
        if not layout.even:
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        alpha = layout.tensor(1).view(())
        return FUNCTIONS[name.removesuffix(f"_{kind}")](x, x, x, alpha, 0.03)

    return call


def project(name: str) -> Call:
    def call(layout: Layout) -> object:
        for x in (layout.images(), layout.medium(), layout.large()):
            FUNCTIONS[name](x, x, 0.03)
        return x

    return call


def drawn(name: str) -> Call:
    def call(layout: Layout) -> object:
        return FUNCTIONS[name](layout.integers(4), (3, 32, 32), SEED, OFFSET, 1)

    return call


def reflected(layout: Layout) -> object:
    store = layout.tensor(5, 3, 40, 40, dtype=torch.uint8)
    return FUNCTIONS["crop_flip"](store, *layout.view(4), (32, 32), padding="reflect")


def start(name: str) -> Call:
    def call(layout: Layout) -> object:
        x = layout.images()
        return FUNCTIONS[name](x, 0.03, layout.integers(x.shape[0]), SEED, OFFSET)

    return call


def crop(dtype: torch.dtype) -> Call:
    def call(layout: Layout) -> object:
        store = layout.tensor(5, 3, 40, 40, dtype=dtype)
        size = (32, 32) if layout.even else (31, 33)
        return FUNCTIONS["crop_flip"](store, *layout.view(4), size, torch.float16)

    return call


def loaded(layout: Layout) -> object:
    """A loader's images: uint8 to channels_last."""
    store = layout.tensor(5, 3, 40, 40, dtype=torch.uint8)
    size = (32, 32) if layout.even else (31, 33)
    return FUNCTIONS["crop_flip"](store, *layout.view(4), size, channels_last=True)


def omega(name: str, channels_last: bool = False) -> Call:
    def call(layout: Layout) -> object:
        store, x = layout.tensor(5, 3, 40, 40), layout.images()
        if channels_last:
            pixels = layout.tensor(x.shape[0], *x.shape[2:], x.shape[1])
            x = pixels.permute(0, 3, 1, 2)
        rest = {"crop_flip_add": (0.3, 0.1), "crop_flip_ascend": (0.3,), "crop_flip_write": ()}
        return FUNCTIONS[name](store, *layout.view(x.shape[0]), x, *rest[name])

    return call


def losses(layout: Layout) -> object:
    z, y = layout.logits(), layout.integers(layout.logits().shape[0])
    grad, kept = layout.tensor(z.shape[0]), layout.tensor(z.shape[0], dtype=torch.int8)
    FUNCTIONS["trades_kl_forward"](z, z)
    FUNCTIONS["trades_kl_backward"](grad, z, z, True, True)
    FUNCTIONS["masked_ce_forward"](z, y, 1.7)
    return FUNCTIONS["masked_ce_backward"](grad[0], z, y, kept)


def wide_losses(layout: Layout) -> object:
    z, y = layout.many_logits(), layout.integers(layout.many_logits().shape[0])
    FUNCTIONS["trades_kl_backward"](layout.tensor(z.shape[0]), z, z, False, True)
    return FUNCTIONS["masked_ce_forward"](z, y, 1.7)


def top_n(layout: Layout) -> object:
    FUNCTIONS["top_n_forward"](layout.logits(), layout.logits(), 100, True)
    return FUNCTIONS["top_n_forward"](layout.many_logits(), layout.many_logits(), 1000, True)


def weights(layout: Layout) -> object:
    w = layout.layers()
    FUNCTIONS["perturb_weights"](w, layout.layers(), 0.01, "tensor")
    FUNCTIONS["perturb_weights"](w, layout.layers(), 0.01, "global")
    return FUNCTIONS["restore_weights"](w, layout.layers(), layout.layers())


def block_noise(layout: Layout) -> object:
    blocks = layout.layers()
    FUNCTIONS["block_signs"](blocks)
    FUNCTIONS["block_noise"](blocks, layout.tensor(3))
    return FUNCTIONS["block_step_gradients"](blocks, layout.layers())


def lists(*dtypes: torch.dtype) -> Call:
    """All operators on lists, with one tensor per dtype in each list."""

    def call(layout: Layout) -> object:
        def listed() -> list[Tensor]:
            shapes = [(4, 3, 32, 32), (64, 3, 3, 3), (16, 512)]
            return [layout.tensor(*s, dtype=d) for s, d in zip(shapes, dtypes, strict=False)]

        FUNCTIONS["block_signs"](listed())
        FUNCTIONS["block_noise"](listed(), layout.tensor(len(dtypes)))
        FUNCTIONS["block_step_gradients"](listed(), listed())
        FUNCTIONS["perturb_weights"](listed(), listed(), 0.01)
        return FUNCTIONS["restore_weights"](listed(), listed(), listed())

    return call


# Under autocast: float32 images first, then blocks of bfloat16.
mixed_lists = lists(torch.float32, torch.bfloat16, torch.bfloat16)


def padded(layout: Layout) -> object:
    """float32 images, in both layouts, to eight channels of bfloat16; to a number between powers of
    two."""
    x, pad = layout.images(), FUNCTIONS["pad_channels_forward"]
    pixels = layout.tensor(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    pad(pixels, 24, torch.float16)
    pad(pixels, 8, torch.bfloat16)
    return pad(x, 8, torch.bfloat16)


def flag(value: bool = True) -> Tensor:
    return torch.tensor(value)


def guard(layout: Layout) -> object:
    w, counter = layout.layers(), torch.tensor(0)
    FUNCTIONS["not_finite"](w)
    FUNCTIONS["not_finite"](w, layout.layers())
    FUNCTIONS["put_back_unless"](w, layout.layers(), flag())
    FUNCTIONS["put_back_unless"]([layout.integers(16)], [layout.integers(16)], flag())
    signs = [flag(), None, layout.tensor(1).view(()), None, flag()]
    FUNCTIONS["record_fault"](counter, counter, counter, signs, [True] * 5)
    return FUNCTIONS["record_fault"](counter, counter, counter, signs, [False] * 5, flag())


def batch(dtype: torch.dtype) -> Call:
    def call(layout: Layout) -> object:
        x = layout.images().to(dtype)
        y, flags = layout.integers(x.shape[0]), [flag(), flag(), flag()]
        box = (0.0, 1.0), 1e-5, 10, 0
        FUNCTIONS["unmoved_images"](x, x, x, layout.tensor(x.shape[0]))
        FUNCTIONS["unmoved_images"](x, x, x, 0.03)
        FUNCTIONS["look_at_batch"](x, None, None, *box, 2**62, flags)
        return FUNCTIONS["look_at_batch"](x, y, y, *box, 50000, flags)

    return call


def rows(layout: Layout) -> object:
    """A radius and a step for each sample."""
    x, large = layout.images(), layout.large()
    each, index = layout.tensor(x.shape[0]), layout.integers(x.shape[0])
    for norm in ("linf", "l2"):
        FUNCTIONS[f"{norm}_start"](x, each, index, SEED, OFFSET)
        FUNCTIONS[f"{norm}_step"](x, x, x, each, each)
        FUNCTIONS[f"{norm}_project"](x, x, each)
    FUNCTIONS["l2_step"](large, large, large, *(layout.tensor(large.shape[0]) for _ in range(2)))
    store = layout.tensor(5, 3, 40, 40)
    return FUNCTIONS["crop_flip_add"](store, *layout.view(x.shape[0]), x, 0.3, each)


def norm(dtype: torch.dtype, residuals: bool, parameters: torch.dtype = torch.float32) -> Call:
    """BatchNorm in training mode, with both residuals or none."""

    def call(layout: Layout) -> object:
        x = layout.activations(dtype)
        other = layout.activations(dtype) if residuals else None
        mean, rate = (layout.tensor(layout.channels) for _ in range(2))
        affine = [layout.tensor(layout.channels, dtype=parameters) for _ in range(2)]
        FUNCTIONS["norm_statistics"](x, other, *affine, 0.1, 1e-5)
        FUNCTIONS["norm_apply"](x, mean, rate, None, *affine, other, True)
        return FUNCTIONS["norm_gradients"](
            x, x, other, mean, rate, None, *affine, True, True, other, residuals, True
        )

    return call


def norm_of_two_readers(layout: Layout) -> object:
    """Both parts of the gradient for a result that two others read, as a projected block does."""
    x, numbers = layout.activations(torch.bfloat16), layout.tensor(layout.channels)
    scales = (numbers, numbers, None, numbers, numbers)
    for y in (None, x):
        rest = (x, y, *scales, True, True, None, y is not None, True)
        FUNCTIONS["norm_gradients"](x, *rest, more=x)
    return FUNCTIONS["norm_gradients"](x, x, None, *scales, True, False, None, False, False, more=x)


def norm_of_evaluation(layout: Layout) -> object:
    """BatchNorm by its buffers, in an attack: no gradient of weight and bias."""
    x, numbers = layout.activations(torch.bfloat16), layout.tensor(layout.channels)
    scales = (numbers, numbers, 1e-5, numbers, numbers)
    FUNCTIONS["norm_apply"](x, *scales, None, True)
    for y in (None, x):
        FUNCTIONS["norm_gradients"](x, x, y, *scales, True, False, None, y is not None, False)
    return FUNCTIONS["norm_gradients"](x, x, None, *scales, False, False, None, False, True)


CALLS: dict[str, Call] = {
    "norm": norm(torch.float32, residuals=False),
    "norm_bf16": norm(torch.bfloat16, residuals=False),
    "norm_residuals": norm(torch.float32, residuals=True),
    "norm_residuals_bf16": norm(torch.bfloat16, residuals=True),
    "norm_fp16_parameters": norm(torch.float16, True, parameters=torch.float16),
    "norm_of_two_readers": norm_of_two_readers,
    "norm_of_evaluation": norm_of_evaluation,
    "rows": rows,
    "linf_step": step("linf_step"),
    "linf_step_fp16": step("linf_step", torch.float16),
    "linf_step_bf16": step("linf_step", torch.bfloat16),
    "linf_project": project("linf_project"),
    "linf_start": start("linf_start"),
    "l2_start": start("l2_start"),
    "l2_step": step("l2_step"),
    "l2_step_medium": step("l2_step_medium"),
    "l2_step_medium_bf16": step("l2_step_medium", torch.bfloat16),
    "l2_step_large": step("l2_step_large"),
    "l2_project": project("l2_project"),
    "noise_normal": drawn("noise_normal"),
    "noise_uniform": drawn("noise_uniform"),
    "crop_flip_uint8": crop(torch.uint8),
    "crop_flip_float": crop(torch.float32),
    "crop_flip_reflect": reflected,
    "crop_flip_channels_last": loaded,
    "crop_flip_add": omega("crop_flip_add"),
    "crop_flip_add_channels_last": omega("crop_flip_add", channels_last=True),
    "crop_flip_ascend": omega("crop_flip_ascend"),
    "crop_flip_ascend_channels_last": omega("crop_flip_ascend", channels_last=True),
    "crop_flip_write": omega("crop_flip_write"),
    "pad_channels": padded,
    "losses": losses,
    "wide_losses": wide_losses,
    "top_n": top_n,
    "weights": weights,
    "block_noise": block_noise,
    "mixed_lists": mixed_lists,
    "guard": guard,
    "batch": batch(torch.float32),
    "batch_fp16": batch(torch.float16),
}

# Where consecutive threads touch consecutive memory, 16 bytes go in one instruction:
# kernel -> (wide loads, wide stores). A store of a narrower type than the compute type is
# wide only if each thread holds enough of it, a gather by index never is.
WIDE = {
    "_linf_kernel": (True, True),
    "_linf_start_kernel": (True, True),
    "_noise_kernel": (False, True),
    "_l2_kernel": (True, True),
    "_crop_kernel": (False, True),
    "_crop_add_kernel": (True, True),
    "_pad_kernel": (False, True),
    "_write_kernel": (True, False),
    "_kl_forward_kernel": (True, False),
    "_kl_backward_kernel": (True, True),
    "_ce_forward_kernel": (True, False),
    "_ce_backward_kernel": (True, True),
    "_squares_kernel": (True, False),
    "_perturb_kernel": (True, True),
    "_restore_kernel": (True, True),
    "_scale_kernel": (True, True),
    "_dot_kernel": (True, False),
    "_histogram_kernel": (True, False),
    "_partial_kernel": (True, False),
    "_finish_kernel": (True, False),
    "_not_finite_kernel": (True, False),
    "_put_back_kernel": (True, True),
    "_look_kernel": (True, True),
    "_unmoved_kernel": (True, False),
}


# Called by autograd functions that call a forward and a backward function listed here.
DIFFERENTIABLE = {"masked_ce", "pad_channels", "trades_kl", "top_n_sum"}


def test_every_function_is_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def noting(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **options: object) -> object:
            called.add(name)
            return function(*args, **options)

        return noted

    for name, function in list(FUNCTIONS.items()):
        monkeypatch.setitem(FUNCTIONS, name, noting(name, function))
    with recorded():
        for call in CALLS.values():
            call(Layout(even=True))
    assert called | DIFFERENTIABLE == set(FUNCTIONS)


def launches(name: str, even: bool) -> list[Launch]:
    with recorded() as found:
        CALLS[name](Layout(even))
    assert found
    return found


def sizes_of_one() -> None:
    """Triton turns an argument that is 1 into a constant, which is another program."""
    image, z, one = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), torch.zeros(1)
    row = torch.zeros(1, dtype=torch.int64)
    view = (row, row, row, row != 0)
    for name in ("linf_start", "l2_start"):
        FUNCTIONS[name](image, 0.1, row, 1, 1, 0.0, 1.0, 1)
    for name in ("linf_step", "l2_step"):
        FUNCTIONS[name](image, image, image, 0.1, 0.1)
    for name in ("linf_project", "l2_project"):
        FUNCTIONS[name](image, image, 0.1)
    FUNCTIONS["l2_step"](torch.zeros(1, 33000), torch.zeros(1, 33000), torch.zeros(1, 33000), 1, 1)
    for norm in ("linf", "l2"):
        FUNCTIONS[f"{norm}_start"](image, one, row, 1, 1)
        FUNCTIONS[f"{norm}_step"](image, image, image, one, one)
        FUNCTIONS[f"{norm}_project"](image, image, one)
    FUNCTIONS["noise_normal"](row, (1,), row[0], row[0], 1)
    FUNCTIONS["pad_channels_forward"](image, 1, torch.bfloat16)
    FUNCTIONS["crop_flip"](image, *view, (1, 1), padding="reflect")
    FUNCTIONS["crop_flip_add"](image, *view, image, 1, 1.0)
    FUNCTIONS["crop_flip_ascend"](image, *view, image, 1, ok=row[0] == 0)
    pair = torch.zeros(2, 1, 1, 1)
    FUNCTIONS["norm_statistics"](pair, pair, one, one, 0.1, 1e-5)
    for total in (image, pair):
        FUNCTIONS["norm_apply"](total, one, one, 1.0, one, one, total, True)
        FUNCTIONS["norm_gradients"](
            total, total, total, one, one, None, one, one, True, True, total, True, True
        )
    FUNCTIONS["top_n_forward"](z, z, 1, True)
    FUNCTIONS["top_n_forward"](torch.zeros(1, 8193), torch.zeros(1, 8193), 1, False)
    FUNCTIONS["trades_kl_forward"](z, z)
    FUNCTIONS["trades_kl_backward"](one, z, z, True, True)
    FUNCTIONS["masked_ce_forward"](z, row, 1.0)
    FUNCTIONS["masked_ce_backward"](one[0], z, row, row.to(torch.int8))
    FUNCTIONS["perturb_weights"]([one], [one.clone()], 0.1)
    FUNCTIONS["block_step_gradients"]([one], [one])
    FUNCTIONS["not_finite"]([one], [one])
    FUNCTIONS["put_back_unless"]([one], [one], row[0] == 0)
    FUNCTIONS["unmoved_images"](image, image, image, one)
    FUNCTIONS["record_fault"](row[0], row[0], row[0], [None], [True])
    FUNCTIONS["look_at_batch"](image, row, row, (0.0, 1.0), 1.0, 1, 1, 1, [row[0] == 0] * 3)


def test_sizes_of_one_compile() -> None:
    with recorded() as found:
        sizes_of_one()
    failures = []
    for launch in found:
        try:
            triton_compiled(launch, 90)
        except Exception as error:
            failures.append(f"{launch.name}: {error}")
    assert not failures, "\n".join(failures)


def inspect(name: str, even: bool, capability: int) -> None:
    for launch in launches(name, even):
        machine = compiled(launch, capability)
        told = f"{launch.name} sm_{capability} {'even' if even else 'odd'}"
        print(f"{told}: {machine.registers} registers, {machine.shared} bytes shared")
        assert (machine.local, machine.stack) == (0, 0), f"{told} spills"
        assert machine.count(r"\b(STL|LDL)\b") == 0, f"{told} uses local memory"
        assert machine.count(r"\b(DADD|DMUL|DFMA|DSETP|F2F\.F64\S*)") == 0, f"{told} uses float64"
        assert ".f64" not in machine.ptx, f"{told} uses float64"
        if even and launch.name in WIDE:
            loads, stores = WIDE[launch.name]
            stores = stores and launch.options.get("WALK", 2) == 2  # the others write one sum
            assert not loads or machine.count(r"\bLDG\.E\S*\.128"), f"{told}: no 128-bit load"
            assert not stores or machine.count(r"\bSTG\.E\S*\.128"), f"{told}: no 128-bit store"


def test_a_crop_is_not_bound_by_instructions() -> None:
    """At 5 bytes per element 35 instructions take an H100 about as long as its memory does."""
    for name in ("crop_flip_channels_last", "crop_flip_float"):
        (launch,) = launches(name, True)
        threads = math.prod(launch.grid) * 4 * 32  # Triton's default is four warps
        elements = 4 * 3 * 32 * 32
        assert compiled(launch, 90).instructions * threads <= 35 * elements, name


def test_pixels_of_the_store_are_accessed_one_by_one() -> None:
    """Two neighbours in a mirrored window are not neighbours in the store."""
    for name, access in {
        "crop_flip_channels_last": r"\bLDG\.E\.U8 ",
        "crop_flip_float": r"\bLDG\.E ",
        "crop_flip_ascend": r"\bSTG\.E ",
        "crop_flip_ascend_channels_last": r"\bSTG\.E ",
    }.items():
        (launch,) = launches(name, True)
        per_thread = 4 * 3 * 32 * 32 // (math.prod(launch.grid) * 4 * 32)
        assert compiled(launch, 90).count(access) >= per_thread, name


def wide_accesses(call: Call) -> dict[int, tuple[str, int, int]]:
    """Launch number -> (kernel, 128-bit loads, 128-bit stores), where WIDE promises some."""
    with recorded() as found:
        call(Layout(even=True))
    counts = {}
    for number, launch in enumerate(found):
        if launch.name in WIDE:
            machine = compiled(launch, 90)
            loads, stores = (machine.count(rf"\b{op}\.E\S*\.128") for op in ("LDG", "STG"))
            counts[number] = (launch.name, loads, stores)
    return counts


@pytest.mark.slow
def test_each_kind_of_a_mixed_list_has_wide_accesses() -> None:
    """A list of two dtypes has the 128-bit accesses of both, not only those of one."""
    alone = [wide_accesses(lists(kind)) for kind in (torch.float32, torch.bfloat16)]
    for number, (name, *found) in wide_accesses(mixed_lists).items():
        expected = [counts[number] for counts in alone]
        assert [other for other, *_ in expected] == [name, name]
        for promised, both, *each in zip(
            WIDE[name], found, *(e[1:] for e in expected), strict=True
        ):
            assert not promised or (min(each) > 0 and both >= sum(each)), (name, both, each)


# Other types or forms of kernels that are compiled anyway; all are in the slow tier.
ALIKE = {"norm", "norm_bf16", "norm_residuals", "norm_fp16_parameters", "norm_of_two_readers"}
ALIKE |= {"norm_of_evaluation", "rows", "linf_step_fp16", "linf_step_bf16", "linf_project"}
ALIKE |= {"l2_step_medium", "l2_step_medium_bf16", "l2_project", "noise_uniform", "batch"}
ALIKE |= {"crop_flip_reflect", "crop_flip_add_channels_last", "weights", "block_noise"}


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ALIKE])
def test_code_for_sm_90(name: str) -> None:
    inspect(name, True, 90)


@pytest.mark.parametrize("name", ["linf_step", "crop_flip_uint8", "losses"])
def test_code_without_alignment(name: str) -> None:
    inspect(name, False, 90)


@pytest.mark.parametrize("capability", [t for t in TARGETS if t != 90])
def test_one_kernel_for_each_target(capability: int) -> None:
    inspect("linf_step", True, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("even", [True, False], ids=["even", "odd"])
@pytest.mark.parametrize("name", CALLS)
def test_code_for_all_targets(name: str, even: bool, capability: int) -> None:
    inspect(name, even, capability)


def launch_names(function: str, *args: object) -> list[str]:
    with recorded() as found:
        FUNCTIONS[function](*args)
    return [launch.name for launch in found]


@pytest.mark.parametrize("count", [1, 21, 60])
def test_number_of_launches_does_not_depend_on_the_layers(count: int) -> None:
    tensors = [torch.ones(7, 5) for _ in range(count)]
    tensors[0] = tensors[0].to(torch.bfloat16)
    assert len(launch_names("perturb_weights", tensors, tensors, 0.1, "global")) == 3
    assert len(launch_names("restore_weights", tensors, tensors, tensors)) == 1
    assert len(launch_names("block_signs", tensors)) == 1
    assert len(launch_names("block_noise", tensors, torch.ones(count))) == 1
    assert len(launch_names("block_step_gradients", tensors, tensors)) == 2


def test_losses_take_one_forward_and_one_backward_launch() -> None:
    z, y = torch.ones(128, 10), torch.zeros(128, dtype=torch.int64)
    assert len(launch_names("masked_ce_forward", z, y, 1.7)) == 1
    assert len(launch_names("trades_kl_forward", z, z)) == 1
    assert len(launch_names("linf_step", z, z, z, 0.1, 0.1)) == 1


def test_only_large_samples_take_several_launches_of_the_l2_step() -> None:
    for size, count in ((3072, 1), (8191, 1), (8193, 3), (12288, 1), (16384, 1), (16400, 3)):
        x = torch.ones(2, size)
        assert len(launch_names("l2_step", x, x, x, 0.1, 0.1)) == count


def test_images_are_cast_and_padded_in_one_launch() -> None:
    images = torch.ones(4, 3, 8, 8)
    assert len(launch_names("pad_channels_forward", images, 8, torch.bfloat16)) == 1


def test_batch_norm_takes_two_launches_forward_and_two_backward() -> None:
    x = torch.ones(4, 8, 6, 6).to(memory_format=torch.channels_last)
    numbers = torch.ones(8)
    scales = (numbers, numbers, None, numbers, numbers)
    assert launch_names("norm_statistics", x, x, numbers, numbers, 0.1, 1e-5) == [
        "_statistics_kernel"
    ]
    assert launch_names("norm_apply", x, *scales, x, True) == ["_apply_kernel"]
    both = ["_reduce_kernel", "_input_gradient_kernel"]
    for training, affine, expected in (
        *((True, True, both), (True, False, both), (False, True, both)),
        (False, False, both[1:]),
    ):
        rest = (*scales, True, training, x, True, affine)
        assert launch_names("norm_gradients", x, x, x, *rest) == expected


@pytest.mark.parametrize("name", ["norm", "norm_bf16", "norm_residuals", "norm_residuals_bf16"])
def test_two_programs_of_a_sum_fit_into_one_multiprocessor(name: str) -> None:
    """They are 256, and an H100 has 132 multiprocessors of 65,536 registers."""
    for launch in launches(name, even=True):
        if "PADDED" in launch.options:
            assert launch.grid == (256,)
            threads = 32 * launch.options["num_warps"]
            assert registers(launch, 90) * threads <= 65536 // 2, launch.name
