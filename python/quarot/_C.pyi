"""The compiled library (csrc/ops/module.cpp); importing it registers torch.ops.quarot.*."""

__version__: str
cuda_archs: list[str]
cpu_isa: str
cpu_isas: list[str]
