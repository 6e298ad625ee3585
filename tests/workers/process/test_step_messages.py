"""A step's outputs by gateway and message."""

from __future__ import annotations

from workers.process.step_messages import step_messages
from workers.requests.inspection import NamedArray
from workers.requests.request import TokenOutput

ARRAY = NamedArray(name="logits", shape=(1,), dtype="float32", data=bytes(4))
OWNERS = {"a": "one", "b": "two", "c": "one", "d": "one"}


def output(name: str, choice: int = 0, score: float | None = None, arrays: int = 0) -> TokenOutput:
    return TokenOutput(
        request_id=name,
        attempt=0,
        choice=choice,
        index=0,
        score=score,
        arrays=(ARRAY,) * arrays,
    )


def test_long_outputs_are_messages_of_their_own() -> None:
    outputs = [
        output("a"),
        output("c", 0, score=-0.5),
        output("c", 1, score=-0.6),
        output("b"),
        output("d", 0, score=-0.5),
        output("a", 1, arrays=1),
        output("gone"),
        output("a", 2),
    ]
    sent: dict[str, list[list[tuple[str, int]]]] = {}
    for gateway, message in step_messages(outputs, OWNERS):
        names = [(one.request_id, one.choice) for one in message.outputs]
        sent.setdefault(gateway, []).append(names)
    assert sent["two"] == [[("b", 0)]]
    first, *others = sent["one"]
    assert first == [("a", 0), ("a", 2)]
    assert sorted(others) == [[("a", 1)], [("c", 0), ("c", 1)], [("d", 0)]]
