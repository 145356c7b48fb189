"""Teachers and students of different families, trained on real digits.

Networks of timm, of torchvision and of the test itself.
"""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.models.hrnet import HighResolutionNet
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision.models import resnet, swin_transformer, vision_transformer

from kdtoolkit import Callback, Frozen, Taps, create_method, distill, functional
from kdtoolkit.data.loading import load
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.loading import load_model
from kdtoolkit.types import Clock

SIZE = 32
METHODS = {
    "fitnet": "fitnet",
    "at": "at",
    "kd": None,
    "srkd": "srkd",
}  # method: its loss of features


def hrnet():
    def stage(*channels):
        count = len(channels)
        blocks = {
            "block_type": "BASIC",
            "num_blocks": [1] * count,
            "num_channels": channels,
            "fuse_method": "SUM",
        }
        return {"num_modules": 1, "num_branches": count, **blocks}

    stages = {f"stage{i + 1}": stage(*(4, 8, 16, 32)[: i + 1]) for i in range(4)}
    return HighResolutionNet({"stem_width": 8, **stages}, num_classes=10)


class Own(nn.Module):
    """A user's network: nothing but PyTorch."""

    def __init__(self, width=8):
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in itertools.pairwise(sizes)
        )
        self.fc = nn.Linear(sizes[-1], 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


TOKENS = {"img_size": SIZE, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}
NETS = {
    "CNN": ("cifar_resnet8", {}),
    "ConvNeXt": ("test_convnext", {}),
    "CrossViT": (
        "crossvit_tiny_240",
        {
            "img_size": 60,
            "img_scale": (1.0, 0.934),
            "patch_size": (12, 14),
            "embed_dim": (24, 48),
            "depth": ((1, 1, 0),) * 3,
            "num_heads": (2, 2),
        },
    ),
    "DeiT": ("deit_tiny_distilled_patch16_224", TOKENS),
    "DenseNet": ("densenet121", {"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    "EfficientNet": ("test_efficientnet", {}),
    "EfficientViM": ("efficientvim_m1", {"embed_dim": (16, 32, 48), "depths": (1, 1, 1)}),
    "HRNet": hrnet,
    "Hiera": (
        "hiera_tiny_224",
        {"img_size": SIZE, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 2, 1)},
    ),
    "Mixer": lambda: MlpMixer(10, img_size=SIZE, patch_size=8, num_blocks=4, embed_dim=32),
    "MobileNetV3": ("mobilenetv3_small_050", {}),
    "PiT": (
        "pit_ti_224",
        {
            "img_size": SIZE,
            "patch_size": 8,
            "stride": 4,
            "base_dims": (16, 16, 16),
            "depth": (1, 1, 1),
            "heads": (1, 2, 4),
        },
    ),
    "RegNet": ("regnetx_002", {}),
    "ResNet": ("test_resnet", {}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": SIZE,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (1, 1, 2),
            "num_heads": (1, 2, 4),
        },
    ),
    "TNT": (
        "tnt_s_legacy_patch16_224",
        {
            "img_size": SIZE,
            "patch_size": 8,
            "embed_dim": 48,
            "inner_dim": 12,
            "depth": 4,
            "num_heads_outer": 2,
            "num_heads_inner": 2,
        },
    ),
    "ViT": ("vit_tiny_patch16_224", TOKENS),
    "XCiT": (
        "xcit_nano_12_p8_224",
        {"img_size": SIZE, "depth": 4, "embed_dim": 32, "num_heads": 2},
    ),
    "own": Own,
    "torchvision ResNet": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
    "torchvision Swin": lambda: swin_transformer.SwinTransformer(
        [2, 2], 16, [1, 1, 2], [1, 2, 4], [4, 4], num_classes=10
    ),
    "torchvision ViT": lambda: vision_transformer.VisionTransformer(
        SIZE, 8, 4, 2, 32, 64, num_classes=10
    ),
}
PAIRS = [  # teacher, student; what the teacher's stages end in
    ("ResNet", "ViT"),  # maps
    ("ViT", "ResNet"),  # tokens, one class token
    ("Swin", "ConvNeXt"),  # maps, channels last
    ("Mixer", "ResNet"),  # tokens, no class token
    ("HRNet", "MobileNetV3"),  # several maps
    ("PiT", "ResNet"),  # a map and a class token
    ("CrossViT", "CNN"),  # two series of tokens; images of 60 pixels
    ("TNT", "EfficientNet"),  # tokens of pixels and of patches
    ("Hiera", "ResNet"),  # tokens in an order of their own
    ("DeiT", "ViT"),  # two class tokens, the student has one
    ("EfficientViM", "ConvNeXt"),  # maps and states; cannot be reset behind the last stage
    ("DenseNet", "RegNet"),
    ("ConvNeXt", "XCiT"),
]
OTHERS = [
    ("torchvision ResNet", "ViT"),
    ("ViT", "torchvision ResNet"),
    ("torchvision ViT", "ResNet"),
    ("ResNet", "torchvision ViT"),
    ("torchvision Swin", "ResNet"),
    ("ResNet", "torchvision Swin"),
    ("own", "ViT"),
    ("ViT", "own"),
]
# inputs of a teacher's stage that its next feature does not read: EfficientViM's go straight to
# the head
UNREAD = {
    "EfficientViM": (
        "losses.srkd.inputs.2.1.",
        "losses.srkd.inputs.3.1.",
        "losses.srkd.inputs.3.2.",
    )
}
every_method = pytest.mark.parametrize("method", METHODS)


@functools.cache
def digits(count=10):
    data = load("digits", image_size=SIZE)
    return data.prepare_batch(next(iter(data.train.loader(count))), epoch=0, train=False)


def network(name, seed=0):
    torch.manual_seed(seed)
    make = NETS[name]
    return (
        make()
        if callable(make)
        else load_model(make[0], num_classes=10, pretrained=False, **make[1])
    )


def fit(method, parameters, steps):
    """[{loss: value}] of every step, and which parameters ever had a gradient."""
    optimizer = torch.optim.Adam(parameters, 3e-3, fused=True)
    course, reached = [], set()
    for _ in range(steps):
        losses = method(digits(), Clock()).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        reached |= {n for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        course.append({name: loss.item() for name, loss in losses.items()})
    return course, reached


@functools.cache
def teacher(name):
    """A teacher that has seen the digits for 10 steps; measured once."""
    model = network(name, seed=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    plain = create_method("none", Taps(model, None, size_of(name)), image=(SIZE, SIZE)).train()
    fit(plain, plain.parameters(), 10)
    model.zero_grad()
    return Frozen(model, None, size_of(name), image=(SIZE, SIZE))


def size_of(name):
    return 60 if name == "CrossViT" else SIZE


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def course_of(teacher_name, student_name, method, steps, rate):
    """Train, with everything that must hold for any pair; the course of the losses."""
    frozen, model = teacher(teacher_name), network(student_name)
    before = state(frozen.model)
    net = create_method(method, Taps(model, None, SIZE), [frozen], image=(SIZE, SIZE)).train()
    rates = [
        {"params": net.student.parameters()},
        {"params": net.losses.parameters(), "lr": rate},
    ]
    course, reached = fit(net, rates, steps)
    without = [n for n, _ in net.named_parameters() if n not in reached]
    assert not [n for n in without if not n.startswith(UNREAD.get(teacher_name, ("-",)))]
    assert all(p.grad is not None for p in net.parameters())  # DDP waits for each
    assert all(p.grad is None for p in frozen.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in frozen.model.state_dict().items())
    assert not any(m.training for m in frozen.model.modules())
    return course


def fell(course, name=None):
    """Mean of the last three steps over that of the first three."""
    values = [losses[name] if name else sum(losses.values()) for losses in course]
    return sum(values[-3:]) / sum(values[:3])


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
@every_method
def test_twenty_steps(pair, method):
    course = course_of(*pair, method, steps=20, rate=0.1)
    assert fell(course) < 0.85
    assert METHODS[method] is None or fell(course, METHODS[method]) < 0.85


@pytest.mark.parametrize("pair", OTHERS, ids=" to ".join)
@every_method
def test_networks_of_others(pair, method):
    course = course_of(*pair, method, steps=5, rate=3e-3)
    assert sum(course[-1].values()) < sum(course[0].values())


# --------------------------------------------------------------------------------- several teachers
def three_teachers():
    """A ViT for 64 pixels, a CNN for any, a Mixer for 48, each with its own statistics."""
    torch.manual_seed(0)
    vit = load_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        pretrained=False,
        **TOKENS | {"img_size": 64, "patch_size": 16},
    )
    mixer = MlpMixer(10, img_size=48, patch_size=12, num_blocks=3, embed_dim=24)
    mixer.pretrained_cfg = {
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "input_size": (3, 48, 48),
    }
    return [(vit, 64), (network("CNN"), None), (mixer, 48)]


def by_hand(model, size, x):
    """The model's own input, from its published statistics."""
    cfg = (
        model.pretrained_cfg
        if isinstance(model.pretrained_cfg, dict)
        else model.pretrained_cfg.to_dict()
    )
    x = x if size is None else F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (x - mean) / std


class ByHand(Callback):
    """Compares inputs of the teachers and losses with what is computed here."""

    def __init__(self, teachers):
        self.teachers, self.seen, self.steps = teachers, {}, 0
        for number, (model, _) in enumerate(teachers):
            model.register_forward_pre_hook(
                lambda _, args, number=number: self.seen.update({number: args[0].clone()})
            )

    def on_losses(self, run, step, batch):
        seen, total = dict(self.seen), 0.0
        for number, (model, size) in enumerate(self.teachers):
            x = by_hand(model, size, batch["x"])
            torch.testing.assert_close(seen[number], x)
            with torch.no_grad():
                kd = functional.kd(step.logits["student"], model(x))
            torch.testing.assert_close(step.losses[f"kd/{number}"], 0.9 * kd / 3)
            total = total + 0.9 * kd / 3
        total = total + 0.1 * F.cross_entropy(step.logits["student"], batch["y"])
        torch.testing.assert_close(sum(step.losses.values()), total)
        self.steps += 1


def test_three_teachers_of_other_sizes_and_statistics():
    teachers = three_teachers()
    assert len({tuple(Preprocess.from_model(model).mean) for model, _ in teachers}) == 3
    watch, before = ByHand(teachers), [state(model) for model, _ in teachers]
    result = distill(
        [model for model, _ in teachers],
        network("ResNet"),
        "digits",
        image_size=SIZE,
        method="kd",
        max_steps=3,
        batch_size=16,
        train_limit=64,
        validation="none",
        mixed_precision="no",
        report_to="none",
        progress="off",
        callbacks=[watch],
        allow_weak_teacher=True,
    )
    assert watch.steps == 3 and result.metrics["top1"] >= 0
    for (model, _), kept in zip(teachers, before, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("count", [2, 3])
def test_losses_of_several_teachers_are_those_of_each(count):
    losses = {"ce": 1.0, "kd": 1.0, "at": 10.0, "fitnet": 1.0, "srkd": 1.0}

    def method(teachers):
        frozen = [Frozen(model, None, size or SIZE, image=(SIZE, SIZE)) for model, size in teachers]
        return create_method(
            "kd", Taps(network("ResNet"), None, SIZE), frozen, losses=losses, image=(SIZE, SIZE)
        )

    several = three_teachers()[:count]
    net = method(several).eval()
    together = net(digits(), Clock()).losses
    assert set(together) == {"ce"} | {
        f"{name}/{i}" for name in losses if name != "ce" for i in range(count)
    }
    sum(together.values()).backward()
    assert all(p.grad is not None for p in net.parameters())
    own = {k: v for k, v in net.state_dict().items() if k.startswith("losses.")}
    net.release()
    for number, one in enumerate(several):
        alone = method([one]).eval()
        adapters = {k.replace(f"/{number}.", "."): v for k, v in own.items() if f"/{number}." in k}
        alone.load_state_dict(
            adapters | {f"student.{k}": v for k, v in net.student.state_dict().items()}
        )
        for name, loss in alone(digits(), Clock()).losses.items():
            if name == "ce":
                torch.testing.assert_close(together["ce"], loss)
            else:
                torch.testing.assert_close(together[f"{name}/{number}"], loss / count)
        alone.release()


# --------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Swin", "ResNet", "ConvNeXt", "TNT"])
def test_gradients_through_a_teacher_that_checkpoints(name):
    def gradients(checkpointing):
        model = copy.deepcopy(teacher(name).model)
        model.set_grad_checkpointing(checkpointing)
        frozen = Frozen(model, None, SIZE, image=(SIZE, SIZE))
        torch.manual_seed(0)
        student = Taps(Own(12), None, SIZE)
        net = create_method(
            "srkd", student, [frozen], image=(SIZE, SIZE), losses={"srkd": 1.0}, detach=False
        )
        loss = net(digits(), Clock()).losses["srkd"]
        parameters = dict(net.named_parameters())
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return loss, dict(zip(parameters, found, strict=True))

    (plain, off), (saving, on) = gradients(False), gradients(True)
    assert torch.equal(plain, saving)
    assert any(g is not None and g.any() for n, g in on.items() if "inputs" in n)
    for parameter, gradient in off.items():
        assert (gradient is None) == (on[parameter] is None)
        if gradient is not None:
            torch.testing.assert_close(on[parameter], gradient, rtol=1e-6, atol=1e-8)
