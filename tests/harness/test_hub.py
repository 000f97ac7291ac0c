"""Whether the hub answers, and what is asked of it where it does not."""

from __future__ import annotations

import socket
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

from harness import hub


@pytest.fixture(autouse=True)
def _unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    hub.reachable.cache_clear()
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: (names, options))


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    asked = []

    def connect(place: tuple[str, int], timeout: float) -> Any:
        asked.append(place)
        if not answers:
            raise OSError("no route")
        return socket.socket()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "create_connection", connect)
    for _ in range(2):
        read = hub.read_split("owner/name", "main", split="test")
        assert read == (("owner/name", "main"), {"split": "test"})
    assert len(asked) == 1
    assert hub.reachable() is answers
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is not answers


def test_a_process_told_to_stay_offline_asks_nothing() -> None:
    assert not hub.reachable()


@pytest.mark.parametrize(
    ("endpoint", "proxies", "place"),
    [
        ("https://hub.example", {}, ("hub.example", 443)),
        ("http://hub.example", {}, ("hub.example", 80)),
        ("https://hub.example", {"https_proxy": "http://way.example:3128"}, ("way.example", 3128)),
        ("https://hub.example", {"https_proxy": "way.example:3128"}, ("way.example", 3128)),
        (
            "https://hub.example",
            {"https_proxy": "http://way.example:3128", "no_proxy": "hub.example"},
            ("hub.example", 443),
        ),
    ],
)
def test_the_hub_is_asked_the_way_its_files_come(
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    proxies: dict[str, str],
    place: tuple[str, int],
) -> None:
    asked = []

    def connect(place: tuple[str, int], timeout: float) -> Any:
        asked.append(place)
        return socket.socket()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(socket, "create_connection", connect)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    assert hub.reachable()
    assert asked == [place]
