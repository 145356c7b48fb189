"""Callbacks: the events of a run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kdtoolkit.core.plan import PlanRow
from kdtoolkit.core.run_context import ExportCandidates, RunContext, RunPreview
from kdtoolkit.types import Batch, LossWeight, Step
from kdtoolkit.utils.state_tree import UnsupportedState, pack_state

if TYPE_CHECKING:
    from typing import Self

    from kdtoolkit.core.method import Method


def ordered_callbacks(method: Method, given: Sequence[Callback]) -> list[Callback]:
    """Sort the callbacks of a run by their `order`.

    Args:
        method: The method; its own callbacks come before those of a user that have the same order.
        given: Callbacks of the user.

    Raises:
        ValueError: If two callbacks have the same name.
    """
    callbacks = sorted([*method.callbacks, *given], key=lambda callback: callback.order)
    names = [callback.name for callback in callbacks if callback.name]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise ValueError(
            f"two callbacks are named {repeated!r}: give one of them another `name`, "
            "states are saved by name"
        )
    return callbacks


def check_several_networks(callback: Callback, method: Method) -> None:
    """Check that a method trains two networks or more.

    Args:
        callback: The callback that needs them, for the message.
        method: The method of the run.

    Raises:
        ValueError: If there are fewer.
    """
    count = len(method.networks())
    if count < 2:
        raise ValueError(
            f"{type(callback).__name__} needs two networks or more, this run trains {count}: "
            "use Peers([...])"
        )


def check_same_images(callback: Callback, method: Method) -> None:
    """Check that the networks of a method see the same images in a step.

    Args:
        callback: The callback whose loss compares their logits, for the message.
        method: The method of the run.

    Raises:
        ValueError: If every network has a batch of its own.
    """
    if method.own_batches:
        raise ValueError(
            f"{type(callback).__name__} compares the networks on the same images, and "
            "batches='own' gives every network other ones: pass batches='shared', with views=True "
            "for augmentations of their own, or leave this loss out (DCL joins networks by their "
            "weights alone)"
        )


def check_states(callbacks: Sequence[Callback]) -> None:
    """Check that a checkpoint can hold what every callback saves.

    A callback whose state does not exist before training is checked when it is first saved.

    Args:
        callbacks: All callbacks of a run.

    Raises:
        ValueError: If a state is no dict, or holds what a checkpoint cannot save.
    """
    for callback in callbacks:
        if callback.name:
            with contextlib.suppress(AttributeError, KeyError, TypeError, IndexError):
                check_state(callback, callback.state_dict())


def check_state(callback: Callback, state: object) -> None:
    """Check that a checkpoint can hold the state of a callback.

    Args:
        callback: The callback, for the message.
        state: What its `state_dict` returned.

    Raises:
        ValueError: If it is no dict, or holds what a checkpoint cannot save.
    """
    who = f"{type(callback).__name__}.state_dict() (callback {callback.name!r})"
    if not isinstance(state, dict):
        raise ValueError(f"{who} returns a {type(state).__name__}: return a dict")
    try:
        pack_state(state)
    except UnsupportedState as error:
        raise ValueError(f"{who} returns what cannot be saved: {error}") from error


# Methods of a callback that had another name in 0.1; the old names go with the next release.
RENAMED_EVENTS = {"plan": "plan_rows", "notes": "plan_notes", "products": "export_candidates"}


class Callback:
    """Watches a run, edits weights between steps, or returns extra losses made from logits.

    Override what you need. The training loop, with every event in its place:

    ```python
    check(preview)  # before anything is written
    on_fit_start(run)
    while run.clock.step < run.clock.total_steps and not run.stop:
        on_epoch_start(run)
        for batch in training_batches:
            step = method(batch, run.clock)  # Step(losses, logits)
            losses = step.losses | on_losses(run, step, batch)
            sum(losses.values()).backward()
            on_grads(run)  # only when the optimizer steps, see grad_accum
            optimizer.step()
            run.clock.step += 1
            on_step_end(run, step)
        run.clock.epoch += 1
        metrics = evaluate()
        on_epoch_end(run, metrics)  # not after an interrupted epoch
    on_fit_end(run)  # also when the run fails
    ```

    Callbacks are called by their `order` at every event, those of the same order as they were
    given:

    | order | callback |
    |---|---|
    | 10 | `DCLMerger` |
    | 20 | `EMATeacher` |
    | 30 | `DecayingEnsemble` |
    | 40 | `MutualKL` |
    | 45 | `KDCL` |
    | 100 | all others |

    Attributes:
        name: Key under which its state is saved; "" saves none. Give two callbacks of one class
            different names.
        order: Its place among the callbacks of a run. A checkpoint fits only a run with the same
            callbacks of an order below 100, those that take part in training.
        init_arguments: Positional and keyword arguments with which it was made.

    Example:
        ```python
        import kdtoolkit


        class GradientNorm(kdtoolkit.Callback):
            def on_grads(self, run: kdtoolkit.RunContext) -> None:
                parameters = run.method.trainable_parameters().values()
                squares = [p.grad.square().sum() for p in parameters if p.grad is not None]
                self.norm = float(sum(squares)) ** 0.5

            def on_epoch_end(self, run: kdtoolkit.RunContext, metrics: dict[str, float]) -> None:
                position = {"epoch": run.clock.epoch, "step": run.clock.step}
                run.metrics_log.add(event="gradient", norm=self.norm, **position)


        result = kdtoolkit.distill(
            None, "cifar_resnet8", "digits", method="none", callbacks=[GradientNorm()], epochs=1
        )
        print([row["norm"] for row in result.history if row["event"] == "gradient"])
        ```
    """

    name: str = ""
    order: int = 100
    init_arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in RENAMED_EVENTS.items():
            if callable(vars(cls).get(old)) and new not in vars(cls):
                warnings.warn(
                    f"Callback.{old} is named {new} now: rename {cls.__name__}.{old}; the old "
                    "name goes with the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
                setattr(cls, new, vars(cls)[old])

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments, for the configuration file and the fingerprint of a run."""
        callback = super().__new__(cls)
        callback.init_arguments = args, kwargs
        return callback

    def check(self, run: RunPreview) -> None:
        """Refuse what cannot work, before anything is written.

        Args:
            run: Method, data, config and callbacks of the run that is about to start.

        Raises:
            ValueError: If the callback cannot work in this run.
        """

    def on_fit_start(self, run: RunContext) -> None:
        """Networks, data and optimizer are ready; a resumed run has its state back."""

    def on_epoch_start(self, run: RunContext) -> None:
        """An epoch begins; the networks are in train mode."""

    def on_losses(self, run: RunContext, step: Step, batch: Batch) -> dict[str, Tensor] | None:
        """The forward pass is done.

        Args:
            run: The run.
            step: Weighted losses and logits of the method.
            batch: The batch, augmented, on the training device.

        Returns:
            Named, weighted losses (scalars) to add to those of the method, or None.
        """
        return None

    def on_grads(self, run: RunContext) -> None:
        """Gradients are complete and averaged over processes; the optimizer has not stepped."""

    def on_step_end(self, run: RunContext, step: Step) -> None:
        """The batch is done; `run.clock.step` counts it.

        Args:
            run: The run.
            step: What the method returned for this batch.
        """

    def on_epoch_end(self, run: RunContext, metrics: dict[str, float]) -> None:
        """An epoch is over and evaluated; `run.clock.epoch` counts it.

        Args:
            run: The run.
            metrics: Numbers of this epoch by "<split>/<number>" or "<split>/<network>/<number>";
                "monitored", the accuracy in percent that chooses the best epoch; "improved", 1.0
                where it is the best so far, else 0.0.
        """

    def on_fit_end(self, run: RunContext) -> None:
        """The run is over; also called when it fails, so that files and bars are closed."""

    def loss_weights(self) -> Mapping[str, LossWeight]:
        """Weights of its losses by name; schedules are tried over the whole run before it starts.

        Returns:
            Numbers and schedules; empty where it has none.
        """
        return {}

    def plan_rows(self) -> list[PlanRow]:
        """Rows of the plan for the losses that it adds."""
        return []

    def plan_notes(self) -> list[str]:
        """Sentences for the plan, on what it does beside losses."""
        return []

    def networks(self) -> dict[str, nn.Module]:
        """Its own networks by name, where it keeps some, such as an average of those that train.

        They are evaluated and saved with those of the method.
        """
        return {}

    def export_candidates(self) -> ExportCandidates | None:
        """As `Method.export_candidates`; the first callback that does not return None decides."""
        return None

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the logits of its networks in eval mode, then switch them back to train mode.

        Args:
            x: Images (B, 3, H, W) in [0, 1].

        Returns:
            Logits (B, C) by name of the network.
        """
        return {}

    def sync(self) -> None:
        """As `Method.sync`, for its networks."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint saves of it, if it has a `name`.

        Returns:
            Plain values, tensors, NumPy arrays and scalars, and paths, in nested dicts, lists,
            tuples and sets. `load_state_dict` gets them back with the types that they had, tensors
            on the CPU. Anything else is an error before training begins.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; a resumed run calls it before `on_fit_start`."""
