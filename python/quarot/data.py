"""Token streams: texts, their hash, and windows of token ids.

A result over a text is comparable only if the text is the same, so every result carries `sha256`.
Nothing here downloads anything.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PYDOC = "pydoc"
"""Name that `read_text` takes for `pydoc_topics`."""


def pydoc_topics() -> str:
    """Return the texts of Python's own `pydoc_data.topics`, in key order, joined by a newline.

    English prose and code of about 100,000 tokens that every Python carries. It differs from one
    Python version to the next.
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics) if isinstance(topics[key], str))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file as it stands (no newline translation); "pydoc" means `pydoc_topics`.

    Raises:
        ValueError: the file is missing, no file, or not UTF-8.
    """
    if str(path) == PYDOC:
        return pydoc_topics()
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(
            f"text: cannot read {str(path)!r} ({error.strerror}), needs a UTF-8 file or {PYDOC!r}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {str(path)!r} is not UTF-8 at byte {error.start}, needs a UTF-8 file"
        ) from None


def sha256(text: str) -> str:
    """Return the hex SHA-256 of `text` in UTF-8 (of a file read by `read_text`: of its bytes)."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokenize `text` once, without special tokens, with a transformers tokenizer.

    Returns:
        int64 `[tokens]`.
    """
    # verbose=False: a text longer than the model's context is what windows are for, no warning.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def windows(ids: Tensor, size: int, count: int | None = None) -> Tensor:
    """Cut `ids` `[tokens]` into its first `count` non-overlapping windows; the tail is dropped.

    Args:
        ids: one-dimensional token ids.
        size: tokens a window, at least 2 (a window predicts all but its first token).
        count: number of windows, or None for all that the ids fill.

    Returns:
        `[count, size]`, a view of `ids`.

    Raises:
        ValueError: fewer than `count` windows (or none) in `ids`, or a size below 2.
    """
    if ids.dim() != 1:
        raise ValueError(f"ids: got shape {list(ids.shape)}, needs [tokens]")
    if size < 2:
        raise ValueError(f"window: got {size}, needs at least 2 tokens")
    if count is not None and count < 1:
        raise ValueError(f"windows: got {count}, needs at least 1")
    available = ids.numel() // size
    needed = available if count is None else count
    if available < max(needed, 1):
        raise ValueError(
            f"windows: got a text of {ids.numel()} tokens = {available} windows of {size}, "
            f"needs {max(needed, 1)}"
        )
    return ids[: needed * size].view(needed, size)
