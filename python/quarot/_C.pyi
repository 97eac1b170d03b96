"""The compiled library (csrc/ops/module.cpp); importing it registers torch.ops.quarot.*."""

__version__: str
cuda_archs: list[str]
cpu_isa: str
cpu_isas: list[str]

class Tape:
    """Kernel calls on the CPU, to make again (csrc/ops/tape.h). Memory is (address, bytes)."""

    calls: int

    def __init__(self, inputs: list[tuple[int, int]]) -> None: ...
    def begin(self) -> None: ...
    def end(self) -> None: ...
    def run(self, inputs: list[int], result: tuple[int, int], output: int) -> None: ...
