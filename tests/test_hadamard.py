"""hadamard.py: integer identities, the pinned format, the transform against dense products."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import dense_hadamard
from quarot import hadamard

MODEL_SIZES = {
    5120: (5120, 20, 8),
    14336: (14336, 28, 9),
    28672: (28672, 28, 10),
    11008: (11008, 172, 6),
    13824: (13824, 108, 7),
    576: (576, 36, 4),
    1536: (1536, 12, 7),
    18944: (18944, 148, 7),
    29568: (4224, 132, 5),  # 7 blocks
    4096: (4096, 1, 12),
    40: (40, 20, 1),
    92: (4, 1, 2),  # no construction of order 92
    9: (1, 1, 0),
    15: (1, 1, 0),
    1: (1, 1, 0),
}


def sha256(matrix: torch.Tensor) -> str:
    return hashlib.sha256(matrix.numpy().tobytes()).hexdigest()


def test_orders_are_every_multiple_of_four_but_two():
    assert hadamard.factor_orders() == (1, 2, *(n for n in range(4, 173, 4) if n not in (92, 116)))


@pytest.mark.parametrize("order", hadamard.factor_orders())
def test_factor_is_hadamard_in_integers(order):
    matrix = hadamard.factor_matrix(order)
    assert matrix.dtype == torch.int8 and matrix.shape == (order, order)
    assert matrix.abs().eq(1).all()
    wide = matrix.long()
    assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("order", hadamard.factor_orders())
def test_factor_is_the_one_checkpoints_hold(order):
    assert sha256(hadamard.factor_matrix(order)) == FACTOR_SHA256[order]


def test_factors_are_copies():
    hadamard.factor_matrix(12).zero_()
    assert hadamard.factor_matrix(12).abs().eq(1).all()


@pytest.mark.parametrize("order", [0, -4, 3, 92, 116, 176])
def test_factor_refuses_other_orders(order):
    with pytest.raises(ValueError, match=f"^order: got {order}, needs one of 1, 2, 4, 8, 12"):
        hadamard.factor_matrix(order)


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_split_of_model_sizes(n):
    assert hadamard.split(n) == MODEL_SIZES[n]


@given(st.integers(1, 1 << 16))
def test_split_is_the_largest_block_and_smallest_factor(n):
    size, factor, power = hadamard.split(n)
    assert size == factor << power and n % size == 0
    fitting = [
        (order << p, order)
        for order in hadamard.factor_orders()
        for p in range(17)
        if n % (order << p) == 0
    ]
    largest = max(block for block, _ in fitting)
    assert size == largest
    assert factor == min(order for block, order in fitting if block == largest)


def test_split_refuses_no_dimension():
    with pytest.raises(ValueError, match="^n: got 0"):
        hadamard.split(0)


@pytest.mark.parametrize("n", [1, 2, 12, 28, 64, 96, 172, 576, 1536, 2048])
def test_transform_is_the_dense_product(n):
    x = torch.randn(3, 2, n, dtype=torch.float64)
    expected = x @ dense_hadamard(n) / n**0.5
    torch.testing.assert_close(hadamard.transform(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "size"), [(576, 36), (96, 12), (64, 1), (100, 20), (29568, 4224)])
def test_transform_of_blocks(n, size):
    x = torch.randn(2, n, dtype=torch.float64)
    if size < 1000:
        expected = (x.view(2, -1, size) @ dense_hadamard(size)).view(2, n) * 0.5
    else:
        expected = torch.cat([hadamard.transform(b, scale=0.5) for b in x.split(size, dim=-1)], -1)
    torch.testing.assert_close(
        hadamard.transform(x, size, scale=0.5), expected, rtol=1e-13, atol=1e-12
    )


def test_transform_is_orthonormal_by_default():
    x = torch.randn(4, 688, dtype=torch.float64)
    torch.testing.assert_close(hadamard.transform(x).norm(dim=-1), x.norm(dim=-1))


def test_transform_with_a_given_factor():
    factor = hadamard.factor_matrix(12).T.contiguous()
    x = torch.randn(5, 48, dtype=torch.float64)
    sylvester = dense_hadamard(4)
    expected = x @ torch.kron(factor.double(), sylvester)
    actual = hadamard.transform(x, 48, scale=1.0, factor=factor)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(actual, hadamard.transform(x, 48, scale=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transform_rounds_16_bit_types_once(dtype):
    x = torch.randn(8, 576).to(dtype)
    assert torch.equal(hadamard.transform(x), hadamard.transform(x.float()).to(dtype))


def test_transform_keeps_shape_of_empty_and_strided_inputs():
    assert hadamard.transform(torch.empty(0, 64)).shape == (0, 64)
    assert hadamard.transform(torch.empty(3, 0)).shape == (3, 0)
    x = torch.randn(64, 6)
    assert torch.equal(hadamard.transform(x.T), hadamard.transform(x.T.contiguous()))


@pytest.mark.parametrize(("n", "size"), [(64, 3), (64, 0), (64, -2), (64, 128), (92, 92), (36, 18)])
def test_transform_refuses_sizes(n, size):
    with pytest.raises(ValueError, match=f"^size: got {size} for a last dimension of {n}"):
        hadamard.transform(torch.zeros(n), size)


def test_transform_heads_is_across_heads():
    x = torch.randn(5, 12, 8, dtype=torch.float64)
    expected = torch.einsum("thd,hg->tgd", x, dense_hadamard(12)) / 12**0.5
    torch.testing.assert_close(hadamard.transform_heads(x), expected)
    pairs = hadamard.transform_heads(x, 2)
    both = torch.stack((x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]), 1) / 2**0.5
    torch.testing.assert_close(pairs[:, :2], both)


def test_transform_differentiates_after_inference_mode():
    """The cached factor must not be an inference tensor."""
    hadamard._factor.cache_clear()
    hadamard._factor_like.cache_clear()
    with torch.inference_mode():
        hadamard.transform(torch.randn(12))
    x = torch.randn(12, requires_grad=True)
    hadamard.transform(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_random_signs_are_seeded():
    signs = hadamard.random_signs(4096, seed=3)
    assert signs.dtype == torch.int8 and signs.abs().eq(1).all()
    assert signs.sum().abs() < 400  # about six standard deviations
    assert torch.equal(signs, hadamard.random_signs(4096, seed=3))
    assert not torch.equal(signs, hadamard.random_signs(4096, seed=4))
    assert sha256(signs) == SIGNS_SHA256


def test_random_orthogonal_is_orthogonal_and_seeded():
    q = hadamard.random_orthogonal(96, seed=1)
    assert q.dtype == torch.float64
    torch.testing.assert_close(q @ q.T, torch.eye(96, dtype=torch.float64))
    torch.testing.assert_close(q, hadamard.random_orthogonal(96, seed=1), rtol=0, atol=1e-12)
    assert not torch.allclose(q, hadamard.random_orthogonal(96, seed=2))


def test_random_orthogonal_differs_by_roundings_only_over_threads():
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(hadamard.random_orthogonal(192, seed=1))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


SIGNS_SHA256 = "0a55e7c42cb6e491fee5a4e36cf5fec83234d8d8c9903135d65f4c6540444190"

FACTOR_SHA256 = {
    1: "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a",
    2: "ae0c359ec39763b63fab5028b9c20bdc187b02cf0b81eed343de9b44a84c32c1",
    4: "14edb060b895542e36542bfe57c990c3ab60c74c6ded991c127ff28bf669f4aa",
    8: "7c99a8eda1a433afd28577a0d930873985123e34c4999f5e6a60e393c505a36d",
    12: "db7478025ce74776a8a2669368885b71737288dabf1e23985366a367b4f78ab9",
    16: "4173cdf0377bf83a777e9674bf71f5b1cbb97a7c767d5b8465e27b04c375ab1f",
    20: "d04b560308676ee7cb59dd0f11653ead6c5f5efcbe97f1b57fe11bd39ee46faa",
    24: "1b6d8ae9dab6cce76d17eb65ca904b3f64159d48a7ee1835f6a8ec99e629cfdd",
    28: "3ec6c53133760a03e1b5a4e9c15c83dd33a4a51d0bc97bffc2618262d0b06676",
    32: "0b71401da96bcee9b8441720c63918f3485d8541ed6dca419199d56c43128853",
    36: "1a7aed2f42a8c71de2ae13e765a6df2c2023519ef899b00d5d0baa7ee26f341b",
    40: "3c2e966aff899a31dcc64a9536d7f95ee8b86b6b1d0f35991fef2de1b351cf96",
    44: "7608149d896734a0526d38f2538474511db07117b2551d012c30cd4f07e6a477",
    48: "bec212a1e86c9aeb9c17b535432e179af7839cc9d15cbcab8874b2b576a67732",
    52: "977a8d950dbfb40e0fdc36a532867fa9b43486755ed06b76b873a435e97ca125",
    56: "64d45028d9edb451ff1476624c7add8d51925202e172f0082f4e68e65c750ffb",
    60: "91a505ae266d3871fefff665af8234c0af0e225d5b5438311f0a63a803939a2f",
    64: "4be469934f00a70b701ba4d1d2f489d817feb9fce017ad0decb3433bb851aae0",
    68: "90f5a68830fdaf41fbf7fbc86f90268423e06537197f01c2266ba95671be2d23",
    72: "a73fb3d0ea2ac002c24b6866009cc874a4d05de6596c866c7ffe1b91c53bbb7f",
    76: "290dc2c593bbcba4e222e035aa4efb86901c43a06037e7c62bc84ffd3bd54197",
    80: "a20b74d8edca3569b964cbc4557fa794b56ef6d821577f3318b37e2ef4df25e7",
    84: "698e79250ff2545aa3b67b5f7670ecab8f67b9ecd74d8ad790c681345c033ec6",
    88: "0d8079c59166e29c7f64c1546f799bb4a8b9cbabdedb06164965908f1662b917",
    96: "4f80ce30bdc45b44cada3fa21d69f226bbd1fb4542edb4504ae8c8f83c69fe44",
    100: "0150c4eae139444b3099631748425a294c31148924ffec4a47ca8e89896275ac",
    104: "f8007b07261281d17aa798b418f74428384e74680311ce065a325e09f496b22b",
    108: "7deb180ca8331131e11b581731bbc5a32d5d2c0a6c1e19b9e79c1a6718fee996",
    112: "4a2cf9c35b7d8b27f78866924ff88a4ab1298aefd5d22a6de8636ccdecf70245",
    120: "2dda9de3135eefdcc4524951afca925eb3c9fdc665cc158a89aadcfdf211b084",
    124: "afa026e6da7dbf96769c9ae5171bbd810e79bfadced95d13779446bbb231b0f2",
    128: "6c75072bc838cd31cf9d36107ed40203803153bb786269c7ef3e53e17ba46fee",
    132: "1a068e9d8c241a50fc7358ecbb990cbd1a09ae40831857bb38e1ee28bbcf5914",
    136: "8956d8771454fc9a0131e26b8dc4f8f4353a51154dc81fbfa094dd546bc7bd4b",
    140: "902eb66771c67a6bb94b14a2e76ed61dd7750a6e5ef6ba36d100274666339d8f",
    144: "4de8fb9c23e3a1b915af4f95bff88dfbd97b8488b5b6e005a9f40d675ca110db",
    148: "1a8964dfe75c61f5113b1c7a953a939daecaa628da6f83156e29b9059eec94ed",
    152: "1131879e2ef06cb7e8e2d194aecfaff0dafcc7216097080b9e779c7aae995a95",
    156: "1aac7fad336c39a5943e7bdc4b63483b47cfd0a010391e6366d9f4d06343f9a3",
    160: "d622ce47379dc1bef87336433ba69a91dbf037ef04ecfe0fbdb5e5c0e199c44d",
    164: "4f5d6f926990bd87a719842fb6c250ff930d4cddb675f6f8dfc6a26702058e53",
    168: "680392cf46d7f6a5f56f797c4521b27be23832d05c0be8a3a5705f94f28d7472",
    172: "1473e433b76ae27da96d1c5f78be917e11345fb7a8b5efded1035cefedf209a5",
}
