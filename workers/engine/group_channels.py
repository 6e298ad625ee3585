"""The step channels of an expert worker that serves several step groups."""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.step_channel import StepChannel


class GroupChannels:
    """Receives the step headers of all step groups, each on a channel. Data thread only."""

    is_leader = False
    """Whether this worker decides headers: no expert worker does."""

    def __init__(self, channels: Sequence[StepChannel]) -> None:
        """``channels``: one for each step group, in the order of ``Generation.groups``."""
        self.channels = tuple(channels)

    @property
    def highest_step(self) -> int:
        """Highest step number of all headers received, in any generation; 0 before the first."""
        return max(channel.highest_step for channel in self.channels)

    @property
    def highest_epoch(self) -> int:
        """Highest placement epoch of all headers received; 0 before the first header."""
        return max(channel.highest_epoch for channel in self.channels)

    def start_generation(self, first_step: int, epoch: int) -> None:
        """Drop all state of the old generation; see ``StepChannel.start_generation``."""
        for channel in self.channels:
            channel.start_generation(first_step, epoch)

    def set_epoch(self, epoch: int, oldest_epoch: int) -> None:
        """Do nothing: leaders put epochs into headers."""
