"""Losses between teachers and every network of a strategy, beside the strategy's own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn

from kdtoolkit.core.loss import DistillationLoss, zero_loss
from kdtoolkit.core.method import num_parameters
from kdtoolkit.core.plan import PlanRow
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.methods.build_losses import BuiltLosses
from kdtoolkit.methods.loss_rows import loss_rows
from kdtoolkit.methods.terms import describe_weights, weights_at
from kdtoolkit.types import Batch, Clock, LossWeight, Out, TapKey

FIRST = "student"
LossBuilder = Callable[[Taps, Sequence[Frozen]], BuiltLosses]
TeacherRunner = Callable[[int, Tensor], Out]


@runtime_checkable
class TakesTeacherLosses(Protocol):
    """A method whose networks can learn from frozen teachers, too."""

    def add_teacher_losses(self, teachers: Sequence[Frozen], build: LossBuilder) -> None:
        """Add the losses of frozen teachers; called once, before training.

        Args:
            teachers: The frozen teachers.
            build: Builds the losses between one tapped network and the teachers.
        """
        ...


class TeacherLosses(nn.ModuleDict):
    """The losses of every network, each with adapters of its own: "kd", "kd/peer1", ...

    Without arguments it holds no loss and adds nothing.

    Args:
        taps: Taps of every network that learns, by the network's name.
        teachers: What the networks learn from.
        build: Builds the losses between one network and the teachers.

    Attributes:
        taps: Taps by the network's name.
        weights: Weight of every loss, for all networks alike.

    Raises:
        ValueError: If a network shares parameters with a frozen teacher, or a loss refuses it.
    """

    def __init__(
        self,
        taps: Mapping[str, Taps] | None = None,
        teachers: Sequence[Frozen] = (),
        build: LossBuilder | None = None,
    ) -> None:
        super().__init__()
        self.taps = dict(taps or {})
        self.teachers = tuple(teachers)
        self.weights: dict[str, LossWeight] = {}
        self.teacher_of: dict[str, int] = {}
        for name, network in self.taps.items():
            assert build is not None
            _check_not_frozen(name, network.model, self.teachers)
            built = build(network, self.teachers)
            self[name] = nn.ModuleDict(dict(built.losses))
            self.weights, self.teacher_of = built.weights, built.teacher_of

    @classmethod
    def of_student(
        cls, taps: Taps, teachers: Sequence[Frozen], build: LossBuilder
    ) -> TeacherLosses:
        """The losses of a method with one network; the taps that they read are added to its own.

        Args:
            taps: The tapped network.
            teachers: What it learns from.
            build: Builds the losses between the network and the teachers.

        Returns:
            The losses; networks and teachers are tapped.
        """
        losses = cls({FIRST: taps}, teachers, build)
        losses.select_teacher_taps()
        taps.select([*taps.keys, *losses.student_taps(FIRST)])
        taps.check_training_forward()
        return losses

    def losses_of(self, name: str) -> dict[str, DistillationLoss]:
        """The losses of one network.

        Args:
            name: Name of the network.

        Returns:
            Losses by name; empty where there are none.
        """
        if name not in self:
            return {}
        losses = cast("nn.ModuleDict", self[name])
        return {key: cast("DistillationLoss", loss) for key, loss in losses.items()}

    def student_taps(self, name: str) -> list[TapKey]:
        """Taps of a network that its losses read.

        Args:
            name: Name of the network.

        Returns:
            Every tap once.
        """
        read = [s for loss in self.losses_of(name).values() for s, _ in loss.read_taps]
        return list(dict.fromkeys(read))

    def teacher_taps(self, number: int) -> list[TapKey]:
        """Taps of a teacher that the losses read.

        Args:
            number: Number of the teacher.

        Returns:
            Every tap once.
        """
        read = [
            t
            for name in self
            for key, loss in self.losses_of(name).items()
            if self.teacher_of[key] == number
            for _, t in loss.read_taps
        ]
        return list(dict.fromkeys(read))

    def select_teacher_taps(self) -> None:
        """Tap the teachers where a loss reads them, and nowhere else."""
        for number, teacher in enumerate(self.teachers):
            teacher.select(self.teacher_taps(number))

    def forward(
        self,
        outs: Mapping[str, Out],
        batches: Mapping[str, Batch],
        clock: Clock,
        run_teacher: TeacherRunner | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of networks.

        A teacher runs once on the same images, and not at all where no loss reads it. A loss of
        weight 0 is a zero that depends on its parameters.

        Args:
            outs: What the networks gave, by name.
            batches: What each saw: `x`, and the labels.
            clock: Step and epoch, for weights that are schedules.
            run_teacher: (number, images) -> output of a teacher; default the frozen teachers.

        Returns:
            Loss by term, network by network.
        """
        weights = weights_at(self.weights, clock)
        run = run_teacher or (lambda number, x: self.teachers[number](x))
        teacher_outs: dict[tuple[int, int], Out] = {}
        terms: dict[str, Tensor] = {}
        for name, out in outs.items():
            batch = batches[name]
            for key, loss in self.losses_of(name).items():
                term = term_of(key, name)
                if weights[key] == 0.0:
                    terms[term] = zero_loss(loss, out.logits)
                    continue
                teacher, place = out, (self.teacher_of[key], id(batch["x"]))
                if loss.needs_teacher:
                    if place not in teacher_outs:
                        teacher_outs[place] = run(place[0], batch["x"])
                    teacher = teacher_outs[place]
                terms[term] = weights[key] * loss(out, teacher, batch)
        return terms

    def plan_rows(self, teacher_name: str = "") -> list[PlanRow]:
        """One row for each loss of each network, or for each pair of taps that it compares.

        Args:
            teacher_name: What stands in front of a teacher's taps; default nothing.
        """
        weights, rows = describe_weights(self.weights), list[PlanRow]()
        for name in self:
            for key, loss in self.losses_of(name).items():
                teacher = self.teachers[self.teacher_of[key]] if loss.needs_teacher else None
                compared = loss_rows(
                    term_of(key, name), loss, weights[key], self.taps[name], teacher
                )
                for row in compared:
                    row["student"] = f"{name} {row['student']}"
                    if teacher is not None:
                        row["teacher"] = f"{teacher_name or _called(self, key)} {row['teacher']}"
                rows += compared
        return rows

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the teachers and of all adapters, for the plan; empty without losses."""
        if not len(self):
            return {}
        counts = {
            "teacher" if len(self.teachers) == 1 else f"teacher/{number}": num_parameters(t.model)
            for number, t in enumerate(self.teachers)
        }
        return counts | {"adapters": num_parameters(self)}

    def release(self) -> None:
        """Remove the hooks of all networks, and give the teachers back as they were."""
        for taps in self.taps.values():
            taps.remove_hooks()
        for teacher in reversed(self.teachers):
            teacher.release()


def term_of(loss: str, network: str) -> str:
    """Name of the loss of one network: "kd" of the student, "kd/peer1", ...

    Args:
        loss: Name of the loss.
        network: Name of the network.

    Returns:
        Name of the term.
    """
    return loss if network == FIRST else f"{loss}/{network}"


def _called(losses: TeacherLosses, key: str) -> str:
    return "teacher" if len(losses.teachers) == 1 else f"teacher/{losses.teacher_of[key]}"


def _check_not_frozen(name: str, network: nn.Module, teachers: Sequence[Frozen]) -> None:
    frozen = {id(p) for teacher in teachers for p in teacher.model.parameters()}
    shared = [own for own, p in network.named_parameters() if id(p) in frozen]
    if shared:
        raise ValueError(
            f"network {name!r} shares parameters with a frozen teacher ({len(shared)}, such as "
            f"{shared[0]!r}): pass copy.deepcopy(...) of the network as one of them"
        )
