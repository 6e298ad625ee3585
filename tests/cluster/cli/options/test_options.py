from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main, make_parser
from cluster.cli.options.option import parse_bytes
from cluster.cli.options.serve_config import build_config
from cluster.cli.options.serve_options import (
    OPTIONS,
    add_missing_values,
    read_given_options,
    read_template,
    without_keys,
)
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.config.api_keys import hash_key
from cluster.config.cluster import ClusterConfig, section_types
from cluster.config.option_metadata import FLAG
from cluster.launch import state_file
from cluster.launch.model_source import ModelSource
from gateway.auth.auth import make_key_rings
from tests.cluster.launch.test_state_file import record
from tests.paths import ROOT

pytestmark = pytest.mark.heavy

MODEL = ModelSource(folder=Path("/models/m"), name="m")


def parse(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(add_missing_values(["serve", *words]))


def config_of(*words: str, environment: dict[str, str] | None = None) -> ClusterConfig:
    return build_config(read_given_options(parse(*words), environment or {}).values, MODEL)


def collect_of(environment: dict[str, str]) -> dict[str, Any]:
    return read_given_options(parse(), environment).values


def test_without_options_the_defaults_of_the_configuration_hold() -> None:
    config = config_of()
    assert config.gateway.port == 8000
    assert config.gateway.grpc_port == 50051
    assert config.workers.num_expert_workers == 2
    assert config.model.served_model_name == "m"
    assert len(config.cluster_token) == 64


def test_every_start_draws_its_own_token() -> None:
    assert config_of().cluster_token != config_of().cluster_token


def test_flags_reach_their_section() -> None:
    config = config_of(
        *("--port", "1", "--grpc-port", "2", "--dtype", "float32", "--max-model-len", "99"),
        *("--num-expert-workers", "3", "--num-redundant-experts", "4", "--recovery-slots", "5"),
        *("--cpus-per-worker", "0.5", "--kv-cache-bytes", "2M", "--transport", "collective"),
        *("--served-model-name", "x", "--seed", "7", "--max-num-seqs", "8"),
    )
    assert (config.gateway.port, config.gateway.grpc_port) == (1, 2)
    assert (config.model.dtype, config.model.max_model_len) == ("float32", 99)
    assert config.workers.num_expert_workers == 3
    assert (config.workers.num_redundant_experts, config.workers.recovery_slots) == (4, 5)
    assert config.workers.cpus_per_worker == 0.5
    assert config.engine.kv_cache_bytes == 2 * 1024 * 1024
    assert config.transport.transport == "collective"
    assert config.model.served_model_name == "x"
    assert (config.engine.seed, config.engine.max_num_seqs) == (7, 8)


def test_limits_and_the_latency_target_reach_their_section() -> None:
    config = config_of(
        *("--itl-target-ms", "37.5", "--max-waiting", "4", "--max-waiting-tokens", "500"),
        *("--max-queue", "6", "--max-queue-tokens", "7000", "--max-queue-wait-s", "0"),
    )
    engine, gateway = config.engine, config.gateway
    assert (engine.itl_target_ms, engine.max_waiting, engine.max_waiting_tokens) == (37.5, 4, 500)
    assert (gateway.max_queue, gateway.max_queue_tokens, gateway.max_queue_wait_s) == (6, 7000, 0)
    with pytest.raises(CommandError, match=r"itl_target_ms \(-1.0\) must be positive") as caught:
        config_of("--itl-target-ms", "-1")
    assert caught.value.code == ExitCode.USAGE


def test_autoscaling_has_options_of_its_own() -> None:
    assert config_of().autoscale.autoscale == "off"
    assert config_of("--autoscale", "--max-expert-workers", "3").autoscale.autoscale == "on"
    section = config_of(
        *("--autoscale", "dry-run", "--max-attention-workers", "5", "--min-expert-workers", "1"),
        *("--autoscale-kv-target", "0.5", "--autoscale-queue-target", "3", "--autoscale-up-s", "9"),
    ).autoscale
    assert (section.autoscale, section.kv_target, section.queue_target) == ("dry-run", 0.5, 3.0)
    assert (section.max_attention_workers, section.min_expert_workers) == (5, 1)
    assert section.up_s == 9.0
    with pytest.raises(CommandError, match=r"autoscale \(on\) must be off in local mode") as caught:
        config_of("--autoscale", "on", "--mode", "local")
    assert caught.value.code == ExitCode.USAGE


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"EXPERTMESH_PORT": "1234", "EXPERTMESH_NUM_EXPERT_WORKERS": "5"}
    config = config_of("--port", "4321", environment=environment)
    assert config.gateway.port == 4321
    assert config.workers.num_expert_workers == 5
    assert config.gateway.grpc_port == 50051


def test_prefix_caching_is_on_unless_it_is_switched_off() -> None:
    off = {"EXPERTMESH_ENABLE_PREFIX_CACHING": "0"}
    assert config_of().engine.enable_prefix_caching
    assert not config_of("--no-enable-prefix-caching").engine.enable_prefix_caching
    assert not config_of(environment=off).engine.enable_prefix_caching
    assert config_of("--enable-prefix-caching", environment=off).engine.enable_prefix_caching


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "auto"),
        (("--deterministic",), "on"),
        (("--deterministic", "MODEL"), "on"),
        (("MODEL", "--deterministic"), "on"),
        (("--deterministic", "--port", "1"), "on"),
        (("--deterministic", "on", "MODEL"), "on"),
        (("--deterministic", "true"), "on"),
        (("--deterministic=0",), "off"),
        (("--deterministic", "auto"), "auto"),
        (("--deterministic", "off"), "off"),
    ],
)
def test_deterministic_takes_a_word_or_none(words: tuple[str, ...], expected: str) -> None:
    args = parse(*words)
    assert args.model == ("MODEL" if "MODEL" in words else None)
    assert config_of(*words).engine.deterministic == expected


@pytest.mark.parametrize(("text", "expected"), [("yes", "on"), ("False", "off"), ("auto", "auto")])
def test_a_variable_says_deterministic_as_a_switch_or_by_a_word(text: str, expected: str) -> None:
    environment = {"EXPERTMESH_DETERMINISTIC": text}
    assert config_of(environment=environment).engine.deterministic == expected


def test_deterministic_goes_with_cpus() -> None:
    assert config_of("--deterministic").workers.device == "cpu"
    with pytest.raises(CommandError, match=r"device \(cuda\) must be cpu with deterministic") as no:
        config_of("--deterministic", "--device", "cuda")
    assert no.value.code == ExitCode.USAGE
    assert config_of("--deterministic", "auto", "--device", "cuda").workers.device == "cuda"
    with pytest.raises(
        CommandError, match=r"EXPERTMESH_DETERMINISTIC \(maybe\) must be one of auto"
    ):
        config_of(environment={"EXPERTMESH_DETERMINISTIC": "maybe"})


def test_an_empty_variable_counts_as_absent() -> None:
    assert config_of(environment={"EXPERTMESH_PORT": ""}).gateway.port == 8000


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EXPERTMESH_PORT", "many"),
        ("EXPERTMESH_DTYPE", "int3"),
        ("EXPERTMESH_ALLOW_UNAUTHENTICATED", "perhaps"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(CommandError) as caught:
        config_of(environment={variable: value})
    assert caught.value.code == ExitCode.USAGE
    assert variable in str(caught.value)
    assert value in str(caught.value)


def test_help_groups_options_by_section_with_types_and_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split("\nmodel:\n")[1].split())
    groups = ["workers:", "engine:", "transport:", "observability:", "rebalance:", "gateway:"]
    positions = [text.index(f" {group} ") for group in [*groups, "start:"]]
    assert positions == sorted(positions)
    for words in (
        "--detection-limit-s SECONDS Time without heartbeats or step progress after which a worker "
        "is declared lost (default: 2)",
        "--max-body-bytes BYTES Maximum size of an HTTP request body (default: 8M)",
        "--rebalance-bytes-per-s BYTES Maximum bytes per second of expert weights that each worker "
        "receives while serving (default: 100000000)",
        "--num-micro-batches {auto,1,2} ",
        "--device-speed {given,measured} ",
        "--enable-prefix-caching, --no-enable-prefix-caching ",
        "--max-model-len TOKENS ",
        "--tls-key FILE ",
        "requests without one are derived; 0 selects random seeds (default: 0)",
        "--start-timeout SECONDS Time limit of the whole start, in seconds (default: 1800)",
    ):
        assert words in text, words


def test_every_option_has_help_in_words_of_the_command_line() -> None:
    assert [option.flag for option in OPTIONS if not option.help] == []
    text = " ".join(option.help for option in OPTIONS)
    assert "None" not in text
    fields = {option.field for option in OPTIONS}
    named = set(re.findall(r"``(\w+_\w+)``", text))
    assert named <= fields, "help names a field that has no option"


def test_every_field_of_the_configuration_is_an_option_or_internal() -> None:
    targets = {option.target for option in OPTIONS}
    for name, kind in section_types().items():
        for field in dataclasses.fields(kind):
            is_internal = field.metadata.get(FLAG) == ""
            assert (f"{name}.{field.name}" in targets) is not is_internal, field.name


def test_the_limits_of_a_start_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--start-timeout", "0"]) == ExitCode.USAGE
    assert "--start-timeout (0.0) must be above 0" in one_line(capsys)
    assert main(["up", "--wait-nodes", "-1"]) == ExitCode.USAGE
    assert "--wait-nodes (-1) must not be negative" in one_line(capsys)


def test_every_target_is_a_setting_of_the_configuration() -> None:
    data = ClusterConfig.from_dict(config_of().to_dict()).to_dict()
    for option in OPTIONS:
        section, _, field = option.target.partition(".")
        assert not field or field in data[section], option.flag


def test_a_short_detection_limit_brings_faster_heartbeats() -> None:
    assert config_of("--detection-limit-s", "0.4").transport.heartbeat_s == pytest.approx(0.1)
    assert config_of("--detection-limit-s", "30").transport.heartbeat_s == 0.5


def test_keys_of_flag_and_file_add_up(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\none\n\n  two  \n")
    config = config_of("--api-key", "zero", "--api-key-file", str(file))
    public, _ = make_key_rings(config.gateway)
    for key in ("zero", "one", "two"):
        assert public.check(None, key) is not None


def test_keys_of_the_environment_add_up_and_are_hashed_at_once() -> None:
    environment = {"EXPERTMESH_API_KEY": "zero", "EXPERTMESH_API_KEYS": "one, two,,"}
    values = collect_of(environment)
    assert values["gateway.api_keys"] == tuple(map(hash_key, ("zero", "one", "two")))
    assert collect_of({"EXPERTMESH_ADMIN_KEYS": "a"})["gateway.admin_keys"] == (hash_key("a"),)
    assert without_keys({**environment, "HOME": "/"}) == {"HOME": "/"}


def test_keys_are_never_in_what_is_passed_on() -> None:
    config = config_of("--api-key", "zero-zero", "--admin-key", "one-one")
    for text in (repr(config), json.dumps(config.to_dict())):
        assert "zero-zero" not in text
        assert "one-one" not in text


@pytest.mark.parametrize("flag", ["--api-key-file", "--admin-key-file"])
def test_a_key_file_without_keys_is_refused(tmp_path: Path, flag: str) -> None:
    file = tmp_path / "keys"
    file.write_text("# nobody\n")
    with pytest.raises(CommandError, match="holds no key"):
        config_of(flag, str(file))
    with pytest.raises(CommandError, match="cannot be read"):
        config_of(flag, str(tmp_path / "missing"))


def test_a_public_host_needs_keys_or_a_word() -> None:
    with pytest.raises(CommandError) as caught:
        config_of("--host", "0.0.0.0")
    assert caught.value.code == ExitCode.REFUSED
    assert "--allow-unauthenticated" in str(caught.value)
    assert config_of("--host", "0.0.0.0", "--allow-unauthenticated").gateway.host == "0.0.0.0"
    assert config_of("--host", "0.0.0.0", "--api-key", "k").gateway.requires_keys


def test_limits_of_requests_are_options() -> None:
    words = ["--max-body-bytes", "1M", "--max-n", "4", "--request-timeout-s", "2.5"]
    gateway = config_of(*words, "--max-logprobs", "5").gateway
    assert (gateway.max_body_bytes, gateway.max_n) == (1 << 20, 4)
    assert (gateway.request_timeout_s, gateway.max_logprobs) == (2.5, 5)
    for flag in ("--max-body-bytes", "--max-json-depth", "--request-timeout-s", "--max-stop-chars"):
        with pytest.raises(CommandError, match="must be above 0"):
            config_of(flag, "0")


def test_a_public_admin_host_needs_keys_of_its_own() -> None:
    with pytest.raises(CommandError, match="--admin-key") as caught:
        config_of("--admin-host", "0.0.0.0", "--api-key", "k", "--allow-unauthenticated")
    assert caught.value.code == ExitCode.REFUSED
    assert config_of("--admin-host", "0.0.0.0", "--admin-key", "k").gateway.requires_admin_keys


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("64M", 64 << 20), ("2GiB", 2 << 30), ("1.5K", 1536), ("3MB", 3 << 20)],
)
def test_bytes_are_read_with_units(text: str, number: int) -> None:
    assert parse_bytes(text) == number


def test_a_trace_goes_where_the_command_was_given() -> None:
    """Workers have other working directories."""
    section = config_of("--trace-dir", "traces", "--trace-max-bytes", "2M").observability
    assert section.trace_dir == str(Path("traces").absolute())
    assert section.trace_max_bytes == 2 << 20
    assert config_of().observability.trace_dir is None


def test_traces_of_requests_need_a_collector() -> None:
    assert config_of().observability.otlp_endpoint is None
    section = config_of("--otlp-endpoint", "http://c:4317", "--trace-content").observability
    assert (section.otlp_endpoint, section.trace_content) == ("http://c:4317", True)
    with pytest.raises(CommandError, match="needs otlp_endpoint"):
        config_of("--trace-content")


@pytest.mark.parametrize(
    "url", ["", "c:4317", "http://c", "http://u@c:1", "ftp://c:1", "http://c:1/x"]
)
def test_a_collector_is_named_by_an_url_with_a_port(url: str) -> None:
    with pytest.raises(CommandError, match=r"otlp_endpoint .* must be http://HOST:PORT"):
        config_of("--otlp-endpoint", url)


def test_packages_for_traces_are_asked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(CommandError, match="needs the extra otel: pip install") as caught:
        config_of("--otlp-endpoint", "http://c:4317")
    assert caught.value.code == ExitCode.USAGE


def test_the_number_of_micro_batches_is_a_word_or_a_number() -> None:
    assert config_of().engine.num_micro_batches == "auto"
    assert config_of("--num-micro-batches", "2").engine.num_micro_batches == 2
    with pytest.raises(CommandError, match=r"num_micro_batches \(3\) must be one of auto, 1, 2"):
        config_of("--num-micro-batches", "3")


@pytest.mark.parametrize("text", ["", "M", "12Q", "-", "one"])
def test_bad_bytes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bytes(text)


def test_a_chat_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert read_template(str(file)) == "{{ messages }}"
    loop = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert read_template(loop) == loop
    with pytest.raises(CommandError, match="cannot be read"):
        read_template(str(tmp_path / "missing"))
    with pytest.raises(CommandError, match="--chat-template: the chat template is not valid") as no:
        read_template("{% for m in messages %}")
    assert no.value.code is ExitCode.USAGE


@pytest.mark.parametrize("words", [["--json", "status"], ["status", "--json"]])
def test_global_options_stand_before_or_after_the_command(words: list[str]) -> None:
    assert make_parser().parse_args(words).json is True


def test_global_options_default_to_off() -> None:
    args = make_parser().parse_args(["status"])
    assert (args.json, args.url, args.name, args.timeout, args.verbose) == (
        False,
        None,
        None,
        None,
        False,
    )


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("expertmesh: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.usefixtures("state_home", "check_in_process")
@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (
            ["--mode", "colocated", "--num-attention-workers", "1"],
            2,
            "--num-attention-workers (1) must be left out or equal --num-expert-workers (2) in",
        ),
        (["--num-expert-workers", "0"], 2, "--num-expert-workers (0) must be at least 1"),
        (["--port", "99999"], 2, "--port (99999)"),
        (["--host", "0.0.0.0"], 5, "--host (0.0.0.0) is public"),
        (["--host", "no.such.host.invalid"], 5, "no.such.host.invalid"),
        (["/no/such/folder"], 5, "/no/such/folder is neither a folder nor a hub id"),
        (["--placement-file", "/no/such/file"], 2, "--placement-file (/no/such/file) cannot be"),
        (["--tls-cert", "/no/such/file"], 2, "--tls-cert (/no/such/file) cannot be read: No"),
        (["--num-expert-workers", "65"], 5, "more workers than can ever have work"),
        (["--cpus-per-worker", "1000"], 5, "--cpus-per-worker (1000) does not fit"),
        (["--gpus-per-worker", "1"], 5, "--gpus-per-worker (1) does not fit"),
        (["--gpus-per-worker", "2"], 2, "--gpus-per-worker (2.0) must not exceed 1: a worker comp"),
        (["--max-model-len", "10000000"], 5, "--max-model-len (10000000) must not exceed"),
        (["--name", "../x"], 2, "name (../x)"),
    ],
)
def test_impossible_requests_get_one_line(
    words: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = ["--port", "0", "--grpc-port", "0"] if "--port" not in words else []
    public = words[:1] == ["--host"] and "invalid" in words[1]
    extra = ["--allow-unauthenticated"] if public else []
    assert main(["serve", *ports, *extra, *words]) == code
    assert text in one_line(capsys)


@pytest.mark.usefixtures("state_home")
def test_a_port_in_use_is_refused(
    busy_port: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", "--port", str(busy_port)]) == ExitCode.REFUSED
    text = f"--port ({busy_port}) is in use on 127.0.0.1 by "
    error = one_line(capsys)
    assert text in error
    assert error.endswith(f"(pid {os.getpid()})\n")
    state_file.write_record(replace(record("mine"), http=f"http://127.0.0.1:{busy_port}"))
    assert main(["serve", "--port", str(busy_port)]) == ExitCode.REFUSED
    assert one_line(capsys) == f"expertmesh: {text}the cluster mine\n"


@pytest.mark.usefixtures("state_home")
def test_errors_name_the_variable_that_sets_an_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_MAX_NUM_SEQS", "0")
    assert main(["serve", "--port", "0", "--grpc-port", "0"]) == ExitCode.USAGE
    assert "EXPERTMESH_MAX_NUM_SEQS (0) must be" in one_line(capsys)


@pytest.mark.usefixtures("state_home")
def test_unknown_variables_are_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_MAX_NUM_SEQ", "8")
    monkeypatch.setenv("EXPERTMESH_GATEWAY_SERVICE_HOST", "10.0.0.1")  # as in a pod
    monkeypatch.setenv("EXPERTMESH_GATEWAY_PORT_8000_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("EXPERTMESH_NAME", "known")
    assert main(["config"]) == ExitCode.OK
    warning = "EXPERTMESH_MAX_NUM_SEQ is set, but is not a variable of expertmesh: did you mean "
    assert capsys.readouterr().err == f"expertmesh: warning: {warning}EXPERTMESH_MAX_NUM_SEQS?\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["serve", "--kv-host-bytes", "8Q"], "argument --kv-host-bytes: '8Q' must be a number of "),
        (["serve", "--kv-host-bytes", "infG"], "'infG' must be a number of bytes, such as 4096, "),
        (["serve", "--max-num-seqs", "x"], "argument --max-num-seqs: 'x' must be a whole number"),
        (["serve", "--num-experts-workers", "3"], "unknown option --num-experts-workers: did you "),
        (["status", "--wach"], "unknown option --wach: did you mean --watch?"),
        (["statsu"], "invalid choice: 'statsu': did you mean status?"),
        (["serve", "--mode", "locl"], "local, auto: did you mean local?"),
        (["workers", "more"], "unknown argument more (see expertmesh workers --help)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_the_command_line_are_short_and_suggest(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == ExitCode.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("usage: expertmesh")
    assert error in lines[1]


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("64M", 64 << 20), ("2GiB", 2 << 30), ("1.5kB", 1536), ("1T", 1 << 40)],
)
def test_numbers_of_bytes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    "text", ["", "G", "1.5", "8Q", "infG", "nan", "1e9", "0x1", "1 2", "6MM", "9" * 400 + "G"]
)
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_bytes(text)


@pytest.mark.distributed
def test_a_refused_start_leaves_nothing(
    state_home: Path, temp_dirs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["serve", "--port", "0", "--grpc-port", "0", "--num-expert-workers", "65"])
    assert "more workers than can ever have work" in one_line(capsys)
    assert len(temp_dirs) == 1
    assert not temp_dirs[0].exists()
    assert list((state_home / "expertmesh").iterdir()) == []


@pytest.mark.parametrize("words", [[], ["nonsense"], ["serve", "--port", "x"], ["generate"]])
def test_a_wrong_command_line_is_a_usage_error(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == ExitCode.USAGE
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--lora-modules", "sql=/a", "chat=b", "MODEL"),
        ("MODEL", "--lora-modules", "sql=/a,chat=b"),
        ("MODEL", "--lora-modules=sql=/a", "chat=b", "--port", "1"),
    ],
    ids=" ".join,
)
def test_adapters_are_words_or_a_list(words: tuple[str, ...]) -> None:
    assert parse(*words).model == "MODEL"
    modules = config_of(*words).lora.lora_modules
    assert modules == ("sql=/a", f"chat={Path('b').absolute()}")


def test_adapters_of_the_environment() -> None:
    config = config_of(environment={"EXPERTMESH_LORA_MODULES": "sql=/a, chat=/b"})
    assert config.lora.lora_modules == ("sql=/a", "chat=/b")


def test_every_command_is_in_the_help_and_the_docs() -> None:
    parser = make_parser()
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name in commands.choices:
        assert f"\n  {name} " in parser.format_help(), name
        assert re.search(rf"`(expertmesh )?{name}\b", page), name


def test_every_option_of_serve_is_in_the_readme_or_the_docs() -> None:
    root = ROOT
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    commands = next(
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    missing = [
        action.option_strings
        for action in commands.choices["serve"]._actions
        if action.option_strings
        and not any(
            re.search(rf"{re.escape(name)}(?![\w-])", text)
            for name in action.option_strings
            if name.startswith("--")
        )
    ]
    assert missing == []


def test_adapters_come_from_any_folder_where_no_keys_are_configured() -> None:
    assert config_of().lora.allows_path("/any/folder")
    assert not config_of("--lora-roots", "/adapters").lora.allows_path("/any/folder")
    config = config_of(environment={"EXPERTMESH_API_KEYS": "secret"})
    assert not config.lora.allows_path("/any/folder")
