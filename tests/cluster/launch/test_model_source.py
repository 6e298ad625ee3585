from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import CheckpointError
from cluster.launch.model_source import BUNDLED_NAME, bundled_checkpoint, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from cluster.launch.model_source import find_model
print(find_model(sys.argv[1], lambda line: None).folder)
"""


def silent(line: str) -> None:
    pass


class FakeHub:
    """The few answers of a hub that a download needs."""

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository = repository
        self.files = files
        self.url = ""
        self.requested: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a path."""
        self.requested.append(path)
        path = path.partition("?")[0]
        if path == f"/api/models/{self.repository}/revision/main":
            return self._json({"id": self.repository, "sha": COMMIT, **self._siblings()})
        if path.startswith(f"/api/models/{self.repository}/tree/"):
            return self._json(
                [
                    {"type": "file", "path": n, "size": len(b), "oid": _etag(b)}
                    for n, b in self.files.items()
                ]
            )
        name = path.rpartition("/")[2]
        if path.startswith(f"/{self.repository}/resolve/") and name in self.files:
            body = self.files[name]
            return 200, {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": COMMIT}, body
        _, headers, body = self._json({"error": "Repository not found"})
        return 404, {**headers, "X-Error-Code": "RepoNotFound"}, body

    def _siblings(self) -> dict[str, Any]:
        return {"siblings": [{"rfilename": name} for name in self.files]}

    def _json(self, document: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()


def _etag(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = {
        "config.json": b'{"model_type": "olmoe"}',
        "model.safetensors": os.urandom(4096),
        "README.md": b"# not needed",
        "pytorch_model.bin": b"not wanted",
    }
    fake = FakeHub("someone/tiny-moe", files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(hub: FakeHub, home: Path, name: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its settings when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, "-c", FETCH, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_a_hub_id_is_downloaded_without_what_is_not_needed(hub: FakeHub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "someone/tiny-moe")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert found == {n: hub.files[n] for n in ("config.json", "model.safetensors")}


def test_an_unknown_hub_id_is_named(hub: FakeHub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path, "someone/nothing")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "cluster.core.errors.CheckpointError: someone/nothing is not a folder, and the"
    )


def test_no_model_is_the_bundled_one() -> None:
    found = find_model(None, silent)
    assert found.name == BUNDLED_NAME
    assert found.folder == bundled_checkpoint()
    assert (found.folder / "config.json").is_file()


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    found = find_model("my-model", silent)
    assert found.folder == tmp_path / "my-model"
    assert found.name == "my-model"


@pytest.mark.parametrize("text", ["/no/such", "a/b/c", "../x", "~/nothing", "a b", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        find_model(text, silent)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("~no-such-user-here/model", "Could not determine home directory"),
        ("a" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_looked_up_is_refused(text: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        find_model(text, silent)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        find_model(str(file), silent)
