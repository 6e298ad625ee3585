"""locust: users who chat, whole and streamed, and look around, until ``WANTED`` requests are done.

``MODEL`` is in the environment. Ends with 1 where a request failed, or too few were made.
"""

from __future__ import annotations

import os
from typing import Any

import gevent
from locust import HttpUser, constant, events, task

WANTED = 30
ASKED = {
    "model": os.environ["MODEL"],
    "messages": [{"role": "user", "content": "Who is there?"}],
    "max_tokens": 8,
}


class Visitor(HttpUser):
    """One client that never waits."""

    wait_time = constant(0)

    @task(3)
    def chat(self) -> None:
        """A whole answer."""
        self.client.post("/v1/chat/completions", json=ASKED)

    @task(3)
    def stream(self) -> None:
        """A stream, to its end."""
        body = {**ASKED, "stream": True}
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True
        ) as response:
            lines = [line for line in response.iter_lines() if line]
            if lines[-1] != b"data: [DONE]":
                response.failure(f"the stream ends with {lines[-1][:80]!r}")

    @task(1)
    def look(self) -> None:
        """What is served."""
        self.client.get("/v1/models")


@events.init.add_listener
def end_after_enough(environment: Any, **_: Any) -> None:
    """As locust's own examples end a run: from a greenlet beside the users."""

    def watch() -> None:
        while environment.stats.total.num_requests < WANTED:
            gevent.sleep(0.1)
        environment.runner.quit()

    gevent.spawn(watch)


@events.quitting.add_listener
def tell(environment: Any, **_: Any) -> None:
    """What the process ends with."""
    total = environment.stats.total
    good = total.num_requests >= WANTED and not total.num_failures
    environment.process_exit_code = 0 if good else 1
