"""Method.clone, and what a method of one's own needs."""

import pytest
import timm
import torch

import kdtoolkit.models  # noqa: F401
from kdtoolkit.callbacks.diversity import Diversity
from kdtoolkit.core.method import Method
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.methods.factory import create_method
from kdtoolkit.types import Clock

SIZE = 16


def build_network(name, seed):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=10)


def build_method():
    student = Taps(build_network("cifar_resnet8", 0), None, SIZE)
    teacher = Frozen(build_network("cifar_resnet14", 1), None, SIZE)
    return create_method("srkd", student, [teacher], image=(SIZE, SIZE))


def build_batch():
    torch.manual_seed(2)
    return {"x": torch.rand(4, 3, SIZE, SIZE), "y": torch.arange(4), "index": torch.arange(4)}


def losses_of(method):
    return {name: loss.item() for name, loss in method(build_batch(), Clock()).losses.items()}


def test_a_clone_has_the_same_losses_and_its_own_parameters():
    method = build_method().train()
    clone = method.clone()
    assert type(clone) is type(method)
    assert not {id(p) for p in clone.parameters()} & {id(p) for p in method.parameters()}
    before = losses_of(method)
    assert losses_of(clone) == before
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert losses_of(clone) != before
    assert losses_of(build_method().train()) == before  # a first step, as that of `method` was


def test_a_clone_reads_its_own_taps_and_leaves_those_of_the_method_alone():
    method = build_method().eval()
    clone = method.clone()
    x = method.preprocess(build_batch()["x"])
    features = {key: value.clone() for key, value in method.taps(x).feats.items()}
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    others = clone.taps(x).feats
    again = method.taps(x).feats
    assert features.keys() == others.keys() == again.keys()
    assert all(torch.equal(features[key], again[key]) for key in features)
    assert not any(torch.equal(features[key], others[key]) for key in features)


def test_a_clone_has_no_callbacks_and_shares_or_copies_its_teachers():
    method = build_method()
    method.callbacks = (Diversity(),)
    shared, copied = method.clone(), method.clone(share_teachers=False)
    assert shared.callbacks == copied.callbacks == ()
    assert len(method.callbacks) == 1
    assert shared.teachers is method.teachers
    assert copied.teachers[0] is not method.teachers[0]
    assert copied.teachers[0].model is not method.teachers[0].model
    assert losses_of(copied.eval()) == losses_of(method.eval())


def test_a_clone_is_without_what_mixed_precision_wraps_around_forward():
    method = build_method()
    method._original_forward = method.forward
    method.forward = lambda *args: pytest.fail("the wrapped forward was called")
    clone = method.clone()
    assert "forward" not in vars(clone)
    assert "_original_forward" not in vars(clone)
    assert losses_of(clone)


def test_what_a_method_must_say_itself():
    method = Method()
    for call in (
        method.networks,
        lambda: method({}, Clock()),
        lambda: method.logits("student", None),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert method.plan() == {}
    method.no_compile_reason = "it is not possible"
    with pytest.raises(ValueError, match="compile=True: it is not possible; leave compile out"):
        method.compile()
