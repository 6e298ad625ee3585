"""The bundled demo checkpoint: complete, small, and what the engine expects of an OLMoE."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

import workers.demo
from benchmarks.demo_model.served_load import NEW_TOKENS, PROMPT_TOKENS, served_load

CHECKPOINT = Path(workers.demo.__file__).parent / "checkpoint"
MAX_TOTAL_BYTES = 12_000_000
EOS_ID = 1


def load_json(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((CHECKPOINT / name).read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return load_json("config.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def render_chat(messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        load_json("tokenizer_config.json")["chat_template"]
    )
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def expected_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Every tensor of a per-expert OLMoE checkpoint."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv_size = head_dim * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
        "lm_head.weight": [config["vocab_size"], hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        in_layer = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.k_proj": [kv_size, hidden],
            "self_attn.v_proj": [kv_size, hidden],
            "self_attn.o_proj": [hidden, hidden],
            "self_attn.q_norm": [hidden],
            "self_attn.k_norm": [kv_size],
            "mlp.gate": [config["num_experts"], hidden],
        }
        for expert in range(config["num_experts"]):
            in_layer[f"mlp.experts.{expert}.gate_proj"] = [width, hidden]
            in_layer[f"mlp.experts.{expert}.up_proj"] = [width, hidden]
            in_layer[f"mlp.experts.{expert}.down_proj"] = [hidden, width]
        shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in in_layer.items()}
    return shapes


def test_checkpoint_is_complete_and_fits_the_size_limit() -> None:
    sizes = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "load_profile.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= MAX_TOTAL_BYTES


def test_config_describes_an_olmoe_of_64_experts_top_8(config: dict[str, Any]) -> None:
    assert config["model_type"] == "olmoe"
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert config["num_experts"] == 64
    assert config["num_experts_per_tok"] == 8
    assert config["num_hidden_layers"] >= 4
    assert config["max_position_embeddings"] == 4096
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False


def test_config_leaves_no_training_only_setting_behind(config: dict[str, Any]) -> None:
    assert config["attention_dropout"] == 0
    assert config["output_router_logits"] is False


def test_every_tensor_is_stored_in_bfloat16_with_its_shape(config: dict[str, Any]) -> None:
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: s.get_shape() for name, s in slices.items()} == expected_shapes(config)
        assert {s.get_dtype() for s in slices.values()} == {"BF16"}


def test_every_weight_is_finite() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert torch.isfinite(file.get_tensor(name)).all(), name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ROMEO:\nO, wilt thou leave me so unsatisfied?",
        "  two leading spaces, a tab\t, trailing space ",
        "\n\n\r\n \n\nmany\n\n\n\nlines\n",
        "emoji 🎭👩‍👩‍👧 and flags 🇩🇪",
        "Zürich, naïve, e\u0301, 東京, Ελλάδα, العربية",
        "\u0000\u0007\ufeff\u2028\U0010ffff",
        "12345678901234567890 !?;:--''\"\"",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_knows_every_byte(tokenizer: Tokenizer) -> None:
    every_code_point = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), 0x1F3AD]))
    assert tokenizer.decode(tokenizer.encode(every_code_point).ids) == every_code_point


def test_character_broken_over_tokens_comes_back_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎭").ids
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:1])
    assert tokenizer.decode(ids[:1] + ids[1:]) == "🎭"


def test_text_with_special_tokens_round_trips_when_they_are_kept(tokenizer: Tokenizer) -> None:
    text = "<|user|>Who's there?<|eos|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_adds_no_token_of_its_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").ids == []
    assert tokenizer.encode("O").tokens == ["O"]


def test_token_ids_agree_with_the_configs(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    tokenizer_config = load_json("tokenizer_config.json")
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    for role in ("pad", "eos"):
        token_id = tokenizer.token_to_id(tokenizer_config[f"{role}_token"])
        assert token_id is not None
        assert token_id == config[f"{role}_token_id"]
        assert token_id == load_json("generation_config.json")[f"{role}_token_id"]


def test_chat_template_renders_every_role_and_the_generation_prompt() -> None:
    messages = [
        {"role": "system", "content": "Answer as a character of the play."},
        {"role": "user", "content": " Who's there?\n"},
        {"role": "assistant", "content": "FRANCISCO:\nNay, answer me."},
        {"role": "user", "content": "Long live the king!"},
    ]
    rendered = render_chat(messages, add_generation_prompt=True)
    assert rendered == (
        "<|system|>Answer as a character of the play.<|eos|>"
        "<|user|>Who's there?<|eos|>"
        "<|assistant|>FRANCISCO:\nNay, answer me.<|eos|>"
        "<|user|>Long live the king!<|eos|>"
        "<|assistant|>"
    )
    assert render_chat(messages, add_generation_prompt=False) == rendered.removesuffix(
        "<|assistant|>"
    )


def test_chat_turns_use_one_token_per_role_and_end_with_eos(tokenizer: Tokenizer) -> None:
    rendered = render_chat(
        [{"role": role, "content": "Ay."} for role in ("system", "user", "assistant")],
        add_generation_prompt=False,
    )
    tokens = tokenizer.encode(rendered).tokens
    assert [token for token in tokens if token.startswith("<|") and token != "<|eos|>"] == [
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert tokenizer.encode(rendered).ids.count(EOS_ID) == 3


def test_load_profile_counts_every_choice_of_every_token(config: dict[str, Any]) -> None:
    profile = load_json("load_profile.json")
    assert profile["schema"] == 1
    assert profile["model"] == "expertmesh-demo"
    assert profile["top_k"] == config["num_experts_per_tok"]
    assert [(bank["bank"], bank["layer"]) for bank in profile["banks"]] == [
        ("mlp", layer) for layer in range(config["num_hidden_layers"])
    ]
    for bank in profile["banks"]:
        assert len(bank["counts"]) == config["num_experts"]
        assert sum(bank["counts"]) == profile["tokens"] * profile["top_k"]


def test_the_load_profile_is_what_the_engine_counts() -> None:
    """Other text of the same kind, served now, has nearly the load that the profile promises."""
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    text = (CHECKPOINT / "README.md").read_text(encoding="utf-8").partition("## Samples")[2]
    load = served_load(CHECKPOINT, text[:1500])
    num_prompt_tokens = len(tokenizer.encode(text[:1500]).ids)
    num_prompts = -(-num_prompt_tokens // PROMPT_TOKENS)
    assert load.num_tokens == num_prompt_tokens + num_prompts * (NEW_TOKENS - 1)
    for bank, counts in zip(load_json("load_profile.json")["banks"], load.counts, strict=True):
        assert int(counts.sum()) == load.num_tokens * load.top_k
        expected = torch.tensor(bank["counts"], dtype=torch.float64)
        assert float(torch.corrcoef(torch.stack([expected, counts.double()]))[0, 1]) > 0.5


def test_expert_load_is_unequal_but_not_collapsed() -> None:
    for bank in load_json("load_profile.json")["banks"]:
        counts = bank["counts"]
        mean = sum(counts) / len(counts)
        assert max(counts) > 1.3 * mean
        assert sum(count > 0.05 * mean for count in counts) >= 48


def test_model_card_gives_quality_and_licence_and_no_absolute_path() -> None:
    card = (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    assert "bits per byte" in card
    assert "public domain" in card
    assert not re.search(r"(?<![\w.:/])/\w+/", card)
