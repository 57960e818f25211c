"""Where the pretended CUDA runtime is, and the environment of programs that run on it."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools" / "pretend_cuda"
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
_PINNED = dict(
    re.findall(r"^(\w+)==(\S+)$", (TOOLS / "requirements.txt").read_text(), re.MULTILINE)
)
# requirements.txt does not name Python, nor the CUDA version that PyPI's torch is built for.
VERSIONS = {
    "python": "3.12",
    "torch": _PINNED["torch"] + "+cu130",
    "triton": _PINNED["triton"],
}


class Pretended:
    """An installed pretended runtime.

    ``folder`` is where ``tools/pretend_cuda/run.py`` keeps its environment; ``python`` replaces the
    Python of that environment. Ends the program if the Python is missing or has other versions than
    ``VERSIONS``.
    """

    def __init__(self, folder: Path, python: Path | None) -> None:
        self.folder = folder.resolve()
        self.python = python or self.folder / "venv" / "bin" / "python"
        sys.path.insert(0, str(TOOLS))
        import build

        if not self.python.exists():
            sys.exit(f"There is no {self.python}; run python tools/pretend_cuda/run.py controls.")
        self._require_versions()
        build.build(str(self.python), self.folder / "runtime")
        self._environment = build.environment(self.folder / "runtime")

    def environment(self, gpu: str, root: Path = ROOT) -> dict[str, str]:
        """The environment of a program on the pretended ``gpu``, with the tools of the checkout
        ``root``: checks of numbers are off, and constants are folded on the CPU."""
        startup = root / "tools" / "pretend_cuda" / "startup"
        chosen = {"PRETEND_CUDA_NAME": gpu, "PRETEND_CUDA_TRUE": "1"}
        # The runtime's log would hide the output of a stage.
        chosen["PRETEND_CUDA_LOG"] = str(self.folder / "runtime.log")
        return self._environment | chosen | {"PYTHONPATH": str(startup)}

    def _require_versions(self) -> None:
        ask = "import json, platform, torch, triton; print(json.dumps([platform.python_version(), "
        ask += "torch.__version__, triton.__version__]))"
        said = subprocess.run([str(self.python), "-c", ask], capture_output=True, text=True)
        found = dict(zip(VERSIONS, json.loads(said.stdout or "[]"), strict=False))
        for name, version in VERSIONS.items():
            if not found.get(name, "").startswith(version):
                sys.exit(
                    f"Compiled code needs {name} {version}, but {self.python} has "
                    f"{found.get(name)}; set it up again with tools/pretend_cuda/run.py."
                )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--pretend`` and ``--python``."""
    folder = ROOT / ".pretend-cuda"
    parser.add_argument(
        "--pretend", type=Path, default=folder, help="folder of the pretended runtime"
    )
    parser.add_argument(
        "--python", type=Path, help="the Python of another environment with the same versions"
    )
