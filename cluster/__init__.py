"""The control plane: which workers exist, which experts they hold, what happens on a change.

No module lives here directly. Floors, from the ground up: ``core`` and ``config``, ``tracing``;
``planner``, ``load``, ``sizing`` and ``policy``; ``controller``; ``actors``; ``launch`` and
``cli``. Nothing below ``launch`` imports ``workers`` or ``gateway``.
"""
