"""The model hub: whether it answers, and its data sets."""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import Any


@cache
def reachable(timeout: float = 3.0) -> bool:
    """Whether the model hub answers, or the proxy through which it is asked; asked once."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    from huggingface_hub.constants import ENDPOINT

    hub = urlsplit(ENDPOINT)
    proxies = {} if proxy_bypass(hub.hostname or "") else getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    if proxy:
        hub = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    try:
        place = (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443))
        socket.create_connection(place, timeout=timeout).close()
    except OSError:
        return False
    return True


def read_split(name: str, *configuration: str, **options: Any) -> Any:
    """A split of a data set, as `datasets.load_dataset` gives it; its errors are raised.

    Where the hub does not answer, only what is cached: each file would be asked for six times,
    with pauses.
    """
    import datasets
    from huggingface_hub import constants

    if not reachable():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return datasets.load_dataset(name, *configuration, **options)
