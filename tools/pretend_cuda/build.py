"""Build the pretended CUDA runtime, and give the environment of a program that runs on it.

``python build.py PYTHON FOLDER`` compiles ``runtime/*.cpp`` with g++ against the headers in the
packages of PYTHON (the CUDA build of torch, with Triton) into FOLDER.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RUNTIME = Path(__file__).parent / "runtime"
LIBRARY = "libpretend_cuda.so"
DRIVER_NAMES = ("libcuda.so", "libcuda.so.1")  # Triton loads the second at run time
HEADERS = (
    "nvidia/cu13/include",
    "nvidia/cudnn/include",
    "nvidia/nccl/include",
    "triton/backends/nvidia/include",
)
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def packages(python: str) -> Path:
    """The site-packages folder of ``python``.

    Raises ``SystemExit`` if it has no torch.
    """
    script = "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"
    found = subprocess.run([python, "-P", "-c", script], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{python} has no torch; pass a Python with the CUDA build of torch.")
    return Path(found.stdout.strip())


def build(python: str, folder: Path, jobs: int = 2) -> Path:
    """Compile the sources that changed since the last build; returns the library.

    Raises ``SystemExit`` if a header is missing or g++ fails.
    """
    site = packages(python)
    if missing := [part for part in HEADERS if not (site / part).is_dir()]:
        sys.exit(f"{site} has no {missing[0]}: install the CUDA build of torch, with Triton.")
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    include = [f"-I{site / part}" for part in HEADERS]
    newest = max(header.stat().st_mtime for header in RUNTIME.glob("*.h"))

    def compiled(source: Path) -> Path:
        made = objects / f"{source.stem}.o"
        changed = max(newest, source.stat().st_mtime)
        if not made.exists() or made.stat().st_mtime < changed:
            _run(["g++", *FLAGS, *include, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(compiled, sorted(RUNTIME.glob("*.cpp"))))
    library = folder / LIBRARY
    fresh = folder / f"{LIBRARY}.new"  # running programs keep the library they have loaded
    _run(["g++", "-shared", *map(str, parts), "-o", str(fresh), "-ldl", "-lpthread", "-lrt"])
    fresh.replace(library)
    for name in DRIVER_NAMES:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(LIBRARY)
    return library


def environment(folder: Path) -> dict[str, str]:
    """The present environment, changed so that a program loads the library built in ``folder``.

    Paths in it are absolute, because programs change their working directory.
    """
    place = str(folder.absolute())
    paths = [place, os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {
        "LD_PRELOAD": f"{place}/{LIBRARY}",
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        "TRITON_LIBCUDA_PATH": place,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        sys.exit(f"{command[0]} failed; its messages are printed above.")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(
            "Usage: build.py PYTHON FOLDER, with the Python of the programs that use the library."
        )
    print(build(sys.argv[1], Path(sys.argv[2]).absolute()))
