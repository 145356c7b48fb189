"""The mathematics of distillation as pure functions of tensors: no state, no device code.

Students' tensors come first, then teachers', then labels, then hyper-parameters by keyword with the papers' defaults.
Half-precision inputs are taken to float32; float64 stays float64. Logits have classes in dimension 1 and losses are
means over every other position, so (B, C) and (B, C, H, W) both work. A function that is named as a method returns
the method's whole loss, a scalar; its parts stand beside it, unweighted. Temperatures, epsilons and weights have no
unit. One file a topic:

logits, features   one student, one teacher
peers, targets     networks of equal standing: DML, CL; KDCL
branches           ONE, OKDDip
collaborative      PCL, DKEL
selves, teachers   BYOT, BAKE; SOKD, Mean Teacher
updates            EMA and the exchange of DCL, without gradients
"""

from kdtoolkit.functional.branches import (
    kd_ensemble_eps,
    okddip,
    okddip_attention,
    okddip_leader,
    okddip_peers,
    okddip_targets,
    one,
    one_ensemble,
)
from kdtoolkit.functional.consistency import consistency, mean_teacher
from kdtoolkit.functional.ensemble_classifier import (
    dkel,
    dkel_each,
    kd_ensemble,
    kd_mean_of_other_teachers,
    kd_other_teachers,
    pcl,
    pcl_each,
)
from kdtoolkit.functional.features import (
    at,
    attention,
    fitnet,
    similarities,
    smaller_grid,
    sp,
    srkd,
)
from kdtoolkit.functional.kdcl_targets import (
    KDCL_RULES,
    kdcl,
    kdcl_covariance,
    kdcl_general_probabilities,
    kdcl_general_weights,
    kdcl_kd,
    kdcl_linear_weights,
    kdcl_targets,
)
from kdtoolkit.functional.logits import at_least_float32, ce, kd, kd_eps, logits_mse, soft_ce
from kdtoolkit.functional.parameter_updates import (
    DCL_RULES,
    dcl_alphas,
    dcl_average,
    dcl_merge,
    ema_alpha,
    ema_update,
)
from kdtoolkit.functional.peers import (
    PeerLogits,
    ce_each,
    cl_okddip,
    cl_paper,
    dml,
    dml_okddip,
    dml_tf,
    mutual_kl,
    mutual_kl_eps,
    mutual_kl_tf,
    others_kl_eps,
    others_mean,
    others_soft_ce,
    scale_gradient,
)
from kdtoolkit.functional.self_distillation import (
    bake,
    bake_kd,
    bake_targets,
    byot,
    byot_features,
    byot_features_unofficial,
    byot_logits,
    byot_unofficial,
)
from kdtoolkit.functional.semi_online import sokd, sokd_auxiliary, sokd_student

__all__ = [
    "DCL_RULES", "KDCL_RULES", "PeerLogits", "at", "attention", "bake", "bake_kd", "bake_targets", "byot",
    "byot_features", "byot_features_unofficial", "byot_logits", "byot_unofficial", "ce", "ce_each", "cl_okddip",
    "cl_paper", "consistency", "dcl_alphas", "dcl_average", "dcl_merge", "dkel", "dkel_each", "dml", "dml_okddip",
    "dml_tf", "ema_alpha", "ema_update", "fitnet", "at_least_float32", "kd", "kd_ensemble", "kd_ensemble_eps", "kd_eps",
    "kd_mean_of_other_teachers", "kd_other_teachers", "kdcl", "kdcl_covariance", "kdcl_general_probabilities",
    "kdcl_general_weights", "kdcl_kd", "kdcl_linear_weights", "kdcl_targets", "logits_mse", "mean_teacher",
    "mutual_kl", "mutual_kl_eps", "mutual_kl_tf", "okddip", "okddip_attention", "okddip_leader", "okddip_peers",
    "okddip_targets", "one", "one_ensemble", "others_kl_eps", "others_mean", "others_soft_ce", "pcl", "pcl_each",
    "scale_gradient", "similarities", "smaller_grid", "soft_ce", "sokd", "sokd_auxiliary", "sokd_student", "sp",
    "srkd",
]  # fmt: skip
