"""Fuse rotations into a model's weights, so that its outputs do not change but its outliers vanish.

QuaRot (arXiv 2404.00456, section 4) and SpinQuant (arXiv 2405.16406, section 3). Row vectors
times matrices; a linear computes y = x W^T + b with W [out, in]; R orthogonal.

    step           weights                                               undone by
    fold norms     readers W <- W diag(gamma), gamma <- 1
    R1             E <- E R1; readers and head W <- W R1;                each other
                   writers W <- R1^T W, b <- b R1
    R2             v, each KV head: W <- R2^T W, b <- b R2;              each other
                   o, each head: W <- W R2
    head Hadamard  o: W <- W (H_heads (x) I)                             online, before o
    R4             down: W <- W H                                        online, before down
    R3             none: q and k are both multiplied by H after RoPE     each other

R1 passes the RMSNorms, once folded, because it keeps the length of a vector.
H is orthonormal, block-diagonal where the dimension has no Hadamard matrix of its own. Products in
float64 with one rounding to the weights' dtype. Everything goes through the architecture's
description, layer by layer; nothing here knows a model or a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quarot import hadamard
from quarot.config import QuarotConfig
from quarot.models.base import Architecture, Geometry

Apply = Callable[[Tensor], Tensor]
"""x [..., n] float64 -> x R, for one orthogonal matrix R [n, n]."""

Matrices = Mapping[str, Tensor | Sequence[Tensor]]
"""Given rotations: "r1" [hidden, hidden]; "r2" [head_dim, head_dim], or one such a layer."""

_ORTHOGONAL = 1e-5  # largest entry of |R^T R - I| accepted: a float32 matrix has about 1e-6
_ROWS = 8192  # rows of an embedding that are float64 at a time


@dataclasses.dataclass(frozen=True)
class Rotations:
    """The rotations of one model; None and False leave a step out.

    Args:
        r1: applies R1 of the residual stream.
        r2: applies R2, one a layer.
        r4: whether the down projection gets the inverse of its online Hadamard.
        head_hadamard: whether the output projection gets the inverse of its own.
    """

    r1: Apply | None
    r2: Sequence[Apply] | None
    r4: bool
    head_hadamard: bool

    @classmethod
    def from_config(
        cls, config: QuarotConfig, geometry: Geometry, matrices: Matrices | None = None
    ) -> Rotations:
        """Make the rotations that `config` describes, the same for the same seed.

        Args:
            matrices: for `rotation="given"`, one entry for each of r1 and r2 that is on.

        Raises:
            ValueError: a matrix is missing, has the wrong shape or is not orthogonal; or matrices
                came for another kind of rotation.
        """
        if matrices and config.rotation != "given":
            raise ValueError(f'matrices: got some for rotation {config.rotation!r}, needs "given"')
        r1: Apply | None = None
        r2: Sequence[Apply] | None = None
        if config.rotation == "hadamard":
            signs = hadamard.random_signs(geometry.hidden, config.seed)

            def signed(x: Tensor) -> Tensor:
                return hadamard.transform(x * signs.to(x.device))

            r1, r2 = signed, [hadamard.transform] * geometry.layers
        elif config.rotation == "random":
            seed = config.seed * (geometry.layers + 1)
            r1 = _by_matrix(hadamard.random_orthogonal(geometry.hidden, seed))
            r2 = [
                _by_matrix(hadamard.random_orthogonal(geometry.head_dim, seed + 1 + layer))
                for layer in range(geometry.layers)
            ]
        elif config.rotation == "given":
            r1, r2 = _given(config, geometry, matrices or {})
        return cls(
            r1=r1 if config.r1 else None,
            r2=r2 if config.r2 else None,
            r4=config.r4,
            head_hadamard=config.head_hadamard,
        )


def rotate_model(
    model: Any, architecture: Architecture, config: QuarotConfig, matrices: Matrices | None = None
) -> None:
    """Fuse all rotations of `config` into a causal LM, in place.

    The outputs stay the same once the online transforms run: R4 on the down projection's input
    (`hadamard.transform`), the head Hadamard on the output projection's (`transform_heads`).

    Args:
        model: a transformers causal LM of this architecture, with float weights.
        matrices: as for `Rotations.from_config`.
    """
    geometry = architecture.geometry(model.config)
    rotations = Rotations.from_config(config, geometry, matrices)
    rotate_embeddings(model, architecture, rotations)
    for index, layer in enumerate(model.get_submodule(architecture.layers)):
        rotate_layer(layer, architecture, geometry, rotations, index)
    rotate_head(model, architecture, rotations)


def untie_embeddings(model: Any, architecture: Architecture) -> None:
    """Give the head its own copy of the embedding if the two are one parameter."""
    embedding = model.get_submodule(architecture.embedding)
    head = model.get_submodule(architecture.head)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(
            embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad
        )
    model.config.tie_word_embeddings = False
    for module in model.modules():  # what save_pretrained and post_init would tie again
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}


def rotate_embeddings(model: Any, architecture: Architecture, rotations: Rotations) -> None:
    """Rotate the residual stream where it begins: E <- E R1, untied from the head first."""
    if rotations.r1 is None:
        return
    untie_embeddings(model, architecture)
    _update_rows(model.get_submodule(architecture.embedding).weight, rotations.r1)


def rotate_head(model: Any, architecture: Architecture, rotations: Rotations) -> None:
    """Undo R1 where the residual stream ends: fold the final norm, head W <- W R1."""
    if rotations.r1 is None:
        return
    r1, norm = rotations.r1, model.get_submodule(architecture.final_norm)
    gamma = norm.weight.detach().double()
    _update_rows(model.get_submodule(architecture.head).weight, lambda rows: r1(rows * gamma))
    norm.weight.data.fill_(1)


def rotate_layer(
    layer: nn.Module,
    architecture: Architecture,
    geometry: Geometry,
    rotations: Rotations,
    index: int,
) -> None:
    """Fuse every rotation into one decoder layer, in place.

    With R1: both norms folded, readers and writers rotated. With R2: v and o. Then the inverses of
    the online transforms into o and down. One rounding a weight, whatever the number of steps.
    """
    a, g = architecture, geometry
    linears: dict[str, Any] = {path: layer.get_submodule(path) for path in a.linears}
    weights = {path: linear.weight.detach().double() for path, linear in linears.items()}
    biases = {
        path: linear.bias.detach().double()
        for path, linear in linears.items()
        if linear.bias is not None
    }
    if rotations.r1 is not None:
        for norm, readers in a.norm_readers.items():
            gamma = layer.get_parameter(f"{norm}.weight")
            for path in readers:
                weights[path] = rotations.r1(weights[path] * gamma.detach().double())
            gamma.data.fill_(1)
        for path in a.residual_writers:
            weights[path] = rotations.r1(weights[path].mT).mT
            if path in biases:
                biases[path] = rotations.r1(biases[path])
    if rotations.r2 is not None:
        r2 = rotations.r2[index]
        weights[a.v] = r2(weights[a.v].mT.unflatten(-1, (g.kv_heads, -1))).flatten(-2).mT
        if a.v in biases:
            biases[a.v] = r2(biases[a.v].unflatten(-1, (g.kv_heads, -1))).flatten()
        weights[a.o] = r2(weights[a.o].unflatten(-1, (g.heads, -1))).flatten(-2)
    if rotations.head_hadamard:
        heads = weights[a.o].unflatten(-1, (g.heads, -1))
        weights[a.o] = hadamard.transform_heads(heads).flatten(-2)
    if rotations.r4:
        weights[a.down] = hadamard.transform(weights[a.down])
    for path, weight in weights.items():
        linears[path].weight.data.copy_(weight)
    for path, bias in biases.items():
        linears[path].bias.data.copy_(bias)


def _update_rows(weight: Tensor, apply: Apply) -> None:
    """Replace each row of a large matrix by `apply` of it, a bounded number at a time."""
    for rows in weight.data.split(_ROWS):
        rows.copy_(apply(rows.double()))


def _by_matrix(matrix: Tensor) -> Apply:
    return lambda x: x @ matrix.to(x.device, x.dtype)


def _given(
    config: QuarotConfig, geometry: Geometry, matrices: Matrices
) -> tuple[Apply | None, list[Apply] | None]:
    """Check given matrices and return (r1, r2 a layer)."""
    needed = {name for name in ("r1", "r2") if getattr(config, name)}
    if matrices.keys() != needed:
        raise ValueError(
            f"matrices: got {sorted(matrices)}, needs {sorted(needed)}: what the config turns on"
        )
    r1: Apply | None = None
    r2: list[Apply] | None = None
    if config.r1:
        r1 = _by_matrix(_orthogonal("r1", matrices["r1"], geometry.hidden))
    if config.r2:
        given = matrices["r2"]
        if isinstance(given, Tensor) and given.ndim == 2:
            given = [given] * geometry.layers
        if len(given) != geometry.layers:
            raise ValueError(f"r2: got {len(given)} matrices, needs one, or {geometry.layers}")
        r2 = [
            _by_matrix(_orthogonal(f"r2[{layer}]", matrix, geometry.head_dim))
            for layer, matrix in enumerate(given)
        ]
    return r1, r2


def _orthogonal(name: str, matrix: Any, size: int) -> Tensor:
    """Return `matrix` in float64 if it is an orthogonal [size, size]."""
    if not isinstance(matrix, Tensor) or matrix.shape != (size, size):
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"{name}: got {shape}, needs a tensor of shape {(size, size)}")
    matrix = matrix.detach().double()
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    error = float((matrix.mT @ matrix - identity).abs().max())
    if not error <= _ORTHOGONAL:  # a NaN is not orthogonal either
        raise ValueError(
            f"{name}: not orthogonal: |R^T R - I| reaches {error:.1e}, needs ≤ {_ORTHOGONAL:.0e}"
        )
    return matrix
