"""A teacher that is near chance stops the run before its first step."""

from __future__ import annotations

from collections.abc import Collection

from kdtoolkit.core.callback import Callback
from kdtoolkit.core.run_context import RunContext


class TeacherCheck(Callback):
    """Refuses teachers whose top-1 is what answers reach that do not depend on the image.

    Args:
        unchecked: Numbers of teachers whose answers are not used, so that they may be near chance.
        finetuned: Numbers of teachers that were fine-tuned on the data, for the message.
    """

    def __init__(self, unchecked: Collection[int] = (), finetuned: Collection[int] = ()) -> None:
        self.unchecked, self.finetuned = set(unchecked), set(finetuned)

    def on_fit_start(self, run: RunContext) -> None:
        """Compare each teacher with chance, on the split with most images.

        Raises:
            ValueError: If a teacher is near chance.
        """
        from kdtoolkit.metrics.chance import is_near_chance

        for number in range(len(run.method.teachers)):
            name = "teacher" if number == 0 else f"teacher/{number}"
            splits = [key for key in run.teacher_chance if key.rpartition("/")[0] == name]
            if number in self.unchecked or not splits:
                continue
            key = max(splits, key=lambda split: run.teacher_chance[split].images)
            top1, chance = run.teacher_metrics[key]["top1"], run.teacher_chance[key]
            if is_near_chance(top1, chance):
                split = key.rpartition("/")[2]
                raise ValueError(
                    f"the {name} is near chance: its top-1 is {top1:.2f} % on the {chance.images} "
                    f"images of the {split} split, and answers that do not depend on the image "
                    f"reach {chance.top1:.2f} %. {self._advice(number)}, or "
                    "allow_weak_teacher=True to learn from it all the same"
                )

    def _advice(self, number: int) -> str:
        if number in self.finetuned:
            return (
                "It was fine-tuned too briefly or with a wrong learning rate: pass "
                "teacher_training={'epochs': ..., 'lr': ...}"
            )
        return (
            "Check its weights, the order of its classes and its input normalisation; pass "
            "teacher_head='finetune' to train it on this data first, teacher_head='feature-only' "
            "if its classes are others"
        )
