"""Which documents are held out, and what passages keep of them."""

from __future__ import annotations

from tasks.domains import held_out, passages


def test_documents_are_held_out_whole_and_passages_lose_nothing() -> None:
    texts = [f"Sentence {i} is here. Another follows it. " * 120 for i in range(200)]
    share = sum(map(held_out, texts)) / len(texts)
    assert 0.02 < share < 0.12
    for text in texts[:5]:
        parts = list(passages(text))
        assert all(len(part) <= 2500 for part in parts)
        assert "".join("".join(parts).split()) == "".join(text.split())
    assert list(passages("Short.")) == ["Short."]
