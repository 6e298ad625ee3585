"""The comparison with other servers: its protocols, its tables. No speed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tokenizers
from aiohttp import test_utils, web

from benchmarks.checkpoints import random_checkpoint, random_tokenizer
from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.harness.systems import System
from benchmarks.memory_wall.bounds import step_weight_bytes
from benchmarks.peers import comparison as peers
from benchmarks.peers import http_systems
from benchmarks.peers.tables import LAYOUTS, Found, Row, bound, report
from benchmarks.report.timing import Sample
from workers.quantization.rounding import FORMATS

MODEL = RandomModel()


def _sample(tokens_per_s: float) -> Sample:
    return Sample(
        tokens_per_s=tokens_per_s,
        prefill_s=0.5,
        decode_tokens_per_s=2 * tokens_per_s,
        itl_ms=1.0,
        others_cores=0.0,
    )


def test_every_token_of_the_random_tokenizer_has_a_text(tmp_path: Path) -> None:
    random_tokenizer.write(tmp_path, 1000)
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.get_vocab_size() == 1000
    assert found.decode([300, 999]) == " t300 t999"
    assert found.decode(found.encode("ROMEO: a\n").ids) == "ROMEO: a\n"


FAKE_LLAMA = """
export async function getLlama(options) {
    if (options.maxThreads !== 3 || options.gpu !== false)
        throw new Error("options");
    return {loadModel: async ({modelPath}) => ({createContext: async (context) => {
        if (modelPath !== "model.gguf" || context.sequences !== 2 || context.contextSize !== 9)
            throw new Error("context");
        return {getSequence: () => ({
            clearHistory: async () => {},
            async *evaluate(prompt, {temperature, yieldEogToken}) {
                if (temperature !== 0 || !yieldEogToken)
                    throw new Error("not greedy");
                for (let token = prompt[0]; ; token++)
                    yield token;
            },
        })};
    }})};
}
"""


def test_llama_cpp_is_driven_by_the_protocol_of_the_other_systems(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    package = tmp_path / "node_modules" / "node-llama-cpp"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text('{"type": "module"}')
    (package / "dist" / "index.js").write_text(FAKE_LLAMA)
    script = Path(peers.__file__).with_name("llama_cpp.mjs")
    system = System("llama", [node, str(script), str(tmp_path), "model.gguf", "3", "2", "9"], {})
    try:
        system.wait_loaded()
        times = system.generate([[5, 6], [7, 8]], 4)
    finally:
        system.close()
    assert [len(t) for t in times] == [4, 4]
    assert all(list(t) == sorted(t) for t in times)


def test_streams_are_read_token_by_token() -> None:
    """A server that brings three tokens in two events."""

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["prompt"] == [13]:
            return web.Response(status=400, text="unlucky")
        asked = (body["temperature"], body["ignore_eos"], body["stream"], body["max_tokens"])
        assert asked == (0, True, True, 3)
        response = web.StreamResponse()
        await response.prepare(request)
        for choices in ([{"token_ids": [4, 5]}], [{"token_ids": [9]}], []):
            await response.write(f"data: {json.dumps({'choices': choices})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def body() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", complete)
        async with test_utils.TestServer(app) as server:
            url = str(server.make_url("/v1/completions"))
            times = await http_systems.stream_all(url, [[1, 2], [3, 4]], 3)
            assert [len(t) for t in times] == [3, 3]
            assert all(0 < t[0] == t[1] <= t[2] for t in times)
            with pytest.raises(RuntimeError, match="400: unlucky"):
                await http_systems.stream_all(url, [[1, 2], [13]], 3)

    asyncio.run(body())


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('no such model'); raise SystemExit(1)"]
    system = http_systems.HttpSystem(
        "broken", words, os.environ, "http://127.0.0.1:1", "/health", tmp_path / "log"
    )
    with pytest.raises(RuntimeError, match="broken ended: no such model"):
        system.wait_loaded()
    system.close()


def test_the_tables_compare_the_best_types_and_name_what_is_absent() -> None:
    args = peers.make_parser().parse_args(["--batch", "1,4", "--repeats", "2", "--tiny"])
    rates = {
        Row("local", "bfloat16"): {1: [30.0, 40.0], 4: [50.0, 60.0]},
        Row("local", "float32"): {1: [10.0, 10.0], 4: [90.0, 110.0]},
        Row("1 + 1", "bfloat16"): {1: [15.0, 20.0], 4: [25.0, 30.0]},
        Row("vLLM", "float32"): {1: [10.0, 20.0], 4: [45.0, 55.0]},
    }
    samples = {
        row: {batch: [_sample(rate) for rate in each] for batch, each in by_batch.items()}
        for row, by_batch in rates.items()
    }
    found = Found(samples=samples, bandwidth=[1e9, 2e9], absent={"llama.cpp": "no FOLDER"})
    lines = report(args, TINY, 2, found).splitlines()
    assert "| local, bfloat16 | 35.0 | 70.0 | 55.0 | 110.0 |" in lines
    assert "| llama.cpp: not measured, no FOLDER |  |  |  |  |" in lines
    assert "| local / vLLM | 2.50 | 2.00 |" in lines
    assert "| 1 + 1 / local | 0.50 | 0.28 |" in lines
    limit = bound(TINY, found, 4, "float32")
    assert limit == pytest.approx(4 * 1.5e9 / step_weight_bytes(TINY, 4, 4))
    assert f"| bound, float32 |  | {bound(TINY, found, 1, 'float32'):.0f} |" in " ".join(lines)
    assert not [line for line in lines if "transformers |" in line], "it was not measured"


def test_quantized_weights_are_compared_with_equal_ones() -> None:
    args = peers.make_parser().parse_args(["--dtype", "bfloat16,int8,int4", "--batch", "1"])
    rates = {
        Row("local", "bfloat16"): 30.0,
        Row("local", "int8"): 50.0,
        Row("local", "int4"): 90.0,
        Row("llama.cpp", "bfloat16"): 20.0,
        Row("llama.cpp", "int8"): 40.0,
        Row("llama.cpp", "int4"): 30.0,
    }
    samples = {row: {1: [_sample(rate)]} for row, rate in rates.items()}
    found = Found(samples=samples, bandwidth=[1e9])
    text = report(args, MODEL, 2, found)
    lines = text.splitlines()
    assert "| local / llama.cpp | 1.50 |" in lines
    assert "| local / llama.cpp, int8 | 1.25 |" in lines
    assert "| local / llama.cpp, int4 | 3.00 |" in lines
    limit = 1e9 / step_weight_bytes(MODEL, 1, 2, FORMATS["int4"], "all")
    assert bound(MODEL, found, 1, "int4") == limit
    assert f"| local, decode rate / bound, int4 | {180 / limit:.2f} |" in lines
    assert "int8 8.125 in expertmesh and 8.5 in llama.cpp (Q8_0), int4 4.75 in" in text
    only = peers.make_parser().parse_args(["--dtype", "int8"])
    assert "| local / llama.cpp |" not in report(only, MODEL, 2, Found(bandwidth=[1e9]))
    with pytest.raises(SystemExit):
        peers.make_parser().parse_args(["--dtype", "int2"])


def test_each_system_is_started_with_the_weights_that_it_has(tmp_path: Path) -> None:
    checkpoint = random_checkpoint.write(TINY, tmp_path / "checkpoint")
    words = ["--dtype", "float32,int8,int4", "--vllm", "v", "--transformers", "t"]
    args = peers.make_parser().parse_args([*words, "--node-llama-cpp", "n"])
    found = Found()
    starts = peers.starts_of(args, TINY, checkpoint, [0, 1], found)
    ours = {Row(name, weights) for name in LAYOUTS for weights in args.dtype}
    float32 = {Row("transformers", "float32"), Row("vLLM", "float32")}
    assert set(starts) == ours | float32 | {Row("llama.cpp", "int8"), Row("llama.cpp", "int4")}
    assert sorted(file.name for file in tmp_path.glob("*.gguf")) == ["Q4_0.gguf", "Q8_0.gguf"]
    assert not found.absent


@pytest.mark.ray
@pytest.mark.slow
def test_ours_are_measured_over_http(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = os.sched_getaffinity(0)
    size = ["--batch", "1", "--input-len", "5", "--output-len", "32", "--repeats", "1"]
    wrong = ["--transformers", str(tmp_path)]
    assert peers.main(["--tiny", "--dtype", "float32", *size, *wrong]) == 0
    lines = capsys.readouterr().out.splitlines()
    for system in LAYOUTS:
        (row,) = [line for line in lines if line.startswith(f"| {system}, float32 |")]
        assert all(float(cell) > 0 for cell in row.strip("| ").split(" | ")[1:])
    assert any("vLLM: not measured, no --vllm FOLDER" in line for line in lines)
    assert any("transformers, float32: not measured, [Errno 2]" in line for line in lines)
    assert os.sched_getaffinity(0) == before
