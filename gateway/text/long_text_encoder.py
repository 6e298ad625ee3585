"""Tokenizes long texts in another process, one at a time; see ``encode_texts``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from array import array
from pathlib import Path

from cluster.core.errors import RequestFailedError
from gateway.text.encode_texts import ID_TYPE, REPLY, encode_message

LONG_CHARS = 262_144
"""Number of characters above which a text is tokenized in a process instead of a thread."""


class LongTextEncoder:
    """Client of the process that tokenizes long texts.

    The process starts for the first long text and keeps running.

    Args:
        file: path of ``tokenizer.json``.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def encode(
        self, text: str, add_special_tokens: bool, token_slice: slice
    ) -> tuple[array[int], int]:
        """Return the slice ``token_slice`` of the token ids of a text, and the total number of ids.

        Cancelling the call kills the process.

        Raises:
            RequestFailedError: the process ended.
        """
        async with self._lock:
            process, self._process = self._process, None  # in use: an exception kills the process
            if process is None or process.returncode is not None:
                process = await self._start()
            try:
                message = await asyncio.to_thread(
                    encode_message, text, add_special_tokens, token_slice
                )
                reply = await _request(process, message)
            except BaseException:
                _kill(process)
                await asyncio.shield(process.wait())
                raise
            self._process = process
            return reply

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            await process.wait()

    async def _start(self) -> asyncio.subprocess.Process:
        path = os.pathsep.join(filter(None, sys.path))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway.text.encode_texts", str(self._file)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={"PYTHONPATH": path},
        )


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, for example for lack of memory
        process.kill()


async def _request(process: asyncio.subprocess.Process, message: bytes) -> tuple[array[int], int]:
    assert process.stdin is not None, "a pipe"
    assert process.stdout is not None, "a pipe"
    try:
        process.stdin.write(message)
        await process.stdin.drain()
        count, length = REPLY.unpack(await process.stdout.readexactly(REPLY.size))
        raw = await process.stdout.readexactly(length)
    except (OSError, EOFError) as err:
        raise RequestFailedError("the process that tokenizes long texts ended") from err
    return array(ID_TYPE, raw), count
