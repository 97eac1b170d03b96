"""Hadamard matrices, the transform by them, random signs and random orthogonal matrices.

A transform of `size` entries multiplies a row vector by H = H_K (x) H_2^p, with H_2^p Sylvester's
matrix and H_K, the *factor*, one of the +-1 matrices built here; K * 2^p = size. Factors exist for
1, 2 and every multiple of 4 up to 172 except 92 and 116. They need not be symmetric, and they are
part of the checkpoint format: weights are stored multiplied by them.

Constructions (Horadam, "Hadamard Matrices and Their Applications", 2007, chapter 2), first match:
Sylvester's doubling of 1 for powers of two; Paley I, q + 1 for a prime power q = 3 mod 4; Paley II,
2 (q + 1) for a prime power q = 1 mod 4; Williamson for 156 and 172; doubling of order / 2.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MAX_FACTOR = 172
"""Largest order of a factor."""

_RADIX = 5  # bits of the Sylvester part in one product; 2-3x faster than a pass a bit (2048 x 1536)

# First rows of the four symmetric circulants A, B, C, D of a Williamson matrix: bit i (i <= n // 2,
# then mirrored) set means +1 in column i.
_WILLIAMSON = {
    156: (39, (0x320A7, 0x25167, 0x50C8F, 0xB82B1)),
    172: (43, (0x325E3, 0xBD4D7, 0x2CA1FB, 0x1BAF31)),
}


def factor_matrix(order: int) -> Tensor:
    """Return the Hadamard factor of `order`: int8 [order, order] on the CPU, entries +-1.

    Raises:
        ValueError: there is no construction of that order.
    """
    if order not in factor_orders():
        raise ValueError(
            f"order: got {order}, needs one of {', '.join(map(str, factor_orders()))} "
            "(the orders of Hadamard matrices that quarot constructs)"
        )
    return _factor(order).clone()


@functools.cache
def factor_orders() -> tuple[int, ...]:
    """Return the orders `factor_matrix` constructs, ascending."""
    return tuple(order for order in range(1, MAX_FACTOR + 1) if _exists(order))


@functools.lru_cache(maxsize=1024)
def split(n: int) -> tuple[int, int, int]:
    """Return `(size, K, p)` of the largest transformable block of n entries.

    `size` = K * 2^p is the largest such product that divides n, K the smallest factor that reaches
    it (1 for a power of two): 5120 -> (5120, 20, 8), 29568 -> (4224, 132, 5), 9 -> (1, 1, 0).

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, needs a dimension ≥ 1")
    sizes = []
    for factor in factor_orders():
        if n % factor == 0:
            cofactor = n // factor
            power = (cofactor & -cofactor).bit_length() - 1
            sizes.append((factor << power, -factor, power))
    size, factor, power = max(sizes)
    return size, -factor, power


def transform(
    x: Tensor,
    size: int | None = None,
    scale: float | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Multiply each block of `size` entries of the last dimension by H: scale * x @ H.

    Args:
        x: [..., n], float64, float32, bfloat16 or float16.
        size: block length, K * 2^p and a divisor of n; None = the largest, 1 = no transform.
        scale: None = 1 / sqrt(size), which makes the transform orthonormal.
        factor: [K, K], in place of the constructed one of this size.

    Returns:
        Tensor of x's shape and dtype. float64 and float32 compute in their own precision, 16-bit
        types in float32 with one rounding. Differentiable. O(n (K + log n)) a row.

    Raises:
        ValueError: `size` does not divide n, or no factor fits it.
    """
    n = x.shape[-1]
    if n == 0:
        return x.clone()
    if size is None:
        size = split(n)[0]
    order = split(max(size, 1))[1] if factor is None else factor.shape[0]
    power = (size // order).bit_length() - 1
    if size < 1 or n % size or order << power != size:
        needed = "a constructible factor" if factor is None else f"{order}, the factor's order"
        raise ValueError(
            f"size: got {size} for a last dimension of {n}, needs a divisor of it of the form "
            f"K * 2^p with K {needed}"
        )
    if scale is None:
        scale = 1 / math.sqrt(size)
    y = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # Sylvester's H_2^p is a product of H_2 on every bit of the index: five bits a matrix product.
    for low in range(0, power, _RADIX):
        bits = min(_RADIX, power - low)
        sylvester = _factor_like(1 << bits, y.dtype, y.device)
        if low == 0:  # symmetric, so the lowest bits may take the faster product from the right
            y = y.reshape(-1, 1 << bits) @ sylvester
        else:
            y = sylvester @ y.reshape(-1, 1 << bits, 1 << low)
    if order > 1:
        matrix = _factor_like(order, y.dtype, y.device) if factor is None else factor.to(y)
        y = matrix.mT @ y.reshape(-1, order, 1 << power)
    return (y * scale).reshape(x.shape).to(x.dtype)


def transform_heads(
    x: Tensor,
    heads: int | None = None,
    scale: float | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Transform [..., H, D] across the heads, in blocks of `heads`: scale * x (H_heads (x) I_D).

    Same rules as `transform`, on the dimension before the last.
    """
    return transform(x.mT, heads, scale, factor).mT.contiguous()


def random_signs(n: int, seed: int) -> Tensor:
    """Return n random signs: int8 [n] of +-1 on the CPU, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1


def random_orthogonal(n: int, seed: int) -> Tensor:
    """Return a uniformly random orthogonal matrix: float64 [n, n] on the CPU, seeded.

    The seed fixes the matrix up to rounding, not its last bits: those depend on LAPACK and its
    number of threads. A checkpoint is unaffected, because its weights contain the matrix.

    QR of a Gaussian matrix with the signs of R's diagonal moved into Q (Mezzadri, "How to generate
    random matrices from the classical compact groups", 2007, section 5).
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _exists(order: int) -> bool:
    return (
        order in (1, 2)
        or order in _WILLIAMSON
        or _paley_field(order) is not None
        or (order % 4 == 0 and _exists(order // 2))
    )


@functools.cache
def _factor(order: int) -> Tensor:
    # Entries are small integers throughout, so int8 is exact. A cached tensor must not be an
    # inference tensor: it is shared with callers that differentiate.
    with torch.inference_mode(False):
        field = _paley_field(order)
        if order == 1:
            return torch.ones(1, 1, dtype=torch.int8)
        if field is not None:
            return _paley(field, order)
        if order in _WILLIAMSON:
            return _williamson(*_WILLIAMSON[order])
        half = _factor(order // 2)
        return torch.cat((torch.cat((half, half), 1), torch.cat((half, -half), 1)))


@functools.lru_cache(maxsize=64)
def _factor_like(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _factor(order).to(device, dtype)


def _paley_field(order: int) -> int | None:
    """Return the q of the Paley construction used for `order`, None for the other orders."""
    if order % 4 or order & (order - 1) == 0:
        return None  # powers of two are Sylvester's
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return order - 1
    if (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1):
        return order // 2 - 1
    return None


def _paley(q: int, order: int) -> Tensor:
    """Paley I (order q + 1: I + C, C skew) or II (order 2 (q + 1), C symmetric) from GF(q)."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if q % 4 == 1 else -1
    conference[1:, 1:] = _quadratic_residues(q)
    identity = torch.eye(q + 1, dtype=torch.int8)
    if order == q + 1:
        return identity + conference
    return torch.kron(conference, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)) + torch.kron(
        identity, torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    )


def _quadratic_residues(q: int) -> Tensor:
    """Return Q int8 [q, q] with Q[i, j] = character of e_i - e_j: 0, +1 for a square, else -1.

    Element i of GF(p^m) is the polynomial whose coefficients are the base-p digits of i, modulo the
    first x^m - c(x) (c counted the same way) for which x has order q - 1. Then every non-zero
    element is a power of x, so this is a field, and its squares are the even powers.
    """
    p, m = _prime_power(q) or (q, 1)
    for code in range(1, q):
        reduction = _digits(code, p, m)
        powers = [_digits(1, p, m)]
        while len(powers) < q:
            *rest, top = powers[-1]
            shifted = (0, *rest)
            product = tuple((s + top * c) % p for s, c in zip(shifted, reduction, strict=True))
            if product == powers[0] or not any(product):
                break
            powers.append(product)
        if len(powers) == q - 1:
            break
    else:
        raise AssertionError(f"GF({q}) has no primitive polynomial")
    character = {element: 1 - 2 * (exponent % 2) for exponent, element in enumerate(powers)}
    elements = [_digits(i, p, m) for i in range(q)]
    return torch.tensor(
        [
            [
                character.get(tuple((s - t) % p for s, t in zip(a, b, strict=True)), 0)
                for b in elements
            ]
            for a in elements
        ],
        dtype=torch.int8,
    )


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, m) with q = p^m and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    m = round(math.log(q, p))
    return (p, m) if p**m == q else None


def _digits(value: int, base: int, count: int) -> tuple[int, ...]:
    return tuple(value // base**i % base for i in range(count))


def _williamson(n: int, masks: tuple[int, ...]) -> Tensor:
    column = torch.arange(n)
    distance = (column[:, None] - column).abs()
    distance = torch.minimum(distance, n - distance)
    a, b, c, d = (((mask >> distance & 1) * 2 - 1).to(torch.int8) for mask in masks)
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])
