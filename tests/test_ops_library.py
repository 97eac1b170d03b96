"""ops.library: one set of ops in schemas, wrappers and reference; what runs where; loading."""

import inspect
import logging

import pytest
import torch

from quarot import ops
from quarot.ops import library, reference


def test_every_op_has_a_wrapper_a_fake_and_a_reference():
    assert set(library.OPS) | {"kernels"} == set(ops.__all__)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if "quarot::" in name}
    assert registered == {f"quarot::{op}" for op in library.OPS}


@pytest.mark.parametrize("op", library.OPS)
def test_wrapper_and_reference_follow_the_schema(op):
    """The fallback passes arguments by position, so names and order must be the schema's."""
    wrapper, specified = (inspect.signature(getattr(m, op)).parameters for m in (ops, reference))
    assert list(wrapper) == list(specified)
    assert [p.kind for p in wrapper.values()] == [p.kind for p in specified.values()]
    assert [p.default for p in wrapper.values() if p.default is not p.empty] == [
        p.default for p in specified.values() if p.default is not p.empty
    ]
    schema = getattr(torch.ops.quarot, op).default._schema
    names = [name.replace("scale_hadamard", "scale") for name in specified]
    assert [argument.name for argument in schema.arguments] == names


def test_cpu_has_every_kernel():
    assert {devices["cpu"] for devices in ops.kernels().values()} == {"kernel"}
    assert all(set(devices) == {"cpu", "cuda"} for devices in ops.kernels().values())


def test_fallback_runs_the_reference_and_is_noted_once(caplog):
    fallback = library._fallback("quantize")
    x = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING, logger="quarot"):
        for _ in range(2):
            codes, scale, zero = fallback(x, 4, False, 0.9, 4, True)
    expected = reference.quantize(x, symmetric=False, clip=0.9, group=4, packed=True)
    for actual, e in zip((codes, scale, zero), expected, strict=True):
        assert torch.equal(actual, e)
    assert [r.getMessage() for r in caplog.records] == [
        "quarot::quantize has no kernel for cpu: its reference runs there"
    ]


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("quantize", (torch.zeros(2, 8), 5, True, 1.0, 0, False), "bits.*5"),
        ("quantize", (torch.zeros(2, 8), 4, True, 7.0, 0, False), "clip.*7"),
        ("quantize", (torch.zeros(2, 8).double(), 4, True, 1.0, 0, False), "x .*float64"),
        (
            "rmsnorm_quantize",
            (torch.zeros(2, 8), torch.ones(7), 1e-6, 4, True, 1.0, 0, False),
            "weight.*7",
        ),
        (
            "dequantize",
            (torch.zeros(2, 8).char(), torch.ones(2), None, torch.float64),
            "dtype.*float64",
        ),
    ],
)
def test_fallback_refuses_what_a_kernel_refuses(op, arguments, message):
    for call in (library._fallback(op), getattr(torch.ops.quarot, op)):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


def test_a_missing_library_says_what_to_do(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(library.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"No module named 'quarot._C'.*pip install \.") as error:
        library._load()
    assert torch.__version__ in str(error.value)
