"""Mean teacher (Tarvainen, Valpola 2017, arXiv 1703.01780): a network learns from its own average.

Loss: sum of the cross-entropies of the labelled images / B + w(e) times the mean over B and C of
(p_s - p_t)^2, p_t of the average on another augmentation; w(e) = 100 exp(-5 (1 - e / 5)^2);
alpha = min(1 - 1 / (n + 1), 0.99), n from 1.

Differs: no second head (the authors' symmetric distance of logits). Images without a label have
y = -1.
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
    inputs: StrategyInputs,
    *,
    loss: str = "mse",
    temperature: float = 1.0,
    ema_decay: float = 0.99,
    count: str = "from 1",
    mixed: float | None = None,
    rampup_epochs: float | None = None,
    label_smoothing: float = 0.0,
) -> Method:
    """Build a network that learns from its exponential moving average, also without labels.

    Args:
        inputs: The student and weights.
        loss: Distance from the average: "mse" or "kl" of probabilities, or "kd".
        temperature: Of the loss "kd", no unit, above 0.
        ema_decay: Share of the average in each of its updates, from 0 to 1.
        count: How the first updates are weighted: "constant", "from 0" or "from 1"; see
            `EMATeacher`.
        mixed: Share of labelled rows in every batch, between 0 and 1; None draws all rows evenly.
        rampup_epochs: Epochs over which the weight of "consistency" rises, from 0; None is 5.
        label_smoothing: Of the cross-entropy, from 0 to below 1.

    Returns:
        The method; the average is exported.
    """
    weights = with_rampup(inputs.weights, ("consistency",), rampup_epochs)
    teacher = EMATeacher(
        weights["consistency"],
        decay=ema_decay,
        count=count,
        loss=loss,
        temperature=temperature,
        learn_from="own",
        view=1,
        export="mean teacher",
        term="consistency",
    )
    method = Peers(
        [inputs.student.model],
        weight=inputs.weights["ce"],
        label_smoothing=label_smoothing,
        image=inputs.image,
        spread=False,
        unlabelled=True,
    )
    method.num_views = 2
    method.batch_sampler = None if mixed is None else Mixed(mixed)
    method.callbacks = (teacher,)
    return method
