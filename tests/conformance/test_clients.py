"""Clients of other projects, unchanged, against a server: see docs/reference/conformance.md.

They live in an environment of their own, see ``tests/harness/clients.py``. What is not there is
skipped. A recorder between them and the server notes what they send, for the table in
docs/reference/conformance.md; with ``EXPERTMESH_WRITE_FIELDS`` set it is written anew.
``EXPERTMESH_URL`` takes a server that runs already, whose chat template must have tools, with a
``--state-dir``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.server import running_server
from tests.conformance.conftest import TOOL_TEMPLATE
from tests.conformance.recorder import Recorder, expecting
from tests.harness.clients import node_modules, program
from tests.paths import DEMO

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAMS = Path(__file__).parent / "clients"
LIMIT_S = 400.0
"""Longest run of one client, on a machine that is busy with other work."""


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bundled model, with a chat template that has tools; or what ``EXPERTMESH_URL`` names."""
    if url := os.environ.get("EXPERTMESH_URL"):
        yield url
        return
    folder = tmp_path_factory.mktemp("clients")
    template = folder / "tools.jinja"
    template.write_text(TOOL_TEMPLATE)
    options = ("--chat-template", str(template), "--state-dir", str(folder / "state"))
    with running_server(folder, *options) as server:
        yield server.http


@pytest.fixture(scope="module")
def model(server_url: str) -> str:
    """The served model's name."""
    return str(httpx.get(f"{server_url}/v1/models", timeout=60).json()["data"][0]["id"])


@pytest.fixture
def recorder(server_url: str, request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """Where the client connects; what it sends must be what the table says."""
    name = request.node.name.partition("_")[2]
    if "[" in name:
        name = name.partition("[")[2].partition("-")[0].rstrip("]")
    with expecting(server_url, name) as recorder:
        yield recorder


def run(words: list[str], folder: Path, more: Mapping[str, str] | None = None) -> str:
    """What a client's program says; it must end well."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY_"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "NO_COLOR": "1"}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**kept, **offline, **(more or {})},
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("client", "module"),
    [
        ("openai", "openai"),
        ("openai_responses", "openai"),
        ("langchain", "langchain_openai"),
        ("litellm", "litellm"),
        ("anthropic", "anthropic"),
        ("messages", "langchain_anthropic"),
    ],
)
def test_python_clients(
    recorder: Recorder, model: str, tmp_path: Path, client: str, module: str
) -> None:
    script = str(PROGRAMS / f"use_{client}.py")
    run([program("python", module), script, recorder.url, model], tmp_path)


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm packages, and the program that uses them."""
    packages = node_modules()
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(packages)
    for name in ("use_ai.mjs", "use_anthropic.mjs"):
        shutil.copy(PROGRAMS / name, folder)
    return folder


def test_npm_packages(recorder: Recorder, model: str, node_folder: Path) -> None:
    run(["node", "use_ai.mjs", recorder.url, model], node_folder)


def test_npm_anthropic(recorder: Recorder, model: str, node_folder: Path) -> None:
    run(["node", "use_anthropic.mjs", recorder.url, model], node_folder)


def test_curl(recorder: Recorder, model: str, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    plain = ["curl", "-sS", "--fail-with-body", "-H", "content-type: application/json"]
    url = f"{recorder.url}/v1/chat/completions"
    answer = json.loads(run([*plain, "-d", json.dumps(body), url], tmp_path))
    assert answer["usage"]["completion_tokens"] <= 4
    streamed = run([*plain, "-N", "-d", json.dumps({**body, "stream": True}), url], tmp_path)
    assert streamed.endswith("data: [DONE]\n\n")
    output = run(["curl", "-sS", "-d", json.dumps(body), "-w", "%{http_code}", url], tmp_path)
    error, status = output[:-3], output[-3:]  # without a header curl calls it a form
    assert (status, json.loads(error)["error"]["param"]) == ("400", "content-type")


def test_guidellm(recorder: Recorder, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ["run", "--backend", f"kind=openai_http,target={recorder.url}"]
    words += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={DEMO}"]
    words += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
    words += ["--output", f"kind=json,path={report}", "--disable-progress"]
    run([program("guidellm", "guidellm"), *words], tmp_path)
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (4, 0, 0)
    counts = metrics["output_token_count"]["successful"]
    assert (counts["min"], counts["max"]) == (16, 16)  # from the usage chunk


def test_locust(recorder: Recorder, model: str, tmp_path: Path) -> None:
    file = str(PROGRAMS / "locustfile.py")
    words = ["-f", file, "--headless", "-u", "4", "-r", "4", "-H", recorder.url, "--only-summary"]
    run([program("locust", "locust"), *words], tmp_path, {"MODEL": model})


def test_lm_eval(recorder: Recorder, model: str, tmp_path: Path) -> None:
    """``local-completions`` scores echoed prompts, and generates."""
    rows = [
        {"question": f"Who is there? {i}\n", "choices": [" The king", " It"], "label": i % 2}
        for i in range(4)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\n"
    common += 'doc_to_text: "{{question}}"\n'
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{common}output_type: multiple_choice\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "write.yaml").write_text(
        f'task: write\n{common}output_type: generate_until\ndoc_to_target: "x"\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 8\nmetric_list:\n'
        "  - metric: exact_match\n"
    )
    settings = f"model={model},base_url={recorder.url}/v1/completions,tokenizer={DEMO}"
    words = ["run", "--model", "local-completions", "--tasks", "choose,write"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    words += ["--model_args", f"{settings},num_concurrent=2,max_retries=1"]
    run([program("lm_eval", "lm_eval"), *words], tmp_path)
    (found,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    assert 0 <= results["choose"]["acc,none"] <= 1
    assert results["write"]["exact_match,none"] == 0
