"""The loss of Mean Teacher between a network and its moving average."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdtoolkit.functional.logits import at_least_float32, check_shapes, kd
from kdtoolkit.utils.validation import check_choice

CONSISTENCY_KINDS = ("mse", "kl")


def consistency(student_logits: Tensor, teacher_logits: Tensor, *, kind: str = "mse") -> Tensor:
    """Distance between the probabilities of student and teacher, at temperature 1.

    The authors' symmetric distance between the logits of two heads is `logits_mse`.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models".

    Args:
        student_logits: s, (B, C, ...).
        teacher_logits: t, of the same shape; detached.
        kind: "mse": mean over samples and classes of (softmax(s) - softmax(t))^2; "kl":
            KL(softmax(t) || softmax(s)), mean over the batch.

    Returns:
        Scalar.

    Raises:
        ValueError: If `kind` is another one, or the shapes differ.
    """
    check_choice("kind", kind, CONSISTENCY_KINDS)
    if kind == "kl":
        return kd(student_logits, teacher_logits.detach(), temperature=1.0)
    check_shapes(student_logits=student_logits, teacher_logits=teacher_logits)
    student = F.softmax(at_least_float32(student_logits), dim=1)
    teacher = F.softmax(at_least_float32(teacher_logits.detach()), dim=1)
    return F.mse_loss(student, teacher)
