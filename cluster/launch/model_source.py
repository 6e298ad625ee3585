"""Resolves the argument MODEL to a local folder: bundled, given, or from the Hugging Face hub."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cluster.core.errors import CheckpointError, first_line

BUNDLED_NAME = "expertmesh-demo"
"""Name of the bundled checkpoint."""
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""Name patterns of the files of a hub repository that are downloaded."""
PROGRESS_INTERVAL_S = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model in a folder on this host."""

    folder: Path
    """Folder with the model's files."""
    name: str
    """Default of ``served_model_name``, the model's name in requests."""


def find_model(text: str | None, say: Callable[[str], None]) -> ModelSource:
    """Return the model for argument MODEL: a folder, a hub id to download, or None (bundled).

    ``say`` prints a line of progress. Raises ``CheckpointError``.
    """
    if text is None:
        return ModelSource(folder=bundled_checkpoint(), name=BUNDLED_NAME)
    try:
        folder = Path(text).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as err:  # no permission, too long a name, ~ of an unknown user
        raise CheckpointError(f"{text} cannot be looked up: {first_line(err)}") from err
    if text and is_folder:
        resolved = folder.resolve()
        return ModelSource(folder=resolved, name=resolved.name)
    if text and exists:
        raise CheckpointError(f"{text} is a file: a checkpoint is a folder")
    if not _HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text or 'an empty MODEL'} is neither a folder nor a hub id")
    return ModelSource(folder=download(text, say), name=text)


def bundled_checkpoint() -> Path:
    """Return the folder of the bundled checkpoint. Raises ``CheckpointError``."""
    folder = Path(str(resources.files("workers.demo"))) / "checkpoint"
    if not (folder / "config.json").is_file():
        raise CheckpointError("the bundled checkpoint is missing from this installation")
    return folder


def download(hub_id: str, say: Callable[[str], None]) -> Path:
    """Download a repository of the Hugging Face hub; return its folder.

    The variables ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HOME`` apply. ``say`` prints a line of
    progress. Raises ``CheckpointError`` with the hub's own message.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"fetching {hub_id} from the hub")
    done = threading.Event()
    watcher = threading.Thread(target=_report, args=(hub_id, say, done), daemon=True)
    watcher.start()
    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        return Path(api.snapshot_download(hub_id, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as err:
        raise CheckpointError(
            f"{hub_id} is not a folder, and the hub replied: {first_line(err)}"
        ) from err
    finally:
        done.set()


def _report(hub_id: str, say: Callable[[str], None], done: threading.Event) -> None:
    seconds = 0.0
    while not done.wait(PROGRESS_INTERVAL_S):
        seconds += PROGRESS_INTERVAL_S
        say(f"fetching {hub_id}, {seconds:.0f} s")
