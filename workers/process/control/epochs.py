"""The placement epochs that a worker may run: the current one and announced ones."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from cluster.core.errors import ProtocolError
from cluster.core.frames import NewEpoch
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from workers.experts.transfer.loading import Obstacle, SlotOrder


class EpochPlacements:
    """Placements of one generation by epoch. Data thread only, except ``obstacle``."""

    def __init__(self) -> None:
        self.current = ExpertPlacement(epoch=0, banks=())
        self._announced: dict[int, ExpertPlacement] = {}

    def start(self, placement: ExpertPlacement) -> None:
        """Start a generation with its first placement; drop the placements of earlier ones."""
        self.current = placement
        self._announced.clear()

    def add_announced(self, frame: NewEpoch) -> ExpertPlacement:
        """Record an announced placement, and return it.

        Raises ``ProtocolError`` if the frame refers to a base epoch that this worker does not know.
        """
        known = {self.current.epoch: self.current, **self._announced}
        base = known.get(frame.base_epoch)  # a step header in transit may refer to it
        if base is None:
            raise ProtocolError(
                f"epoch {frame.epoch} follows {frame.base_epoch}, but {self.current.epoch} runs"
            )
        banks = list(base.banks)
        for index, maps in frame.banks:
            if index not in range(len(banks)):
                raise ProtocolError(f"the maps of an epoch name bank {index}, which does not exist")
            _check_bank(maps, banks[index])
            banks[index] = maps
        placement = replace(self.current, epoch=frame.epoch, banks=tuple(banks))
        self._announced[frame.epoch] = placement
        return placement

    def switch_to(self, epoch: int) -> bool:
        """Switch to the epoch of a step header; returns whether it is new.

        Raises ``ProtocolError`` for an unknown epoch.
        """
        if epoch == self.current.epoch:
            return False
        if epoch not in self._announced:
            raise ProtocolError(f"a step runs in epoch {epoch}, which was not announced")
        self.current = self._announced.pop(epoch)
        for old in [e for e in self._announced if e < epoch]:
            del self._announced[old]
        return True

    def obstacle(
        self, device: int, orders: Iterable[SlotOrder], epoch: int, announced: int
    ) -> Obstacle | None:
        """Return why ``orders`` must not write slots of expert rank ``device``, None if they may.

        A step may read the slots of this worker's current epoch and of all later ones up to
        ``epoch``, the controller's current epoch. ``announced``: newest known epoch. Any thread.
        """
        current, coming = self.current, dict(self._announced)
        if epoch < current.epoch:
            return Obstacle(
                f"commanded in epoch {epoch}, but epoch {current.epoch} is current", False
            )
        work = tuple(orders)
        for maps in (current, *(m for e, m in coming.items() if e <= epoch)):
            for bank, slot, expert in work:
                row = maps.banks[bank].physical_to_logical[device] if maps.banks else ()
                held = row[slot] if slot < len(row) else FREE_SLOT
                if held not in (FREE_SLOT, expert):
                    text = f"slot {slot} of bank {bank} has expert {held} in epoch {maps.epoch}"
                    return Obstacle(text, max(epoch, announced) > current.epoch)
        return None


def _check_bank(maps: BankPlacement, old: BankPlacement) -> None:
    if (maps.bank, maps.layer, maps.num_experts) != (old.bank, old.layer, old.num_experts):
        raise ProtocolError(f"maps of bank {maps.bank} layer {maps.layer} at a wrong index")
