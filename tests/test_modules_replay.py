"""Replay on the CPU: the same bits as op by op, and a new tape whenever something changed."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers import MODEL_SHAPES, tiny_model
from quarot.convert import convert
from quarot.modules import replay

STEPS = 5


def converted(preset="W4A8KV4", shape="gqa", dtype=torch.bfloat16, **options):
    model = tiny_model(**MODEL_SHAPES[shape], dtype=dtype)
    return convert(model, preset, progress=False, **options).eval()


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(replay, "enabled", True)
    replay._tapes.clear()


@torch.inference_mode()
def decode(model, cache, steps=STEPS, batch=1, prompt=3):
    """Return the last hidden states of some steps, of tokens that do not depend on them."""
    start, out = cache.get_seq_length(), []
    ids = (torch.arange(start, start + prompt + steps) * 7 + torch.arange(batch)[:, None]) % 50
    for part in ids.split([prompt] * bool(prompt) + [1] * steps, dim=1):
        out.append(model.model(part, past_key_values=cache).last_hidden_state)
    return out


def op_by_op(model, cache, **options):
    replay.enabled = False
    try:
        return decode(model, cache, **options)
    finally:
        replay.enabled = True


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def tapes(model):
    return [replay._tapes.get(layer) for layer in model.model.layers]


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_replay_equals_op_by_op(model, kind, batch):
    def cache():
        if kind == "static":
            return StaticCache(model.config, max_cache_len=20)
        return DynamicCache(config=model.config)

    actual = decode(model, cache(), batch=batch)
    assert all(tape.usable for tape in tapes(model))
    assert_same(actual, op_by_op(model, cache(), batch=batch))


@pytest.mark.parametrize("preset", ["W4A4KV4", "W4A8KV8", "W4A8KV4-g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_integer_preset_replays(preset, dtype):
    model = converted(preset, dtype=dtype)
    actual = decode(model, DynamicCache(config=model.config))
    assert all(tape.usable for tape in tapes(model))
    assert_same(actual, op_by_op(model, DynamicCache(config=model.config)))


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("W4A8KV16", {}),
        ("W16A16KV4", {}),
        ("W4A16KV4", {}),
        ("W4A8KV4", {"backend": "reference"}),
    ],
)
def test_what_uses_torch_in_between_is_not_replayed(preset, options):
    model = converted(preset, **options)
    actual = decode(model, DynamicCache(config=model.config))
    assert not any(tape is not None and tape.usable for tape in tapes(model))
    assert_same(actual, op_by_op(model, DynamicCache(config=model.config)))


def test_one_recording_serves_all_steps(model, monkeypatch):
    recorded = []
    record = replay._Tape.record
    monkeypatch.setattr(replay._Tape, "record", lambda *a: recorded.append(1) or record(*a))
    decode(model, DynamicCache(config=model.config))
    assert len(recorded) == len(model.model.layers)


def test_a_cache_that_grew_is_recorded_anew(model):
    grows = 62  # 64 tokens fit at first
    actual = decode(model, DynamicCache(config=model.config), prompt=grows)
    assert_same(actual, op_by_op(model, DynamicCache(config=model.config), prompt=grows))


def test_two_texts_in_turn(model):
    first, second = (DynamicCache(config=model.config) for _ in range(2))
    actual = decode(model, first) + decode(model, second, prompt=7)
    actual += decode(model, first, prompt=0) + decode(model, second, prompt=0)
    first, second = (DynamicCache(config=model.config) for _ in range(2))
    expected = op_by_op(model, first) + op_by_op(model, second, prompt=7)
    expected += op_by_op(model, first, prompt=0) + op_by_op(model, second, prompt=0)
    assert_same(actual, expected)


def test_outputs_are_not_overwritten(model):
    cache = DynamicCache(config=model.config)
    out = decode(model, cache)
    copies = [x.clone() for x in out]
    decode(model, cache, prompt=0)
    assert_same(out, copies)


@pytest.mark.parametrize("change", ["weights", "norm in place", "new norm", "reload"])
def test_changed_weights_count(change):
    model = converted()
    cache = DynamicCache(config=model.config)
    before = decode(model, cache)
    layer = model.model.layers[0]
    with torch.no_grad():
        if change == "weights":
            kernel = layer.kernels["down"]
            layer.unfuse()
            layer.mlp.down_proj.weight_scale.mul_(2)
            layer.fuse()
            assert layer.kernels["down"] is kernel
        elif change == "norm in place":
            layer.input_layernorm.weight.mul_(-2)
        elif change == "new norm":
            layer.input_layernorm.weight = torch.nn.Parameter(-layer.input_layernorm.weight)
        else:
            other = {n: t * 2 if n.endswith("scale") else t for n, t in model.state_dict().items()}
            model.load_state_dict(other)
    cache.crop(-STEPS)
    after = decode(model, cache, prompt=0)
    assert not torch.equal(before[-1], after[-1])
    cache.crop(-STEPS)
    assert_same(after, op_by_op(model, cache, prompt=0))


def test_hooks_are_called():
    model = converted()
    cache, seen = DynamicCache(config=model.config), []
    decode(model, cache)
    kernel = model.model.layers[0].kernels["qkv"]
    handle = kernel.register_forward_hook(lambda *_: seen.append(1))
    decode(model, cache, prompt=0)
    assert len(seen) == STEPS
    handle.remove()
    decode(model, cache, prompt=0)
    assert len(seen) == STEPS


def test_models_with_tapes_can_be_copied_and_pickled():
    model = converted()
    out = decode(model, DynamicCache(config=model.config))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.model.layers))):
        assert other is not None
    assert_same(decode(copy.deepcopy(model), DynamicCache(config=model.config)), out)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_may_change(model, threads):
    cache = DynamicCache(config=model.config)
    expected = decode(model, cache)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        cache.crop(-STEPS)
        assert_same(decode(model, cache, prompt=0), expected[1:])
    finally:
        torch.set_num_threads(before)


def test_a_full_static_cache_is_refused(model):
    cache = StaticCache(model.config, max_cache_len=5)
    decode(model, cache, steps=2)
    with pytest.raises(ValueError, match="max_cache_len"):
        decode(model, cache, steps=1, prompt=0)


def test_a_tape_refuses_what_does_not_fit():
    tape = replay.Tape([(0, 0)])
    with pytest.raises(RuntimeError, match="needs 1 inputs and recorded calls"):
        tape.run([0], (0, 0), 0)
    tape.begin()
    try:
        with pytest.raises(RuntimeError, match="records a tape already"):
            replay.Tape([]).begin()
    finally:
        tape.end()
