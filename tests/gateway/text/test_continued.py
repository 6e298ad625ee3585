"""A prompt that ends within the last message: exactly its text, as transformers renders it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.text.chat_template import ChatTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
)
TRIMMED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}"
)
SPACED = "{% for m in messages %}[{{ m.role }}] {{ m.content.strip() }} </s>{% endfor %}"
TEXTS = ("<", "i", "|", "end", "im", "user", "q", ">", "Yes", "According to ", "def f():\n    ")
BLANKS = ("a\n\n", " a", "- ", "\n", " ", "\n\n ", "a b\t")


@cache
def transformers_tokenizer() -> Any:
    """A tokenizer of transformers, for its rendering alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def continued(source: str, text: str) -> str:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    return ChatTemplate(source).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )


@pytest.mark.parametrize("text", [*TEXTS, *BLANKS])
def test_a_template_that_keeps_white_space(text: str) -> None:
    before = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert continued(CHATML, text) == before + text


@pytest.mark.parametrize("text", [*TEXTS, *BLANKS])
def test_a_template_that_removes_white_space(text: str) -> None:
    before = "<|im_start|>user\nq<|im_end|><|im_start|>assistant\n"
    assert continued(TRIMMED, text) == before + text.strip()


@pytest.mark.parametrize("source", [CHATML, TRIMMED, SPACED])
@pytest.mark.parametrize("text", [*TEXTS, *(text for text in BLANKS if text.strip())])
def test_prompts_are_those_of_transformers(source: str, text: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    expected = transformers_tokenizer().apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert continued(source, text) == expected


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_message_cannot_be_continued(content: str | None) -> None:
    with pytest.raises(RequestError, match="needs a final message with content") as caught:
        continued(CHATML.replace("m.content", "m.content|string"), content)  # type: ignore[arg-type]
    assert caught.value.param == "continue_final_message"


def test_a_template_that_changes_the_text_is_refused() -> None:
    with pytest.raises(RequestError, match="keeps as it is"):
        continued("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "abc")
