"""Branches: several copies of the last part of a network on one shared trunk, trained together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import zero_loss
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.plan import MethodPlan, PlanRow
from kdtoolkit.core.run_context import ExportCandidates
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.feature_checks import check_logits
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.methods.branch_join import BranchJoin, BranchOutputs
from kdtoolkit.methods.network_checks import (
    check_different_tails,
    check_inputs,
    check_same_architecture,
    list_networks,
)
from kdtoolkit.methods.teacher_losses import LossBuilder, TeacherLosses
from kdtoolkit.methods.terms import describe_feature, describe_weights, merge_weights, weights_at
from kdtoolkit.models.embedding import EmbeddingHook
from kdtoolkit.models.network_cut import (
    boundary_taps,
    cut_network,
    resolve_cut,
    share_trunk,
    tail_parameters,
)
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.models.tail import Tail
from kdtoolkit.types import Batch, Clock, LossWeight, Out, Step, TapKey
from kdtoolkit.utils.validation import (
    check_flag,
    check_number,
    check_whole_number,
    describe_value,
)

FIRST = "student"


class Branches(Method):
    """Networks of one architecture that share everything up to a cut, and what joins them.

    Its losses are "ce" of the student, "ce/branch1", ... of the others, and those of the join.
    Where the join's are 0 every branch has the loss and the gradients that it would have alone on
    this trunk, which gets the sum.

    Args:
        networks: One network that maps images to logits (B, C), of which copies are made that are
            re-initialised behind the cut; or a list of networks that are built already, whose
            trunks are replaced by that of the first, in place. They are named "student", "branch1",
            ...
        branches: How many, the student among them, from 2; read where one network is given.
        cut: Number of a stage, or name of a module, behind which the branches part. "auto" is the
            last stage boundary in front of the last stage, so that a branch is a copy of the last
            stage and the classifier.
        join: What joins the branches; None trains them side by side.
        weights: Weight of "ce", for the cross-entropy of every branch, and of each term of the
            join, numbers or schedules; default 1.
        views: True gives every branch its own augmentation of an image, at the cost of one run of
            the trunk for each; False runs the trunk once.
        share_gradient: Whether the gradient that enters the trunk is divided by the number of
            branches.
        label_smoothing: Of the branches' cross-entropy, from 0 to below 1.
        image: Height and width of the data in pixels, where the network's own size is fixed and
            differs.
        preprocess: Input normalisation; default that of the first network's `pretrained_cfg`.
        best: True exports the best branch on the validation split; False the student.

    Raises:
        ValueError: For networks of several architectures or with equal weights behind the cut, a
            place where the network cannot be cut, unknown weights, or `views` with a join that
            reads the feature at the cut.

    Example:
        >>> method = Branches(timm.create_model("resnet18", num_classes=10), branches=3)
        >>> result = distill(None, None, "digits", method=method)
    """

    no_compile_reason = (
        "branches are run from the feature of a shared trunk, which is replaced in every step"
    )

    def __init__(
        self,
        networks: nn.Module | Sequence[nn.Module],
        *,
        branches: int = 3,
        cut: TapKey = "auto",
        join: nn.Module | None = None,
        weights: Mapping[str, LossWeight] | None = None,
        views: bool = False,
        share_gradient: bool = False,
        label_smoothing: float = 0.0,
        image: tuple[int, int] | None = None,
        preprocess: Preprocess | None = None,
        best: bool = True,
    ) -> None:
        super().__init__()
        for name, flag in (("views", views), ("share_gradient", share_gradient), ("best", best)):
            check_flag(name, flag)
        if join is not None and not isinstance(join, nn.Module):
            raise ValueError(
                f"join is {describe_value(join)}; allowed: a BranchJoin, made by calling its class"
            )
        check_inputs("Branches", preprocess, image)
        networks = _list_networks(networks, branches)
        check_same_architecture(networks)
        check_number("label_smoothing", label_smoothing, minimum=0, below=1)
        _check_views(views, join)
        self.terms: tuple[str, ...] = tuple(getattr(join, "terms", ()))
        self.weights = merge_weights("Branches", dict.fromkeys(("ce", *self.terms), 1.0), weights)
        self.preprocess = preprocess or Preprocess.from_model(networks[0], image)
        self.num_views = len(networks) if views else 1
        self.share_gradient, self.label_smoothing, self.best = share_gradient, label_smoothing, best
        self._share_trunk(networks, cut, self.preprocess.size or image)
        self.join = cast("BranchJoin | None", join)
        reads_embeddings = getattr(join, "reads_embeddings", False)
        self._embeddings = (
            [EmbeddingHook.from_taps(t) for t in self._all_taps()] if reads_embeddings else []
        )
        self.teacher_losses = TeacherLosses()
        self._is_released = False

    def _share_trunk(
        self, networks: list[nn.Module], cut: TapKey, size: tuple[int, int] | None
    ) -> None:
        """Give all networks the trunk of the first, and tap the feature at the cut."""
        self.taps = Taps(networks[0], None, size)
        self.cut = resolve_cut(self.taps, cut)
        parts = cut_network(self.taps, self.cut)
        check_different_tails(networks, parts)
        self.student = networks[0]
        for network in networks[1:]:
            share_trunk(network, networks[0], parts)
        self._boundary = boundary_taps(self.taps, self.cut)
        self.tails = nn.ModuleDict()
        for k, network in enumerate(networks[1:], 1):
            self.tails[name_of(k)] = Tail(network, self.cut, size, read=self._boundary)
        self.taps.select(list(dict.fromkeys([self.cut, *self._boundary])))
        self.taps.check_training_forward()
        self._num_parameters_behind = sum(
            p.numel() for p in tail_parameters(networks[0], parts).values()
        )

    def add_teacher_losses(self, teachers: Sequence[Frozen], build: LossBuilder) -> None:
        """Let every branch, as the complete network that it is, learn from frozen teachers, too.

        A feature of the trunk is compared once for each branch, through an adapter of its own.

        Args:
            teachers: The frozen teachers.
            build: Builds the losses between one branch and the teachers.
        """
        self.teachers = tuple(teachers)
        taps = dict(zip(self.networks(), self._all_taps(), strict=True))
        self.teacher_losses = TeacherLosses(taps, teachers, build)
        self.teacher_losses.select_teacher_taps()
        for name, tapped in taps.items():
            tapped.select(
                list(dict.fromkeys([*tapped.keys, *self.teacher_losses.student_taps(name)]))
            )
        self.taps.check_training_forward()

    # -------------------------------------------------------------------------------- training
    def forward(self, batch: Batch, clock: Clock) -> Step:
        """Cross-entropy of every branch, the losses of the join, and those of teachers."""
        outputs, labels = self._run_branches(batch), batch["y"]
        weights = weights_at(self.weights, clock)
        logits = self._by_name(outputs)
        losses: dict[str, Tensor] = {}
        for name, z in logits.items():
            ce = functional.ce(z, labels, label_smoothing=self.label_smoothing)
            losses[loss_of(name)] = weights["ce"] * ce
        losses |= self._join_losses(outputs, labels, weights)
        return Step(losses | self._teacher_terms(outputs, batch, clock), logits)

    def _teacher_terms(
        self, outputs: BranchOutputs, batch: Batch, clock: Clock
    ) -> dict[str, Tensor]:
        outs = {
            name: Out(logits, feats)
            for name, logits, feats in zip(
                self.networks(), outputs.logits, outputs.feats, strict=True
            )
        }
        batches = {
            name: batch if self.num_views == 1 else batch | {"x": batch["views"][:, k]}
            for k, name in enumerate(outs)
        }
        terms: dict[str, Tensor] = self.teacher_losses(outs, batches, clock)
        return terms

    def _join_losses(
        self, outputs: BranchOutputs, labels: Tensor, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Weighted; a loss of weight 0 still reads its parameters, as DDP requires."""
        if self.join is None:
            return {}
        is_on = any(weights[term] for term in self.terms)
        losses = self.join(outputs, labels) if is_on else {}
        zero = zero_loss(self.join, outputs.logits[0])
        return {
            term: weights[term] * losses[term] if weights[term] else zero for term in self.terms
        }

    def train_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Logits (B, C) of every branch in training, each on its own view."""
        return self._by_name(self._run_branches(batch))

    def _by_name(self, outputs: BranchOutputs) -> dict[str, Tensor]:
        return dict(zip(self.networks(), outputs.logits, strict=True))

    def _run_branches(self, batch: Batch) -> BranchOutputs:
        if self.num_views == 1:
            return self._run_on_one_view(self.preprocess(batch["x"]))
        views = [self.preprocess(batch["views"][:, k]) for k in range(self.num_views)]
        return self._run_on_own_views(views)

    def _run_on_one_view(self, x: Tensor) -> BranchOutputs:
        """The trunk runs once, as a part of the student; the other tails start at its feature."""
        first, embedding = self._run(0, self.taps, x)
        features = [first.feats[key] for key in self._boundary]
        self._scale_gradient(features)
        logits, embeddings, feats = [first.logits], [embedding], [first.feats]
        for k, tail in enumerate(self._tails(), 1):
            out, embedding = self._run(k, tail.run, x, features)
            logits.append(out.logits)
            embeddings.append(embedding)
            feats.append({**first.feats, **out.feats})
        return BranchOutputs(logits, _without_none(embeddings), first.feats[self.cut], feats)

    def _run_on_own_views(self, views: Sequence[Tensor]) -> BranchOutputs:
        """Every branch runs as the complete network that it is."""
        complete: list[Callable[[Tensor], Out]] = [
            self.taps,
            *(t.run_network for t in self._tails()),
        ]
        logits: list[Tensor] = []
        embeddings: list[Tensor | None] = []
        feats: list[Mapping[TapKey, Tensor]] = []
        for k, (network, x) in enumerate(zip(complete, views, strict=True)):
            out, embedding = self._run(k, network, x)
            self._scale_gradient([out.feats[key] for key in self._boundary])
            logits.append(out.logits)
            embeddings.append(embedding)
            feats.append(out.feats)
        return BranchOutputs(logits, _without_none(embeddings), None, feats)

    def _run(self, k: int, call: Callable[..., Out], *args: Any) -> tuple[Out, Tensor | None]:
        """Output of branch k, and its embedding where the join reads these."""
        return self._embeddings[k].capture(call, *args) if self._embeddings else (call(*args), None)

    def _scale_gradient(self, features: Sequence[Tensor]) -> None:
        """Divide the gradient that all branches together send into the trunk by their number."""
        count = 1 + len(self.tails)
        for tensor in features:
            if self.share_gradient and tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradient / count)  # type: ignore[no-untyped-call]

    def _tails(self) -> list[Tail]:
        return [cast("Tail", tail) for tail in self.tails.values()]

    def _all_taps(self) -> list[Taps]:
        return [self.taps, *(tail.taps for tail in self._tails())]

    # ------------------------------------------------------------------------------ evaluation
    def loss_weights(self) -> Mapping[str, LossWeight]:
        """The weights of its losses."""
        return {**self.weights, **self.teacher_losses.weights}

    def networks(self) -> dict[str, nn.Module]:
        """Every branch as a complete network."""
        return {name_of(k): taps.model for k, taps in enumerate(self._all_taps())}

    def export_candidates(self) -> ExportCandidates:
        """All branches with `best`, else the student."""
        if self.best:
            return list(self.networks()), "its branches have the same architecture"
        return super().export_candidates()

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Logits (B, C) of one branch for images in [0, 1]."""
        network = self.networks()[name]
        return check_logits(network, network(self.preprocess(x)))

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of every branch, and of the join's ensemble, from one run of the trunk."""
        outputs = self._run_on_one_view(self.preprocess(x))
        logits = self._by_name(outputs)
        return logits if self.join is None else logits | {"ensemble": self.join.ensemble(outputs)}

    def place_teachers(
        self,
        device: torch.device,
        memory_format: torch.memory_format = torch.preserve_format,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Refuse branches whose hooks were removed at the end of an earlier run."""
        if self._is_released:
            raise ValueError(
                "these Branches were trained by an earlier run, which removed their hooks: build "
                "new ones"
            )
        super().place_teachers(device, memory_format, autocast)

    def release(self) -> None:
        """Remove all hooks; the branches cannot be trained again."""
        self._is_released = True
        for taps in self._all_taps():
            taps.remove_hooks()
        for embedding in self._embeddings:
            embedding.remove()
        self.teacher_losses.release()
        super().release()

    def plan(self) -> MethodPlan:
        """Rows of losses, parameters of trunk and tails, and where the trunk ends."""
        weights, join_name = describe_weights(self.weights), type(self.join).__name__
        rows = [
            PlanRow(
                loss=loss_of(name),
                weight=weights["ce"],
                student=f"{name} logits",
                teacher="labels",
            )
            for name in self.networks()
        ]
        rows += [
            PlanRow(loss=term, weight=weights[term], student="all branches", teacher=join_name)
            for term in self.terms
        ]
        behind_cut = self._num_parameters_behind
        counts = {"trunk": num_parameters(self.student) - behind_cut}
        counts |= dict.fromkeys((f"tail of {name}" for name in self.networks()), behind_cut)
        if self.join is not None:
            counts[join_name] = num_parameters(self.join)
        rows += self.teacher_losses.plan_rows()
        counts |= self.teacher_losses.parameter_counts()
        place = describe_feature(self.taps.boundary_of(self.cut))
        notes = [f"the branches leave the trunk behind {place}"]
        return {"losses": rows, "parameters": counts, "notes": notes}


def name_of(k: int) -> str:
    """Name of branch k: "student", "branch1", ...

    Args:
        k: Number of the branch, from 0.

    Returns:
        The name; branch 0 is the student.
    """
    return FIRST if k == 0 else f"branch{k}"


def loss_of(name: str) -> str:
    """Name of a branch's cross-entropy: "ce" of the student, "ce/branch1", ...

    Args:
        name: Name of the branch.

    Returns:
        Name of the loss.
    """
    return "ce" if name == FIRST else f"ce/{name}"


def _list_networks(networks: nn.Module | Sequence[nn.Module], branches: int) -> list[nn.Module]:
    if not isinstance(networks, nn.Module) or isinstance(networks, nn.ModuleList):
        return list_networks("Branches", networks)
    check_num_branches(branches)
    return [networks, *(reinitialised_copy(networks, k) for k in range(1, branches))]


def check_num_branches(branches: object) -> None:
    """Check that a number of branches is a whole number from 2.

    Args:
        branches: What was given.

    Raises:
        ValueError: If it is not such a number.
    """
    check_whole_number(
        "branches", branches, minimum=2, maximum=1000, meaning="the student among them"
    )


def _check_views(views: bool, join: nn.Module | None) -> None:
    if views and getattr(join, "reads_shared", False):
        raise ValueError(
            f"views=True: every branch sees its own view, and {type(join).__name__} reads the one "
            "feature map that all share: leave views out, or use a join that reads logits and "
            "embeddings"
        )


def _without_none(embeddings: Sequence[Tensor | None]) -> list[Tensor]:
    return [embedding for embedding in embeddings if embedding is not None]
