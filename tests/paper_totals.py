"""The total loss of every paper whose terms the package trains with, written from `functional`.

A method returns its terms in a dictionary; here each paper's sum is one plain function, the
reference for "the terms of the method are the loss of the paper". What only a variant needs that no
method runs stands here too.
"""

import torch
import torch.nn.functional as F

from kdtoolkit import functional
from kdtoolkit.functional import at_least_float32, ce, mutual_loss, stack_logits


def ce_each(student_logits, labels, *, label_smoothing=0.0):
    """Cross-entropy of every network, (K,)."""
    logits = stack_logits(student_logits, labels)
    return torch.stack([ce(z, labels, label_smoothing=label_smoothing) for z in logits])


# ------------------------------------------------------------------------------------ DML, CL, KDCL
def dml(student_logits, labels, *, temperature=1.0, weight=1.0):
    """sum_k CE_k + weight * mutual_k (Zhang, Xiang, Hospedales, Lu 2018)."""
    mutual = mutual_loss(student_logits, temperature=temperature)
    return (ce_each(student_logits, labels) + weight * mutual).sum()


def dml_tf(student_logits, labels, *, label_smoothing=0.1, eps=1e-8):
    """DML as in the authors' TensorFlow release (re-identification)."""
    hard = ce_each(student_logits, labels, label_smoothing=label_smoothing)
    return (hard + mutual_loss(student_logits, form="tf", eps=eps)).sum()


def dml_okddip(student_logits, labels, *, temperature=3.0, eps=1e-7, ensemble_first=False):
    """DML as OKDDip's benchmark runs it (Chen et al. 2020): gradients in both sides.

    ensemble_first: the target is the mean of the others' logits, the default mode of that code.
    """
    target = "ensemble" if ensemble_first else "pairwise"
    soft = mutual_loss(
        student_logits, temperature=temperature, target=target, detach=False, form="eps", eps=eps
    )
    return (ce_each(student_logits, labels) + soft).sum()


def others_soft_ce(student_logits, *, temperature=2.0):
    """The soft term of collaborative learning for every head, (K,)."""
    return mutual_loss(student_logits, temperature=temperature, target="ensemble", form="soft-ce")


def cl_paper(student_logits, labels, *, temperature=2.0, beta=0.5, squared=False):
    """sum_h beta CE_h + (1 - beta) soft_h (Song & Chai 2018).

    squared: T^2 in front of the soft term; whether the paper has it could not be confirmed.
    """
    factor = temperature**2 if squared else 1.0
    soft = others_soft_ce(student_logits, temperature=temperature)
    return (beta * ce_each(student_logits, labels) + (1 - beta) * factor * soft).sum()


def others_kl_eps(student_logits, *, temperature=3.0, eps=1e-7):
    """KL to the mean logits of the others, which are not detached, (K,)."""
    return mutual_loss(
        student_logits,
        temperature=temperature,
        target="ensemble",
        detach=False,
        form="eps",
        eps=eps,
    )


def cl_okddip(student_logits, labels, *, temperature=3.0, weight=1.0, eps=1e-7):
    """CL-ILR as OKDDip's benchmark runs it; weight: sigmoid ramp-up over 80 epochs."""
    soft = others_kl_eps(student_logits, temperature=temperature, eps=eps)
    return (ce_each(student_logits, labels) + weight * soft).sum()


def scale_gradient(shared, scale):
    """The same values, exactly; the gradient that flows back is multiplied by `scale`.

    Song & Chai 2018, "intermediate-level representation sharing". Branches divides by a hook.
    """
    return shared.detach() + scale * (shared - shared.detach())


def kdcl(student_logits, target_logits, labels, *, temperature=2.0, weight=1.0):
    """sum_i CE_i + weight * sum_i KD(z_i, target) (Guo et al. 2020)."""
    soft = functional.kdcl_kd(student_logits, target_logits, temperature=temperature)
    return ce_each(student_logits, labels).sum() + weight * soft.sum()


def kdcl_general_probabilities(student_logits, weights, *, temperature=2.0):
    """sum_i w_i softmax(z_i / T): the other reading of KDCL's rule "general"."""
    p = F.softmax(stack_logits(student_logits).detach() / temperature, dim=2)
    return (weights.to(p).reshape(-1, *[1] * (p.ndim - 1)) * p).sum(0)


# ---------------------------------------------------------------------- ONE, OKDDip, PCL, DKEL, SOK
def one(student_logits, ensemble_logits, labels, *, temperature=3.0, weight=1.0, eps=1e-7):
    """sum_k CE_k + CE(z_e) + weight * sum_k KD(z_k, z_e) (Lan, Zhu, Gong 2018)."""
    soft = functional.kd_ensemble_eps(
        student_logits, ensemble_logits, temperature=temperature, eps=eps
    )
    return ce_each(student_logits, labels).sum() + ce(ensemble_logits, labels) + weight * soft.sum()


def okddip(student_logits, attention, labels, *, temperature=3.0, weight=1.0, eps=1e-7):
    """CE of peers and, last, leader + weight * (peers + leader) (Chen et al. 2020)."""
    z = stack_logits(student_logits, labels)
    peers = functional.okddip_peers(z[:-1], attention, temperature=temperature, eps=eps).sum()
    leader = functional.okddip_leader(z, temperature=temperature, eps=eps)
    return ce_each(z, labels).sum() + weight * (peers + leader)


def pcl_each(
    student_logits, ensemble_logits, teacher_logits, labels, *, temperature=3.0, weight=1.0
):
    """Every peer's part of `pcl`, (K,)."""
    ensemble = functional.kd_ensemble(student_logits, ensemble_logits, temperature=temperature)
    mutual = functional.kd_other_teachers(student_logits, teacher_logits, temperature=temperature)
    return ce_each(student_logits, labels) + weight * (ensemble + mutual)


def pcl(student_logits, ensemble_logits, teacher_logits, labels, **options):
    """CE(z_e) + sum_i [CE_i + w KD(z_i, z_e) + w mean_{j != i} KD(z_i, m_j)] (Wu & Gong 2021)."""
    each = pcl_each(student_logits, ensemble_logits, teacher_logits, labels, **options)
    return ce(ensemble_logits, labels) + each.sum()


def dkel_each(
    student_logits,
    ensemble_logits,
    teacher_logits,
    labels,
    *,
    temperature=3.0,
    weight=0.1,
    ensemble_weight=1.0,
):
    """Every peer's part of `dkel`, (K,)."""
    pair, options = (student_logits, teacher_logits), {"temperature": temperature}
    ensemble = functional.kd_ensemble(student_logits, ensemble_logits, **options)
    early = functional.kd_mean_of_other_teachers(*pair, **options)
    late = functional.kd_other_teachers(*pair, **options)
    soft = ensemble + ensemble_weight * early + (1 - ensemble_weight) * late
    return ce_each(student_logits, labels) + weight * soft


def dkel(student_logits, ensemble_logits, teacher_logits, labels, **options):
    """CE(z_e) + sum_i {CE_i + w KD(z_i, z_e) + w [g early_i + (1 - g) late_i]} (Shao & Chen 2023).

    weight: w; ensemble_weight: g, the decaying share of the teachers' ensemble.
    """
    each = dkel_each(student_logits, ensemble_logits, teacher_logits, labels, **options)
    return ce(ensemble_logits, labels) + each.sum()


SOKD_TERMS = ("ce", "kd", "ce/branch", "kd/branch", "mutual/branch")


def sokd(student_logits, branch_logits, teacher_logits, labels, *, temperature=4.0, weights=None):
    """The weighted sum of five terms (Liu, Liu, Huang 2021); all weights are 1 in the paper."""
    weights = dict.fromkeys(SOKD_TERMS, 1.0) | (weights or {})
    terms = functional.sokd_terms(
        student_logits, branch_logits, teacher_logits, labels, temperature=temperature
    )
    return sum(weights[name] * term for name, term in terms.items())


# --------------------------------------------------------------------- Mean Teacher, BYOT, BAKE
def mean_teacher(student_logits, teacher_logits, labels, *, weight=100.0, kind="mse"):
    """CE of the labelled / B + weight * consistency (Tarvainen & Valpola 2017)."""
    hard = functional.ce_partly_labelled(student_logits, labels)
    return hard + weight * functional.consistency(student_logits, teacher_logits, kind=kind)


def byot(
    student_logits,
    student_features,
    labels,
    *,
    temperature=3.0,
    soft_weight=0.3,
    feature_weight=0.03,
    exempt=1,
):
    """CE_0 + sum_i [s soft_i + (1 - s) CE_i] + feature_weight * features (Zhang et al. 2019)."""
    hard = ce_each(student_logits, labels)
    soft = functional.byot_logits(student_logits, temperature=temperature)
    shallow = (soft_weight * soft + (1 - soft_weight) * hard[1:]).sum()
    distance = functional.byot_features(student_features, exempt=exempt)
    return hard[0] + shallow + feature_weight * distance


def byot_features_unofficial(student_features):
    """sum_i sum of (f_i - f_0)^2 where f_i or f_0 is above 0; f_0 is detached."""
    target = at_least_float32(student_features[0]).detach()
    total = target.new_zeros(())
    for feature in student_features[1:]:
        active = (feature > 0) | (target > 0)
        total = total + ((at_least_float32(feature) - target).square() * active).sum()
    return total


def byot_unofficial(
    student_logits, student_features, labels, *, temperature=3.0, alpha=0.1, beta=1e-6
):
    """The popular unofficial version of BYOT: T^2 in the soft term, squared distances."""
    soft = functional.byot_logits(student_logits, temperature=temperature).sum() * temperature**2
    hard = ce_each(student_logits, labels).sum()
    return (1 - alpha) * hard + alpha * soft + beta * byot_features_unofficial(student_features)


def bake(student_logits, student_features, labels, *, temperature=4.0, omega=0.5, weight=1.0):
    """CE + weight * KL to the targets of the same batch (Ge et al. 2021)."""
    targets = functional.bake_targets(
        student_logits, student_features, temperature=temperature, omega=omega
    )
    soft = functional.bake_kd(student_logits, targets, temperature=temperature)
    return ce(student_logits, labels) + weight * soft
