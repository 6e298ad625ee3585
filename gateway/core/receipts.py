"""What Serve's proxy and a replica agree on about the bytes of an answer that a client has taken.

Ray carries an answer from the replica to the proxy without a bound: the rest of a stream that its
client does not read would wait in the proxy's memory. The proxy announces receipts in the ASGI
scope and sends them to the replica in place of the client's next message.
"""

from __future__ import annotations

from typing import Final

RECEIPTS: Final = "expertmesh.receipts"
"""Key in the scope's ``extensions``: receipts will come."""
RECEIPT: Final = "expertmesh.receipt"
"""Type of a message with ``num_bytes``, the bytes that the client took since the last receipt."""
STEP_BYTES: Final = 64 * 1024
"""Bytes after which a receipt is sent: some 250 tokens."""
WINDOW_BYTES: Final = 256 * 1024
"""Bytes without a receipt after which a replica sends no more of a stream."""
