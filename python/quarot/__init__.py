"""Run LLaMA-family models with 4-bit weights, 4- or 8-bit activations and a 4-bit KV cache.

    model = quarot.convert(model, "W4A4KV4")    # a loaded transformers model, in place
    model.save_pretrained(path)                 # and back: quarot.load(path)
    quarot.ops.hadamard_quantize(x, bits=4)     # the kernels, as torch ops

Importing quarot registers it with transformers: quarot checkpoints load through `from_pretrained`.
"""

from importlib.metadata import PackageNotFoundError, version

from quarot import ops
from quarot.config import QuarotConfig
from quarot.convert import convert
from quarot.generate import generate
from quarot.hf import load, load_model

__all__ = ["QuarotConfig", "__version__", "convert", "generate", "load", "load_model", "ops"]

try:
    __version__ = version("quarot")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+source"
