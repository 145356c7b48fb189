"""Ctrl-C, SIGTERM and SIGHUP: every rank stops at the same step."""

from __future__ import annotations

import itertools
import os
import time

from accelerate import Accelerator

from kdtoolkit.utils import distributed
from kdtoolkit.utils.rank_monitor import raise_if_rank_failed
from kdtoolkit.utils.signals import Interrupted

INTERRUPTED = "interrupted"  # `Trainer.stop` after a signal
EXCHANGE_EVERY = 10  # optimizer steps between two exchanges of signals between ranks
MIN_STEPS = 3  # optimizer steps that are timed, at least
SLOW_STEP = 1.5  # seconds of an optimizer step, above which ranks exchange at every step
REPEAT_WINDOW = 3.0  # seconds in which a launcher sends on the signal that all processes got


class StopSignal:
    """Whether a signal to stop came, on any rank.

    Args:
        accelerator: Says where an optimizer step is complete, and on which device ranks exchange.
        grad_accum: Batches that share one optimizer step.

    Attributes:
        number: The signal that came; 0 before.
    """

    def __init__(self, accelerator: Accelerator, grad_accum: int) -> None:
        self.accelerator, self.grad_accum = accelerator, grad_accum
        self.number = 0
        self._received_at = 0.0
        self._exchange_every = EXCHANGE_EVERY
        self._asked_at: list[float] = []  # times since the last exchange

    def receive(self, number: int) -> None:
        """Note a signal. The second ends the run, unless it is the launcher's copy of the first.

        Args:
            number: The signal.

        Raises:
            Interrupted: At the second signal.
        """
        now = time.monotonic()
        if not self.number:
            self.number, self._received_at = number, now
            return
        is_copy = "LOCAL_RANK" in os.environ and now - self._received_at < REPEAT_WINDOW
        if not is_copy:
            raise Interrupted(signal_number=number)

    def is_received(self, step: int, *, exchange_now: bool = False) -> bool:
        """Whether to stop after this batch; all ranks call it and get the same answer.

        It is False between optimizer steps. Ranks exchange their signals only every tenth optimizer
        step; at every step where one takes more than 1.5 s, since launchers kill after 30 s.

        Args:
            step: Batches since the start.
            exchange_now: Exchange at this step in any case.

        Raises:
            RankFailed: If another rank failed.
        """
        raise_if_rank_failed()
        if not self.accelerator.sync_gradients:
            return False
        if distributed.is_distributed():
            self._asked_at.append(time.monotonic())
            is_due = (step // self.grad_accum) % self._exchange_every == 0
            if not (is_due or exchange_now):
                return False
            self._exchange()
        return self.number > 0

    def _exchange(self) -> None:
        """Take over another rank's signal; agree on how often ranks exchange from now on."""
        asked = self._asked_at
        # the fastest step: others may hold an evaluation
        fastest = min((b - a for a, b in itertools.pairwise(asked)), default=0.0)
        mine = [self.number, fastest if len(asked) > MIN_STEPS else 0.0]
        number, seconds = distributed.all_reduce_max(mine, self.accelerator.device)
        self.number = int(number)
        if seconds > SLOW_STEP:
            self._exchange_every = 1
        self._asked_at = []
