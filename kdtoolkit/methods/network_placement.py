"""Which process trains which network, where networks are spread over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtoolkit.utils import distributed


@dataclass(frozen=True)
class NetworkPlacement:
    """Spreads networks over the processes of a run: network k belongs to process k modulo P.

    The number of processes is read when it is needed, as a method is built before they are known.

    Attributes:
        num_networks: How many networks there are.
        spread: True spreads them and requires a number of processes P that divides their number;
            "auto" spreads them where it does; False trains all on every process.
    """

    num_networks: int
    spread: bool | str

    def check(self) -> None:
        """Raise ValueError if the networks must be spread and cannot be shared equally."""
        processes = distributed.world_size()
        if self.spread is True and self.num_networks % processes:
            raise ValueError(
                f"spread=True: {self.num_networks} networks cannot be shared out equally among "
                f"{processes} processes; launch a number of processes that divides "
                f"{self.num_networks}, or pass spread=False"
            )

    @property
    def is_spread(self) -> bool:
        """Whether every process trains networks of its own."""
        processes = distributed.world_size()
        return processes > 1 and self.spread is not False and self.num_networks % processes == 0

    def process_of(self, k: int) -> int:
        """Rank of the process that trains network k, where networks are spread.

        Args:
            k: Number of the network, from 0.

        Returns:
            k modulo the number of processes.
        """
        return k % distributed.world_size()

    def is_local(self, k: int) -> bool:
        """Whether this process trains network k.

        Args:
            k: Number of the network, from 0.

        Returns:
            True for every network where they are not spread.
        """
        return not self.is_spread or self.process_of(k) == distributed.rank()

    def gather_logits(
        self, local_logits: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Logits of all networks on every process.

        Args:
            local_logits: Logits (B, C) of this process's networks, by name.
            names: All networks, in order.

        Returns:
            Logits of all, in order; those of other processes' networks without gradient.
        """
        if not self.is_spread:
            return dict(local_logits)
        own = torch.stack([logits.detach() for logits in local_logits.values()])
        by_process = distributed.all_gather(own)  # P tensors (K / P, B, C)
        gathered: dict[str, Tensor] = {}
        for k, name in enumerate(names):
            place = k // distributed.world_size()
            gathered[name] = local_logits.get(name, by_process[self.process_of(k)][place])
        return gathered
