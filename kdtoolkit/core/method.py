"""`Method`: the module that owns every trained parameter of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.plan import MethodPlan
from kdtoolkit.core.run_context import ExportCandidates
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.hooks import remove_tap_hooks
from kdtoolkit.types import Batch, Clock, LossWeight, Step

if TYPE_CHECKING:
    from typing import Self

    from kdtoolkit.data.batch_order import BatchOrder


class Method(nn.Module):
    """Owns every trained parameter: `method(batch, clock)` -> `Step(losses, logits, logs)`.

    It is the only thing that `accelerate` prepares. Write your own by overriding `forward`,
    `networks`, `logits` and, for a run that is compiled, `compile`; pass it to
    `distill(method=...)`.

    Attributes:
        teachers: Frozen teachers. They are outside of the module tree: no gradient, in no
            checkpoint.
        num_views: Augmentations of each training image that it reads; more than 1 adds
            `batch["views"]` (B, num_views, 3, H, W).
        callbacks: Those that are a part of it. The run calls them with those of the user, in the
            order of `Callback.order`.
        batch_sampler: Chooses the rows of every batch: (labels (N,) int64, batch size, seed) -> a
            batch sampler with `set_epoch`. None draws all rows evenly.
        uses_unlabelled: Whether it can use training rows without a label (y = -1).
        no_compile_reason: Why its networks cannot be compiled; None where they can.
        networks_per_process: Whether every process trains networks of its own on the whole batch,
            and gradients are not averaged.
        own_batches: Whether every network sees images of its own, so that their logits of a step
            cannot be compared.

    Example:
        ```python
        import timm
        import torch.nn.functional as F

        import kdtoolkit
        from kdtoolkit.types import Step


        class LabelSmoothing(kdtoolkit.Method):
            def __init__(self, student):
                super().__init__()
                self.student = student

            def forward(self, batch, clock):
                logits = self.logits("student", batch["x"])
                hard = F.cross_entropy(logits, batch["y"])
                flat = -logits.log_softmax(1).mean()
                return Step({"ce": 0.9 * hard, "flat": 0.1 * flat}, {"student": logits})

            def networks(self):
                return {"student": self.student}

            def logits(self, name, x):
                return self.student(x)


        student = timm.create_model("cifar_resnet8", num_classes=10)
        method = LabelSmoothing(student)
        result = kdtoolkit.distill(None, None, "digits", method=method, epochs=1)
        ```
    """

    teachers: tuple[Frozen, ...] = ()
    num_views: int = 1
    callbacks: tuple[Callback, ...] = ()
    batch_sampler: Callable[[np.ndarray, int, int], BatchOrder] | None = None
    uses_unlabelled: bool = False
    no_compile_reason: str | None = None
    networks_per_process: bool = False
    own_batches: bool = False

    def forward(self, batch: Batch, clock: Clock) -> Step:
        """One forward pass of everything that is trained.

        Args:
            batch: Images `x` (B, 3, H, W) in [0, 1], labels `y` (B,) int64, row numbers `index`
                (B,) int64, and `views` where `num_views` is above 1.
            clock: Step and epoch, for weights that are schedules.

        Returns:
            Weighted losses by name (scalars; their sum is minimised), logits (B, C) by network,
            and figures to log.
        """
        raise NotImplementedError

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """Weights of its losses by name; schedules are tried over the whole run before it starts.

        Returns:
            Numbers and schedules; empty where it has none.
        """
        return {}

    def networks(self) -> dict[str, nn.Module]:
        """Every network that is trained, complete, by name; the first is the student."""
        raise NotImplementedError

    def export_candidates(self) -> ExportCandidates:
        """Names of the networks one of which is exported, and the reason for these.

        The best of them on the validation split is exported; without such a split the first.
        """
        return [next(iter(self.networks()))], "it is the network that was passed as student"

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits of one network.

        Args:
            name: Its key in `networks()`.
            x: Images (B, 3, H, W) in [0, 1], not yet normalised.

        Returns:
            Logits (B, C).
        """
        raise NotImplementedError

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every network, and of ensembles that it trains, for evaluation.

        Args:
            x: Images (B, 3, H, W) in [0, 1].

        Returns:
            Logits (B, C) by name.
        """
        return {name: self.logits(name, x) for name in self.networks()}

    def train_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits of every network in training, each for its own view of the images.

        Args:
            batch: As in `forward`.

        Returns:
            Logits (B, C) by name.
        """
        return {name: self.logits(name, batch["x"]) for name in self.networks()}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the networks that this process trains, by name.

        Those with `requires_grad=False` are included.
        """
        return dict(self.named_parameters())

    def sync(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Exchange networks, where each process trains networks of its own.

        All ranks call it before an evaluation and before a checkpoint.

        Args:
            optimizer: Its state is exchanged too; None exchanges networks only.
        """

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Groups of parameters whose gradients have one norm together, for `grad_clip`.

        Networks that train independently have one group each.
        """
        return [list(self.parameters())]

    def place_teachers(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Put the teachers on the device of the run; the trainer moves the method itself.

        Args:
            device: The device.
            memory_format: Layout of their weights in memory.
            autocast: The half precision of the run, or None. With it, BatchNorms of the teachers
                are folded into convolutions: the rounding of autocast is a thousand times that of
                folding.
        """
        for teacher in self.teachers:
            teacher.to(device=device, memory_format=memory_format)
            if autocast is not None:
                teacher.fold_batch_norms(autocast)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the networks, for `distill(compile=True)`.

        Args:
            *args: Not used; `nn.Module.compile` has them.
            **kwargs: Not used.

        Raises:
            ValueError: If `no_compile_reason` is set.
        """
        if self.no_compile_reason:
            raise ValueError(f"compile=True: {self.no_compile_reason}; leave compile out")
        raise NotImplementedError

    def release(self) -> None:
        """Remove all hooks, and give the teachers back as they were."""

    def plan(self) -> MethodPlan:
        """What the plan prints of it: losses with their taps and adapters, parameter counts."""
        return {}

    def clone(self, share_teachers: bool = True) -> Self:
        """A deep copy with parameters and buffers of its own, such as an EMA teacher needs.

        The copy has no callbacks, its taps are its own, other hooks do nothing in it, and its
        `forward` is that of the class, without what mixed precision has wrapped around it.

        Args:
            share_teachers: Use the same frozen teachers; False copies them as well.
        """
        memo: dict[int, Any] = {id(self.callbacks): ()}
        if share_teachers:
            memo[id(self.teachers)] = self.teachers
        else:  # a deep copy of a Frozen is the same object
            memo |= {id(teacher): _copy_teacher(teacher) for teacher in self.teachers}
        clone = copy.deepcopy(self, memo)
        for wrapped in ("forward", "_original_forward"):  # instance attributes set by accelerate
            vars(clone).pop(wrapped, None)
        return clone


def _copy_teacher(teacher: Frozen) -> Frozen:
    model = remove_tap_hooks(copy.deepcopy(teacher.model))
    return Frozen(model, teacher.keys, teacher.size, preprocess=teacher.preprocess)


def num_parameters(module: nn.Module) -> int:
    """Number of parameters of a module.

    Args:
        module: The module, with all that is in it.

    Returns:
        Number of values, trainable or not; a shared parameter counts once.
    """
    return sum(p.numel() for p in module.parameters())
