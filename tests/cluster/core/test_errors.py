"""Exceptions cross process borders whole."""

from __future__ import annotations

import pickle

import pytest

from cluster.core import errors

EXAMPLES = [
    errors.ConfigError("num_expert_slots", 40, "must be at least num_experts (64) in total"),
    errors.CheckpointError("no config.json"),
    errors.StartError("attention-0", "out of memory"),
    errors.RequestError("max_tokens (-1) must be at least 1", "max_tokens"),
    errors.UnsupportedParameterError("best_of is not supported", "best_of"),
    errors.ContextLengthError("maximum context length is 10 tokens", "prompt"),
    errors.ModelNotFoundError("model 'x' is not served here"),
    errors.AuthenticationError("no key"),
    errors.PermissionDeniedError("an admin key is needed"),
    errors.KeyLimitError("60 requests a minute", 2.5, "key_requests"),
    errors.RequestTooLargeError("9 bytes"),
    errors.QueueFullError("1024 requests wait", 3.5),
    errors.NotReadyError("loading", "not_ready", 2.0),
    errors.DeadlineExceededError("60 s passed", True),
    errors.RequestFailedError("logits are not finite"),
    errors.PoisonousRequestError("a third worker was lost"),
    errors.RequestAbortedError("ended by an operator"),
    errors.ConflictError("drain-1.1 is under way"),
    errors.UnknownNameError("there is no worker 'x'"),
    errors.ProtocolError("bad magic"),
    errors.SupersededError("a controller of the older term 2"),
    errors.HandshakeError("another checkpoint"),
    errors.DuplicateRegistrationError("expert-1 registers again"),
    errors.PeerLostError("expert-1", "reset"),
    errors.TransferAbortedError("not done within 3 s"),
    errors.GenerationChangedError("generation 2"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_errors_survive_pickling(error: errors.ExpertMeshError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_every_error_has_an_example() -> None:
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ExpertMeshError)
    }
    bases = {errors.ExpertMeshError, errors.LimitReachedError, errors.TransportError}
    assert kinds - bases == {type(e) for e in EXAMPLES}


def test_config_error_names_field_value_and_rule() -> None:
    error = errors.ConfigError("num_expert_slots", 40, "must be at least 64")
    assert str(error) == "num_expert_slots (40) must be at least 64"
