"""Ctrl-C and SIGTERM: every rank stops at the same step."""

from __future__ import annotations

from accelerate import Accelerator

from kdtoolkit.utils import distributed

INTERRUPTED = "interrupted"  # `Trainer.stop` after a signal
EXCHANGE_EVERY = 10  # optimizer steps between two exchanges of signals between ranks


class StopSignal:
    """Whether a signal to stop came, on any rank.

    Args:
        accelerator: Says where an optimizer step is complete, and on which device ranks exchange.
        grad_accum: Batches that share one optimizer step.
    """

    def __init__(self, accelerator: Accelerator, grad_accum: int) -> None:
        self.accelerator, self.grad_accum = accelerator, grad_accum
        self.received = False

    def receive(self) -> bool:
        """Note that a signal came.

        Returns:
            Whether one had come before.
        """
        before, self.received = self.received, True
        return before

    def is_received(self, step: int, *, exchange_now: bool = False) -> bool:
        """Whether to stop after this batch; all ranks call it and get the same answer.

        It is False between optimizer steps. Ranks exchange their signals only every tenth optimizer
        step.

        Args:
            step: Batches since the start.
            exchange_now: Exchange at this step in any case.
        """
        if not self.accelerator.sync_gradients:
            return False
        if distributed.is_distributed():
            is_due = (step // self.grad_accum) % EXCHANGE_EVERY == 0
            if not (is_due or exchange_now):
                return False
            self.received = distributed.any_rank(self.received, self.accelerator.device)
        return self.received
