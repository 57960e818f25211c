"""Philox against Python integers and published vectors; what the noise promises."""

import pytest
import torch
from torch import Tensor

from fastadv import kernels
from fastadv.kernels.philox import philox, sample_radius

MASK = 2**32 - 1


def by_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's unlimited integers."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def words(counter: list[int], seed: int) -> list[int]:
    found = philox([torch.tensor([c]) for c in counter], seed)
    return [int(word) for word in found]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # from the known-answer file of the authors' Random123
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert by_integers(counter, key) == expected
    assert words(counter, key[1] << 32 | key[0]) == expected
    signed = torch.tensor((key[1] << 32 | key[0]) - (2**64 if key[1] >> 31 else 0))
    assert [int(w) for w in philox([torch.tensor([c]) for c in counter], signed)] == expected


def test_the_counter_of_each_element() -> None:
    seed, offset, stream, row = 2**40 + 11, 2**33 + 5, 3, 2**31 + 9
    noise = kernels.noise_uniform(torch.tensor([row]), (3, 5), seed, offset, stream).flatten()
    for element in range(15):
        counter = [element // 4, row, offset & MASK, stream << 24 | offset >> 32]
        word = by_integers(counter, [seed & MASK, seed >> 32])[element % 4]
        assert noise[element].item() == (word >> 8) * 2.0**-23 - 1


def test_a_sample_draws_the_same_in_any_batch() -> None:
    rows = torch.tensor([4, 9, 2, 7])
    together = kernels.noise_normal(rows, (3, 5, 6), 1, 2)
    alone = torch.cat([kernels.noise_normal(r[None], (3, 5, 6), 1, 2) for r in rows])
    assert torch.equal(together, alone)
    flat = kernels.noise_normal(rows, (90,), 1, torch.tensor(2))
    assert torch.equal(together.flatten(1), flat)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_start_does_not_depend_on_the_layout(channels_last: bool) -> None:
    x, rows = torch.rand(2, 3, 5, 6), torch.arange(2)
    laid_out = x.to(memory_format=torch.channels_last) if channels_last else x
    for start in (kernels.linf_start, kernels.l2_start):
        assert torch.equal(start(laid_out, 0.1, rows, 1, 2), start(x, 0.1, rows, 1, 2))


def draws() -> dict[str, Tensor]:
    rows = torch.arange(3)
    return {
        "first": kernels.noise_uniform(rows, (50,), 1, 0),
        "seed": kernels.noise_uniform(rows, (50,), 2, 0),
        "high seed": kernels.noise_uniform(rows, (50,), 1 + 2**32, 0),
        "offset": kernels.noise_uniform(rows, (50,), 1, 1),
        "high offset": kernels.noise_uniform(rows, (50,), 1, 2**32),
        "stream": kernels.noise_uniform(rows, (50,), 1, 0, 1),
        "rows": kernels.noise_uniform(rows + 3, (50,), 1, 0),
    }


def test_every_part_of_the_key_matters() -> None:
    seen = draws()
    values = torch.cat([d.flatten() for d in seen.values()])
    assert values.unique().numel() >= values.numel() - 1
    assert all(torch.equal(seen[name], again) for name, again in draws().items())


def test_the_distributions() -> None:
    rows = torch.arange(200)
    uniform = kernels.noise_uniform(rows, (1000,), 5, 6)
    assert -1 <= uniform.min() < -0.9999
    assert 0.9999 < uniform.max() < 1
    assert abs(uniform.mean().item()) < 0.006
    assert abs(uniform.square().mean().item() - 1 / 3) < 0.004
    normal = kernels.noise_normal(rows, (1000,), 5, 6)
    assert abs(normal.mean().item()) < 0.01
    assert abs(normal.var().item() - 1) < 0.015
    assert abs((normal.abs() < 1).double().mean().item() - 0.6827) < 0.005
    pairs = normal.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean().item()) < 0.01
    radius = sample_radius(torch.arange(20000), 5, 6)
    assert abs(radius.mean().item() - 0.5) < 0.01
    assert radius.min() >= 0
    assert radius.max() < 1


def test_dtypes_and_errors() -> None:
    rows = torch.arange(2)
    single = kernels.noise_normal(rows, (5,), 1, 2)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(kernels.noise_normal(rows, (5,), 1, 2, dtype=dtype), single.to(dtype))
    with pytest.raises(ValueError, match="stream"):
        kernels.noise_uniform(rows, (5,), 1, 2, 256)
