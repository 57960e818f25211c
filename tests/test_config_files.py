"""``fastadv train --config FILE``: read as it is said, behind the command line; --name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastadv.errors import UserError
from fastadv.run.config_file import to_toml
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.request_file import with_file
from fastadv.run.resolve import resolve_run
from fastadv.storage import sealed


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return str(path)


def resolved(tmp_path: Path, text: str, **said):
    return resolve_run(with_file(written(tmp_path, text), RunRequest(**said)))


def test_a_few_lines_by_hand_are_a_run(tmp_path):
    config = resolved(
        tmp_path,
        'method = "trades"\nepochs = 3\neps = "8/255"\ndrops = [0.5, 0.75]\n'
        'schedule = "multistep"\nweights = "awp"\ngamma = 0.02\n[options]\nbeta = 3\n',
        epochs=4,
        options={"gamma": "0.03"},
    )
    assert (config.method, config.epochs, config.eps) == ("trades", 4, 8 / 255)
    assert config.drops == (0.5, 0.75)
    assert config.options["weights"] == "awp"
    assert (config.options["beta"], config.options["gamma"]) == (3.0, 0.03)
    found = {name: config.origins[name] for name in ("eps", "beta", "weights", "epochs", "gamma")}
    assert found == {
        "eps": Origin.FILE,
        "beta": Origin.FILE,
        "weights": Origin.FILE,
        "epochs": Origin.USER,
        "gamma": Origin.USER,
    }


@pytest.mark.parametrize("method", ["apart", "trades", "atta-10", "trades-awp", "kd-swa"])
def test_a_file_of_a_run_is_the_same_run_anew(tmp_path, method):
    before = resolve_run(RunRequest(method=method, out="runs/before", seed=3))
    text = sealed.seal_text(to_toml(before))
    after = resolved(tmp_path, text)
    assert after.out is None
    for name in setting_types():
        assert name == "out" or getattr(after, name) == getattr(before, name), name
    assert after.options == before.options


@pytest.mark.parametrize(
    ("said", "gone"),
    [
        ({"schedule": "cosine"}, ("drops", "drop_factors", "peak")),
        ({"optimizer": "adam"}, ()),
        ({"model": "resnet18"}, ("width", "shortcut")),
        ({"method": "pgd"}, ()),
        ({"options": {"adversary": "pgd"}}, ()),
        ({"eps": "0.1"}, ("eval_alpha",)),
    ],
)
def test_what_belonged_to_a_replaced_setting_is_left_out(tmp_path, said, gone):
    before = resolve_run(RunRequest(method="apart", shortcut="raw", eval_alpha="0.01"))
    with pytest.warns() if "method" in said else no_warning():
        after = resolved(tmp_path, to_toml(before), **said)
    for name in gone:
        assert getattr(after, name) is None, name
    if said.get("optimizer") == "adam":
        assert (after.lr, after.momentum) == (1e-3, 0)


@pytest.mark.parametrize(
    ("text", "said", "expected"),
    [
        ('schedule = "cosine"\nend_factor = 0.1', {"schedule": "triangular"}, {"end_factor": None}),
        ('schedule = "cosine"\nend_factor = 0.1', {"schedule": "linear"}, {"end_factor": 0.1}),
        ('points = "0@0,0.1@5,0@30"', {"schedule": "cosine"}, {"points": None, "end_factor": 0}),
        ("lr = 0.3\nschedule = 'cosine'", {"points": "0@0,0.1@5,0@30"}, {"lr": 0.1}),
        ('optimizer = "sgd"\noptimizer_options = "dampening=0"', {"optimizer": "adam"},
         {"optimizer_options": None}),
        ('schedule = "piecewise"\ndrops = "3,4"', {"schedule": "multistep"}, {"drops": (3, 4)}),
    ],
)  # fmt: skip
def test_what_goes_with_a_value_of_the_file(tmp_path, text, said, expected):
    config = resolved(tmp_path, text + "\n", **said)
    assert {name: getattr(config, name) for name in expected} == expected


def no_warning():
    import contextlib

    return contextlib.nullcontext()


def test_another_method_takes_nothing_of_the_files_parts_and_says_so(tmp_path):
    path = written(tmp_path, 'method = "trades"\nepochs = 3\nbeta = 2\n')
    with pytest.warns(UserWarning, match=r"is for method trades: .* its beta is omitted"):
        config = resolve_run(with_file(path, RunRequest(method="pgd")))
    assert config.epochs == 3
    assert "beta" not in config.options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('methd = "pgd"', "did you mean 'method'"),
        ("[options]\nbetta = 3", "did you mean 'beta'"),
        ("[options]\nepochs = 3", "write it above the line"),
        ("beta = 3\n[options]\nbeta = 3", "said twice"),
        ("epochs = 3.5", "epochs in .* must be a whole number, not 3.5"),
        ("epochs = true", "epochs in .* must be a whole number, not True"),
        ('epochs = "ten"', "must be a whole number, not 'ten'"),
        ("method = 3", "method in .* must be a text"),
        ("lr = nan", "lr in .* must be at least 0, not nan"),
        ("lr = 1e999", "lr in .* finite"),
        ("lr = 2020-01-01", "must be a text, a number"),
        ("lr = {a = 1}", "must be a text, a number"),
        ("[options]\nbeta = [[1]]", "must be a text, a number"),
        ("options = 3", "must be a table"),
        ("lr = ", "Cannot read the configuration"),
        ('data = "\\u0000"', "Unknown data set"),
        ('model = "os:system"', "names code to run"),
        ("beta = 3", "--beta belongs to --objective"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as error:
        resolved(tmp_path, text + "\n")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.toml", "There is no file nowhere.toml"),
        (".", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "no name of a file"),
    ],
)
def test_a_path_that_is_no_file_is_one_sentence(tmp_path, monkeypatch, path, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        with_file(path, RunRequest())


def test_a_folder_of_a_run_names_its_file(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(UserError, match=r"write --config .*config\.toml"):
        with_file(str(tmp_path), RunRequest())


def test_a_changed_file_of_a_run_is_read_and_said(tmp_path):
    text = sealed.seal_text(to_toml(resolve_run(RunRequest()))).replace("epochs = 30", "epochs = 2")
    with pytest.warns(UserWarning, match="was changed after a run wrote it"):
        assert resolved(tmp_path, text).epochs == 2


def test_a_file_of_an_older_run_does_not_give_its_folder_away(tmp_path):
    text = to_toml(resolve_run(RunRequest(out="runs/before", seed=3))).replace("flip = false\n", "")
    after = resolved(tmp_path, sealed.seal_text(text))
    assert (after.out, after.seed) == (None, 3)
    assert resolved(tmp_path, text).out == "runs/before"  # written by hand


def test_a_run_of_a_file_in_a_named_folder(tmp_path, fastadv_command):
    (tmp_path / "run.toml").write_text(
        'method = "fast"\nwidth = 2\nepochs = 1\nlimit = 128\ntest_limit = 40\nout = "elsewhere"\n'
    )
    outcome = fastadv_command("train", "--config", "run.toml", "--name", "one")
    assert outcome.code == 0
    assert "run folder: runs/one" in outcome.out
    assert not (tmp_path / "elsewhere").exists()
    again = fastadv_command("train", "--config", "runs/one/config.toml", "--name", "two")
    assert again.code == 0
    first, second = (numbers(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two"))
    assert first == second


def numbers(file):
    """The lines of ``file`` without what the clock gave."""
    timed = ("checksum", "images_per_second", "train_seconds", "eval_seconds")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: line[name] for name in line if name not in timed} for line in lines]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a\nb"])
def test_a_name_is_that_of_one_folder(name, fastadv_command):
    outcome = fastadv_command("train", "--name", name)
    assert outcome.code == 2
    assert "--name is the name of one folder" in outcome.err


def test_name_and_out_are_not_both_taken(fastadv_command):
    outcome = fastadv_command("train", "--name", "a", "--out", "b")
    assert outcome.code == 2
    assert "omit one of them" in outcome.err
