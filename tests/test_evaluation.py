"""evaluate(): counts, independence of batching, cost, restoring and bad input."""

import pytest
import torch
from torch import Tensor, nn

from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.tally import _memory_format

NAMES = ("clean", "fgsm", "fgsm-rwp", "pgd-5", "pgd-3-3", "cw-5", "cw-margin-5", "noise-0.2")


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 4),
    ).double()
    net[1].running_var.fill_(0.05)
    return net


@pytest.fixture
def data(model):
    """60 images, most labels as the model sees them."""
    x = torch.rand(60, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model.eval()(x).argmax(1)
    y[:10] = (y[:10] + 1) % 4
    return x, y


def batched(data, size):
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def test_scores_are_the_share_of_all_images_an_attack_leaves_right(model, data):
    x, y = data
    scores = evaluate(model, batched(data, 60), NAMES, eps=0.05, seed=4)
    assert list(scores) == list(NAMES)
    for name, score in scores.items():
        x_adv = attack(model, x, y, name, eps=0.05, seed=4)
        assert score == pytest.approx((model(x_adv).argmax(1) == y).double().mean().item())
    assert scores["clean"] == pytest.approx(50 / 60)
    assert 0 < scores["pgd-5"] < scores["noise-0.2"]
    assert scores["pgd-5"] < scores["clean"]


@pytest.mark.parametrize("size", [1, 7, 32])
def test_scores_do_not_depend_on_the_batch_size(model, data, size):
    whole = evaluate(model, batched(data, 60), NAMES, eps=0.05)
    assert evaluate(model, batched(data, size), NAMES, eps=0.05) == pytest.approx(whole)


def test_a_batch_does_not_depend_on_those_before_it(model, data):
    """Scores of two halves add up when the second half keeps its rows of noise."""
    x, y = data
    scores = evaluate(model, batched(data, 30), ["pgd-2"], eps=0.05)
    rows = torch.arange(30, 60)
    second = attack(model, x[30:], y[30:], "pgd-2", eps=0.05, index=rows)
    right = (model(second).argmax(1) == y[30:]).sum().item()
    first = evaluate(model, [(x[:30], y[:30])], ["pgd-2"], eps=0.05)["pgd-2"] * 30
    assert scores["pgd-2"] * 60 == pytest.approx(first + right)


def test_l2_and_alpha_reach_the_attacks(model, data):
    x, y = data
    options = {"eps": 0.4, "norm": "l2", "alpha": 0.3}
    scores = evaluate(model, batched(data, 60), ["pgd-5", "fgsm"], **options)
    expected = attack(model, x, y, "pgd-5", **options)
    assert scores["pgd-5"] == pytest.approx((model(expected).argmax(1) == y).double().mean().item())
    # alpha is the step of attacks with several; FGSM's stays eps.
    fgsm = attack(model, x, y, "fgsm", eps=0.4, norm="l2")
    assert scores["fgsm"] == pytest.approx((model(fgsm).argmax(1) == y).double().mean().item())


@pytest.mark.parametrize(
    ("names", "ignored"),
    [
        (["clean"], "clean"),
        (["clean", "apgd-ce-2"], "clean and apgd-ce-2"),
        (["clean", "fgsm", "apgd-ce-2+square-3"], "clean, fgsm and apgd-ce-2\\+square-3"),
    ],
)
def test_an_alpha_that_no_attack_follows_is_named(model, data, names, ignored):
    sentence = f"alpha is the step of pgd, cw and cw-margin, and ignored by {ignored}: omit it"
    with pytest.warns(UserWarning, match=sentence):
        scores = evaluate(model, batched(data, 60), names, eps=0.1, alpha=0.01)
    assert {scores.verdicts[name].facts["alpha"] for name in names} == {None}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("followed", ["pgd-1", "cw-margin-1", "apgd-ce-1+pgd-1"])
def test_an_alpha_that_one_attack_follows_is_stored_with_it_alone(model, data, followed):
    scores = evaluate(model, batched(data, 60), ["apgd-ce-1", followed], eps=0.1, alpha=0.01)
    found = {name: scores.verdicts[name].facts["alpha"] for name in scores}
    assert found == {"apgd-ce-1": None, followed: 0.01}


def test_names_may_be_one_string(model, data):
    assert list(evaluate(model, batched(data, 60), "clean, pgd-2")) == ["clean", "pgd-2"]


def test_one_pass_over_the_batches_and_no_more_forwards_than_needed(model, data):
    passes = []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    served = []

    def loader():
        for batch in batched(data, 30):
            served.append(len(batch[0]))
            yield batch

    seen = []
    evaluate(model, loader(), ("clean", "pgd-4"), progress=seen.append)
    assert served == [30, 30]
    assert seen == [30, 60]
    # A batch costs one clean forward, four with a gradient, one on x_adv; the first is forwarded
    # twice, to see whether its outputs change. Before, some passes see what can be folded.
    needed = [False] + 2 * ([False] + 4 * [True] + [False])
    assert passes[-len(needed) :] == needed
    assert len(passes) - len(needed) <= 8


def test_only_input_gradients_are_computed(model, data):
    """No parameter takes part in the graph, so no weight gradient is ever computed."""
    asked = []
    model.register_forward_pre_hook(
        lambda module, args: asked.append([p.requires_grad for p in module.parameters()])
    )
    evaluate(model, batched(data, 60), ["pgd-2"])
    assert not any(flag for flags in asked for flag in flags)


def test_the_model_is_left_as_it_was_found(model, data):
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        evaluate(model, batched(data, 60), ["pgd-2"])
        assert not torch.is_grad_enabled()
    with pytest.raises(UserError):
        evaluate(model, [(data[0], data[1] + 7)])
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_same_scores_under_inference_mode_and_autocast(model, data):
    expected = evaluate(model, batched(data, 20), ["clean", "pgd-3"], eps=0.05)
    with torch.inference_mode():
        again = [(x + 0, y + 0) for x, y in batched(data, 20)]
        assert evaluate(model, again, ["clean", "pgd-3"], eps=0.05) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(model, batched(data, 20), ["clean", "pgd-3"], eps=0.05) == expected


def test_images_take_the_layout_of_the_convolutions(model, data):
    layouts = []
    model[3].register_forward_hook(
        lambda module, args, out: layouts.append(
            out.is_contiguous(memory_format=torch.channels_last)
        )
    )
    expected = evaluate(model, batched(data, 60), ["pgd-2"], eps=0.05)
    assert not any(layouts)
    layouts.clear()
    model.to(memory_format=torch.channels_last)
    assert evaluate(model, batched(data, 60), ["pgd-2"], eps=0.05) == expected
    assert all(layouts)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, y: [(x * 3, y)], r"must lie in \[0, 1\]"),
        (lambda x, y: [(x, y), (x * float("nan"), y)], r"must lie in \[0, 1\]"),
        (lambda x, y: [(x, y + 4)], "the model has 4 classes, so labels run from 0 to 3"),
        (lambda x, y: [(x, y), (x, y - 9)], "Labels are out of range"),
        (lambda x, y: [(x, y.double())], "integer labels"),
        (lambda x, y: [((x * 255).byte(), y)], "divide uint8 images by 255"),
        (lambda x, y: [], "no images to evaluate"),
        (lambda x, y: [(x[:0], y[:0])], "no images to evaluate"),
        (lambda x, y: [(x, y, y)], "pairs"),
        (lambda x, y: [x], "pairs"),
    ],
)
def test_bad_batches_are_refused_in_one_sentence(model, data, change, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(model, change(*data), ["clean", "pgd-2"])


def test_a_problem_in_a_later_batch_is_found_without_reading_every_batch(model, data, monkeypatch):
    """On an accelerator the host waits only for the first batch and at the end."""
    from fastadv.engine.model.network import Network

    monkeypatch.setattr(Network, "syncs_are_free", False)
    x, y = data
    with pytest.raises(UserError, match="Labels are out of range"):
        evaluate(model, [(x, y), (x, y + 4), (x, y)], ["pgd-2"])


def test_a_diverged_model_has_no_accuracy(model, data):
    with torch.no_grad():
        model[6].bias[2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        evaluate(model, batched(data, 60), ["clean"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attacks": ["clean", "pdg-20"]}, "did you mean 'pgd-20'"),
        ({"attacks": []}, "at least one attack"),
        ({"eps": float("nan")}, "eps must be"),
        ({"norm": "linv"}, "did you mean 'linf'"),
        ({"alpha": -0.1}, "alpha must be"),
    ],
)
def test_bad_options_are_refused_before_the_first_batch(model, options, sentence):
    def never():
        raise AssertionError("the batches were read")
        yield

    with pytest.raises(UserError, match=sentence):
        evaluate(model, never(), **options)


class FiniteBelow(nn.Module):
    """Logits that are not finite where a pixel is 0.55 or more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(0.55 - x.flatten(1)[:, :4]) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_outputs_that_only_an_attack_makes_infinite_give_no_accuracy() -> None:
    batches = [(torch.full((4, 1, 2, 2), 0.5), torch.arange(4))]
    assert evaluate(FiniteBelow(), batches, ["clean"], eps=0.1)["clean"] <= 1
    with pytest.raises(NotFiniteError):
        evaluate(FiniteBelow(), batches, ["noise-0.3"], eps=0.1)


def test_a_convolution_weight_in_both_layouts_does_not_decide_the_layout() -> None:
    telling, silent = nn.Conv2d(3, 4, 3), [nn.Conv2d(3, 4, 1), nn.Conv2d(1, 4, 3)]
    assert _memory_format(nn.Sequential(*silent)) is torch.contiguous_format
    assert _memory_format(nn.Sequential(telling, *silent)) is torch.contiguous_format
    telling.to(memory_format=torch.channels_last)
    assert _memory_format(nn.Sequential(telling, *silent)) is torch.channels_last


@pytest.mark.parametrize(
    ("attacks", "options", "sentence"),
    [
        ("clean,", {}, "single commas between them"),
        (["clean", " "], {}, "single commas between them"),
        (["apgd-ce-5"], {"search_dtype": "bfloat16"}, "in float32 or bf16, not in 'bfloat16'"),
    ],
)
def test_what_was_meant_is_said_and_not_guessed(model, data, attacks, options, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(model, batched(data, 60), attacks, **options)
