"""A call of every operator in ``fastadv.kernels``, small to check it and large to time it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Shapes of a call: images (B,C,H,W) out of ``stored`` rows, logits (B,K), the activations of
    one BatchNorm, and the weights of a network."""

    images: tuple[int, int, int, int]
    stored: int
    logits: tuple[int, int]
    norm: tuple[int, int, int, int]
    weights: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return "x".join(map(str, self.images))


SMALL = Sizes((3, 3, 9, 8), 6, (6, 5), (3, 5, 9, 8), ((4, 3, 3, 3), (7,), (5, 2)))
LARGE = Sizes(
    *((128, 3, 32, 32), 512, (128, 10), (128, 64, 32, 32)),
    ((64, 3, 3, 3), *[(64, 64, 3, 3)] * 4, *[(128, 128, 3, 3)] * 3, (512, 512, 3, 3), (10, 512)),
)


def kernel_calls(sizes: Sizes = SMALL) -> Mapping[str, Callable[[], Arguments]]:
    """For each operator a function that makes the arguments of a call, on the CPU, the same each
    time. An operator that changes its arguments gets fresh ones."""
    count, channels, height, width = sizes.images

    def draw(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def images(seed: int) -> Tensor:
        return draw(sizes.images, seed).sigmoid()

    def logits(seed: int) -> Tensor:
        return draw(sizes.logits, seed)

    def layers(seed: int) -> list[Tensor]:
        return [draw(shape, seed + place) for place, shape in enumerate(sizes.weights)]

    def activations(seed: int) -> Tensor:
        return draw(sizes.norm, seed).to(memory_format=torch.channels_last)

    def store(dtype: torch.dtype = torch.float32) -> Tensor:
        pixels = draw((sizes.stored, channels, height, width), 3).sigmoid()
        return (255 * pixels).round().to(dtype) if dtype == torch.uint8 else pixels

    def view() -> tuple[Tensor, ...]:
        """Rows of the store in another order, moved and flipped."""
        place = torch.arange(count)
        rows = (place * 5 + 3) % sizes.stored
        return rows, place % 5 - 2, 3 - place % 7, place % 2 == 0

    def scales(seed: int) -> Tensor:
        return draw((sizes.norm[1],), seed).exp()

    index = torch.arange(count) * 7 + 3
    radii = 0.1 + 0.2 * torch.arange(count) / count
    alpha = torch.tensor(0.1)
    step = (images(0), images(1) - 0.5, images(2), alpha, radii)
    classes = sizes.logits[1]
    labels = torch.arange(sizes.logits[0]) % classes
    most = sizes.logits[0] * classes // 4
    norm = (scales(4), scales(5), 1e-5, scales(6), scales(7) - 1)

    def flag(value: bool) -> Tensor:
        return torch.tensor(value)

    return {
        "noise_uniform": lambda: (index, sizes.images[1:], 2**64 - 3, torch.tensor(2**40)),
        "noise_normal": lambda: (index, sizes.images[1:], torch.tensor(5), 9, 1),
        "linf_start": lambda: (images(0), 0.1, index, 2**63, 4),
        "l2_start": lambda: (images(0), radii, index, 1, torch.tensor(4)),
        "linf_step": lambda: step,
        "l2_step": lambda: step,
        "linf_project": lambda: (images(0), images(1), radii),
        "l2_project": lambda: (images(0), images(1), 0.1),
        "perturb_weights": lambda: (layers(0), layers(20), 0.001, "tensor"),
        "restore_weights": lambda: (layers(0), layers(20), layers(40)),
        "top_n_sum": lambda: (logits(0), logits(1), most),
        "crop_flip": lambda: (store(torch.uint8), *view(), (height - 2, width - 2)),
        "crop_flip_add": lambda: (store(), *view(), images(0), alpha, radii),
        "crop_flip_write": lambda: (store(), *view(), images(0), flag(True)),
        "crop_flip_ascend": lambda: (store(), *view(), images(0) - 0.5, alpha),
        "trades_kl": lambda: (logits(0), logits(1)),
        "masked_ce": lambda: (logits(0), labels, alpha + 1),
        "pad_channels": lambda: (images(0), 8, torch.bfloat16),
        "block_signs": lambda: (layers(0),),
        "block_noise": lambda: (layers(0), draw((len(sizes.weights),), 9)),
        "block_step_gradients": lambda: (layers(0), layers(20)),
        "not_finite": lambda: (layers(0), layers(20)),
        "put_back_unless": lambda: (layers(0), layers(20), flag(False)),
        "record_fault": lambda: (
            *(torch.tensor(-1), torch.tensor(0), torch.tensor(7)),
            *([None, flag(True), alpha.clone()], [True, True, False]),
        ),
        "look_at_batch": lambda: (
            *(images(0), index % classes, None, (0.2, 0.8), 1e-5, classes, 2, 9),
            [flag(False) for _ in range(3)],
        ),
        "unmoved_images": lambda: (images(0), images(0), images(1), 0.1),
        "norm_statistics": lambda: (
            *(activations(0), activations(1), scales(2), scales(3), 0.1, 1e-5),
        ),
        "norm_apply": lambda: (activations(0), *norm, activations(1), True),
        "norm_gradients": lambda: (
            *(activations(1), activations(0), activations(2), *norm),
            *(True, True, activations(3), True, True),
        ),
    }


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(moved(each, device) for each in value)
    return value
