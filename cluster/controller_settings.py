"""Limits of the controller: how long it waits for what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    """Limits of the controller."""

    detection_limit_s: float = 2.0
    """Silence or standstill after which a worker is lost."""
    confirm_s: float = 0.2
    """Time in which a worker that a peer has lost may show another cause, before it is lost."""
    start_limit_s: float = 600.0
    """Limit for the whole start."""
    start_silence_s: float = 30.0
    """As ``detection_limit_s``, while workers start: importing and loading starve other threads."""
    generation_limit_s: float = 15.0
    """Limit for a member to take part in a new generation."""
    adoption_limit_s: float = 10.0
    """Time in which the workers must call a restarted controller, before they are lost."""
