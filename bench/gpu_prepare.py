"""Make the kit that ``gpu_suite.py`` uses: ``python bench/gpu_prepare.py --images ARCHIVE``.

A GPU machine may be available without a network and for minutes, most of which compilation would
take. This script writes, into the ignored folder ``bench/gpu_kit``:

- compiled code for every GPU in ``gpu_pretend.GPUS``: the stages of the suite run on a pretended
  CUDA runtime (made by ``tools/pretend_cuda/run.py``), with exactly the torch, Triton and Python of
  the machine, because the keys of Inductor's cache contain the GPU's name and the hash of torch's
  own sources. Tile sizes are chosen on the GPU.
- the peers' wheels, from the package registry;
- images, if an archive is given: a .tar.xz with ``train/CLASS/NAME.jpg`` and ``test/...``.

Repository and kit together must not be larger than ``MOST_MIB``. The commands to type on the
machine are printed last. ``--only code``, ``wheels``, ``images`` or ``commands`` does one of these
and keeps what exists of the others.
"""

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gpu_kit import CODE, FACTS, IMAGES, KIT, ROOT, WHEELS, facts
from gpu_plan import CALLS
from gpu_pretend import GPUS, VERSIONS, Pretended, add_arguments

from fastadv.benchmark.rows import commit

PACKAGES = (
    "torchattacks==3.5.1", "adversarial-robustness-toolbox==1.20.1", "pyautoattack==0.2.0",
)  # fmt: skip
COMPILING = {
    "smoke": None,
    "rest": "parity,pgd-512,fused-512,single-512,pgd-128,pgd-eval-512,peers-128",
    "train": None,
    "inductor": "variants-128",
}
# Subfolders of Inductor's cache that travel: their entries contain the kernels. The others are
# written again on the GPU, or must not travel (tile sizes that were "timed" on a pretended GPU).
TAKEN = ("fxgraph", "aotautograd")
# Each GPU's entries contain the same kernels, far apart in the archive: a large dictionary.
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 256 * 2**20}]
MOST_MIB = 60  # the machine with the GPU accepts at most 64 MiB, packed
PATIENCE = 30  # times the suite's own limits: everything is compiled, on fewer cores
PARTS = ("code", "wheels", "images", "commands")


def main() -> None:
    """Make the parts of the kit, check its size, print the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--images", type=Path, help="a .tar.xz of JPEG images")
    parser.add_argument("--images-name", help="their name in the tables [the archive's name]")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--kit", type=Path, default=KIT)
    given = parser.parse_args()
    if given.images is not None and not given.images.is_file():
        parser.error(f"there is no archive {given.images}; omit --images or correct the path")
    given.kit.mkdir(parents=True, exist_ok=True)
    wanted = [given.only] if given.only else list(PARTS)
    if "wheels" in wanted:
        collect_wheels(given.kit)
    if "images" in wanted and given.images is not None:
        shutil.copyfile(given.images, given.kit / IMAGES)
    elif given.only == "images":
        parser.error("--only images needs --images ARCHIVE")
    if "code" in wanted:
        compile_code(given.kit, Pretended(given.pretend, given.python))
    write_facts(given.kit, given.images_name or (given.images and given.images.name))
    check_size(given.kit)
    print_commands(given.kit)


def collect_wheels(kit: Path) -> None:
    """Download the peers' packages alone: the machine with the GPU has what they depend on."""
    folder = kit / WHEELS
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), *PACKAGES], capture_output=True)
    if done.returncode:
        sys.exit(
            "The peers' wheels could not be downloaded; check the network, or use --only code."
        )
    print(f"wheels: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def compile_code(kit: Path, pretended: Pretended) -> None:
    """Run the stages that compile on a pretended GPU of each name, and keep Inductor's cache.

    Compiled code stays in the pretended runtime's folder until all stages are done, so that an
    interrupted run continues.
    """
    work = pretended.folder / "kit"
    calls = [(gpu, *call) for gpu in GPUS for call in COMPILING.items()]
    for number, (gpu, call, only) in enumerate(calls, 1):
        print(f"{number} of {len(calls)}: {call} on a pretended {gpu}", flush=True)
        run_call(pretended, gpu, call, only, kit, work)
    print(f"compiled code: {pack_code(work / 'inductor', kit / CODE)}")
    shutil.rmtree(work)


def run_call(
    pretended: Pretended, gpu: str, call: str, only: str | None, kit: Path, work: Path
) -> None:
    """Run one call of the suite for its compiled code; its times mean nothing."""
    command = [str(pretended.python), "-P", str(ROOT / "bench" / "gpu_suite.py"), call]
    command += ["--kit", str(without_code(kit, work)), "--work", str(work)]
    command += ["--pack", str(work / "packed"), "--patience", str(PATIENCE)]
    began = time.monotonic()
    done = subprocess.run(
        command + (["--only", only] if only else []), env=pretended.environment(gpu)
    )
    print(f"{call}: {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"A stage of {call} failed on the pretended GPU; its log is in {work}.")


def without_code(kit: Path, work: Path) -> Path:
    """A kit without compiled code, so that everything is compiled."""
    bare = work / "kit"
    bare.mkdir(parents=True, exist_ok=True)
    for name in (IMAGES, WHEELS):
        if (kit / name).exists() and not (bare / name).exists():
            (bare / name).symlink_to((kit / name).resolve())
    return bare


def pack_code(cache: Path, target: Path) -> str:
    """Pack the parts of ``cache`` that travel into ``target``; returns their size as a message."""
    files = [path for name in TAKEN for path in sorted((cache / name).rglob("*"))]
    files = [path for path in files if path.is_file()]
    with (
        lzma.open(target, "wb", filters=LZMA) as packed,
        tarfile.open(None, "w", packed) as archive,
    ):
        for path in files:
            archive.add(path, path.relative_to(cache))
    held = sum(path.stat().st_size for path in files)
    size = target.stat().st_size
    return f"{len(files)} files, {held / 2**20:.1f} MiB, {size / 2**20:.1f} MiB packed"


def write_facts(kit: Path, images: str | None = None) -> None:
    """Write ``kit.json``: versions, GPUs, commit and date. ``images=None`` keeps their name."""
    said = facts(kit) | VERSIONS | {
        "gpus": list(GPUS) if (kit / CODE).exists() else [],
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if images is not None:
        said["images"] = images
    (kit / FACTS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def tracked() -> list[Path]:
    """The files of the checkout that travel to the GPU, relative to its root."""
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in names if (ROOT / name).is_file()]


def check_size(kit: Path) -> None:
    """Print the size of what travels; end the program if it is too large."""
    tree = sum((ROOT / name).stat().st_size for name in tracked())
    parts = {path.name: path for path in sorted(kit.iterdir())}
    sizes = {
        name: sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())
        for name, path in parts.items()
    }
    total = tree + sum(sizes.values())
    said = {"repository": tree} | sizes
    print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in said.items()))
    if total > MOST_MIB * 2**20:
        sys.exit(
            f"Repository and kit take {total / 2**20:.1f} MiB of {MOST_MIB}; use a smaller "
            f"archive of images, or delete {kit / IMAGES}."
        )
    print(f"together {total / 2**20:.1f} of {MOST_MIB} MiB")


def print_commands(kit: Path) -> None:
    """The commands to type on the machine with the GPU, in the repository's root."""
    print("\nOn the machine with the GPU, in the copy of this repository, kit included:\n")
    for call, seconds in CALLS.items():
        note = f"  # at most {seconds} s" + ("; if so many are left" if call == "train" else "")
        typed = f"FASTADV_COMMIT={commit() or 'unknown'} python3 bench/gpu_suite.py {call}"
        print(f"{typed} --pack RESULTS{note}")
    print("\nAnd here, for each packed file that was copied back:\n")
    print("python bench/tables.py --take FILE.tar.gz --write README.md bench/README.md")


if __name__ == "__main__":
    main()
