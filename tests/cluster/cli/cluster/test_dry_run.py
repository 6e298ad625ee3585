"""``--dry-run``: the whole plan is shown, and nothing is started or left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.errors import ConfigError
from cluster.core.process import count_cpus
from cluster.launch.model_source import find_model
from cluster.launch.state_file import log_path
from gateway.state.folder import check_folder, open_folder
from tests.fakes import TINY_CONFIG, tiny_tensors, write_tiny_checkpoint
from tests.paths import ROOT

pytestmark = [pytest.mark.usefixtures("state_home", "check_in_process"), pytest.mark.heavy]
PORTS = ("--port", "0", "--grpc-port", "0")
MODELS = ROOT / "benchmarks" / "models"


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch, state_home: Path) -> None:
    """A launcher could not be started: its log cannot be opened."""
    monkeypatch.setenv("EXPERTMESH_NAME", "planned")
    log_path("planned").mkdir()


def test_a_plan_names_every_worker_and_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mode", "colocated", "--num-expert-workers", "2", "--cpus-per-worker", "0.5")
    assert main(["serve", "--dry-run", "--json", *PORTS, *words]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert document["workers"] == [
        {
            "name": f"colocated-{i}",
            "role": "colocated",
            "rank": i,
            "slots": 32,
            "weight_bytes": document["workers"][0]["weight_bytes"],
        }
        for i in (0, 1)
    ]
    assert (document["mode"], document["mode_reason"]) == ("colocated", "")
    assert (document["cpus_per_worker"], document["threads_per_worker"]) == (0.5, 1)
    assert document["http"].startswith("http://127.0.0.1:")


def test_one_worker_computes_with_all_cores_unless_torch_would_be_deterministic(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("serve", "--dry-run", "--json", *PORTS, "--mode", "local")
    for more, threads in (
        ((), count_cpus()),
        (("--deterministic",), count_cpus()),
        (("--deterministic", "--kernels", "torch"), 1),
    ):
        assert main([*words, *more]) == ExitCode.OK
        assert json.loads(capsys.readouterr().out)["threads_per_worker"] == threads


def test_fp8_keeps_about_twice_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("serve", "--dry-run", "--mode", "local", "--kv-cache-bytes", "64M", *PORTS)
    found = {}
    for kind in ("auto", "fp8"):
        assert main([*words, "--json", "--kv-cache-dtype", kind]) == ExitCode.OK
        found[kind] = json.loads(capsys.readouterr().out)
        assert found[kind]["kv_cache_dtype"] == kind
    ratio = found["auto"]["kv_bytes_per_token"] / found["fp8"]["kv_bytes_per_token"]
    assert ratio > 1.9
    tokens = [found[kind]["kv_cache_tokens"] for kind in ("auto", "fp8")]
    assert tokens[1] / tokens[0] == pytest.approx(ratio, rel=0.01)
    assert main([*words, "--kv-cache-dtype", "fp8"]) == ExitCode.OK
    each = found["fp8"]["kv_bytes_per_token"]
    assert f"{tokens[1]} tokens of {each} bytes (fp8)" in capsys.readouterr().out


def test_auto_says_why(capsys: pytest.CaptureFixture[str], state_home: Path) -> None:
    assert (
        main(["up", "--dry-run", *PORTS, "--mode", "auto", "--cpus-per-worker", "0.5"])
        == ExitCode.OK
    )
    lines = capsys.readouterr().out.splitlines()
    (mode,) = [line for line in lines if line.startswith("mode ")]
    assert mode.startswith("mode     colocated: a decode step of 64 rows with 2048 tokens")
    assert "1 attention + 2 expert workers (attention " in mode
    assert [line.split()[0] for line in lines[-3:]] == [f"colocated-{i}" for i in range(3)]
    assert not list(state_home.rglob("*.json"))


def test_a_cluster_that_would_be_joined_decides_later(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mode", "auto", "--address", "203.0.113.1:6379")
    assert main(["serve", "--dry-run", "--json", *PORTS, *words]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert (document["mode"], document["workers"], document["device"]) == ("auto", [], None)
    assert "after joining" in document["mode_reason"]


def test_what_would_be_refused_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mode", "colocated", "--num-expert-workers", "65")
    assert main(["serve", "--dry-run", *PORTS, *words]) == ExitCode.REFUSED
    assert "--num-expert-workers (65) must not exceed the 64 experts" in capsys.readouterr().err


def test_a_plan_of_two_models_has_the_workers_of_both(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path / "tiny")
    file = tmp_path / "models.yaml"
    bundled = find_model(None, lambda text: None).folder
    file.write_text(
        f"models: [{{model: {bundled}, served-model-name: first}}, "
        f"{{model: {tmp_path}/tiny, mode: colocated, num-expert-workers: 3}}]"
    )
    words = ("serve", "--dry-run", *PORTS, "--config", str(file))
    assert main([*words, "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    first, second = document["models"]
    assert [model["model"]["name"] for model in (first, second)] == ["first", "tiny"]
    assert document == {**document, **first}, "the first model is shown as if it were alone"
    assert [w["name"] for w in first["workers"]] == ["attention-0", "expert-0", "expert-1"]
    assert [w["name"] for w in second["workers"]] == [f"colocated-{i}" for i in range(3)]
    assert first["cpus_per_worker"] == second["cpus_per_worker"]
    assert first["cpus_per_worker"] == pytest.approx(count_cpus() / 6, abs=1e-3)
    assert "http" not in second
    assert main(list(words)) == ExitCode.OK
    text = capsys.readouterr().out
    assert text.count("http     http://127.0.0.1:") == 1
    assert [line for line in text.splitlines() if line.startswith("model ")] == [
        f"model    first ({bundled})",
        f"model    tiny ({tmp_path}/tiny)",
    ]
    assert text.count("WORKER") == 2


def test_each_model_of_a_plan_is_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path / "tiny")
    file = tmp_path / "models.yaml"
    words = ("serve", "--dry-run", *PORTS, "--config", str(file))
    missing = tmp_path / "missing"
    file.write_text(f"models: [{{model: {tmp_path}/tiny}}, {{model: {missing}}}]")
    assert main(list(words)) != ExitCode.OK
    assert str(missing) in capsys.readouterr().err
    most = TINY_CONFIG["num_experts"]
    file.write_text(
        f"models: [{{model: {tmp_path}/tiny}}, "
        f"{{model: {tmp_path}/tiny, served-model-name: b, num-expert-workers: {most + 1}}}]"
    )
    assert main(list(words)) == ExitCode.REFUSED
    assert f"({most + 1}) must not exceed the {most} experts" in capsys.readouterr().err


def test_one_model_has_no_list_in_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--dry-run", "--json", *PORTS]) == ExitCode.OK
    assert "models" not in json.loads(capsys.readouterr().out)


DOTS1 = {
    "model_type": "dots1",
    "vocab_size": 152064,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
"""The full size of dots.llm1, 143 billion weights."""


def test_a_config_without_weights_is_planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Sizes from the architecture: 251.6 GiB of experts, 14.3 GiB beside them, 992 KiB a token."""
    (tmp_path / "config.json").write_text(json.dumps(DOTS1))
    words = (str(tmp_path), "--num-expert-workers", "12", "--cpus-per-worker", "0.1")
    kv = ("--kv-cache-bytes", str(64 << 30))
    assert main(["serve", "--dry-run", "--json", *PORTS, *words, *kv]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    attention, *experts = document["workers"]
    assert (attention["weight_bytes"], attention["slots"]) == (15_368_476_928, None)
    assert {w["slots"] for w in experts} == {11}
    expert_bytes = 3 * 4096 * 1408 * 2
    assert sum(w["weight_bytes"] for w in experts) == 61 * 128 * expert_bytes
    assert sum(w["weight_bytes"] == 61 * 11 * expert_bytes for w in experts) == 8
    assert document["kv_bytes_per_token"] == 1_015_808
    assert document["kv_cache_tokens"] == (64 << 30) // (16 * 1_015_808) * 16
    banks = document["placement"]["banks"]
    assert [bank["layer"] for bank in banks] == list(range(1, 62))
    assert main(["serve", "--dry-run", *PORTS, *words]) == ExitCode.OK
    assert "expert-0     expert     23.2 GB  11 expert slots a bank" in capsys.readouterr().out


BILLIONS = {
    "OLMoE-1B-7B-0924": 6.9,
    "jetmoe-8b": 8.5,
    "dots.llm1.inst": 143,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235,
    "Qwen3-Coder-480B-A35B": 480,
    "GLM-4.5-Air": 107,
    "GLM-4.5": 353,
    "Mixtral-8x7B": 46.7,
    "FlexOlmo-7x7B-1T": 33.3,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "Mixtral-8x22B": 141,
    "MiniMax-M2": 229,
    "ERNIE-4.5-21B-A3B": 21.8,
    "Qwen3-Next-80B-A3B-Instruct": 79.7,
    "Qwen3.5-35B-A3B": 34.7,
    "ERNIE-4.5-300B-A47B": 299,
    "DeepSeek-V2-Lite": 15.7,
    "DeepSeek-V2": 236,
    "DeepSeek-V3": 671,
    "Kimi-K2-Instruct": 1026,
    "GLM-4.7-Flash": 30,
}
"""Weights, as the model cards say; layers that predict more than the next token do not count."""


@pytest.mark.parametrize("name", BILLIONS)
def test_public_checkpoints_are_planned(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words = (str(MODELS / name), "--num-expert-workers", "7", "--cpus-per-worker", "0.1")
    more = ("--kv-cache-bytes", str(64 << 30), "--quantize", "none")
    assert main(["serve", "--dry-run", "--json", *PORTS, *words, *more]) == ExitCode.OK
    workers = json.loads(capsys.readouterr().out)["workers"]
    assert len(workers) == 8
    weights = sum(worker["weight_bytes"] for worker in workers) / 2  # bfloat16
    assert weights / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)


@pytest.mark.parametrize(
    ("name", "quantize", "bits"),
    [
        ("DeepSeek-V3", "auto", 8 + 32 / 128),
        ("gpt-oss-120b", "auto", 4 + 8 / 32),
        ("OLMoE-1B-7B-0924", "auto", 16),
        ("OLMoE-1B-7B-0924", "int8", 8 + 16 / 128),
        ("OLMoE-1B-7B-0924", "int4", 4 + (16 + 8) / 32),
    ],
)
def test_experts_are_planned_with_the_bytes_that_they_are_kept_in(
    capsys: pytest.CaptureFixture[str], name: str, quantize: str, bits: float
) -> None:
    words = (str(MODELS / name), "--num-expert-workers", "7", "--cpus-per-worker", "0.1")
    more = ("--kv-cache-bytes", str(64 << 30), "--quantize")
    found = []
    for setting in ("none", quantize):
        assert main(["serve", "--dry-run", "--json", *PORTS, *words, *more, setting]) == 0
        workers = json.loads(capsys.readouterr().out)["workers"]
        found.append(sum(w["weight_bytes"] for w in workers if w["role"] == "expert"))
    assert found[1] / found[0] == pytest.approx(bits / 16, rel=0.002)


@pytest.mark.parametrize(
    ("name", "form"),
    [("DeepSeek-V3", "e4m3 in groups of 128"), ("gpt-oss-20b", "e2m1 in groups of 32")],
)
def test_experts_in_codes_are_not_quantized_again(
    capsys: pytest.CaptureFixture[str], name: str, form: str
) -> None:
    words = (str(MODELS / name), "--quantize", "int8")
    assert main(["serve", "--dry-run", *PORTS, *words]) == ExitCode.REFUSED
    found = capsys.readouterr().err
    assert f"quantize (int8) must be auto or none: the checkpoint stores experts as {form}" in found


def test_quantizing_all_products_needs_a_number_of_bits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (str(MODELS / "OLMoE-1B-7B-0924"), "--quantize-layers", "all")
    assert main(["serve", "--dry-run", *PORTS, *words]) == ExitCode.USAGE
    assert "must be 'experts' while quantize is 'auto'" in capsys.readouterr().err


def test_lower_tiers_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", "--dry-run", *PORTS, "--mode", "local", "--kv-host-bytes", "2G"]
    assert main(words) == ExitCode.OK
    assert "copies of KV: 2.15 GB of host memory in each" in capsys.readouterr().out
    words += ["--kv-disk-bytes", "4G", "--kv-disk-dir", "/kv"]
    assert main([*words, "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    sizes = [document[f"kv_{tier}_bytes"] for tier in ("host", "disk")]
    assert (sizes, document["kv_disk_dir"]) == ([2 << 30, 4 << 30], "/kv")
    assert main(words) == ExitCode.OK
    assert "2.15 GB of host memory and 4.29 GB on disk (/kv) in" in capsys.readouterr().out
    assert main([*words[:-2]]) == ExitCode.USAGE
    assert "--kv-disk-bytes (4294967296) needs --kv-disk-dir" in capsys.readouterr().err


def test_recurrent_states_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(MODELS / "Qwen3-Next-80B-A3B-Instruct"), "--num-expert-workers", "7")
    more = ("--cpus-per-worker", "0.1", "--max-num-seqs", "16", "--num-cached-states", "8")
    assert main(["serve", "--dry-run", "--json", *PORTS, *words, *more]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert document["num_states"] == 3 * 16 + 8
    assert document["state_bytes"] == 36 * 4 * (3 * 8192 + 32 * 128 * 128)
    assert document["kv_bytes_per_token"] == 12 * 2 * 2 * 256 * 2  # of a quarter of the layers
    assert main(["serve", "--dry-run", *PORTS, *words, *more]) == ExitCode.OK
    assert "states   56 of 79 MB in each attention worker" in capsys.readouterr().out


def test_names_are_those_of_the_configs_that_are_there() -> None:
    assert BILLIONS.keys() == {path.name for path in MODELS.iterdir()}


def test_weights_that_do_not_fit_the_config_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path, {**TINY_CONFIG, "num_experts": 9}, tiny_tensors())
    assert main(["serve", "--dry-run", *PORTS, str(tmp_path)]) == ExitCode.REFUSED
    assert "the config asks for [9, 32]" in capsys.readouterr().err


def test_unknown_keys_are_reported_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, {**TINY_CONFIG, "colour": "red", "use_cache": True})
    assert main(["serve", "--dry-run", *PORTS, str(tmp_path)]) == ExitCode.OK
    assert capsys.readouterr().err.count("config.json: ignored, not known: colour\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "there are no spare expert slots (--num-redundant-experts)"),
        (("--num-redundant-experts", "1"), ""),
    ],
)
def test_rebalancing_that_cannot_happen_is_said_at_the_start(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    share = ("--cpus-per-worker", "0.2")
    assert main(["serve", "--dry-run", *PORTS, *share, *words, "--enable-eplb"]) == ExitCode.OK
    said = capsys.readouterr().err
    assert ("rebalancing is not possible" in said) is bool(reason)
    assert reason in said


def test_a_missing_tokenizer_is_reported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_tiny_checkpoint(tmp_path)
    assert main(["serve", str(tmp_path), "--dry-run", *PORTS]) == 0
    text = f"{tmp_path.name} has no tokenizer.json: requests must give token ids, not text\n"
    assert text in capsys.readouterr().err


def test_missing_weights_are_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    text = f"{tmp_path.name} has no *.safetensors: this is a plan only, a start needs them\n"
    assert main(["serve", str(tmp_path), "--dry-run", *PORTS]) == ExitCode.OK
    assert text not in capsys.readouterr().err
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    assert main(["serve", str(tmp_path), "--dry-run", *PORTS]) == ExitCode.OK
    assert text in capsys.readouterr().err


def test_a_damaged_tokenizer_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--dry-run", *PORTS]) == ExitCode.REFUSED
    assert "tokenizer.json cannot be read" in capsys.readouterr().err


def test_adapters_that_cannot_be_loaded_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    modules = ["--lora-modules", f"sql={tmp_path}/none"]
    assert main(["serve", "--dry-run", *PORTS, *modules]) == ExitCode.REFUSED
    error = capsys.readouterr().err
    assert f"--lora-modules (sql={tmp_path}/none): {tmp_path}/none: no such folder" in error


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "cannot be used: Not a directory"),
        ({"other.txt": "x"}, "contains other files: use an empty or a new folder"),
        ({"state.json": "{"}, "cannot be used: state.json is damaged"),
        ({"state.json": '{"state_format": 999}'}, "contains objects of format 999"),
    ],
)
def test_a_state_folder_that_cannot_be_used_is_refused(
    content: dict[str, str] | None, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kept"
    if content is None:
        folder.write_text("")
    else:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    words = ("--state-dir", str(folder))
    assert main(["serve", "--dry-run", *PORTS, *words]) == ExitCode.REFUSED
    assert f"--state-dir ({folder}) {rule}" in capsys.readouterr().err


def test_a_state_folder_is_not_made_by_a_dry_run(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    check_folder(folder)
    assert not folder.parent.exists()
    open_folder(folder)
    check_folder(folder)
    with pytest.raises(ConfigError, match="cannot be used"):
        check_folder(Path("/proc/nope/state"))
