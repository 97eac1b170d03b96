"""Print torch's folder and its CUDA version (empty for a CPU build), one a line; do not import it.

Used by CMake. pip's build isolation hides the environment's site-packages from sys.path but keeps
sys.prefix, hence the second look through sysconfig. QUAROT_TORCH_DIR overrides both.
"""

import importlib.util
import os
import pathlib
import re
import sys
import sysconfig


def find_torch() -> pathlib.Path:
    candidates = []
    if override := os.environ.get("QUAROT_TORCH_DIR"):
        candidates.append(pathlib.Path(override))
    else:
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            candidates.append(pathlib.Path(spec.origin).parent)
        candidates += [
            pathlib.Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")
        ]
    for folder in candidates:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    sys.exit(
        "quarot needs PyTorch (2.11 or newer) installed in this environment before it is built: "
        f"`pip install torch`, then install quarot again (looked in {looked})."
    )


folder = find_torch()
version = (folder / "version.py").read_text()
number = re.search(r"__version__ = ['\"](\d+)\.(\d+)", version)
if number is None or (int(number[1]), int(number[2])) < (2, 11):
    sys.exit(f"quarot needs PyTorch 2.11 or newer; the one in {folder} is {number and number[0]}.")
cuda = re.search(r"^cuda\b[^=]*= ['\"]([\d.]+)", version, re.MULTILINE)
print(folder)
print(cuda[1] if cuda else "")
