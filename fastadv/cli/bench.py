"""The command ``bench``: its options. Its work needs torch, which its help does not wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastadv.benchmark.shift import THRESHOLD
from fastadv.cli import completion
from fastadv.cli.beside_options import require_alone
from fastadv.exit_codes import ExitCode


def bench(
    methods: Annotated[
        str | None,
        typer.Option(
            help="methods with commas, or all; options as in pgd:attack_bn=eval; "
            "pgd:fused_norm=on runs own BatchNorm kernels on CUDA [pgd]",
            autocompletion=completion.of("method"),
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="time only these rows: methods, passes, kernels, peers, with commas; * and ? "
            "stand for letters, kernel:* for all kernels"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="network [preact_resnet18]")] = None,
    width: Annotated[int | None, typer.Option(help="the network's width")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="images per step; several, separated by commas, for --plot [128]"),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="height and width of the images [32]")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16; several with commas [bf16]"),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="eager, compiled, captured or captured-eager, with commas; the first one's passes "
            "are timed first [all of the device but captured-eager]"
        ),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="interleaved turns [9]")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="also time common PyTorch loops, torchattacks and ART")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="write a trace and print the heaviest operations")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="draw images/s against batch size")] = None,
    out: Annotated[Path, typer.Option(help="folder for rows and traces")] = Path("runs/bench"),
    threads: Annotated[int | None, typer.Option(help="CPU threads, also of the peers")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    json_file: Annotated[
        str | None,
        typer.Option("--json", help="write all as one JSON document; - for standard output"),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON Schema of these documents")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            help="a --json file: measure its rows again, print new over old; exit code "
            f"{ExitCode.DOUBT} if a row is slower beyond noise"
        ),
    ] = None,
    with_file: Annotated[
        str | None,
        typer.Option("--with", help="with --compare: another --json file instead of measuring"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help=f"with --compare: slower means a whole interval above this [{THRESHOLD}]"
        ),
    ] = None,
) -> None:
    """Time training steps against the device's limits, their own passes, and peers."""
    given = dict(locals())
    if schema:
        require_alone(bench, given, "--schema prints the schema alone", "schema")
        from fastadv.benchmark.schema import schema_text

        print(schema_text(), end="")
        return
    if with_file is not None and compare is not None:
        pair = ("compare", "with_file", "threshold", "json_file")
        require_alone(bench, given, "--with measures nothing", *pair)
    from fastadv.benchmark.command import run

    del given["schema"]
    run(**given)
