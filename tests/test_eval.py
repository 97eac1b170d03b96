"""eval.py: against values computed by hand, and against transformers' own loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from quarot import data, eval


class Bigram:
    """A causal LM whose logits for the next token depend on the current one only: a table."""

    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        self.table = logits
        self.rows: list[int] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert input_ids.shape[0] == 1, "one window at a time"
        self.rows.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[input_ids])


def table(probabilities: list[list[float]]) -> Bigram:
    return Bigram(torch.tensor(probabilities).log())


HALVES = table([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
SURE = table([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.25, 0.5]])


def test_perplexity_by_hand() -> None:
    # 0→1 (1/4), 1→1 (1/2) | 2→2 (1/2), 2→0 (1/4): the token across the windows (1→2) is not there.
    windows = torch.tensor([[0, 1, 1], [2, 2, 0]])
    result = eval.evaluate(HALVES, windows)
    assert result.tokens == 4
    assert result.perplexity == pytest.approx(2**1.5, rel=1e-6)
    assert (result.kld_mean, result.kld_p99, result.top1_agreement) == (None, None, None)
    assert eval.perplexity(HALVES, windows) == result.perplexity


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Bigram(torch.zeros(1000, 1000))
    windows = torch.randint(1000, (3, 700), generator=torch.Generator().manual_seed(0))
    assert eval.perplexity(model, windows) == pytest.approx(1000, rel=1e-5)


def test_divergence_and_agreement_by_hand() -> None:
    # KL(reference || model): row 0: ½ln(½/½) + ½ln(½/¼) = ½ln2; row 1: the same; row 2: 0.
    windows = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 2, 2]])
    result = eval.evaluate(HALVES, windows, SURE)
    rows = [0.5 * math.log(2)] * 2 + [0.0] + [0.5 * math.log(2)] + [0.0] * 4
    assert result.kld_mean == pytest.approx(np.mean(rows), abs=1e-7)
    assert result.kld_p99 == pytest.approx(np.percentile(rows, 99), abs=1e-7)


def test_the_reference_is_the_first_argument_of_the_divergence() -> None:
    # The other way round a token impossible under SURE has probability ¼: infinite divergence.
    result = eval.evaluate(SURE, torch.tensor([[0, 1, 2]]), HALVES)
    assert result.kld_mean == math.inf


def test_agreement_by_hand() -> None:
    ours = table([[0.6, 0.2, 0.2], [0.6, 0.2, 0.2], [0.2, 0.2, 0.6]])
    theirs = table([[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    # Contexts 0, 1, 2, 1: the two agree on 0 and 2.
    result = eval.evaluate(ours, torch.tensor([[0, 1, 2, 1, 0]]), theirs)
    assert result.top1_agreement == 0.5


def test_a_model_is_itself() -> None:
    model = Bigram(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)))
    windows = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(1))
    result = eval.evaluate(model, windows, model)
    assert result.kld_mean == pytest.approx(0, abs=1e-6)
    assert result.kld_p99 == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0


def test_percentile_is_numpys() -> None:
    values = torch.rand(1237, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.0, 0.5, 0.99, 1.0):
        ours = eval._percentile(values, share)
        assert ours == pytest.approx(np.percentile(values.numpy(), 100 * share), rel=1e-12)
    assert eval._percentile(torch.tensor([3.0]), 0.99) == 3.0


def test_windows_longer_than_the_row_blocks_are_whole() -> None:
    """The statistics go in blocks of rows: sizes around the block's must not lose a token."""
    generator = torch.Generator().manual_seed(0)
    model, other = (Bigram(torch.randn(20, 20, generator=generator)) for _ in range(2))
    for size in (eval._ROWS, eval._ROWS + 1, eval._ROWS + 2, 2 * eval._ROWS + 7):
        windows = torch.randint(20, (1, size), generator=generator)
        log_q = model.table.double().log_softmax(-1)[windows[0, :-1]]
        log_p = other.table.double().log_softmax(-1)[windows[0, :-1]]
        result = eval.evaluate(model, windows, other)
        nll = -log_q.gather(1, windows[0, 1:, None]).mean()
        assert result.tokens == size - 1
        assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-6)
        kld = (log_p.exp() * (log_p - log_q)).sum(-1)
        assert result.kld_mean == pytest.approx(kld.mean().item(), rel=1e-5)
        assert result.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=1e-5)


def test_models_see_one_window_at_a_time() -> None:
    model, reference = Bigram(torch.zeros(4, 4)), Bigram(torch.zeros(4, 4))
    eval.evaluate(model, torch.zeros(3, 9, dtype=torch.int64), reference)
    assert model.rows == reference.rows == [9, 9, 9]


def test_hopeless_and_broken_models_are_reported_as_such() -> None:
    hopeless = Bigram(torch.tensor([[2000.0, 0.0], [2000.0, 0.0]]))
    assert eval.perplexity(hopeless, torch.tensor([[0, 1, 1]])) == math.inf
    broken = Bigram(torch.full((2, 2), math.nan))
    result = eval.evaluate(broken, torch.tensor([[0, 1, 1]]), hopeless)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.kld_mean) and math.isnan(result.kld_p99)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_model(dtype: torch.dtype) -> None:
    """Against transformers' own loss, whose mean over equal windows is the same mean."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    windows = data.windows(torch.randint(97, (210,)), 50)
    with torch.inference_mode():
        losses = [model(w[None], labels=w[None]).loss.float() for w in windows]
    expected = torch.stack(losses).mean().exp().item()
    result = eval.evaluate(model, windows, model)
    assert result.tokens == 4 * 49
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.top1_agreement == 1.0


@pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 1), (1, 2, 3)])
def test_bad_windows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^windows: got shape \[.*\], needs \[count ≥ 1"):
        eval.evaluate(HALVES, torch.zeros(shape, dtype=torch.int64))


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="^reference: got a vocabulary of 4, needs the model's 3"):
        eval.evaluate(HALVES, torch.tensor([[0, 1, 2]]), Bigram(torch.zeros(4, 4)))
