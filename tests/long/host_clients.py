"""Clients of an HTTP gateway that run on another host; started by ``reliability_hosts``.

python -m tests.long.host_clients URL NUM_STREAMS NUM_TOKENS

Each client asks again as soon as it has its answer, until the process is killed. Stdout has a line
for each event: the client's number, ``call``, ``delta`` or ``error``, and the monotonic time (that
of this machine: pretended hosts share it) or the error's words.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
import urllib.request

_LIMIT_S = 300.0
_RETRY_S = 0.05
_LOCK = threading.Lock()


def say(number: int, event: str, what: object) -> None:
    """Print one line."""
    with _LOCK:
        sys.stdout.write(f"{number} {event} {what}\n")
        sys.stdout.flush()


def ask(url: str, number: int, seed: int, num_tokens: int) -> None:
    """One streamed call. Raises ``OSError``, and ``ValueError`` for a stream with an error."""
    body = {
        "prompt": f"ROMEO {number}:",
        "max_tokens": num_tokens,
        "temperature": number % 2,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_LIMIT_S) as answer:
        say(number, "call", time.monotonic())
        for line in answer:
            if line.startswith(b"data: {"):
                if b'"error"' in line:
                    raise ValueError(line.decode().strip())
                say(number, "delta", time.monotonic())


def repeat(url: str, number: int, num_tokens: int) -> None:
    """One client."""
    for seed in itertools.count():
        try:
            ask(url, number, seed, num_tokens)
        except (OSError, ValueError) as err:
            say(number, "error", f"{type(err).__name__}: {err}")
            time.sleep(_RETRY_S)


def main() -> None:
    """See the module."""
    url, num_streams, num_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for number in range(num_streams):
        threading.Thread(target=repeat, args=(url, number, num_tokens)).start()


if __name__ == "__main__":
    main()
