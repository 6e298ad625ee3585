"""The placement epochs that a worker may run: the one in force, and those that may follow."""

from __future__ import annotations

from dataclasses import replace

from cluster.control_frames import NewEpoch
from cluster.errors import ConfigError, ProtocolError
from cluster.placement import BankPlacement, ExpertPlacement


class EpochMaps:
    """Placements by epoch, of one generation. Data thread only."""

    def __init__(self) -> None:
        self.current = ExpertPlacement(epoch=0, banks=())
        """Placement in force."""
        self._coming: dict[int, ExpertPlacement] = {}

    def start(self, placement: ExpertPlacement) -> None:
        """A generation begins with this placement; nothing else is known in it."""
        self.current = placement
        self._coming.clear()

    def learn(self, frame: NewEpoch) -> ExpertPlacement:
        """A placement that may come into force.

        Raises ``ProtocolError`` when it does not follow from one that is known.
        """
        known = {self.current.epoch: self.current, **self._coming}
        base = known.get(frame.base_epoch)  # maybe in force already, with its header on the way
        if base is None:
            raise ProtocolError(
                f"epoch {frame.epoch} follows {frame.base_epoch}, but {self.current.epoch} runs"
            )
        banks = list(base.banks)
        try:
            for place, maps in frame.banks:
                banks[place] = _read(maps, banks[place])
        except (ConfigError, KeyError, TypeError, ValueError, IndexError) as err:
            raise ProtocolError(f"no maps of an epoch: {err}") from err
        placement = replace(self.current, epoch=frame.epoch, banks=tuple(banks))
        self._coming[frame.epoch] = placement
        return placement

    def reach(self, epoch: int) -> bool:
        """A step header names this epoch; whether it is another than the last one's.

        Raises ``ProtocolError`` for one that was never told.
        """
        if epoch == self.current.epoch:
            return False
        if epoch not in self._coming:
            raise ProtocolError(f"a step runs in epoch {epoch}, which nobody has announced")
        self.current = self._coming.pop(epoch)
        for old in [e for e in self._coming if e < epoch]:
            del self._coming[old]
        return True


def _read(maps: dict[str, object], old: BankPlacement) -> BankPlacement:
    found = BankPlacement.from_dict(maps)
    if (found.bank, found.layer, found.num_experts) != (old.bank, old.layer, old.num_experts):
        raise ProtocolError(f"maps of bank {found.bank} layer {found.layer} in a wrong place")
    return found
