"""A trained network read back from a run folder: to make pseudo-labels, and as a teacher."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_step

from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.run import provenance
from fastadv.run.pseudo_labels import pseudo_labels, write_pseudo_labels
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import load_model
from fastadv.run.teachers import with_networks
from fastadv.storage import checkpoint


@pytest.fixture
def run(tmp_path):
    """A run folder with the weights of a narrow network, and that network."""
    torch.manual_seed(3)
    config = RunRequest(method="pgd", model="preact_resnet18", width=4, dropout=0.1)
    folder = RunFolder.create(str(tmp_path / "run"), resolve_run(config))
    model = build_model(
        "preact_resnet18", num_classes=4, width=4, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2]
    )
    model.train()(torch.rand(16, 3, 6, 6))
    of = provenance.configuration(resolve_run(config))
    built_for = {"num_classes": 4, "in_channels": 3, "image_size": (6, 6)}
    built_for |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2), "classes": ()}
    payload = {"model": model.state_dict(), "built_for": built_for, "configuration": of}
    checkpoint.save(folder.best, payload)
    return folder, model.eval()


def test_the_network_of_a_run_computes_what_it_did(run):
    folder, model = run
    x = torch.rand(5, 3, 6, 6)
    for path in (folder.path, folder.best):
        loaded = load_model(str(path))
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


def test_a_run_of_another_shape_is_refused(run):
    with pytest.raises(UserError, match="for 4 classes, and the call has 7"):
        load_model(str(run[0].path), 7, 3)


def test_pseudo_labels_are_written_beside_their_images(run, tmp_path):
    folder, model = run
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "more.npz", images=images)
    counts = write_pseudo_labels(
        str(folder.path), str(tmp_path / "more.npz"), str(tmp_path / "labelled.npz")
    )
    with np.load(tmp_path / "labelled.npz") as file:
        assert np.array_equal(file["images"], images)
        found = torch.from_numpy(file["labels"])
    expected = pseudo_labels(model, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    assert torch.equal(found, expected)
    assert list(counts) == [0, 1, 2, 3]
    assert sum(counts.values()) == 9


def test_images_that_are_not_bytes_are_refused(tmp_path):
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 3, 3, 3)))
    with pytest.raises(UserError, match="uint8"):
        write_pseudo_labels("run", str(tmp_path / "floats.npz"), "out.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="Cannot read images"):
        write_pseudo_labels("run", str(tmp_path / "other.npz"), "out.npz")
    with pytest.raises(UserError, match="uint8"):
        pseudo_labels(tiny_model(), torch.rand(2, 3, 6, 6))


def test_teachers_named_by_their_run_folders(run):
    folder, teacher = run
    named = resolve("pgd", {"target": "distillation", "teachers": f"{folder.path}, {folder.best}"})
    assert [isinstance(one, str) for one in named.target.teachers] == [True, True]
    drawn = torch.random.get_rng_state()
    plan = with_networks(named, num_classes=4, in_channels=3)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    model = tiny_model().float()
    step = tiny_step(model, target="distillation", teachers=plan.target.teachers, steps=2)
    x, y = torch.rand(6, 3, 6, 6), torch.arange(6) % 4
    step(x, y)
    with torch.no_grad():
        taught = step.plan.target.teach(x)
        for logits in taught:
            torch.testing.assert_close(logits, teacher(x))
