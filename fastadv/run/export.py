"""Write a run's network out: its weights as safetensors, or the whole of it as a program."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fastadv.errors import UserError, unknown
from fastadv.run.configured_model import configured_model
from fastadv.run.export_notes import notes_of
from fastadv.run.loaded import Run, load_run
from fastadv.run.run_folder import RunFolder
from fastadv.storage import files
from fastadv.storage.printable import printable

LARGEST_DIFFERENCE = 1e-4  # of the logits, as a share of the largest of them
_COMPARED = 8  # images; the program is also run on one, because it must take any number

Program = Callable[[Tensor], Tensor]


class _Export(NamedTuple):
    """The network of ``run`` about to be written, and images ``x``, both on the CPU."""

    run: Run
    x: Tensor
    notes: dict[str, str]

    @property
    def model(self) -> nn.Module:
        return self.run.model


def export_run(path: str, out: Path | None, which: str = "best", form: str | None = None) -> str:
    """Write the network of the run in ``path`` to ``out``; returns a line about it.

    ``form`` is one of ``FORMS``; None: as the suffix of ``out`` says. ``out`` None: "model" with
    the suffix of ``form``. The data need not be there. Before anything is written, what was made is
    read back, and its logits on test images, or on noise, are compared with the network's. Raises
    ``UserError`` if they differ by more than ``LARGEST_DIFFERENCE``, for a file that exists and for
    a network that has no such form.
    """
    names = {file.name for file in RunFolder(Path(path)).files()}
    if out and out.name in names and os.path.realpath(out.parent) == os.path.realpath(path):
        raise UserError(f"{printable(out)} is a file of the run itself: choose another --out.")
    form, out = _named(out, form)
    if os.path.lexists(out):
        raise UserError(f"{printable(out)} exists: choose another --out, or remove it.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {printable(out.parent)} for {printable(out.name)}.")
    run = load_run(path, which)
    x, images = _images(run)
    made = _Export(run, x, notes_of(run))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            content, program = FORMS[form].write(made)
            difference = _difference(run.model, program, x)
    except UserError:
        raise
    except Exception as error:  # of the network's code or an exporter: any type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{run.config.model} cannot be written as {form} ({printable(reason)}); choose another "
            "--format."
        ) from error
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"The {form} file would give other logits than the network, by {difference:.1e} of the "
            f"largest on {len(x)} {images}, so nothing was written; choose another --format."
        )
    try:
        with files.replaced(out) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"Cannot write {printable(out)}: {error}.") from None
    return (
        f"wrote {printable(out)} ({form}); read back, its logits on {len(x)} {images} differ by "
        f"{difference:.1e} of the largest at most"
    )


def _named(out: Path | None, form: str | None) -> tuple[str, Path]:
    """The form and the file, of which one may leave the other open."""
    if form is not None and form not in FORMS:
        raise unknown("format", form, FORMS)
    if out is None:
        form = form or "safetensors"
        return form, Path(f"model{FORMS[form].suffix}")
    by_suffix = {entry.suffix: name for name, entry in FORMS.items()}.get(out.suffix)
    if form is not None and by_suffix not in (form, None):
        raise UserError(
            f"{printable(out)} says by its name that it is {by_suffix}, and --format says {form}: "
            "omit one of the two."
        )
    found = form or by_suffix
    if found is None:
        raise UserError(
            f"{printable(out)} does not say its form: end it with "
            f"{', '.join(entry.suffix for entry in FORMS.values())}, or add --format."
        )
    return found, out


def _images(run: Run) -> tuple[Tensor, str]:
    """Images on which what was made is compared with the network, and what they are."""
    try:
        return next(iter(run.test.limited(_COMPARED)))[0].cpu(), "test images"
    except UserError:  # the data are gone, and are not needed
        generator = torch.Generator().manual_seed(0)
        own = run.built_for
        shape = (_COMPARED, own.in_channels, *own.image_size)
        return torch.rand(shape, generator=generator), "images of noise (the data are not there)"


def _difference(model: nn.Module, program: Program, x: Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit; with all images in a
    batch, and with one."""
    worst = 0.0
    for batch in (x, x[:1]):
        expected = model(batch)
        found = program(batch)
        if found.shape != expected.shape:
            return float("inf")
        share = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        worst = max(worst, float(share.nan_to_num(float("inf"))))
    return worst


def _safetensors(made: _Export) -> tuple[bytes, Program]:
    tensors = {name: tensor.contiguous() for name, tensor in made.model.state_dict().items()}
    content = save(tensors, metadata=made.notes)
    again = configured_model(made.run.config, **made.run.built_for.facts())
    again.load_state_dict(load(content))
    return content, again.eval()


def _torch(made: _Export) -> tuple[bytes, Program]:
    file = io.BytesIO()
    program = torch.export.export(made.model, (made.x,), dynamic_shapes=_any_number())
    torch.export.save(program, file, extra_files={"fastadv.json": json.dumps(made.notes)})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()


def _onnx(made: _Export) -> tuple[bytes, Program]:
    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"An ONNX file needs {', '.join(missing)}, not installed here; run "
            "`pip install 'fastadv[onnx]'`."
        )
    import onnxruntime

    program: Any = torch.onnx.export(
        made.model, (made.x,), dynamo=True, dynamic_shapes=_any_number(), verbose=False,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    program.model.metadata_props.update(made.notes)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    return content, run


def _any_number() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("images")},)


class _Form(NamedTuple):
    suffix: str
    write: Callable[[_Export], tuple[bytes, Program]]
    """The bytes of the file, and what they compute once they are read back."""


FORMS = {
    "safetensors": _Form(".safetensors", _safetensors),
    "torch": _Form(".pt2", _torch),
    "onnx": _Form(".onnx", _onnx),
}
"""Weights alone; a program of ``torch.export``; an ONNX program. Programs take float32 images
(N,C,H,W) in [0,1] for any N, and need no fastadv."""
