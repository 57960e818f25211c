"""Evaluation attacks against closed forms, independently written loops and their properties."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastadv import kernels
from fastadv.errors import UserError
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.attacks.problem import STREAM

GRADIENT_ATTACKS = [
    *("fgsm", "fgsm-rwp", "pgd-5", "pgd-3-3", "cw-5", "cw-margin-5-2"),
    *("pgd-3-3-largest", "pgd-5-unclipped"),
]


def linear_model(classes=2, size=12, seed=0, dtype=torch.float64):
    """A linear classifier of (B,1,3,4) images, and its weight matrix (classes, size)."""
    torch.manual_seed(seed)
    layer = nn.Linear(size, classes, dtype=dtype)
    nn.init.constant_(layer.bias, 50.0)  # CW's floor of 0 must not bind
    return nn.Sequential(nn.Flatten(), layer), layer.weight.detach()


def small_net(dtype=torch.float64, classes=5, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(6 * 36, classes),
    ).to(dtype)
    for norm in (net[1], net[4]):
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.02, 0.1)  # small: a bumpy loss, many local maxima
    return net.eval()


def images(count=6, dtype=torch.float64, classes=5, shape=(2, 6, 6), seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *shape, generator=generator, dtype=torch.float64).to(dtype)
    x[0, 0, 0, 0], x[1, 0, 1, 1] = 0.0, 1.0  # corners of the box
    return x, torch.randint(classes, (count,), generator=generator)


def norms(delta):
    return delta.flatten(1).norm(dim=1)


# Closed forms on a linear model: z_1 - z_0 is linear in x, so the worst point is known.


def test_fgsm_is_the_closed_form():
    model, weight = linear_model()
    x, y = images(classes=2, shape=(1, 3, 4))
    uphill = (weight[1] - weight[0]).sign().view(1, 1, 3, 4) * (1 - 2 * y).view(-1, 1, 1, 1)
    expected = (x + 0.1 * uphill).clamp(0, 1)
    torch.testing.assert_close(attack(model, x, y, "fgsm", eps=0.1), expected)
    # The gradient's sign is the same everywhere, so RWP's variant ends in the same point.
    torch.testing.assert_close(attack(model, x, y, "fgsm-rwp", eps=0.1), expected)


@pytest.mark.parametrize("name", ["pgd-20", "pgd-10-3", "cw-20", "cw-margin-20"])
def test_linf_attacks_reach_the_worst_point_of_a_linear_model(name):
    model, weight = linear_model()
    x, y = images(classes=2, shape=(1, 3, 4))
    if name.startswith("cw-margin"):  # stops at the first mistake, so only right answers count
        y = model(x).argmax(1)
        worst_margin = (model[1].weight[1] - model[1].weight[0]).abs().sum() * 0.001
        assert ((model(x)[:, 1] - model(x)[:, 0]).abs() > 2 * worst_margin).all()
    eps = 0.001 if name.startswith("cw-margin") else 0.1
    uphill = (weight[1] - weight[0]).sign().view(1, 1, 3, 4) * (1 - 2 * y).view(-1, 1, 1, 1)
    found = attack(model, x, y, name, eps=eps, alpha=eps / 4)
    torch.testing.assert_close(found, (x + eps * uphill).clamp(0, 1))


@pytest.mark.parametrize("name", ["pgd-200", "pgd-200-2", "cw-200"])
def test_l2_attacks_reach_the_worst_point_of_a_linear_model(name):
    model, weight = linear_model()
    x, y = images(classes=2, shape=(1, 3, 4))
    x = 0.3 + 0.4 * x  # the ball stays inside the box
    direction = (weight[1] - weight[0]).view(1, 1, 3, 4)
    uphill = direction / direction.norm() * (1 - 2 * y).view(-1, 1, 1, 1)
    found = attack(model, x, y, name, eps=0.25, norm="l2")
    torch.testing.assert_close(found, x + 0.25 * uphill, atol=1e-6, rtol=0)


# Independently written loops on a small network.


def loop_linf(model, x, y, start, loss, eps, alpha, steps, freeze=False):
    x_adv = start
    for _ in range(steps):
        point = x_adv.clone().requires_grad_()
        logits = model(point)
        loss(logits, y).backward()
        moved = torch.max(torch.min(x_adv + alpha * point.grad.sign(), x + eps), x - eps)
        moved = moved.clamp(0, 1)
        if freeze:
            moved[logits.argmax(1) != y] = x_adv[logits.argmax(1) != y]
        x_adv = moved
    return x_adv


def loop_cw(logits, y):
    total = 0.0
    for row, label in zip(logits, y.tolist(), strict=True):
        masked = row * torch.tensor([c != label for c in range(len(row))])
        total = total - torch.relu(row[label] - masked.max() + 10)
    return total / len(y)


def loop_margin(logits, y):
    gaps = [
        row[label] - torch.cat([row[:label], row[label + 1 :]]).max()
        for row, label in zip(logits, y.tolist(), strict=True)
    ]
    return -torch.stack(gaps).mean()


@pytest.mark.parametrize(
    ("name", "loss", "freeze"),
    [
        ("pgd-7", cross_entropy, False),
        ("cw-7", loop_cw, False),
        ("cw-margin-7", loop_margin, True),
    ],
)
def test_attacks_equal_an_independent_loop(name, loss, freeze):
    model = small_net()
    x, y = images(16)
    # Half of the labels right, so that freezing and the floor of CW have something to do.
    y[:8] = model(x)[:8].argmax(1)
    eps, index = 0.2, torch.arange(16) + 40
    start = kernels.linf_start(x, eps, index, 3, 0, stream=STREAM)
    expected = loop_linf(model, x, y, start, loss, eps, 0.03, 7, freeze)
    found = attack(model, x, y, name, eps=eps, alpha=0.03, seed=3, index=index)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, attack(model, x, y, name, eps=eps, alpha=0.03, index=index))


def test_cw_compares_with_zero_if_all_other_logits_are_negative():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1, 1, 0], [0, 0, 0, 1], [-1, 0, 0, 0]]))
        layer.bias.copy_(torch.tensor([3.0, -9, -9]))
    model = nn.Sequential(nn.Flatten(), layer)
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    y = torch.tensor([0])
    options = {"eps": 0.1, "random_start": False, "alpha": 0.1}
    # RWP's floor: only the true logit goes down, the last pixel (which lifts class 1) stays.
    rwp = attack(model, x, y, "cw-1", **options) - x
    torch.testing.assert_close(rwp.flatten(), 0.1 * torch.tensor([-1.0, 1, -1, 0]).double())
    other = attack(model, x, y, "cw-margin-1", **options) - x
    torch.testing.assert_close(other.flatten(), 0.1 * torch.tensor([-1.0, 1, -1, 1]).double())


def test_cw_does_not_move_a_sample_misclassified_by_more_than_ten():
    layer = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0], [1, 1]]))
        layer.bias.copy_(torch.tensor([0.0, 12]))
    model = nn.Sequential(nn.Flatten(), layer)
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    found = attack(model, x, torch.tensor([0]), "cw-3", eps=0.1, random_start=False)
    assert torch.equal(found, x)


def test_the_kl_objective_maximises_the_kl():
    model = small_net()
    x, y = images(8)
    given = 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    natural = model(x).softmax(1).detach()

    def loss(logits, _):
        return (natural * (natural.log() - logits.log_softmax(1))).sum(1).mean()

    start = (x + given).clamp(0, 1)
    expected = loop_linf(model, x, y, start, loss, 0.1, 0.02, 5)
    options = {"eps": 0.1, "alpha": 0.02, "objective": "kl", "start": given}
    torch.testing.assert_close(attack(model, x, y, "pgd-5", **options), expected)
    # Labels play no part in it.
    torch.testing.assert_close(attack(model, x, 0 * y, "pgd-5", **options), expected)
    with pytest.raises(UserError, match="no gradient at the image itself"):
        attack(model, x, y, "pgd-5", objective="kl", random_start=False)


def test_the_usual_steps_are_the_published_ones():
    model = small_net()
    x, y = images()
    for eps, norm, alpha in ((8 / 255, "linf", 2 / 255), (128 / 255, "l2", 15 / 255)):
        usual = attack(model, x, y, "pgd-3", eps=eps, norm=norm)
        torch.testing.assert_close(
            usual, attack(model, x, y, "pgd-3", eps=eps, norm=norm, alpha=alpha)
        )
        assert not torch.allclose(
            usual, attack(model, x, y, "pgd-3", eps=eps, norm=norm, alpha=alpha / 2)
        )
    assert torch.equal(
        attack(model, x, y, eps="8/255", alpha="2/255"), attack(model, x, y, "pgd-10")
    )


# Ball, box, type, layout.


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_attacks_stay_in_the_ball_and_the_box(name, norm, dtype):
    model, (x, y) = small_net(dtype), images(8, dtype)
    eps = 0.3 if norm == "linf" else 1.5
    given = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for start in (None, 10 * given):
        found = attack(model, x, y, name, eps=eps, norm=norm, start=start)
        reach = (found - x).abs().amax() if norm == "linf" else norms(found - x).amax()
        assert reach <= eps * (1 + 4 * torch.finfo(dtype).eps)
        assert reach > eps / 4
        assert found.min() >= 0
        assert found.max() <= 1
        assert (found.dtype, found.shape, found.requires_grad) == (dtype, x.shape, False)


@pytest.mark.parametrize("name", ["fgsm", "pgd-3-2"])
def test_eps_zero_returns_the_images(name):
    model, (x, y) = small_net(), images()
    for norm in ("linf", "l2"):
        torch.testing.assert_close(attack(model, x, y, name, eps=0, norm=norm), x)


def test_l2_does_not_move_without_a_gradient():
    model, _ = linear_model()
    nn.init.zeros_(model[1].weight)
    x, y = images(classes=2, shape=(1, 3, 4))
    assert torch.equal(attack(model, x, y, "fgsm", eps=0.5, norm="l2"), x)
    found = attack(model, x, y, "pgd-5", eps=0.5, norm="l2", start=0.1 * torch.ones_like(x))
    assert found.isfinite().all()
    assert (norms(found - x) <= 0.5).all()


def test_the_layout_of_the_images_is_kept():
    model = small_net(torch.float32).to(memory_format=torch.channels_last)
    x, y = images(dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    for name in ("fgsm", "pgd-3", "pgd-3-2", "noise-0.1"):
        found = attack(model, x, y, name)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_noise_is_gaussian_with_the_given_standard_deviation():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    x, y = torch.full((16, 3, 32, 32), 0.5), torch.zeros(16, dtype=torch.int64)
    noise = attack(model, x, y, "noise-0.05", eps=0.001) - x
    assert abs(noise.mean()) < 1e-3
    assert abs(noise.std() - 0.05) < 1e-3
    loud = attack(model, x, y, "noise-1")
    assert (loud.min(), loud.max()) == (0, 1)
    assert torch.equal(attack(model, x, y, "clean"), x)


# Restarts.


@pytest.mark.parametrize("name", ["pgd-3", "cw-3"])
def test_a_further_restart_never_helps_the_model(name):
    model = small_net()
    x, _ = images(64)
    y = model(x).argmax(1)
    right, heights = [], []
    for restarts in (1, 2, 4, 8):
        found = attack(model, x, y, name, eps=0.07, restarts=restarts)
        logits = model(found).detach()
        right.append(logits.argmax(1) == y)
        heights.append(cross_entropy(logits, y, reduction="none"))
    for fewer, more in pairwise(right):
        assert (more <= fewer).all()
    assert right[-1].sum() < right[0].sum()
    if name == "pgd-3":
        standing = right[-1]
        assert (heights[-1] >= heights[0])[standing].all()
        assert (heights[-1] > heights[0])[standing].any()


def test_restarts_that_skip_misclassified_samples_change_no_result(monkeypatch):
    """On a CPU fooled samples are left out of further restarts; elsewhere all are attacked."""
    from fastadv.engine.model.network import Network

    model = small_net()
    x, _ = images(32)
    y = model(x).argmax(1)
    skipping = attack(model, x, y, "pgd-3-5", eps=0.07)
    monkeypatch.setattr(Network, "syncs_are_free", False)
    torch.testing.assert_close(attack(model, x, y, "pgd-3-5", eps=0.07), skipping)


def test_a_samples_attack_does_not_depend_on_its_batch():
    model = small_net()
    x, y = images(10)
    index = torch.arange(10)
    for name in ("pgd-5", "pgd-3-3", "pgd-3-3-largest", "cw-margin-5", "noise-0.1"):
        for norm in ("linf", "l2"):
            whole = attack(model, x, y, name, eps=0.1, norm=norm)
            parts = [
                attack(model, x[rows], y[rows], name, eps=0.1, norm=norm, index=index[rows])
                for rows in (slice(0, 3), slice(3, 4), slice(4, 10))
            ]
            torch.testing.assert_close(torch.cat(parts), whole)


# The user's model and surroundings.


def test_the_model_is_left_as_it_was_found():
    model = small_net().train()
    model[4].eval()  # a frozen BatchNorm
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    model[7].weight.grad = torch.ones_like(model[7].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    x, y = images()
    x.requires_grad_()
    for name in [*GRADIENT_ATTACKS, "noise-0.1", "clean"]:
        attack(model, x, y, name)
    with pytest.raises(UserError):
        attack(model, x, y + 100, "pgd-2")
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert torch.equal(model[7].weight.grad, torch.ones_like(model[7].weight))
    assert x.grad is None
    assert torch.is_grad_enabled()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_off(context):
    model = small_net()
    x, y = images()
    expected = attack(model, x, y, "pgd-3-2")
    with context():
        found = attack(model, x + 0, y + 0, "pgd-3-2")
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


def test_the_callers_autocast_does_not_reach_the_attack():
    model = small_net(torch.float32)
    x, y = images(dtype=torch.float32)
    expected = attack(model, x, y, "pgd-3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attack(model, x, y, "pgd-3")
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_computes_the_attack_in_low_precision(amp, monkeypatch):
    from fastadv.engine.model import precision

    monkeypatch.setattr(precision, "cpu_multiplies", lambda dtype: True)
    model = small_net(torch.float32)
    seen = set()
    model[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    x, y = images(8, torch.float32)
    y = model(x).argmax(1)
    seen.clear()
    for norm in ("linf", "l2"):
        found = attack(model, x, y, "pgd-5", eps=0.2, norm=norm, amp=amp)
        assert seen == {precision.DTYPES[amp]}
        assert found.dtype == torch.float32
        assert cross_entropy(model(found), y) > cross_entropy(model(x), y)
        # The direction is that of float32 but for rounding.
        exact = attack(model, x, y, "pgd-5", eps=0.2, norm=norm) - x
        cosine = torch.cosine_similarity((found - x).flatten(1), exact.flatten(1), dim=1)
        assert (cosine > 0.8).all()
        seen.clear()


def batch(count=4):
    return torch.rand(count, 2, 6, 6), torch.zeros(count, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, y: (x * 2 - 1, y), r"must lie in \[0, 1\]"),
        (lambda x, y: (x * float("nan"), y), r"must lie in \[0, 1\]"),
        (lambda x, y: ((x * 255).byte(), y), "divide uint8 images by 255"),
        (lambda x, y: (x, y + 5), "Label 5 is out of range: the model has 5 classes"),
        (lambda x, y: (x, y - 1), "Label -1 is out of range"),
        (lambda x, y: (x, y.float()), "integer labels"),
        (lambda x, y: (x, y[:2]), "integer labels"),
        (lambda x, y: (x, y[:, None]), "integer labels"),
        (lambda x, y: (x[:0], y[:0]), "empty batch"),
        (lambda x, y: (x.numpy(), y), "torch tensors"),
    ],
)
def test_bad_batches_are_refused_in_one_sentence(change, sentence):
    with pytest.raises(UserError, match=sentence):
        attack(small_net(torch.float32), *change(*batch()), "pgd-2")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eps": -1}, "eps must be"),
        ({"eps": "much"}, "eps must be a number"),
        ({"norm": "l1"}, "Unknown norm"),
        ({"alpha": "x"}, "alpha must be a number"),
        ({"start": torch.zeros(1)}, "start must have"),
        ({"index": torch.arange(3)}, "one integer per image"),
        ({"amp": "bf61"}, "did you mean 'bf16'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        attack(small_net(torch.float32), *batch(), "pgd-2", **options)


def test_rounding_errors_outside_of_the_box_are_accepted():
    x, y = batch()
    found = attack(small_net(torch.float32), x - 3e-8, y, "pgd-2")
    assert found.min() >= 0


def test_a_model_without_logits_is_refused():
    with pytest.raises(UserError, match="logits of shape"):
        attack(nn.Conv2d(2, 5, 3), *batch(), "pgd-2")


def test_wrapped_models_are_attacked_inside():
    model = small_net()
    x, y = images()
    wrapped = torch.compile(model, backend="eager")
    assert torch.equal(attack(wrapped, x, y, "pgd-2"), attack(model, x, y, "pgd-2"))
    with pytest.raises(UserError, match="DataParallel is not supported"):
        attack(nn.DataParallel(model), x, y, "pgd-2")
