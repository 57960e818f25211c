"""BatchNorms with running statistics fold into convolutions whose output nothing else reads."""

import pytest
import torch
from tiny import CLASSES, assert_same, climb, descend, sgd, tiny_batch, tiny_step
from torch import nn
from torch.nn import functional

import fastadv
from fastadv.engine.model.bn_fold_search import seen_folds
from fastadv.engine.model.weight_copies import WeightCopies

ALPHA = 0.04


def randomized(model, seed=0):
    """A network with statistics and affine maps that reveal a wrong fold, in float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def network(name="resnet18"):
    torch.manual_seed(1)
    return randomized(fastadv.build_model(name, width=4, num_classes=CLASSES))


def images(size=32):
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(3)).double()


def found(model, x=None):
    return seen_folds(model, model, images() if x is None else x)[1]


@pytest.mark.parametrize(
    ("name", "count"),
    # Every norm after a convolution; in pre-activation networks the second of each block.
    [("resnet18", 20), ("vgg16", 13), ("preact_resnet18", 8), ("resnet50", 53)],
)
def test_networks_fold_where_a_norm_follows_a_convolution(name, count):
    assert len(found(network(name))) == count


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "densenet121", "dla"])
def test_folded_logits_and_input_gradients_are_the_same(name):
    model = network(name)
    weights = WeightCopies(model)
    weights.folds = found(model)
    assert weights.folds
    results = []
    for folded in (False, True):
        x = images().requires_grad_()
        with weights.installed(None, folded=folded):
            logits = model(x)
        (slope,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
        results.append((logits.detach(), slope))
    for plain, fold in zip(*results, strict=True):
        assert (plain - fold).abs().max() < 1e-12 * plain.abs().max()


class Chain(nn.Module):
    """conv -> norm -> relu -> conv, with what a test changes in between."""

    def __init__(self, convolution=None, norm=None, between=None):
        super().__init__()
        self.conv = convolution or nn.Conv2d(3, 4, 3)
        self.norm = norm or nn.BatchNorm2d(4)
        self.between = between or (lambda self, x: self.norm(self.conv(x)))

    def forward(self, x):
        return self.between(self, x).mean((2, 3))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


NOT_FOLDED = {
    "a residual reads the convolution": Chain(
        between=lambda self, x: (y := self.conv(x)) + self.norm(y)
    ),
    "something lies between": Chain(between=lambda self, x: self.norm(self.conv(x).relu())),
    "the norm runs twice": Chain(between=lambda self, x: self.norm(self.norm(self.conv(x)))),
    "the convolution runs twice": Chain(
        between=lambda self, x: self.norm(self.conv(x)) + self.conv(x)
    ),
    "a subclass may do more": Chain(convolution=Scaled(3, 4, 3)),
    "no running statistics": Chain(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "another norm": Chain(norm=nn.GroupNorm(2, 4)),
}


@pytest.mark.parametrize("why", NOT_FOLDED)
def test_norms_that_cannot_fold_are_not_folded(why):
    assert found(NOT_FOLDED[why].double().eval()) == []


def test_a_hook_receives_the_unfolded_output():
    for place in ("conv", "norm"):
        model = Chain().double().eval()
        getattr(model, place).register_forward_hook(lambda *_: None)
        assert found(model) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_the_arithmetic(bias, affine):
    model = Chain(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine))
    model = randomized(model)
    (fold,) = found(model)
    weight, offset = fold.weights()
    expected = model.norm(model.conv(images()))
    torch.testing.assert_close(functional.conv2d(images(), weight, offset), expected)


def test_folding_does_not_change_the_model():
    model = network().requires_grad_(False)
    weights = WeightCopies(model)
    weights.folds = found(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with weights.installed(None, folded=True):
        assert dict(model.named_modules()) == modules
        after = dict(model.named_parameters())
        assert after.keys() == parameters.keys()
        assert all(after[name] is parameters[name] for name in parameters)
        assert "forward" in vars(model.conv1)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_steps_with_an_eval_mode_attack_are_the_unfolded_ones(mode):
    """Three steps: the folded weights must follow the optimizer and the running statistics."""
    model, other = network("resnet18"), network("resnet18")
    step = tiny_step(model, "pgd", steps=2, alpha=ALPHA, attack_bn="eval", mode=mode)
    optimizer = sgd(other)
    for seed in range(3):
        x, y, index, start = tiny_batch(seed=seed)
        step(x, y, index, start=start)
        x_adv = climb(
            other, x, start, lambda z, y=y: functional.cross_entropy(z, y), ALPHA, 2, "eval"
        )
        descend(optimizer, functional.cross_entropy(other.train()(x_adv), y))
    assert_same(model, other, 1e-9)
