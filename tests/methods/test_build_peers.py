"""Peers that begin with given weights: which parts are re-initialised in each of them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from kdtoolkit import Callback, distill, models
from kdtoolkit.features.extractor import Taps
from kdtoolkit.methods.build_peers import _first_convolution

RUN = {"train_limit": 64, "batch_size": 32, "max_steps": 1, "epochs": None, "progress": "off"}
RUN |= {"validation": "none", "num_workers": 0, "eval_test": "end", "peers": 3}
HEAD, STEM = {"fc.weight", "fc.bias"}, {"conv1.weight"}


class First(Callback):
    """The first weights of every network."""

    def on_fit_start(self, run):
        networks = run.method.networks()
        self.weights = {
            n: copy.deepcopy(dict(net.named_parameters())) for n, net in networks.items()
        }


def first_weights(student, method="dcl", **options):
    kept = First()
    distill(None, student, "digits", method=method, callbacks=[kept], **{**RUN, **options})
    return kept.weights


def different(one, two):
    """Names of the parameters that differ; norms begin equal in any network."""
    return {name for name, value in one.items() if not torch.equal(value, two[name])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of ten classes that has weights."""
    torch.manual_seed(9)
    place = tmp_path_factory.mktemp("given") / "net"
    models.save_model(
        timm.create_model("cifar_resnet8", num_classes=10), place, input_size=(3, 32, 32)
    )
    return f"local-dir:{place}"


@pytest.mark.parametrize("method", ["dcl", "dml", "kdcl"])
@pytest.mark.parametrize("redraw, parts", [("head", HEAD), ("head+stem", HEAD | STEM)])
def test_parts_are_drawn_anew_in_every_network(folder, method, redraw, parts):
    given = dict(timm.create_model(folder, pretrained=True).named_parameters())
    found = first_weights(folder, method, redraw=redraw)
    networks = list(found.values())
    assert len(networks) == 3
    for number, weights in enumerate(networks):
        assert different(weights, given) == parts
        assert all(different(weights, other) == parts for other in networks[:number])


def test_the_seed_of_the_run_decides(folder):
    one, same, other = (first_weights(folder, redraw="head", seed=s) for s in (3, 3, 4))
    assert all(not different(one[name], same[name]) for name in one)
    assert all(different(one[name], other[name]) == HEAD for name in one)


def test_without_redraw_given_weights_are_given_to_all(folder, tmp_path):
    with pytest.raises(ValueError, match="equal initial weights.*batches='own'.*redraw='head'"):
        first_weights(folder)
    for options in ({"batches": "own"}, {"batches": "own", "redraw": "none"}, {"views": True}):
        found = first_weights(folder, **options)
        assert not different(found["student"], found["peer1"])
    seven = timm.create_model("cifar_resnet8", num_classes=7)  # a new head in every peer
    models.save_model(seven, tmp_path / "seven", input_size=(3, 32, 32))
    found = first_weights(f"local-dir:{tmp_path / 'seven'}")
    assert different(found["student"], found["peer1"]) == HEAD
    found = first_weights("cifar_resnet8")  # no weights were given
    assert {"fc.weight", "conv1.weight"} <= different(found["student"], found["peer1"])


def test_a_module_gives_its_weights_too():
    net = timm.create_model("cifar_resnet8", num_classes=10)
    before = copy.deepcopy(net.state_dict())
    plan = distill(None, net, "digits", method="dcl", redraw="head", dry_run=True).plan
    assert any("each with another classifier" in note for note in plan["notes"])
    with pytest.raises(ValueError, match="views=True has no effect"):
        first_weights(net, redraw="head", views=True, batches="own")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    found = first_weights(net, redraw="head")
    assert different(found["student"], found["peer1"]) == HEAD
    assert different(found["peer1"], before) == HEAD


@pytest.mark.parametrize(
    "options, message",
    [
        ({"redraw": "all"}, "redraw is 'all'; allowed: 'auto', 'none', 'head', 'head.stem'"),
        ({"redraw": "head", "peers": ["cifar_resnet8"]}, "peers names the networks"),
        ({"redraw": "head", "peers": 1}, "peers is 1"),
        ({"method": "dml", "batches": "own"}, "MutualKL compares the networks on the same images"),
        ({"batches": "other"}, "batches is 'other'; allowed: 'shared', 'own'"),
    ],
)
def test_messages(options, message):
    with pytest.raises(ValueError, match=message):
        first_weights("cifar_resnet8", **options)


def test_dml_without_its_loss_takes_batches_of_their_own():
    found = first_weights("cifar_resnet8", "dml", batches="own", losses={"ce": 1.0})
    assert len(found) == 3


@pytest.mark.parametrize(
    "name, convolution",
    [
        ("resnet18", "conv1"),
        ("resnet18d", "conv1.0"),
        ("vit_tiny_patch16_224", "patch_embed.proj"),
        ("efficientnet_b0", "conv_stem"),
    ],
)
def test_the_first_convolution_is_found(name, convolution):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=10)
    assert _first_convolution(Taps(net, None, 224)) == convolution


def test_a_network_without_convolution_is_named():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
    with pytest.raises(ValueError, match="Sequential has no convolution: pass redraw='head'"):
        first_weights(net, redraw="head+stem", statistics="own")
