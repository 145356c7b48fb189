"""Mean teacher (Tarvainen, Valpola 2017, arXiv 1703.01780): a network learns from its own moving average.

Loss     sum of cross-entropies of the labelled images / B + w(e) * mean over B and C of (p_s - p_t)^2, p_t of the
         average on another augmentation; w(e) = 100 exp(-5 (1 - e / 5)^2); alpha = min(1 - 1 / (n + 1), 0.99), n from 1
Differs  no second head (the authors' symmetric distance of logits). Images without a label have y = -1
"""

from __future__ import annotations

from kdtoolkit.callbacks.ema import EMATeacher
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import register_strategy
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.data.sampling import Mixed
from kdtoolkit.methods.peers import Peers
from kdtoolkit.schedules import SigmoidRampUp, with_rampup


@register_strategy(
    "mean_teacher",
    losses={"ce": 1.0, "consistency": SigmoidRampUp(100.0, 5)},
    title="Mean teacher (Tarvainen and Valpola 2017)",
)
def mean_teacher(
    given: StrategyInputs,
    *,
    loss: str = "mse",
    temperature: float = 1.0,
    ema_decay: float = 0.99,
    count: str = "from 1",
    mixed: float | None = None,
    rampup_epochs: float | None = None,
    label_smoothing: float = 0.0,
) -> Method:
    """loss: "mse" or "kl" of probabilities, or "kd" at `temperature`; ema_decay, count: see EMATeacher; mixed: share of
    labelled rows in every batch (data.Mixed), None draws all rows evenly; rampup_epochs: 5 where none is given."""
    weights = with_rampup(given.weights, ("consistency",), rampup_epochs)
    teacher = EMATeacher(
        weights["consistency"], decay=ema_decay, count=count, loss=loss, temperature=temperature,
        learn_from="own", view=1, product="mean teacher", term="consistency",
    )  # fmt: skip
    method = Peers(
        [given.student.model], weight=given.weights["ce"], label_smoothing=label_smoothing, image=given.image,
        spread=False, unlabelled=True,
    )  # fmt: skip
    method.num_views = 2
    method.batch_sampler = None if mixed is None else Mixed(mixed)
    method.callbacks = (teacher,)
    return method
