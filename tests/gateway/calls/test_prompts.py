"""Token ids of prompts."""

from __future__ import annotations

import asyncio

import pytest

from cluster.core.errors import ContextLengthError
from gateway.calls.prompts import PromptMaker
from gateway.core.model import ModelFacts
from gateway.offload.long_work import LongWork
from gateway.text.encoding import MAX_TOKENS


@pytest.mark.parametrize("max_model_len", [100, MAX_TOKENS])
def test_too_many_token_ids_are_refused_and_not_cut_off(max_model_len: int) -> None:
    prompts = PromptMaker(None, trusts_templates=False, long_work=LongWork())
    model = ModelFacts(name="long", max_model_len=max_model_len, vocab_size=50)
    ids = (1,) * MAX_TOKENS
    if max_model_len == MAX_TOKENS:
        assert asyncio.run(prompts.make_ids([ids], model, False, "input")) == [ids]
    with pytest.raises(ContextLengthError, match=rf"you requested {MAX_TOKENS + 1} tokens") as err:
        asyncio.run(prompts.make_ids([(*ids, 1)], model, False, "input"))
    assert err.value.param == "input"
