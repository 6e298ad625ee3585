"""The control plane: starts workers, places experts on them and handles their failures.

No module lives here directly. Layers, from the lowest up: ``core`` and ``config``, ``tracing``;
``planner``, ``load``, ``sizing`` and ``policy``; ``controller``; ``actors``; ``launch`` and
``cli``. Nothing below ``launch`` imports ``workers`` or ``gateway``.
"""
