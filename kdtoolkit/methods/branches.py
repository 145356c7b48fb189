"""Branches: several copies of the last part of a network on one shared trunk, trained together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdtoolkit import functional
from kdtoolkit.core.loss import zero_loss
from kdtoolkit.core.method import Method, num_parameters
from kdtoolkit.core.strategy import StrategyInputs
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.reinit import reinitialised_copy
from kdtoolkit.models.subnetwork import (
    Cut,
    Embedding,
    Tail,
    behind,
    boundary,
    cut_at,
    cut_of,
    graft,
)
from kdtoolkit.schedules import describe_weight, weight_at
from kdtoolkit.types import Batch, Clock, LossWeight, Step, TapKey
from kdtoolkit.utils.registry import suggestion

FIRST = "student"


class BranchJoin(NamedTuple):
    """What a join reads.

    logits      of every branch, in order, (B, C) each
    embeddings  inputs of their classifiers, (B, D) each; empty unless the join has `reads_embeddings = True`
    shared      the trunk's feature at the cut, in the network's own layout; None where every branch saw its own view
    """

    logits: list[Tensor]
    embeddings: list[Tensor]
    shared: Tensor | None


class Branches(Method):
    """K networks of one architecture that share everything up to the cut, and what joins them.

    networks         one nn.Module that maps images to logits (B, C), of which `branches` are made by drawing weights
                     behind the cut anew (tuning.fresh); or a list of them that are built already, whose trunks are
                     replaced by that of the first, in place. They are "student", "branch1", ...
    branches         how many, the student among them, where one network is given
    cut              number of a stage or module's name; "auto" is the last boundary in front of the last stage, so that
                     a branch is a copy of the last stage and the classifier
    join             nn.Module with `terms` (names of its losses), `join(team, labels) -> {term: unweighted loss}` and
                     `ensemble(team) -> logits (B, C)`; `reads_shared = True` if it reads the map at the cut
    weights          {"ce": of every branch's cross-entropy, term of the join: ...}, numbers or schedules; default 1
    views            True gives every branch an augmentation of its own, at the cost of K runs of the trunk; False runs
                     it once
    share_gradient   divides the gradient that enters the trunk by K
    label_smoothing  of the branches' cross-entropy, in [0, 1)
    image            (H, W) of the data, where the network's own size is fixed and differs
    best             the product is the best of all branches on the validation split; False: the student

    Losses "ce" of the student, "ce/branch1", ... of the others, and the join's. Where these are 0 every branch has the
    loss and the gradients that it would have alone on this trunk, which gets the sum.
    """

    no_compile_reason = "branches are run from the feature of a shared trunk, which takes its place anew in every step"

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
    ):
        super().__init__()
        if isinstance(networks, nn.Module):
            _check_count(branches)
            networks = [networks, *(reinitialised_copy(networks, k) for k in range(1, branches))]
        networks = list(networks)
        _check(networks, label_smoothing)
        if views and getattr(join, "reads_shared", False):
            raise ValueError(
                f"views=True: every branch sees its own view, and {type(join).__name__} reads the one map that all "
                "share: leave views out, or join by what reads logits and embeddings"
            )
        self.terms: tuple[str, ...] = tuple(getattr(join, "terms", ()))
        self.weights = _weights(self.terms, weights)
        self.preprocess = preprocess or Preprocess.of(networks[0], image)
        size = self.preprocess.size or image
        self.taps = Taps(networks[0], None, size)
        self.cut = cut_of(self.taps, cut)
        parts = cut_at(self.taps, self.cut)
        _check_twins(networks, parts)
        self.student = networks[0]
        for net in networks[1:]:
            graft(net, networks[0], parts)
        self._boundary = boundary(self.taps, self.cut)
        tails = [Tail(net, self.cut, size, read=self._boundary) for net in networks[1:]]
        self.tails = nn.ModuleDict({name_of(k): tail for k, tail in enumerate(tails, 1)})
        self.join, self.share_gradient, self.label_smoothing, self.best = (
            join,
            share_gradient,
            label_smoothing,
            best,
        )
        self.num_views = len(networks) if views else 1
        self.taps.select(list(dict.fromkeys([self.cut, *self._boundary])))
        self.taps.rehearse()
        self._embeddings = (
            [Embedding.at(t) for t in self._taps()]
            if getattr(join, "reads_embeddings", False)
            else []
        )
        self._released = False
        self._behind = sum(p.numel() for p in behind(networks[0], parts).values())

    # ------------------------------------------------------------------------------------------------------ training
    def forward(self, batch: Batch, clock: Clock) -> Step:
        team, labels = self._team(batch), batch["y"]
        weights = {term: weight_at(weight, clock) for term, weight in self.weights.items()}
        logits = dict(zip(self.networks(), team.logits, strict=True))
        smoothing = {"label_smoothing": self.label_smoothing}
        losses = {
            loss_of(name): weights["ce"] * functional.ce(z, labels, **smoothing)
            for name, z in logits.items()
        }
        return Step(losses | self._joined(team, labels, weights), logits)

    def _joined(
        self, team: BranchJoin, labels: Tensor, weights: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The join's weighted losses; one that is switched off still touches its parameters, for DDP."""
        if self.join is None:
            return {}
        found = self.join(team, labels) if any(weights[term] for term in self.terms) else {}
        off = zero_loss(self.join, team.logits[0])
        return {term: weights[term] * found[term] if weights[term] else off for term in self.terms}

    def train_logits(self, batch: Batch) -> dict[str, Tensor]:
        return dict(zip(self.networks(), self._team(batch).logits, strict=True))

    def _team(self, batch: Batch) -> BranchJoin:
        if self.num_views == 1:
            return self._on_one_trunk(self.preprocess(batch["x"]))
        return self._on_own_views(
            [self.preprocess(batch["views"][:, k]) for k in range(self.num_views)]
        )

    def _on_one_trunk(self, x: Tensor) -> BranchJoin:
        """The trunk runs once, as a part of the student; the other tails go on from its feature."""
        out, vector = self._run(0, self.taps, x)
        feature = [out.feats[key] for key in self._boundary]
        self._shrink(feature)
        others = [self._run(k, tail, x, feature) for k, tail in enumerate(self.tails.values(), 1)]
        logits, embeddings = zip((out.logits, vector), *others, strict=True)
        return BranchJoin(
            list(logits), [v for v in embeddings if v is not None], out.feats[self.cut]
        )

    def _on_own_views(self, views: list[Tensor]) -> BranchJoin:
        """Every branch is run as the complete network that it is."""
        logits, embeddings = [], []
        whole: list[Any] = [self.taps, *(tail.whole for tail in self.tails.values())]
        for k, (net, x) in enumerate(zip(whole, views, strict=True)):
            out, vector = self._run(k, net, x)
            self._shrink([out.feats[key] for key in self._boundary])
            logits.append(out.logits)
            embeddings.append(vector)
        return BranchJoin(logits, [v for v in embeddings if v is not None], None)

    def _run(self, k: int, call: Callable[..., Any], *args: Any) -> tuple[Any, Tensor | None]:
        return self._embeddings[k].of(call, *args) if self._embeddings else (call(*args), None)

    def _shrink(self, feature: Sequence[Tensor]) -> None:
        """What flows back from all branches together, at this tensor, is divided by their number."""
        count = 1 + len(self.tails)
        for tensor in feature:
            if self.share_gradient and tensor.requires_grad:
                tensor.register_hook(lambda gradient: gradient / count)

    def _taps(self) -> list[Taps]:
        return [self.taps, *(tail.taps for tail in self.tails.values())]  # type: ignore[list-item]

    # ---------------------------------------------------------------------------------------------------- evaluation
    def networks(self) -> dict[str, nn.Module]:
        return {name_of(k): taps.model for k, taps in enumerate(self._taps())}

    def export_candidates(self) -> tuple[list[str], str]:
        if self.best:
            return list(self.networks()), "its branches have the same architecture"
        return super().export_candidates()

    def logits(self, name: str, x: Tensor) -> Tensor:
        return self.networks()[name](self.preprocess(x))

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        team = self._on_one_trunk(self.preprocess(x))
        logits = dict(zip(self.networks(), team.logits, strict=True))
        return logits if self.join is None else logits | {"ensemble": self.join.ensemble(team)}  # type: ignore[operator]

    def place_teachers(self, *args: Any, **kwargs: Any) -> None:
        if self._released:
            raise ValueError(
                "these Branches were trained by an earlier run, which took its hooks off: build new ones"
            )
        super().place_teachers(*args, **kwargs)

    def release(self) -> None:
        self._released = True
        for taps in self._taps():
            taps.remove()
        for embedding in self._embeddings:
            embedding.remove()
        super().release()

    def plan(self) -> dict[str, Any]:
        weights = {term: describe_weight(w) for term, w in self.weights.items()}
        rows: list[dict[str, Any]] = [
            {
                "loss": loss_of(name),
                "weight": weights["ce"],
                "student": f"{name} logits",
                "teacher": "labels",
            }
            for name in self.networks()
        ]
        kind = type(self.join).__name__
        rows += [
            {"loss": t, "weight": weights[t], "student": "all branches", "teacher": kind}
            for t in self.terms
        ]
        end = self.taps.end(self.cut)
        counts = {"trunk": num_parameters(self.student) - self._behind}
        counts |= {f"tail of {name}": self._behind for name in self.networks()}
        counts |= {} if self.join is None else {kind: num_parameters(self.join)}
        note = f"the branches leave the trunk behind {end.name}, {'x'.join(map(str, end.shape))} {end.shape.layout}"
        return {"losses": rows, "parameters": counts, "notes": [note]}


# ------------------------------------------------------------------------------------------------------- building one
def build_branches(
    given: StrategyInputs, join: Callable[[Taps, TapKey], nn.Module], *, branches: int, cut: TapKey = "auto",
    weights: Mapping[str, LossWeight], views: bool = False, share_gradient: bool = False, best: bool = True,
) -> Branches:  # fmt: skip
    """Branches of a strategy; `join(taps of the student, cut)` makes the join from what these measure."""
    _check_count(branches)
    cut = cut_of(given.student, cut)
    parts, nets = cut_at(given.student, cut), [given.student.model]
    for k in range(1, branches):
        net = given.another(k)
        twin = any(
            _equal(other, net, parts) for other in nets
        )  # loaded weights: those behind the cut are drawn anew
        nets.append(reinitialised_copy(net, k) if twin else net)
    return Branches(
        nets,
        cut=cut, join=join(given.student, cut), weights=weights, views=views, share_gradient=share_gradient,
        image=given.image, preprocess=given.preprocess, best=best,
    )  # fmt: skip


def name_of(k: int) -> str:
    return FIRST if k == 0 else f"branch{k}"


def loss_of(name: str) -> str:
    return "ce" if name == FIRST else f"ce/{name}"


def _weights(terms: Sequence[str], given: Mapping[str, LossWeight] | None) -> dict[str, LossWeight]:
    weights: dict[str, LossWeight] = {"ce": 1.0, **{term: 1.0 for term in terms}}
    for name in given or {}:
        if name not in weights:
            hint = suggestion(name, weights) or "."
            raise ValueError(
                f"weights of Branches: unknown loss {name!r}{hint} Known: {', '.join(weights)}"
            )
    return weights | dict(given or {})


def _check_count(branches: Any) -> None:
    if isinstance(branches, bool) or not isinstance(branches, int) or branches < 2:
        raise ValueError(f"branches is {branches!r}: a whole number from 2, the student among them")


def _check(networks: Sequence[nn.Module], label_smoothing: float) -> None:
    if len(networks) < 2:
        raise ValueError(
            f"Branches of {len(networks)} networks: give two or more of one architecture"
        )
    kinds = [{name: tuple(p.shape) for name, p in net.named_parameters()} for net in networks]
    for number, kind in enumerate(kinds):
        if type(networks[number]) is not type(networks[0]) or kind != kinds[0]:
            raise ValueError(
                f"network {number} of Branches ({type(networks[number]).__name__}) has other parameters than the first "
                f"({type(networks[0]).__name__}): branches share a trunk and need one architecture; use Peers"
            )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}, it must be in [0, 1)")


def _equal(one: nn.Module, other: nn.Module, parts: Cut) -> bool:
    tails = [list(behind(net, parts).values()) for net in (one, other)]
    return bool(tails[0]) and all(
        not p.is_meta and torch.equal(p, q) for p, q in zip(*tails, strict=True)
    )


def _check_twins(networks: Sequence[nn.Module], parts: Cut) -> None:
    if not behind(networks[0], parts):
        raise ValueError(
            "nothing that is trained lies behind the cut: choose a stage in front of the classifier"
        )
    for number, net in enumerate(networks):
        for other in range(number):
            if _equal(networks[other], net, parts):
                raise ValueError(
                    f"networks {other} and {number} of Branches have equal weights behind the cut: branches copied "
                    "without re-initialising stay twins; build each anew, or use kdtoolkit.models.reinit.reinitialised_copy(net, seed)"
                )
