"""A generation loop for greedy search and sampling that leaves the GPU no time to wait.

    model.generate(**inputs, max_new_tokens=100, custom_generate=quarot.generate)

transformers prepares everything as ever (prompt, cache, processors of logits, stopping criteria);
only its loop is replaced, which costs a third of a millisecond a token of the host's time and waits
for the GPU after each. This one starts the next step before it looks at a token: while the GPU
computes, the host streams the token and asks whether to stop, and if so takes the step back. Tokens
are those of transformers' loop, random numbers included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from quarot.cache import QuantizedLayer

_INPUTS = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_SETTINGS = ("use_cache", "logits_to_keep")
_REFUSED = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **inputs: Any,
) -> Tensor:
    """Continue prompts, greedily or by sampling; transformers' `generate` calls this.

    Args:
        model: a causal LM, converted or not (the latter without the overlap).
        input_ids: int64 [batch, tokens], padded on the left.
        logits_processor, stopping_criteria, generation_config: as transformers prepared them.
        streamer: gets the prompt and each token [batch], one step late. To a model that is not
            quarot's it comes by functools.partial(quarot.generate, streamer=…) only.
        inputs: attention_mask, position_ids, past_key_values, inputs_embeds of the prompt.

    Returns:
        int64 [batch, tokens + new tokens].

    Raises:
        ValueError: another mode (beams, assisted …) or output than tokens is asked for.
    """
    _check(model, generation_config, stopping_criteria, inputs)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if streamer is not None:
        streamer.put(input_ids.cpu())
    length, last = input_ids.shape[1], max(stopping_criteria.max_length, input_ids.shape[1] + 1)
    ids = functional.pad(input_ids, (0, last - length))
    outputs = model._prefill(input_ids, generation_config, dict(inputs))
    cache = outputs.past_key_values
    steps = _Steps(model, cache, mask, positions, last - length)
    stop = _Stop(stopping_criteria, generation_config, ids)
    while True:
        scores = logits_processor(ids[:, :length], outputs.logits[:, -1].float())
        del outputs  # of a prompt they may be large
        if generation_config.do_sample:
            tokens = torch.multinomial(functional.softmax(scores, dim=-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        ids[:, length] = tokens = stop.padded(tokens)
        length += 1
        stop.ask(tokens, length)
        ahead = length < last and steps.may_run_ahead()
        if ahead:
            outputs = steps.next(tokens)
        try:
            if streamer is not None:
                streamer.put(stop.tokens())
            done = length == last or stop.all_done()
        except BaseException:
            if ahead:
                cache.crop(-1)
            raise
        if done:
            if ahead:
                cache.crop(-1)
            break
        if not ahead:
            outputs = steps.next(tokens)
    if streamer is not None:
        streamer.end()
    return ids[:, :length]


class _Steps:
    """The model's steps after the prompt.

    Args:
        mask: [batch, tokens of the cache], 0 = padding, or None;  positions: [batch, tokens];
        new: most tokens to come.
    """

    def __init__(
        self, model: Any, cache: Any, mask: Tensor | None, positions: Tensor | None, new: int
    ) -> None:
        self.model, self.cache = model, cache
        self.mask = self.positions = None
        self.ours = isinstance(cache.layers[0], QuantizedLayer)
        if mask is not None and not mask.all():  # looked at once, not every step
            self.keys = mask.shape[1]
            self.mask = functional.pad(mask, (0, new), value=1)
            if self.ours:  # a form that nobody needs to look into
                self.mask = self.mask.bool()[:, None, None]
        if positions is not None:
            self.positions = positions[:, -1:]

    def may_run_ahead(self) -> bool:
        """Tell whether a step can be started, and taken back, without waiting for the device."""
        layer = self.cache.layers[0]
        if not self.ours or not layer.k_codes.is_cuda:
            return False
        return layer.max_cache_len is None or layer.length < layer.max_cache_len

    def next(self, tokens: Tensor) -> Any:
        """Return the model's outputs for one more token [batch]."""
        mask = self.mask
        if mask is not None:
            self.keys += 1
            mask = mask[..., : self.keys]
        if self.positions is not None:
            self.positions = self.positions + 1
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=1,
        )


class _Stop:
    """Which sequences are finished. Lengths and end tokens are looked at on the host."""

    def __init__(
        self, criteria: StoppingCriteriaList, config: GenerationConfig, ids: Tensor
    ) -> None:
        self.ids = ids
        self.end: set[int] = set()
        self.pads = False  # whether finished sequences get padding
        self.others = StoppingCriteriaList()
        for one in criteria:
            if type(one) is EosTokenCriteria:
                self.end |= set(one.eos_token_id.tolist())
            elif type(one) is not MaxLengthCriteria:
                self.others.append(one)
            self.pads |= hasattr(one, "eos_token_id")
        pad = getattr(config, "_pad_token_tensor", None)  # transformers' own, on the device
        self.pad = 0 if pad is None else int(pad)
        batch, on_gpu = ids.shape[0], ids.is_cuda
        self.finished = [False] * batch
        self.finished_there: Tensor | None = None  # the same on the device, once there are any
        # Tokens and what the other criteria say of them, [2, batch].
        self.host = torch.empty(2, batch, dtype=torch.int64, pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None

    def padded(self, tokens: Tensor) -> Tensor:
        """Return tokens [batch] with padding where a sequence is finished."""
        if self.finished_there is None or not self.pads:
            return tokens
        return tokens.masked_fill(self.finished_there, self.pad)

    def ask(self, tokens: Tensor, length: int) -> None:
        """Start to bring tokens [batch], the last of `length`, to the host."""
        self.host[0].copy_(tokens, non_blocking=True)
        if self.others:
            self.host[1].copy_(self.others(self.ids[:, :length], None), non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(tokens.device))

    def tokens(self) -> Tensor:
        """Return the tokens asked for, on the host."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host[0].clone()

    def all_done(self) -> bool:
        """Tell whether all sequences are finished, those whose last tokens were asked for too."""
        tokens = self.tokens().tolist()
        others = self.host[1].tolist() if self.others else [False] * len(tokens)
        before = list(self.finished)
        for row, token in enumerate(tokens):
            self.finished[row] |= token in self.end or bool(others[row])
        if self.finished != before:
            self.finished_there = torch.tensor(self.finished, device=self.ids.device)
        return all(self.finished)


def _check(
    model: Any, config: GenerationConfig, criteria: StoppingCriteriaList, inputs: dict[str, Any]
) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"custom_generate: quarot.generate got arguments for {mode.value}, needs greedy search "
            "or sampling; leave custom_generate out"
        )
    for name in _REFUSED:
        if getattr(config, name, None):
            raise ValueError(f"{name}: got True, quarot.generate returns tokens only")
    if model.config.is_encoder_decoder:
        raise ValueError("model: got an encoder-decoder model, quarot.generate needs a causal LM")
    if not inputs.get("use_cache", True):
        raise ValueError("use_cache: got False, quarot.generate needs the cache")
    if criteria.max_length is None:
        raise ValueError("max_length: got None, quarot.generate needs a limit; set max_new_tokens")
    cache = inputs.get("past_key_values")
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"past_key_values: got {type(cache).__name__}, needs a transformers Cache")
    unknown = [
        name
        for name, value in inputs.items()
        if name not in (*_INPUTS, *_SETTINGS) and value is not None
    ]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: quarot.generate takes {', '.join(_INPUTS)}, and no other "
            "arguments of the model"
        )
