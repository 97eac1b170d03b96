"""The head: the same logits as torch's linear layer, for any strides; it stays one."""

import copy
import pickle

import pytest
import torch
from torch import nn

from quarot.modules.head import Head, take_over


def head(bias=False):
    linear = nn.Linear(24, 50, bias=bias)
    take_over(linear)
    return linear


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_linear_layer(shape, bias):
    x, module = torch.randn(shape), head(bias)
    expected = nn.functional.linear(x, module.weight, module.bias)
    torch.testing.assert_close(module(x), expected)


def test_the_last_token_of_a_prompt_is_multiplied_as_a_row(monkeypatch):
    seen = []
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, *a: seen.append(x.stride()) or linear(x, *a)
    )
    prompt, module = torch.randn(1, 7, 24), head()
    last = module(prompt[:, -1:])
    assert seen == [(24, 1)] and last.shape == (1, 1, 50)
    torch.testing.assert_close(last, linear(prompt, module.weight)[:, -1:])


def test_it_survives_copies_and_leaves_others_alone():
    for module in (copy.deepcopy(head()), pickle.loads(pickle.dumps(head()))):
        assert type(module) is Head
    other = nn.Identity()
    take_over(other)
    assert type(other) is nn.Identity
