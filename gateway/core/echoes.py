"""What Serve's proxy and a replica agree on about refusals that the proxy repeats.

Under overload most requests are refused, and the way from the proxy to a replica and back costs
more than all the rest of a refusal. So a replica says with a refusal for how long it holds for
whatever else its key asks for, and the proxy repeats it meanwhile. It tells the replica how often.
"""

from __future__ import annotations

from typing import Final

HOLDS: Final = "x-expertmesh-holds"
"""Header of a refusal, which the proxy takes away: milliseconds, a blank, and the reason."""
ECHOES: Final = "expertmesh.echoes"
"""Key in the scope's ``extensions``: refusals will be repeated. Its value are those that have been
since the last request: path, reason and number of each kind."""
