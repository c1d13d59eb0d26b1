"""Whether the model hub can be reached, found out once and fast.

Without a network, huggingface_hub tries each file several times with pauses between, which is half
a minute of silence before an unknown name is said to be one. A connection to the hub, or to the
proxy on the way, tells in a few seconds; where there is none, only the cache is looked into.
"""

import socket
import threading
import urllib.request
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants

PATIENCE_S = 3.0
"""For a name's address and a connection together."""


def can_ask_hub() -> bool:
    """Whether the hub may be asked (HF_HUB_OFFLINE) and answers."""
    return not constants.HF_HUB_OFFLINE and _is_reachable(constants.ENDPOINT)


@cache
def _is_reachable(endpoint: str) -> bool:
    """Whether a connection to `endpoint`, by the proxy that is set for it, is made in time."""
    found = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection(_address(endpoint), timeout=PATIENCE_S):
                found.set()
        except (OSError, UnicodeError):  # no such host, no route, refused; a name that is none
            return

    # In a thread, for nothing else bounds the time that looking up an address takes.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return found.is_set()


def _address(endpoint: str) -> tuple[str, int]:
    """Host and port to connect to first."""
    parts = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
