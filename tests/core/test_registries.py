"""Registering losses and strategies."""

import pytest
from torch import nn

from kdtoolkit.core.loss import DistillationLoss
from kdtoolkit.core.method import Method
from kdtoolkit.core.registries import LOSSES, METHODS, register_loss, register_strategy


@pytest.fixture
def clean_registries():
    """Registries as they were, whatever a test adds."""
    kept = [(registry, dict(registry._items)) for registry in (LOSSES, METHODS)]
    yield
    for registry, items in kept:
        registry._items.clear()
        registry._items.update(items)


@pytest.mark.usefixtures("clean_registries")
def test_a_loss_is_registered_as_itself_and_with_weights_as_a_method():
    class Mine(DistillationLoss):
        """My loss.

        More of it.
        """

    assert register_loss("mine")(Mine) is Mine
    assert LOSSES["mine"] is Mine
    assert Mine.registered == "mine"
    assert "mine" not in METHODS
    register_loss("mine2", losses={"ce": 1.0, "mine2": 2.0})(Mine)
    assert METHODS["mine2"].losses == {"ce": 1.0, "mine2": 2.0}
    assert METHODS["mine2"].title == "My loss."
    with pytest.raises(ValueError, match="loss 'mine' is registered twice"):
        register_loss("mine")(Mine)


@pytest.mark.usefixtures("clean_registries")
def test_a_strategy_has_the_keyword_parameters_of_its_function_as_options():
    def build(given, *, count: int = 3, rate: float = 0.5) -> Method:
        """Several networks.

        count: networks.
        """

    assert register_strategy("mine", losses={"ce": 1.0})(build) is build
    spec = METHODS["mine"]
    assert spec.options == {"count": 3, "rate": 0.5}
    assert spec.title == "Several networks."
    assert not spec.needs_teacher
    register_strategy("mine2", losses={"ce": 1.0}, title="Two", needs_teacher=True)(build)
    assert METHODS["mine2"].needs_teacher
    assert METHODS["mine2"].title == "Two"


def test_every_registered_loss_is_exported_by_the_package():
    from kdtoolkit import losses

    classes = [LOSSES[name] for name in LOSSES.names()]
    own = [cls for cls in classes if cls.__module__.startswith("kdtoolkit.losses.")]
    assert len(own) >= 7
    for cls in own:
        assert getattr(losses, cls.__name__, None) is cls, (
            f"import {cls.__name__} in kdtoolkit.losses"
        )
        assert issubclass(cls, nn.Module)
