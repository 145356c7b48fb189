"""`DistillationLoss`: one loss between the outputs of a student and a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import ClassVar

from torch import Tensor, nn

from kdtoolkit.core.plan import ComparedTaps
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.types import Batch, Out, Shape, TapKey
from kdtoolkit.utils.validation import describe_value


class DistillationLoss(nn.Module):
    """One paper's loss between two outputs: `loss(student_out, teacher_out, batch)` -> scalar.

    The scalar is not weighted. A subclass builds everything from the shapes of the taps when it is
    constructed; its options are keyword-only arguments, so that `distill()` can pass them on. The
    adapters that it trains are its parameters: give them to your optimizer.

    Args:
        student: The tapped student.
        teacher: The frozen teacher; None for a loss that needs none.
        pairs: (student tap, teacher tap) of every pair of features that it compares.

    Attributes:
        needs_teacher: Whether it reads a teacher; False for a loss on labels alone.
        needs_taps: Whether it reads features; False for a loss on logits alone.
        pairs: The pairs of taps that it reads.
        registered: Name under which `register_loss` registered the class.

    Raises:
        ValueError: If it needs pairs of taps and gets none, or gets networks without taps.

    Example:
        In a training loop of your own:

        ```python
        import timm
        import torch

        import kdtoolkit
        from kdtoolkit.losses import AT, KD

        student = timm.create_model("cifar_resnet8", num_classes=10)
        teacher = timm.create_model("cifar_resnet14", num_classes=10)
        student_taps = kdtoolkit.Taps(student, [2, 3], 32)
        frozen_teacher = kdtoolkit.Frozen(teacher, [2, 3], 32)
        attention = AT(student_taps, frozen_teacher, [(2, 2), (3, 3)], p=2)
        kd = KD(student_taps, frozen_teacher, temperature=4.0)
        parameters = [*student.parameters(), *attention.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05)

        x, y = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
        batch = {"x": x, "y": y}
        student_out, teacher_out = student_taps(x), frozen_teacher(x)
        loss = torch.nn.functional.cross_entropy(student_out.logits, y)
        loss = loss + 0.9 * kd(student_out, teacher_out, batch)
        loss = loss + 1000 * attention(student_out, teacher_out, batch)
        loss.backward()
        optimizer.step()
        ```
    """

    needs_teacher: ClassVar[bool] = True
    needs_taps: ClassVar[bool] = True
    registered: ClassVar[str]

    def __init__(
        self, student: Taps, teacher: Frozen | None, pairs: Sequence[tuple[TapKey, TapKey]] = ()
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check_networks(name, student, teacher, teacher_needed=self.needs_teacher)
        if self.needs_taps:
            check_pairs(name, pairs)
        self.pairs = [
            (student.resolve_key(s), t if teacher is None else teacher.resolve_key(t))
            for s, t in pairs
        ]

    def forward(self, student: Out, teacher: Out, batch: Batch) -> Tensor:
        """Compute the loss of one batch.

        Args:
            student: Logits (B, C) and features of the student.
            teacher: Those of the teacher. A loss that needs no teacher ignores it.
            batch: Images and labels.

        Returns:
            Unweighted scalar, at least float32.
        """
        raise NotImplementedError

    def features(self, student: Out, teacher: Out) -> tuple[list[Tensor], list[Tensor]]:
        """The features of all pairs: the student's, and the teacher's.

        Args:
            student: What the student gave for the batch, with the features of its taps.
            teacher: The same of the teacher.

        Returns:
            Two lists in the order of `pairs`, one feature a pair, batch first.
        """
        return [student.feats[s] for s, _ in self.pairs], [teacher.feats[t] for _, t in self.pairs]

    @property
    def read_taps(self) -> list[tuple[TapKey, TapKey]]:
        """(student tap, teacher tap) of all features that are read, compared or not."""
        return self.pairs

    def plan_rows(self) -> list[ComparedTaps]:
        """The pairs of taps and what stands between them (`self.adapters`), for the plan."""
        found = getattr(self, "adapters", None)
        adapters = list(found) if isinstance(found, nn.ModuleList) else []
        return [
            ComparedTaps(student=s, teacher=t, adapter=adapter)
            for (s, t), adapter in zip_longest(self.pairs, adapters[: len(self.pairs)])
        ]


def _check_networks(loss: str, student: object, teacher: object, *, teacher_needed: bool) -> None:
    """Check that a loss got tapped networks, a teacher among them where it reads one."""
    if not isinstance(student, Taps):
        raise ValueError(
            f"{loss} got {describe_value(student)} as student; allowed: Taps(network, taps, image "
            "size)"
        )
    is_missing = teacher is None and not teacher_needed
    if not is_missing and not isinstance(teacher, Taps):
        raise ValueError(
            f"{loss} got {describe_value(teacher)} as teacher; allowed: Frozen(network, taps, "
            "image size)"
        )


def check_pairs(loss: str, pairs: object) -> None:
    """Check that a loss that compares features got pairs of taps.

    Args:
        loss: Name of the loss, for the message.
        pairs: What was given.

    Raises:
        ValueError: If it is no list of pairs, or an empty one.
    """
    is_list = isinstance(pairs, (list, tuple)) and bool(pairs)
    if not is_list or not all(map(is_pair_of_taps, pairs)):  # type: ignore[call-overload]
        raise ValueError(
            f"{loss} compares features: give pairs of taps, [(student tap, teacher tap)], stage "
            f"numbers or names of modules, got {describe_value(pairs)}"
        )


def is_pair_of_taps(taps: object) -> bool:
    """Whether a value is a pair of stage numbers or names of modules.

    Args:
        taps: What was given.

    Returns:
        True for a list or tuple of two whole numbers or texts; True and False are no numbers.
    """
    return (
        isinstance(taps, (tuple, list))
        and len(taps) == 2
        and all(isinstance(tap, (str, int)) and not isinstance(tap, bool) for tap in taps)
    )


def shapes_of(taps: Taps, keys: Sequence[TapKey]) -> list[Shape]:
    """Shapes of features without their batch dimension.

    Args:
        taps: A tapped network, whose hooks need not be there yet.
        keys: Stage numbers or module names.
    """
    return [taps.boundary_of(key).shape for key in keys]


def zero_loss(part: nn.Module, logits: Tensor) -> Tensor:
    """Zero that depends on every parameter of a module that is switched off.

    DDP expects a gradient for each of them.

    Args:
        part: The module that is switched off.
        logits: Logits (B, C) of the student, on which it depends, too.
    """
    zero = logits.float().sum() * 0.0
    return sum((p.float().sum() * 0.0 for p in part.parameters()), zero)
