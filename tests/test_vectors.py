"""The losses against reference vectors: all files of a folder, with the shapes that they state.

KDTOOLKIT_VECTORS names the folder. A second set with other shapes, taps and hyper-parameters is
computed here by slow loops over the papers' equations, and goes through the same check.
"""

import functools
import json
import os
import random
import re
from pathlib import Path

import paper_totals
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kdtoolkit import functional, schedules
from kdtoolkit.core.registries import LOSSES
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.losses.fitnet import Regressor
from kdtoolkit.types import Out, Shape

DEFAULT = Path(__file__).parents[1] / "../shared/vectors/public"
FOLDER = Path(os.environ.get("KDTOOLKIT_VECTORS") or DEFAULT)
FILES = sorted(FOLDER.glob("*.safetensors"))
FITNET = ("fitnet_same", "fitnet_down", "fitnet_up", "fitnet_valid")
LOSS_OF_VECTOR = {
    "kd": "kd",
    "logits_mse": "logits",
    "at": "at",
    "sp": "sp",
    **dict.fromkeys(FITNET, "fitnet"),
}
DTYPES = [torch.float64, torch.float32]


class Vector:
    """One file: inputs in a dtype (with a gradient where one is stored), expectations, options."""

    def __init__(self, path, dtype):
        with safe_open(path, "pt") as f:
            tensors, self.meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118 (no dict)
        self.name, self.dtype = path.stem, dtype
        self.hparams, self.zeros = (
            json.loads(self.meta["hparams"]),
            set(json.loads(self.meta["zero_gradients"])),
        )
        self.expected = {
            k: v for k, v in tensors.items() if k.split(".")[0] in ("loss", "out", "grad")
        }
        self.inputs = {
            k: (v.to(dtype) if v.is_floating_point() else v).requires_grad_("grad." + k in tensors)
            for k, v in tensors.items()
            if k not in self.expected and k != "loss_f32"
        }

    def __getitem__(self, name):
        return self.inputs[name]

    def series(self, prefix):
        return [
            self[f"{prefix}.{i}"]
            for i in range(sum(k.startswith(f"{prefix}.") for k in self.inputs))
        ]

    def maps(self):
        return self.series("student_features"), self.series("teacher_features")

    def epochs(self, prefix):
        """(name, number) of every expectation of that prefix."""
        return [(k, int(k.removeprefix(prefix))) for k in self.expected if k.startswith(prefix)]

    def check(self, values, parameters=()):
        """Compare losses and outputs in `values`, and gradients of `loss` where there is one."""
        if "loss" in values:
            values["loss"].backward()
        grads = {**self.inputs, **dict(parameters)}
        seen = []
        for name, want in self.expected.items():
            got = (
                grads[name.removeprefix("grad.")].grad if name.startswith("grad.") else values[name]
            )
            assert got is not None, f"{self.name}: no gradient for {name}"
            assert got.shape == want.shape and got.dtype == self.dtype, (
                name,
                got.shape,
                want.shape,
                got.dtype,
            )
            error = (got.detach().double() - want).abs().max().item()
            relative = (
                1e-4
                if self.dtype == torch.float32
                else 1e-9
                if want.dtype == torch.float64
                else 1e-6
            )
            scale = self.hparams.get("beta", 1.0) if name in self.zeros else want.abs().max().item()
            assert error <= relative * max(scale, 1e-30), (
                f"{self.name} {self.dtype} {name}: {error:.3g} of {scale:.3g}"
            )
            seen.append(name)
        return seen


# ----------------------------------------------------------------------------------- pure functions
def kd(v):
    h = v.hparams
    student, teacher, labels = v["student_logits"], v["teacher_logits"], v["labels"]
    loss, ce = functional.kd(student, teacher, temperature=h["T"]), functional.ce(student, labels)
    return {
        "loss": loss,
        "loss.ce": ce,
        "loss.total": h["ce_weight"] * ce + h["kd_weight"] * loss,
    }, {}


def logits_mse(v):
    return {"loss": functional.logits_mse(v["student_logits"], v["teacher_logits"])}, {}


def fitnet(v):
    (student,), (teacher,) = v.maps()
    regressor = regressor_of(v, student, teacher)
    adapted = regressor(student)
    parameters = {f"param.adapter.{k}": p for k, p in regressor.named_parameters()}
    return {"loss": functional.fitnet(adapted, teacher), "out.adapted": adapted}, parameters


def regressor_of(v, student, teacher):
    src, dst = Shape(student.shape[1:]), Shape(teacher.shape[1:])
    assert Regressor.fits(src, dst)
    return load(Regressor(src, dst), v)


def load(regressor, v):
    stored = {
        k.removeprefix("param.adapter."): t.detach()
        for k, t in v.inputs.items()
        if k.startswith("param.")
    }
    missing, unexpected = regressor.load_state_dict(stored, strict=False)
    assert not unexpected and set(missing) <= {"bn.num_batches_tracked"}, (missing, unexpected)
    regressor.bn.eps = v.hparams.get("bn_eps", regressor.bn.eps)
    return regressor.to(v.dtype).train(v.hparams.get("bn_mode", "train") == "train")


def at(v):
    p = float(v.hparams["p"])
    students, teachers = v.maps()
    layers = [functional.at([s], [t], p=p) for s, t in zip(students, teachers, strict=True)]
    return {"loss": functional.at(students, teachers, p=p), **layer_losses(layers)}, {}


def sp(v):
    students, teachers = v.maps()
    layers = [functional.sp([s], [t]) for s, t in zip(students, teachers, strict=True)]
    return {"loss": functional.sp(students, teachers), **layer_losses(layers)}, {}


def layer_losses(layers):
    return {f"loss.layer{i}": loss for i, loss in enumerate(layers)}


# -------------------------------------------------- strategies: losses of several networks, updates
def numbered(prefix, values):
    return {f"{prefix}{i}": value for i, value in enumerate(values)}


def dml(v):
    h, student, labels = v.hparams, v["student_logits"], v["labels"]
    mutual = functional.mutual_loss(student, temperature=h["T"])
    each = paper_totals.ce_each(student, labels) + h["lambda"] * mutual
    loss = paper_totals.dml(student, labels, temperature=h["T"], weight=h["lambda"])
    return {"loss": loss, **numbered("loss.net", each)}, {}


def dml_tf(v):
    h, student, labels = v.hparams, v["student_logits"], v["labels"]
    hard = paper_totals.ce_each(student, labels, label_smoothing=h["label_smoothing"])
    loss = paper_totals.dml_tf(student, labels, label_smoothing=h["label_smoothing"], eps=h["eps"])
    return {
        "loss": loss,
        **numbered("loss.net", hard + functional.mutual_kl_tf(student, eps=h["eps"])),
    }, {}


def dml_okddip(v):
    options = {"temperature": v.hparams["T"], "eps": v.hparams["eps"]}
    losses = [
        paper_totals.dml_okddip(v["student_logits"], v["labels"], ensemble_first=first, **options)
        for first in (False, True)
    ]
    return {"loss": losses[0], "loss.ensemble_first": losses[1]}, {}


def cl_paper(v):
    h, student, labels = v.hparams, v["student_logits"], v["labels"]
    loss, squared = (
        paper_totals.cl_paper(student, labels, temperature=h["T"], beta=h["beta"], squared=squared)
        for squared in (False, True)
    )
    hard, soft = (
        paper_totals.ce_each(student, labels),
        paper_totals.others_soft_ce(student, temperature=h["T"]),
    )
    return {
        "loss": loss,
        "loss.with_T2": squared,
        "loss.hard": hard.sum(),
        "loss.soft": soft.sum(),
    }, {}


def classified(v, features, i):
    return nn.functional.linear(
        features, v[f"param.classifier.{i}.weight"], v[f"param.classifier.{i}.bias"]
    )


def cl_okddip(v):
    h, labels = v.hparams, v["labels"]
    trunk = paper_totals.scale_gradient(v["trunk_features"], h["ilr_scale"])
    weights = [v[f"param.branch.{i}.conv.weight"] for i in range(h["branches"])]
    student = [
        classified(v, nn.functional.conv2d(trunk, w).mean((2, 3)), i) for i, w in enumerate(weights)
    ]
    options = {"temperature": h["T"], "eps": h["eps"]}
    return {
        "loss": paper_totals.cl_okddip(student, labels, weight=h["consistency_weight"], **options),
        "loss.ce": paper_totals.ce_each(student, labels).sum(),
        "loss.kl_unweighted": paper_totals.others_kl_eps(student, **options).sum(),
        "out.logits": torch.stack(student, -1),
        "out.targets": functional.others_mean(student).movedim(0, -1),
    }, {}


def batch_norm(v, x, name):
    weight, bias = v[f"{name}.weight"], v[f"{name}.bias"]
    return nn.functional.batch_norm(
        x, None, None, weight, bias, True, eps=v.hparams.get("bn_eps", 1e-5)
    )


def one(v):
    h, student, labels = v.hparams, v["student_logits"], v["labels"]
    gate = nn.functional.linear(
        v["trunk_features"].mean((2, 3)), v["param.gate.linear.weight"], v["param.gate.linear.bias"]
    )
    ensemble = functional.one_ensemble(
        student, batch_norm(v, gate, "param.gate.bn").relu().softmax(1)
    )
    weight = schedules.sigmoid_rampup(h["epoch"], h["rampup_length"])
    options = {"temperature": h["T"], "eps": h["eps"]}
    return {
        "loss": paper_totals.one(student, ensemble, labels, weight=weight, **options),
        "loss.ce": paper_totals.ce_each(student, labels).sum() + functional.ce(ensemble, labels),
        "loss.kl_unweighted": functional.kd_ensemble_eps(student, ensemble, **options).sum(),
        "out.ensemble_logits": ensemble,
        "out.rampup": torch.tensor(weight, dtype=v.dtype),
    }, {}


def okddip(v):
    h, labels, features = v.hparams, v["labels"], v.series("student_features")
    student = torch.stack([classified(v, f, i) for i, f in enumerate(features)])
    projected = [
        torch.stack([f @ v[f"param.{role}.weight"].T for f in features[:-1]])
        for role in ("query", "key")
    ]
    attention = functional.okddip_attention(*projected)
    weight = h["alpha"] * schedules.sigmoid_rampup(h["epoch"], h["rampup_length"])
    options = {"temperature": h["T"], "eps": h["eps"]}
    hard = paper_totals.ce_each(student, labels)
    return {
        "loss": paper_totals.okddip(student, attention, labels, weight=weight, **options),
        "loss.ce_leader": hard[-1],
        "loss.ce_peers": hard[:-1].sum(),
        "loss.kl_leader": functional.okddip_leader(student, **options),
        "loss.kl_peers": functional.okddip_peers(student[:-1], attention, **options).sum(),
        "out.leader_logits": student[-1],
        "out.peer_logits": student[:-1].movedim(0, -1),
        "out.peer_targets": functional.okddip_targets(student[:-1], attention).movedim(0, -1),
    }, {}


def pcl(v):
    h = v.hparams
    given = v["student_logits"], v["ensemble_logits"], v["teacher_logits"], v["labels"]
    weight = h["lambda"] * schedules.sigmoid_rampup(h["epoch"], h["rampup_length"])
    coded = {
        name: paper_totals.pcl(
            *given, temperature=h["T"], weight=schedules.rampup_as_coded(epoch, h["lambda"])
        )
        for name, epoch in v.epochs("loss.code_epoch_")
    }
    each = paper_totals.pcl_each(*given, temperature=h["T"], weight=weight)
    return {
        "loss": paper_totals.pcl(*given, temperature=h["T"], weight=weight),
        **numbered("loss.peer", each),
        **coded,
    }, {}


def dkel(v):
    h = v.hparams
    given = v["student_logits"], v["ensemble_logits"], v["teacher_logits"], v["labels"]
    weight = h["lambda"] * schedules.sigmoid_rampup(h["epoch"], h["rampup_length"])
    share = h.get("ensemble_weight", schedules.exponential_decay(h["epoch"], h["exp"], h["cut"]))
    options = {"temperature": h["T"], "ensemble_weight": share}
    values = {
        "loss": paper_totals.dkel(*given, weight=weight, **options),
        "loss.full_rampup": paper_totals.dkel(*given, weight=h["lambda"], **options),
        **numbered("loss.peer", paper_totals.dkel_each(*given, weight=weight, **options)),
    }
    for name, epoch in v.epochs("loss.code_epoch_"):
        options["ensemble_weight"] = schedules.exponential_decay(
            epoch, h["exp_of_code_epoch_entries"], h["cut"]
        )
        values[name] = paper_totals.dkel(
            *given, weight=schedules.rampup_as_coded(epoch, h["lambda"]), **options
        )
    return values, {}


def kdcl_targets(v):
    h, student, labels = v.hparams, v["student_logits"], v["labels"]
    w = functional.kdcl_general_weights(v["val_logits"], v["val_labels"]).to(v.dtype)
    targets = {
        rule: functional.kdcl_targets(student, labels, rule=rule, weights=w)
        for rule in functional.KDCL_RULES
    }
    losses = {
        rule: paper_totals.kdcl(student, target, labels, temperature=h["T"], weight=h["lambda"])
        for rule, target in targets.items()
    }
    hard = [
        nn.functional.cross_entropy(z, labels, reduction="none")
        for z in (*student, targets["linear"])
    ]
    at_temperature = paper_totals.kdcl_general_probabilities(student, w, temperature=h["T"])
    return {
        "loss": losses["minlogit"],
        **{f"loss.{rule}": losses[rule] for rule in ("naive", "linear")},
        "loss.mean_logits": losses["mean"],
        "loss.general_logit_mix": losses["general"],
        **{f"out.target.{rule}": targets[rule] for rule in ("naive", "linear", "minlogit", "mean")},
        "out.target.general_logit_mix": targets["general"],
        "out.target.general_prob_mix_at_T": at_temperature,
        "out.general.C": functional.kdcl_covariance(v["val_logits"], v["val_labels"]).to(v.dtype),
        "out.general.weights": w,
        "out.linear.alpha": functional.kdcl_linear_weights(student, labels).T.to(v.dtype),
        "out.linear.ce": hard[-1],
        "out.ce_per_student": torch.stack(hard[:-1]),
    }, {}


def auxiliary_logits(v):
    """The branch of SOKD: a pre-activation block of stride 2, then BN, ReLU, pool, linear."""
    x = batch_norm(v, v["teacher_features.0"], "param.aux.block.bn1").relu()
    y = nn.functional.conv2d(x, v["param.aux.block.conv1.weight"], stride=2, padding=1)
    y = batch_norm(v, y, "param.aux.block.bn2").relu()
    y = nn.functional.conv2d(y, v["param.aux.block.conv2.weight"], padding=1)
    y = y + nn.functional.conv2d(x, v["param.aux.block.shortcut.weight"], stride=2)
    y = batch_norm(v, y, "param.aux.bn").relu().mean((2, 3))
    return nn.functional.linear(y, v["param.aux.fc.weight"], v["param.aux.fc.bias"])


def sokd(v):
    h, student, teacher, labels = v.hparams, v["student_logits"], v["teacher_logits"], v["labels"]
    weights = {
        "ce": h["lambda_ce"],
        "kd": h["lambda_kd"],
        "ce/branch": h["lambda_a_ce"],
        "kd/branch": h["lambda_a_kd_t"],
        "mutual/branch": h["lambda_a_kd_s"],
    }
    branch = auxiliary_logits(v)
    given = student, branch, teacher, labels
    terms = functional.sokd_terms(*given, temperature=h["T"])
    parts = {
        side: sum(
            weights[name] * term for name, term in terms.items() if ("/" in name) == of_branch
        )
        for side, of_branch in (("student", False), ("auxiliary", True))
    }
    return {
        "loss": paper_totals.sokd(*given, temperature=h["T"], weights=weights),
        "loss.auxiliary": parts["auxiliary"],
        "loss.student": parts["student"],
        "out.auxiliary_logits": branch,
    }, {}


def mean_teacher(v):
    student, teacher, labels = v["student_logits"], v["teacher_logits"], v["labels"]
    losses = {
        kind: paper_totals.mean_teacher(
            student, teacher, labels, weight=v.hparams["consistency_weight"], kind=kind
        )
        for kind in ("mse", "kl")
    }
    return {
        "loss": losses["mse"],
        "loss.kl_variant": losses["kl"],
        **{
            f"loss.consistency_{kind}": functional.consistency(student, teacher, kind=kind)
            for kind in losses
        },
        "loss.symmetric_logit_mse": functional.logits_mse(student, teacher),
    }, {}


def byot(v):
    h, student, labels, features = (
        v.hparams,
        v["student_logits"],
        v["labels"],
        v.series("student_features"),
    )
    adapted = [
        nn.functional.linear(f, v[f"param.adaptation.{i}.weight"], v[f"param.adaptation.{i}.bias"])
        if i
        else f
        for i, f in enumerate(features)
    ]
    soft, share = functional.byot_logits(student, temperature=h["T"]), h["loss_coefficient"]
    hard, distance = paper_totals.ce_each(student, labels), functional.byot_features(adapted)
    weights = {"soft_weight": share, "feature_weight": h["feature_loss_coefficient"]}
    return {
        "loss": paper_totals.byot(student, adapted, labels, temperature=h["T"], **weights),
        "loss.deepest_ce": hard[0],
        "loss.shallow_logits": (share * soft + (1 - share) * hard[1:]).sum(),
        "loss.shallow_features": h["feature_loss_coefficient"] * distance,
    }, {}


def byot_unofficial(v):
    h, student, labels, features = (
        v.hparams,
        v["student_logits"],
        v["labels"],
        v.series("student_features"),
    )
    options = {"temperature": h["T"], "alpha": h["alpha"], "beta": h["beta"]}
    return {
        "loss": paper_totals.byot_unofficial(student, features, labels, **options),
        "loss.ce": paper_totals.ce_each(student, labels).sum(),
        "loss.kd": h["T"] ** 2 * functional.byot_logits(student, temperature=h["T"]).sum(),
        "loss.feature": paper_totals.byot_features_unofficial(features),
    }, {}


def bake(v):
    h, student, features = v.hparams, v["student_logits"], v["student_features.0"]
    T, omega = h["T"], h["omega"]
    targets = functional.bake_targets(student, features, temperature=T, omega=omega)
    loss = paper_totals.bake(
        student, features, v["labels"], temperature=T, omega=omega, weight=h["lambda"]
    )
    soft = functional.bake_kd(student, targets, temperature=T)
    return {
        "loss": loss,
        "loss.ce": functional.ce(student, v["labels"]),
        "loss.kd": soft,
        "out.targets": targets,
    }, {}


def dcl_merge(v):
    h, values = v.hparams, {}
    for i, params in enumerate(v.series("student_params")):
        for rule, suffix in (("paper", ""), ("eps-free", "_eps0")):
            merged = functional.dcl_merge(list(params), beta=h["beta"], rule=rule, eps=h["eps"])
            values[f"out.student_params_after{suffix}.{i}"] = torch.stack(merged)
            values[f"out.theta_wavg{suffix}.{i}"] = functional.dcl_average(
                params, rule=rule, eps=h["eps"]
            )
            values[f"out.alpha{suffix}.{i}"] = functional.dcl_alphas(
                params, rule=rule, eps=h["eps"]
            )
        values[f"out.official_float32_after.{i}"] = values[f"out.student_params_after.{i}"]
        mean = functional.dcl_merge(list(params), beta=h["beta"], rule="mean")
        values[f"out.official_float32_after_mean_rule.{i}"] = torch.stack(mean)
    return values, {}


def ema_update(v):
    student, teacher, decay = v["student_params"], v["teacher_params"], v.hparams["alpha"]
    alphas = [functional.ema_alpha(step, decay=decay) for step in v["global_steps"].tolist()]
    after = [functional.ema_update(student, teacher, alpha=alpha) for alpha in alphas]
    values = {
        "out.alpha": torch.tensor(alphas, dtype=v.dtype),
        "out.teacher_after": torch.stack(after),
    }
    for name, first in v.epochs("out.trajectory_step_from_"):
        moving, states = {"w": teacher}, []
        for k in range(len(v.expected[name])):
            alpha = functional.ema_alpha(first + k, decay=decay)
            moving = functional.ema_update({"w": student * (1 + 0.1 * k)}, moving, alpha=alpha)
            states.append(moving["w"])
        values[name] = torch.stack(states)
    return values, {}


RAMPS = {
    "sigmoid_rampup": schedules.sigmoid_rampup,
    "linear_rampup": schedules.linear_rampup,
    "cosine_rampdown": schedules.cosine_rampdown,
    "dkel_ensemble_weight.exp_": schedules.exponential_decay,
    "dkel_code": lambda e, _: schedules.rampup_as_coded(e, 0.1),
    "pcl_code": lambda e, _: schedules.rampup_as_coded(e, 1.0),
    "dkel_intended": lambda e, _: 0.1 * schedules.sigmoid_rampup(e, 80),
    "pcl_intended": lambda e, _: schedules.sigmoid_rampup(e, 80),
}


def rampups(v):
    values = {}
    for name in v.expected:
        kind, number = re.fullmatch(r"out\.(.*?)\.?([\d.]*)", name).groups()
        if warmup := re.fullmatch(r"out\.warmup_epoch_over_(\d+)_(zero|one)_based", name):
            first, number = (warmup[2] == "one"), float(warmup[1])
            table = [schedules.linear_rampup(e + first, number) for e in v["epochs"].tolist()]
        else:
            table = [RAMPS[kind](e, float(number or 0)) for e in v["epochs"].tolist()]
        values[name] = torch.tensor(table, dtype=v.dtype)
    return values, {}


VECTOR_LOSSES = {
    "kd": kd,
    "logits_mse": logits_mse,
    "at": at,
    "sp": sp,
    **dict.fromkeys(FITNET, fitnet),
}
STRATEGIES = {
    f.__name__: f
    for f in (
        *(
            dml,
            dml_tf,
            dml_okddip,
            cl_paper,
            cl_okddip,
            one,
            okddip,
            pcl,
            dkel,
            kdcl_targets,
            sokd,
            mean_teacher,
        ),
        *(byot, byot_unofficial, bake, dcl_merge, ema_update, rampups),
    )
}
FUNCTIONS = VECTOR_LOSSES | STRATEGIES


def function_for(name):
    """dcl_merge_k2, dcl_merge_k6, ... are one function; None where a method is missing."""
    return FUNCTIONS.get(re.sub(r"^(dcl_merge)_k\d+$", r"\1", name))


# ------------------------------------------------------------------------- DistillationLoss modules
class NetworkWithShapes(nn.Module):
    """A network whose stages end in features of these shapes, so that a loss can be built."""

    def __init__(self, sizes):
        super().__init__()
        channels = [3, *(c for c, _, _ in sizes)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 1), nn.AdaptiveAvgPool2d((h, w)))
            for i, (o, h, w) in zip(channels, sizes, strict=False)
        )
        self.fc = nn.Linear(channels[-1], 5)
        self.feature_info = [
            {"num_chs": c, "module": f"stages.{i}"} for i, (c, _, _) in enumerate(sizes)
        ]

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def values_of_loss(v):
    """(values, parameters) from the loss that distill() builds for features of these shapes."""
    cls = LOSSES[LOSS_OF_VECTOR[v.name]]
    students, teachers = v.maps() if cls.needs_taps else ([], [])
    nets = [
        NetworkWithShapes([tuple(f.shape[1:]) for f in side] or [(4, 8, 8)])
        for side in (students, teachers)
    ]
    keys = [f"stages.{i}" for i in range(len(students))]
    student, teacher = Taps(nets[0], keys or None, 16), Frozen(nets[1], keys or None, 16)
    options = {
        "kd": {"temperature": v.hparams.get("T")},
        "at": {"p": v.hparams.get("p")},
        "sp": {"sp_stages": "all"},
    }
    part = cls(student, teacher, list(zip(keys, keys, strict=True)), **options.get(v.name, {}))
    parameters = {}
    if v.name in FITNET:
        regressor = load(part.adapters[0], v)
        parameters = {f"param.adapter.{k}": p for k, p in regressor.named_parameters()}
    batch = {"y": v.inputs.get("labels")}
    outs = [
        Out(v.inputs.get(f"{side}_logits"), dict(zip(keys, features, strict=True)))
        for side, features in (("student", students), ("teacher", teachers))
    ]
    return {"loss": part(*outs, batch)}, parameters


def check_vector(path, dtype):
    """Check one file with its function, and its DistillationLoss; the names that were compared."""
    v = Vector(path, dtype)
    values, parameters = function_for(v.name)(v)
    seen = v.check(values, parameters)
    if v.name not in LOSS_OF_VECTOR:
        return seen
    w = Vector(path, dtype)
    w.expected = {k: t for k, t in w.expected.items() if k == "loss" or k.startswith("grad.")}
    w.check(*values_of_loss(w))
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_public_vector(path, dtype):
    if function_for(path.stem) is None:
        pytest.skip(f"vector {path.stem}: not implemented yet")
    seen = check_vector(path, dtype)
    updates = path.stem.startswith(("dcl_merge", "ema_update", "rampups"))
    has_loss = "loss" in seen and any(name.startswith("grad.") for name in seen)
    assert seen and (updates or has_loss)


def test_vector_folder_is_there():
    if not FILES:
        pytest.skip(f"no reference vectors in {FOLDER}: set KDTOOLKIT_VECTORS")
    assert any(function_for(p.stem) for p in FILES), (
        f"{FOLDER} holds no vector of an implemented method"
    )


# --------------------------------------------------------- a second set, from the papers' equations
def loop_kd(s, t, temperature):
    total = 0.0
    for a, b in zip(s, t, strict=True):
        p, q = (torch.exp(z / temperature) / torch.exp(z / temperature).sum() for z in (b, a))
        total = total + sum(p[c] * torch.log(p[c] / q[c]) for c in range(len(p)))
    return temperature**2 * total / len(s)


def loop_ce(s, labels):
    return sum(
        -torch.log(torch.exp(z[y]) / torch.exp(z).sum()) for z, y in zip(s, labels, strict=True)
    ) / len(s)


def loop_mse(a, b):
    a, b = a.reshape(-1), b.reshape(-1)
    return sum((a[i] - b[i]) ** 2 for i in range(len(a))) / len(a)


def loop_pool(f, rows, columns):
    """Mean over the window of every position; the grid is a multiple of the smaller one."""
    high, wide = f.shape[2] // rows, f.shape[3] // columns
    windows = [
        f[:, :, i * high : (i + 1) * high, j * wide : (j + 1) * wide].mean((2, 3))
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(windows, 2).reshape(*f.shape[:2], rows, columns)


def loop_at(s, t, p):
    rows, columns = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    maps = []
    for f in (loop_pool(s, rows, columns), loop_pool(t, rows, columns)):
        q = sum(f[:, c] ** p for c in range(f.shape[1])).reshape(len(f), -1)
        maps.append(torch.stack([row / torch.sqrt((row * row).sum()) for row in q]))
    return loop_mse(*maps)


def loop_sp(s, t):
    grams = []
    for f in (s.reshape(len(s), -1), t.reshape(len(t), -1)):
        gram = torch.stack([torch.stack([(a * b).sum() for b in f]) for a in f])
        grams.append(torch.stack([row / torch.sqrt((row * row).sum()) for row in gram]))
    return ((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2


def loop_conv(x, weight, bias, stride, padding):
    """Convolution as a sum over kernel positions."""
    x = nn.functional.pad(x, (padding,) * 4)
    high, wide = ((n - k) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True))
    out = bias[None, :, None, None].expand(len(x), -1, high, wide)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            window = x[:, :, i : i + stride * high : stride, j : j + stride * wide : stride][
                :, :, :high, :wide
            ]
            out = out + torch.einsum("bchw,oc->bohw", window, weight[:, :, i, j])
    return out


def loop_transposed(x, weight, bias):
    """Transposed 4x4, stride 2, padding 1: every input position adds its kernel into the output."""
    batch, _, high, wide = x.shape
    out = x.new_zeros(batch, weight.shape[1], 2 * high + 2, 2 * wide + 2)
    for i in range(high):
        for j in range(wide):
            patch = torch.zeros_like(out)
            patch[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] = torch.einsum(
                "bc,cokl->bokl", x[:, :, i, j], weight
            )
            out = out + patch
    return out[:, :, 1:-1, 1:-1] + bias[None, :, None, None]


def loop_norm(x, weight, bias, eps):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    x = (x - mean) / torch.sqrt(variance + eps)
    return x * weight[None, :, None, None] + bias[None, :, None, None]


def make_set(folder, seed):
    """Write every implemented case with random shapes and options; returns the names written."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    def write(name, inputs, compute, hparams, zeros=()):
        cast = {
            k: t.double().requires_grad_() if t.is_floating_point() else t
            for k, t in inputs.items()
        }
        values = compute(cast)
        values["loss"].backward()
        tensors = {**inputs, **{k: t.detach().clone() for k, t in values.items()}}
        for k, t in cast.items():
            if t.is_floating_point() and t.grad is not None and not k.startswith("teacher"):
                tensors[f"grad.{k}"] = torch.zeros_like(t) if f"grad.{k}" in zeros else t.grad
        tensors["loss_f32"] = values["loss"].detach().float()
        meta = {
            "hparams": json.dumps(hparams),
            "zero_gradients": json.dumps(list(zeros)),
            "name": name,
        }
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, folder / f"{name}.safetensors", meta
        )

    batch, classes = draw.randint(3, 6), draw.randint(4, 11)
    logits = {
        "student_logits": 2 * rand(batch, classes),
        "teacher_logits": 2 * rand(batch, classes),
    }
    labels = torch.randint(classes, (batch,), generator=generator)
    h = {"T": draw.choice([1.5, 3.0, 7.0]), "ce_weight": draw.random(), "kd_weight": draw.random()}

    def compute_kd(v):
        loss = loop_kd(v["student_logits"], v["teacher_logits"], h["T"])
        ce = loop_ce(v["student_logits"], v["labels"])
        return {
            "loss": loss,
            "loss.ce": ce,
            "loss.total": h["ce_weight"] * ce + h["kd_weight"] * loss,
        }

    write("kd", {**logits, "labels": labels}, compute_kd, h)
    write(
        "logits_mse",
        logits,
        lambda v: {"loss": loop_mse(v["student_logits"], v["teacher_logits"])},
        {},
    )
    for name, grids in (("at", [(4, 4), (2, 4), (8, 8)]), ("sp", [(3, 3), (2, 5), (4, 4)])):
        taps = draw.randint(1, 5)
        maps = {
            f"{side}_features.{i}": rand(batch, draw.randint(2, 7), *draw.choice(grids))
            for side in ("student", "teacher")
            for i in range(taps)
        }
        p = draw.choice([1, 2, 3, 4])
        h = {"beta": draw.randint(1, 999), **({"p": p} if name == "at" else {})}
        loss = functools.partial(loop_at, p=p) if name == "at" else loop_sp

        def compute(v, taps=taps, loss=loss):
            layers = [
                loss(v[f"student_features.{i}"], v[f"teacher_features.{i}"]) for i in range(taps)
            ]
            return {"loss": sum(layers), **layer_losses(layers)}

        write(name, maps, compute, h)
    for name in FITNET:
        c, d, grid = draw.randint(2, 5), draw.randint(2, 6), draw.choice([2, 3, 4])
        shrink = draw.randint(1, 3) if grid > 2 else 1
        student, teacher, kernel = {
            "fitnet_same": (grid, grid, 1),
            "fitnet_down": (2 * grid, grid, 3),
            "fitnet_up": (grid, 2 * grid, 4),
            "fitnet_valid": (2 * grid + 1, 2 * grid + 1 - shrink, 1 + shrink),
        }[name]
        h = {
            "beta": draw.randint(1, 200),
            "bn_eps": draw.choice([1e-5, 1e-3]),
            "bn_mode": "train",
            "hint_layer": 1,
        }
        weight = rand(c, d, kernel, kernel) if name == "fitnet_up" else rand(d, c, kernel, kernel)
        adapter = {
            "conv.weight": weight,
            "conv.bias": rand(d),
            "bn.weight": rand(d),
            "bn.bias": rand(d),
        }
        adapter |= {"bn.running_mean": rand(d), "bn.running_var": rand(d).abs()}
        maps = {
            "student_features.0": rand(batch, c, student, student),
            "teacher_features.0": rand(batch, d, teacher, teacher),
        }

        def compute_hint(v, name=name, eps=h["bn_eps"]):
            x, (w, b) = (
                v["student_features.0"],
                (v[f"param.adapter.conv.{k}"] for k in ("weight", "bias")),
            )
            stride, padding = (2, 1) if name == "fitnet_down" else (1, 0)
            x = (
                loop_transposed(x, w, b)
                if name == "fitnet_up"
                else loop_conv(x, w, b, stride, padding)
            )
            x = loop_norm(x, v["param.adapter.bn.weight"], v["param.adapter.bn.bias"], eps)
            adapted = torch.where(x > 0, x, torch.zeros_like(x))
            return {"loss": loop_mse(adapted, v["teacher_features.0"]), "out.adapted": adapted}

        inputs = {**maps, **{f"param.adapter.{k}": t for k, t in adapter.items()}}
        write(name, inputs, compute_hint, h, ("grad.param.adapter.conv.bias",))
    return sorted(p.stem for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize("seed", range(1, 7))
def test_vector_check_holds_for_another_set(tmp_path, seed):
    assert make_set(tmp_path, seed) == sorted(VECTOR_LOSSES)
    for name in VECTOR_LOSSES:
        for dtype in DTYPES:
            check_vector(tmp_path / f"{name}.safetensors", dtype)


def test_vector_check_finds_a_wrong_value(tmp_path):
    make_set(tmp_path, 4)
    for name in VECTOR_LOSSES:
        v = Vector(tmp_path / f"{name}.safetensors", torch.float64)
        values, parameters = FUNCTIONS[name](v)
        v.expected["loss"] = v.expected["loss"] * (1 + 1e-8)
        with pytest.raises(AssertionError, match="loss"):
            v.check(values, parameters)
