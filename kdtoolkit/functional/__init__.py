"""The mathematics of distillation, as pure functions of tensors: no state, no device code.

Every loss, method and callback of the package takes its equations from here, and every function is
tested against reference values and a slow loop over its paper's equation.

Conventions:

- Students' tensors come first, then teachers' tensors, then labels, then options by keyword with
  the paper's defaults.
- Logits have the classes in dimension 1; losses are means over the batch and every further
  position, so (B, C) and (B, C, H, W) both work. Labels are class ids of the same shape without C.
- Half precision is computed in float32, float64 stays float64.
- A result is unweighted: one scalar, or one loss for each of K networks, (K,). Temperatures,
  probabilities (`eps`) and shares have no unit.
- Nothing is detached unless the docstring says so.

By topic:

- Logits of one network (`logits`): `ce`, `ce_partly_labelled`, `kd`, `kd_eps`, `logits_mse`,
  `soft_ce`; `at_least_float32`.
- Features (`features`): `fitnet`; `at` with `attention` and `smaller_grid`; `sp` with
  `similarities`; `srkd`.
- Networks that learn from each other (`peers`), DML and CL: `mutual_loss`, `mutual_kl_tf`;
  `mean_over_others`, `loss_to_each`, `others_mean`, `stack_logits`.
- A target that networks build together (`kdcl_targets`, `kdcl_mixture`), KDCL: `kdcl_kd`,
  `kdcl_targets`, `kdcl_linear_weights`, `kdcl_general_weights`, `kdcl_covariance`.
- Branches of one network (`branches`), ONE and OKDDip: `one_ensemble`, `kd_ensemble_eps`;
  `okddip_attention`, `okddip_targets`, `okddip_peers`, `okddip_leader`.
- Branches with a mean teacher (`ensemble_classifier`), PCL and DKEL: `kd_ensemble`,
  `kd_other_teachers`, `kd_mean_of_other_teachers`.
- Mean Teacher (`consistency`): `consistency`.
- A network that teaches itself (`self_distillation`): `byot_logits`, `byot_features`;
  `bake_targets`, `bake_kd`.
- A branch between teacher and student (`semi_online`): `sokd_terms`.
- Updates of parameters (`parameter_updates`): `ema_alpha`, `ema_update`, `ema_update_`;
  `dcl_merge`, `dcl_average`, `dcl_alphas`.

Example:
    >>> import torch
    >>> from kdtoolkit import functional
    >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
    >>> loss = functional.kd(student, teacher, temperature=4.0)
"""

from kdtoolkit.functional.branches import (
    kd_ensemble_eps,
    okddip_attention,
    okddip_leader,
    okddip_peers,
    okddip_targets,
    one_ensemble,
)
from kdtoolkit.functional.consistency import CONSISTENCY_KINDS, consistency
from kdtoolkit.functional.ensemble_classifier import (
    kd_ensemble,
    kd_mean_of_other_teachers,
    kd_other_teachers,
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
from kdtoolkit.functional.kdcl_mixture import kdcl_linear_weights
from kdtoolkit.functional.kdcl_targets import (
    KDCL_RULES,
    kdcl_covariance,
    kdcl_general_weights,
    kdcl_kd,
    kdcl_targets,
)
from kdtoolkit.functional.logits import (
    at_least_float32,
    ce,
    ce_partly_labelled,
    kd,
    kd_eps,
    logits_mse,
    soft_ce,
)
from kdtoolkit.functional.parameter_updates import (
    DCL_RULES,
    dcl_alphas,
    dcl_average,
    dcl_merge,
    ema_alpha,
    ema_update,
    ema_update_,
)
from kdtoolkit.functional.peers import (
    MUTUAL_FORMS,
    MUTUAL_TARGETS,
    PeerLogits,
    loss_to_each,
    mean_over_others,
    mutual_kl_tf,
    mutual_loss,
    others_mean,
    stack_logits,
)
from kdtoolkit.functional.self_distillation import (
    bake_kd,
    bake_targets,
    byot_features,
    byot_logits,
)
from kdtoolkit.functional.semi_online import sokd_terms

__all__ = [
    "CONSISTENCY_KINDS",
    "DCL_RULES",
    "KDCL_RULES",
    "MUTUAL_FORMS",
    "MUTUAL_TARGETS",
    "PeerLogits",
    "at",
    "at_least_float32",
    "attention",
    "bake_kd",
    "bake_targets",
    "byot_features",
    "byot_logits",
    "ce",
    "ce_partly_labelled",
    "consistency",
    "dcl_alphas",
    "dcl_average",
    "dcl_merge",
    "ema_alpha",
    "ema_update",
    "ema_update_",
    "fitnet",
    "kd",
    "kd_ensemble",
    "kd_ensemble_eps",
    "kd_eps",
    "kd_mean_of_other_teachers",
    "kd_other_teachers",
    "kdcl_covariance",
    "kdcl_general_weights",
    "kdcl_kd",
    "kdcl_linear_weights",
    "kdcl_targets",
    "logits_mse",
    "loss_to_each",
    "mean_over_others",
    "mutual_kl_tf",
    "mutual_loss",
    "okddip_attention",
    "okddip_leader",
    "okddip_peers",
    "okddip_targets",
    "one_ensemble",
    "others_mean",
    "similarities",
    "smaller_grid",
    "soft_ce",
    "sokd_terms",
    "sp",
    "srkd",
    "stack_logits",
]
