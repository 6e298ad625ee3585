"""``plan size``: the best pools are the best of all, and what stands in the way is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.errors import ConfigError
from cluster.sizing.devices import CPU_CORE
from cluster.sizing.gpus import H100
from cluster.sizing.pool_sizes import size_pools
from cluster.sizing.roofline import BankSize, ModelSize, disaggregated_step

BANK = BankSize(num_experts=8, top_k=2, expert_values=3_000_000, in_values=1024, out_values=1024)
MODEL = ModelSize(
    banks=(BANK,) * 4, attention_values=40_000_000, kv_bytes_per_token=16384, itemsize=2
)


def test_no_other_split_is_faster() -> None:
    for choice in size_pools(MODEL, [1, 16, 256], 500.0, num_workers=6, device=H100):
        assert choice.num_attention + choice.num_experts == 6
        assert choice.disaggregated is not None
        for attention in range(1, 6):
            other = disaggregated_step(
                MODEL,
                choice.batch,
                500.0,
                num_attention=attention,
                num_experts=6 - attention,
                device=H100,
            )
            assert choice.disaggregated.step_s <= other.step_s
        assert choice.tokens_per_s == pytest.approx(choice.batch / choice.best.step_s)


def test_long_contexts_ask_for_attention_workers() -> None:
    (short,) = size_pools(MODEL, [64], 1.0, num_workers=8, device=CPU_CORE)
    (long,) = size_pools(MODEL, [64], 20_000.0, num_workers=8, device=CPU_CORE)
    assert long.num_attention > short.num_attention


def test_more_workers_than_experts_leave_two_pools() -> None:
    (choice,) = size_pools(MODEL, [4], 100.0, num_workers=10, device=H100)
    assert choice.colocated is None
    assert not choice.colocated_wins
    assert choice.num_experts <= 8
    assert choice.num_attention >= 2


def test_one_worker_leaves_one_pool() -> None:
    (choice,) = size_pools(MODEL, [4], 100.0, num_workers=1, device=H100)
    assert choice.disaggregated is None
    assert choice.colocated_wins
    assert (choice.num_attention, choice.num_experts) == (0, 0)


@pytest.mark.parametrize(
    ("workers", "batch", "balancedness", "message"),
    [
        (0, 1, 1.0, "num_workers"),
        (17, 1, 1.0, "twice the 8 experts"),
        (2, 0, 1.0, "batch"),
        (2, 1, 0.0, "balancedness"),
    ],
)
def test_counts_that_make_no_sense_are_refused(
    workers: int, batch: int, balancedness: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        size_pools(MODEL, [batch], 1.0, num_workers=workers, device=H100, balancedness=balancedness)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="must have experts"):
        size_pools(replace(MODEL, banks=()), [1], 1.0, num_workers=2, device=H100)


@pytest.mark.slow
@pytest.mark.usefixtures("state_home")
def test_the_command_reads_a_bare_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["plan", "size", str(tmp_path), "--workers", "4", "--batch", "2,64"]
    assert main([*command, "--json", "--link-gb-s", "2", "--device", "cuda"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert [b["batch"] for b in found["batches"]] == [2, 64]
    assert found["device"]["link_bytes_s"] == 2e9
    assert found["device"]["name"] == "GPU (numbers of an H100)"
    assert found["device"]["host"]["step_s"] == H100.host.step_s
    assert found["batches"][0]["touched_experts"] == pytest.approx(8 * (1 - 0.75**2))
    for entry in found["batches"]:
        assert entry[entry["mode"]]["step_s"] > entry[entry["mode"]]["host_s"] > H100.host.step_s
        assert entry["num_attention_workers"] + entry["num_expert_workers"] == 4
        assert entry["tokens_per_s"] == pytest.approx(
            entry["batch"] / entry[entry["mode"]]["step_s"]
        )
    assert main([*command, "--json"]) == ExitCode.OK
    device = json.loads(capsys.readouterr().out)["device"]["name"]
    assert ("CPU" in device) is not torch.cuda.is_available(), "what this host has"
    assert main([*command, "--device", "cpu"]) == ExitCode.OK
    text = capsys.readouterr()
    assert "EXPERTS ACTIVATED" in text.out
    assert "u(B)" in text.out
    assert "CPU core" in text.err
    assert main([*command, "--gpu", "H200"]) == ExitCode.OK
    assert "4 workers of one H200 each: 4800 GB/s memory, 989 TFLOPS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tflops", "0"], "--tflops: '0' must be a number above 0"),
        (["--cores", "0"], "--cores: '0' must be a number above 0"),
        (["--nodes", "0"], "--nodes: '0' must be a whole number from 1"),
    ],
)
def test_wrong_options_of_the_command_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "size", "--workers", "2", *options])
    assert ended.value.code == ExitCode.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("state_home")
def test_a_model_that_is_not_found_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "size", "no/such/folder", "--workers", "2"]) == ExitCode.FAILED
    assert "neither a folder nor a hub id" in capsys.readouterr().err


def test_workers_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "size"])
    assert ended.value.code == ExitCode.USAGE
    assert "--workers" in capsys.readouterr().err
