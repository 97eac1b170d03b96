"""data.py: the same text, the same windows, everywhere."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarot import data


def test_pydoc_topics_is_every_topic_in_key_order() -> None:
    from pydoc_data.topics import topics

    text = data.pydoc_topics()
    assert len(text) == sum(map(len, topics.values())) + len(topics) - 1
    assert text.startswith(topics[min(topics)] + "\n")
    assert text.endswith("\n" + topics[max(topics)])
    assert data.read_text("pydoc") == text


def test_read_text_translates_no_newline(tmp_path: Path) -> None:
    raw = "a\r\nb\rc\n\u00e9".encode()
    (tmp_path / "t.txt").write_bytes(raw)
    text = data.read_text(tmp_path / "t.txt")
    assert text == "a\r\nb\rc\né"
    assert data.sha256(text) == hashlib.sha256(raw).hexdigest()


def test_read_text_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^text: cannot read .*No such file.* needs a UTF-8 file"):
        data.read_text(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="^text: cannot read .*[Dd]irectory"):
        data.read_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 at byte 2"):
        data.read_text(tmp_path / "latin.txt")


def test_sha256_of_a_known_text() -> None:
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert data.sha256("abc") == known


def test_tokenize_asks_for_no_special_tokens() -> None:
    calls = []

    def tokenizer(text: str, **options: bool) -> dict[str, list[int]]:
        calls.append((text, options["add_special_tokens"]))
        return {"input_ids": [5, 6, 7]}

    ids = data.tokenize(tokenizer, "abc")
    assert ids.dtype == torch.int64 and ids.tolist() == [5, 6, 7]
    assert calls == [("abc", False)], "tokenised once"


@given(tokens=st.integers(2, 200), size=st.integers(2, 50), data_=st.data())
def test_windows_are_the_head_of_the_stream(tokens: int, size: int, data_: st.DataObject) -> None:
    ids = torch.arange(tokens)
    available = tokens // size
    if available == 0:
        with pytest.raises(ValueError, match="^windows: got a text"):
            data.windows(ids, size)
        return
    count = data_.draw(st.integers(1, available))
    cut = data.windows(ids, size, count)
    assert cut.shape == (count, size)
    assert torch.equal(cut.flatten(), ids[: count * size])
    assert data.windows(ids, size).shape == (available, size)


@pytest.mark.parametrize(
    ("ids", "size", "count", "message"),
    [
        (torch.arange(10), 4, 3, "windows: got a text of 10 tokens = 2 windows of 4, needs 3"),
        (torch.arange(3), 4, None, "windows: got a text of 3 tokens = 0 windows of 4, needs 1"),
        (torch.arange(10), 1, 1, "window: got 1, needs at least 2 tokens"),
        (torch.arange(10), 4, 0, "windows: got 0, needs at least 1"),
        (torch.arange(10).view(2, 5), 4, 1, "ids: got shape [2, 5], needs [tokens]"),
    ],
)
def test_windows_refuse(ids: torch.Tensor, size: int, count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        data.windows(ids, size, count)
