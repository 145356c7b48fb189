"""Every family of timm: taps, stage reset, adapters and plan, on the smallest model of each.

With real numbers on the CPU where the model is small, else on the meta device (shapes and data
flow, no numbers).
"""

import functools
import warnings

import pytest
import timm
import torch
from torch import nn

import kdtoolkit.models  # noqa: F401  (registers the cifar nets with timm)
from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.layout_conversion import as_map
from kdtoolkit.features.model_inputs import fixed_size, image_size
from kdtoolkit.features.stage_matching import pair_stages

SMALLEST = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "convmixer_768_32",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_focus_s",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "gmlp_ti16_224",
    "halonet_h1",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hieradet_small",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s",
    "lowformer_b0",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pnasnet5large",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "samvit_base_patch16_224",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "xception41p",
    "xcit_nano_12_p8_224",
]
# named constructor arguments that make a family's smallest network smaller still
SMALLER = {
    "beit_base_patch16_224": {"depth": 4, "embed_dim": 64, "num_heads": 2},
    "naflexvit_base_patch16_parfac_gap": {"depth": 4, "embed_dim": 64, "num_heads": 2},
    "samvit_base_patch16_224": {"depth": 4, "embed_dim": 64, "num_heads": 2},
    "vgg11": {"mlp_ratio": 0.02},
}
# without numbers: large, or slow
META_ONLY = {
    "deepseek_vit_412m",
    "gemma4_vit_167m",
    "qwen3_vit_88m",
    "nasnetalarge",
    "pnasnet5large",
    "mobilenetv5_base",
    "sequencer2d_s",
}
# timm takes the intermediates of these elsewhere than where a stage ends
OTHER_INTERMEDIATES = {"hrnet_w18_small", "legacy_xception", "tresnet_m", "xception41p"}


@functools.cache
def build(name, meta=False):
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, num_classes=10, **SMALLER.get(name, {}))
    if not meta:
        _initialise(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _initialise(model):
    """No layer of zeros, and statistics of one batch for every BatchNorm, so that signals pass."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model.train()(torch.rand(2, *size_of(model)))


def family(name):
    return timm.models._registry._model_to_module[name]


def size_of(model):
    """A small image that the model takes."""
    own = image_size(model)
    return (
        own
        if fixed_size(model) is not None or model.pretrained_cfg.get("min_input_size")
        else (3, 128, 128)
    )


def for_each(names):
    return pytest.mark.parametrize("name", names)


def test_every_family_is_here():
    ours = {
        m
        for m in timm.list_modules()
        if all(n.startswith(("cifar_", "googlenet")) for n in timm.list_models(module=m))
    }
    assert set(timm.list_modules()) - ours == {family(name) for name in SMALLEST}


@for_each(SMALLEST)
def test_taps_reset_adapters_and_plan(name):
    model = build(name, True)
    taps = Taps(model)
    cuts = [key for key in taps.keys if taps.boundary_of(key).replaceable]
    assert len(taps.keys) >= 2 and len(cuts) >= 2
    assert taps.find_reset_errors(cuts) == []
    assert list(taps.strides.values()) == sorted(taps.strides.values())
    for other, as_teacher in ((build("test_resnet", True), True), (build("test_vit", True), False)):
        theirs = Taps(other, None)
        teacher, student = (taps, theirs) if as_teacher else (theirs, taps)
        pairs = pair_stages(student.stages, teacher.stages)
        assert pairs[-1] == (len(student.stages), len(teacher.stages))
        for s, t in pairs:
            src = student.stages[s - 1].shape
            windows = src.windows[0] * src.windows[1]
            feature = torch.empty(2 * windows, *src, device="meta")
            for part in teacher.stages[t - 1].read_tensors:
                with torch.device("meta"):
                    out = Adapter(src, part.shape)(feature)
                count = part.shape.windows[0] * part.shape.windows[1]
                assert out.shape == (2 * count, *part.shape)
    taps.remove_hooks()


@for_each([name for name in SMALLEST if name not in META_ONLY])
@torch.no_grad()
def test_numbers(name):
    model = build(name)
    taps = Taps(model, None, size_of(model))
    cuts = [k for k in range(1, len(taps.stages) + 1) if taps.boundary_of(k).replaceable]
    parts = {k: [part.name for part in taps.boundary_of(k).read_tensors] for k in cuts}
    x, other = torch.rand(2, 2, *taps.size, generator=torch.Generator().manual_seed(0))
    logits = model(x)

    # a tap changes nothing, and every tensor of a boundary can be read by its name
    pieces = dict.fromkeys(piece for names in parts.values() for piece in names)
    named = taps.select([*range(1, len(taps.stages) + 1), *pieces])(x)
    assert torch.equal(named.logits, logits)
    own = {k: [named.feats[piece].clone() for piece in names] for k, names in parts.items()}

    # the model's own features in their own place give its own logits, bit for bit
    taps.select(range(1, len(taps.stages) + 1))
    again = taps(x, replace=own)
    assert torch.equal(again.logits, logits)
    assert all(torch.equal(again.feats[k], named.feats[k]) for k in taps.keys)

    # the network behind a stage gives the same without what lies in front of it
    behind = taps.forward_from(torch.zeros_like(x), cuts[-1], own[cuts[-1]])
    assert torch.equal(behind.logits, logits)

    # noise in every place: what comes after does not see the image, what comes before not the noise
    noise = {k: [torch.randn_like(t) * t.std() for t in tensors] for k, tensors in own.items()}
    first, second = taps(x, replace=noise), taps(other, replace=noise)
    assert torch.equal(first.logits, second.logits) and not torch.equal(first.logits, logits)
    before = cuts[0]
    for k in taps.keys:
        assert torch.equal(first.feats[k], second.feats[k]) == (k > before), k
        assert torch.equal(first.feats[k], named.feats[k]) == (k <= before), k
    taps.remove_hooks()


@for_each([name for name in SMALLEST if name not in META_ONLY])
@torch.no_grad()
def test_maps_are_timms(name):
    """The map that a tap is read as has the values and the places of timm's own intermediates."""
    model = build(name)
    taps = Taps(model, size=size_of(model))
    x = torch.rand(2, *taps.size, generator=torch.Generator().manual_seed(0))
    feats = taps(x).feats
    maps = [as_map(feats[k], taps.shapes[k]) for k in taps.keys]
    taps.remove_hooks()
    theirs = model.forward_intermediates(x, intermediates_only=True)
    same = [any(m.shape == t.shape and torch.equal(m, t) for t in theirs) for m in maps]
    assert any(same) or name in OTHER_INTERMEDIATES
