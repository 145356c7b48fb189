"""The losses of training strategies against slow loops over the papers' equations.

The loops use nothing of the package. Every case draws shapes, numbers of networks and
hyper-parameters, writes a file like the reference vectors, and goes through the same check (losses,
outputs, gradients; float64 and float32).
"""

import json
import math
import random
from fractions import Fraction

import paper_totals as totals
import pytest
import torch
from safetensors.torch import save_file
from test_vectors import (
    DTYPES,
    STRATEGIES,
    Vector,
    check_vector,
    function_for,
    loop_conv,
    loop_norm,
)

from kdtoolkit import functional as f


# ----------------------------------------------------------------------------------- the slow loops
def softened(z, temperature=1.0):
    powers = torch.exp(z / temperature)
    return powers / powers.sum()


def ce(z, labels, smoothing=0.0):
    total = 0.0
    for row, y in zip(z, labels.tolist(), strict=True):
        log = torch.log(softened(row))
        total = total - (1 - smoothing) * log[y] - smoothing * log.mean()
    return total / len(z)


def kl(target, z, temperature=1.0, eps=0.0):
    """T^2 times the mean over rows of sum_c q (log q - log p)."""
    total = 0.0
    for a, b in zip(target, z, strict=True):
        q, p = softened(a, temperature) + eps, softened(b, temperature)
        total = total + sum(q[c] * (torch.log(q[c]) - torch.log(p[c])) for c in range(len(q)))
    return temperature**2 * total / len(z)


def soft(target, z, temperature):
    rows = zip(target, z, strict=True)
    return -sum(
        (softened(a, temperature) * torch.log(softened(b, temperature))).sum() for a, b in rows
    ) / len(z)


def others(k, number):
    return [i for i in range(number) if i != k]


def average(tensors):
    return sum(tensors) / len(tensors)


def exact(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


class Draw:
    """Random numbers of one seed, and the shapes that most cases share."""

    def __init__(self, seed):
        self.python, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)
        self.K, self.B, self.C = (
            self.python.randint(2, 6),
            self.python.randint(2, 5),
            self.python.randint(3, 7),
        )
        self.T = self.python.choice([0.7, 2.0, 3.0, 6.0])

    def rand(self, *shape):
        return torch.randn(*shape, generator=self.torch)

    def logits(self, *lead):
        return 2 * self.rand(*lead, self.B, self.C)

    @property
    def labels(self):
        return torch.randint(self.C, (self.B,), generator=self.torch)

    def number(self):
        return round(self.python.uniform(0.1, 1.5), 3)


def numbered(prefix, values):
    return {f"{prefix}{i}": value for i, value in enumerate(values)}


def dml(d):
    h = {"T": 1, "lambda": d.number()}

    def compute(v):
        z, y = v["student_logits"], v["labels"]
        n = len(z)
        nets = [
            ce(z[k], y) + h["lambda"] * sum(kl(z[j].detach(), z[k]) for j in others(k, n)) / (n - 1)
            for k in range(n)
        ]
        return {"loss": sum(nets), **numbered("loss.net", nets)}

    return {"student_logits": d.logits(d.K), "labels": d.labels}, compute, h


def dml_tf(d):
    h = {"K": d.K, "eps": 1e-8, "label_smoothing": 0.3}

    def divergence(a, b):
        rows = [(softened(x).detach(), softened(y)) for x, y in zip(a, b, strict=True)]
        return sum((p * torch.log(1e-8 + p / (q + 1e-8))).sum() for p, q in rows) / len(rows)

    def compute(v):
        z, y = v["student_logits"], v["labels"]
        nets = [
            ce(z[k], y, 0.3) + sum(divergence(z[j], z[k]) for j in others(k, len(z)))
            for k in range(len(z))
        ]
        return {"loss": sum(nets), **numbered("loss.net", nets)}

    return {"student_logits": d.logits(d.K), "labels": d.labels}, compute, h


def dml_okddip(d):
    h = {"K": d.K, "T": d.T, "eps": 1e-3}

    def compute(v):
        z, y, n = v["student_logits"], v["labels"], d.K
        hard = sum(ce(x, y) for x in z)
        pairs = sum(kl(z[j], z[k], d.T, 1e-3) for k in range(n) for j in others(k, n)) / (n - 1)
        ensemble = sum(kl(average([z[j] for j in others(k, n)]), z[k], d.T, 1e-3) for k in range(n))
        return {"loss": hard + pairs, "loss.ensemble_first": hard + ensemble}

    return {"student_logits": d.logits(d.K), "labels": d.labels}, compute, h


def cl_paper(d):
    h = {"T": d.T, "beta": d.python.random(), "heads": d.K}

    def compute(v):
        z, y = v["student_logits"], v["labels"]
        hard = sum(ce(x, y) for x in z)
        mixed = sum(
            soft(average([z[j] for j in others(k, d.K)]).detach(), z[k], d.T) for k in range(d.K)
        )
        b = h["beta"]
        total, squared = b * hard + (1 - b) * mixed, b * hard + (1 - b) * d.T**2 * mixed
        return {"loss": total, "loss.hard": hard, "loss.soft": mixed, "loss.with_T2": squared}

    return {"student_logits": d.logits(d.K), "labels": d.labels}, compute, h


def cl_okddip(d):
    h = {
        "T": d.T,
        "branches": d.K,
        "consistency_weight": d.number(),
        "eps": 1e-4,
        "ilr_scale": 1 / d.K,
    }
    inputs = {"trunk_features": d.rand(d.B, 3, 2, 4), "labels": d.labels}
    for i in range(d.K):
        inputs[f"param.branch.{i}.conv.weight"] = d.rand(5, 3, 1, 1)
        inputs[f"param.classifier.{i}.weight"], inputs[f"param.classifier.{i}.bias"] = (
            d.rand(d.C, 5),
            d.rand(d.C),
        )

    def compute(v):
        if v["trunk_features"].requires_grad:
            v["trunk_features"].register_hook(lambda grad: grad / d.K)
        z, y = [], v["labels"]
        for i in range(d.K):
            pooled = (
                v["trunk_features"].mean((2, 3)) @ v[f"param.branch.{i}.conv.weight"][:, :, 0, 0].T
            )
            z.append(pooled @ v[f"param.classifier.{i}.weight"].T + v[f"param.classifier.{i}.bias"])
        targets = [average([z[j] for j in others(k, d.K)]) for k in range(d.K)]
        hard = sum(ce(x, y) for x in z)
        pulled = sum(kl(t, x, d.T, 1e-4) for t, x in zip(targets, z, strict=True))
        out = {"out.logits": torch.stack(z, 2), "out.targets": torch.stack(targets, 2)}
        return {
            "loss": hard + h["consistency_weight"] * pulled,
            "loss.ce": hard,
            "loss.kl_unweighted": pulled,
            **out,
        }

    return inputs, compute, h


def ramp(epoch, length):
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2)


def one(d):
    h = {
        "T": d.T,
        "branches": d.K,
        "epoch": d.python.randint(0, 90),
        "eps": 1e-4,
        "rampup_length": 80,
    }
    h |= {"bn_mode": "train", "bn_eps": 1e-3}
    inputs = {
        "student_logits": d.logits(d.K),
        "labels": d.labels,
        "trunk_features": d.rand(d.B, 4, 16, 16) + 1,
    }
    inputs |= {"param.gate.linear.weight": d.rand(d.K, 4), "param.gate.linear.bias": d.rand(d.K)}
    inputs |= {"param.gate.bn.weight": d.rand(d.K), "param.gate.bn.bias": d.rand(d.K) + 1}

    def compute(v):
        z, y = v["student_logits"], v["labels"]
        pooled = (
            v["trunk_features"].mean((2, 3)) @ v["param.gate.linear.weight"].T
            + v["param.gate.linear.bias"]
        )
        normed = loop_norm(
            pooled[:, :, None, None], v["param.gate.bn.weight"], v["param.gate.bn.bias"], 1e-3
        )
        gates = [softened(torch.where(row > 0, row, 0 * row)) for row in normed[:, :, 0, 0]]
        mixed = torch.stack([sum(g[k] * z[k][b] for k in range(d.K)) for b, g in enumerate(gates)])
        hard = sum(ce(x, y) for x in z) + ce(mixed, y)
        pulled, w = sum(kl(mixed.detach(), x, d.T, 1e-4) for x in z), exact(ramp(h["epoch"], 80))
        out = {"out.ensemble_logits": mixed, "out.rampup": w}
        return {"loss": hard + w * pulled, "loss.ce": hard, "loss.kl_unweighted": pulled, **out}

    return inputs, compute, h, ("grad.param.gate.linear.bias",)


def okddip(d):
    n = d.K + 1  # peers and the leader
    h = {
        "T": d.T,
        "alpha": d.number(),
        "branches": n,
        "epoch": d.python.randint(0, 90),
        "eps": 1e-4,
    }
    h["rampup_length"] = 80
    inputs = {
        "labels": d.labels,
        "param.query.weight": d.rand(2, 6),
        "param.key.weight": d.rand(2, 6),
    }
    for i in range(n):
        inputs[f"student_features.{i}"] = d.rand(d.B, 6)
        inputs[f"param.classifier.{i}.weight"], inputs[f"param.classifier.{i}.bias"] = (
            d.rand(d.C, 6),
            d.rand(d.C),
        )

    def compute(v):
        features, y = [v[f"student_features.{i}"] for i in range(n)], v["labels"]
        z = [
            x @ v[f"param.classifier.{i}.weight"].T + v[f"param.classifier.{i}.bias"]
            for i, x in enumerate(features)
        ]
        query, key = v["param.query.weight"], v["param.key.weight"]
        targets = [[] for _ in range(d.K)]
        for b in range(d.B):
            for i in range(d.K):
                a = softened(
                    torch.stack(
                        [(query @ features[i][b]) @ (key @ features[j][b]) for j in range(d.K)]
                    )
                )
                targets[i].append(sum(a[j] * z[j][b] for j in range(d.K)))
        targets = [torch.stack(rows) for rows in targets]
        hard = sum(ce(x, y) for x in z[:-1])
        pulled = sum(kl(t, x, d.T, 1e-4) for t, x in zip(targets, z[:-1], strict=True))
        last, led = ce(z[-1], y), kl(average(z[:-1]), z[-1], d.T, 1e-4)
        return {
            "loss": hard + last + h["alpha"] * ramp(h["epoch"], 80) * (pulled + led),
            **{
                "loss.ce_peers": hard,
                "loss.ce_leader": last,
                "loss.kl_peers": pulled,
                "loss.kl_leader": led,
            },
            **{"out.leader_logits": z[-1], "out.peer_logits": torch.stack(z[:-1], 2)},
            "out.peer_targets": torch.stack(targets, 2),
        }

    return inputs, compute, h


def coded(epoch, weight):
    return weight * math.exp(-5 * (1 - epoch / weight) ** 2) if epoch <= 80 else weight


def shared(d):
    inputs = {
        "student_logits": d.logits(d.K),
        "ensemble_logits": d.logits(),
        "teacher_logits": d.logits(d.K),
    }
    return inputs | {"labels": d.labels}


def pcl(d):
    h = {"T": d.T, "epoch": d.python.randint(0, 90), "lambda": d.number(), "rampup_length": 80}

    def compute(v):
        z, e, m, y = v["student_logits"], v["ensemble_logits"], v["teacher_logits"], v["labels"]

        def each(w):
            for k in range(d.K):
                taught = average([kl(m[j], z[k], d.T) for j in others(k, d.K)])
                yield ce(z[k], y) + w * kl(e.detach(), z[k], d.T) + w * taught

        nets = list(each(h["lambda"] * ramp(h["epoch"], 80)))
        codes = {
            f"loss.code_epoch_{n}": ce(e, y) + sum(each(coded(n, h["lambda"])))
            for n in (0, 1, 80, 81)
        }
        return {"loss": ce(e, y) + sum(nets), **numbered("loss.peer", nets), **codes}

    return shared(d), compute, h


def dkel(d):
    h = {
        "T": d.T,
        "epoch": d.python.randint(0, 90),
        "lambda": d.number(),
        "rampup_length": 80,
        "exp": 0.05,
    }
    h |= {"cut": 0.01, "exp_of_code_epoch_entries": 0.5}

    def compute(v):
        z, e, m, y = v["student_logits"], v["ensemble_logits"], v["teacher_logits"], v["labels"]

        def each(w, g):
            for k in range(d.K):
                early = kl(average([m[j] for j in others(k, d.K)]), z[k], d.T)
                late = average([kl(m[j], z[k], d.T) for j in others(k, d.K)])
                yield ce(z[k], y) + w * kl(e.detach(), z[k], d.T) + w * (g * early + (1 - g) * late)

        g = math.exp(-0.05 * h["epoch"])
        g = 0.0 if g <= 0.01 else g
        nets = list(each(h["lambda"] * ramp(h["epoch"], 80), g))
        values = {
            "loss": ce(e, y) + sum(nets),
            "loss.full_rampup": ce(e, y) + sum(each(h["lambda"], g)),
        }
        for n in (0, 1, 9, 10, 81):
            values[f"loss.code_epoch_{n}"] = ce(e, y) + sum(
                each(coded(n, h["lambda"]), math.exp(-n / 2) if n < 10 else 0)
            )
        return {**values, **numbered("loss.peer", nets)}

    return shared(d), compute, h


def kdcl_targets(d):
    h = {"T": d.T, "lambda": d.number(), "students": d.K}
    inputs = {
        "student_logits": d.logits(d.K),
        "labels": d.labels,
        "val_logits": d.rand(d.K, 40, d.C),
    }
    inputs["val_labels"] = torch.randint(d.C, (40,), generator=d.torch)

    def compute(v):
        z, y = v["student_logits"].detach(), v["labels"]
        hard = torch.stack(
            [torch.stack([ce(x[b : b + 1], y[b : b + 1]) for b in range(d.B)]) for x in z]
        )
        naive = torch.stack([z[min(range(d.K), key=lambda k: hard[k, b])][b] for b in range(d.B)])
        least = torch.stack(
            [
                torch.stack(
                    [min(z[k, b, c] - z[k, b, y[b]] for k in range(d.K)) for c in range(d.C)]
                )
                for b in range(d.B)
            ]
        )
        wrong = torch.stack([torch.stack([softened(row) for row in x]) for x in v["val_logits"]])
        wrong = wrong - torch.eye(d.C).double()[v["val_labels"]]
        c = torch.stack([torch.stack([(a * b).sum() / 40 for b in wrong]) for a in wrong]).detach()
        w = torch.linalg.inv(c).sum(1)
        w = w / w.sum()
        general = sum(w[k] * z[k] for k in range(d.K))
        at = sum(w[k] * torch.stack([softened(row, d.T) for row in z[k]]) for k in range(d.K))

        def total(target):
            return sum(ce(x, y) + h["lambda"] * kl(target, x, d.T) for x in v["student_logits"])

        targets = {
            "naive": naive,
            "minlogit": least,
            "mean": average(list(z)),
            "general_logit_mix": general,
        }
        return {
            **{
                "loss": total(least),
                "loss.naive": total(naive),
                "loss.mean_logits": total(targets["mean"]),
            },
            **{"loss.general_logit_mix": total(general), "out.target.general_prob_mix_at_T": at},
            **{f"out.target.{k}": t for k, t in targets.items()},
            **{"out.general.C": c, "out.general.weights": w, "out.ce_per_student": hard},
        }

    return inputs, compute, h


def sokd(d):
    parts = ("lambda_a_ce", "lambda_a_kd_s", "lambda_a_kd_t", "lambda_ce", "lambda_kd")
    h = {"T": d.T, "bn_mode": "train", **{k: d.number() if d.K > 3 else 1.0 for k in parts}}
    inputs = {"student_logits": d.logits(), "teacher_logits": d.logits(), "labels": d.labels}
    inputs |= {"teacher_features.0": d.rand(d.B, 3, 8, 8)}
    aux = {
        "block.conv1": (4, 3, 3, 3),
        "block.conv2": (4, 4, 3, 3),
        "block.shortcut": (4, 3, 1, 1),
        "fc": (d.C, 4),
    }
    inputs |= {f"param.aux.{k}.weight": d.rand(*shape) for k, shape in aux.items()} | {
        "param.aux.fc.bias": d.rand(d.C)
    }
    for name, width in (("block.bn1", 3), ("block.bn2", 4), ("bn", 4)):
        inputs |= {
            f"param.aux.{name}.weight": d.rand(width),
            f"param.aux.{name}.bias": d.rand(width),
        }

    def compute(v):
        def norm(x, name):
            x = loop_norm(x, v[f"param.aux.{name}.weight"], v[f"param.aux.{name}.bias"], 1e-5)
            return torch.where(x > 0, x, 0 * x)

        def conv(x, name, stride, padding):
            weight = v[f"param.aux.block.{name}.weight"]
            return loop_conv(x, weight, weight.new_zeros(len(weight)), stride, padding)

        x = norm(v["teacher_features.0"], "block.bn1")
        x = conv(norm(conv(x, "conv1", 2, 1), "block.bn2"), "conv2", 1, 1) + conv(
            x, "shortcut", 2, 0
        )
        a = norm(x, "bn").mean((2, 3)) @ v["param.aux.fc.weight"].T + v["param.aux.fc.bias"]
        s, t, y = v["student_logits"], v["teacher_logits"], v["labels"]
        branch = h["lambda_a_ce"] * ce(a, y) + h["lambda_a_kd_t"] * kl(t, a, d.T)
        branch = branch + h["lambda_a_kd_s"] * kl(s.detach(), a, d.T)
        own = h["lambda_ce"] * ce(s, y) + h["lambda_kd"] * kl(a.detach(), s, d.T)
        return {
            "loss": branch + own,
            "loss.auxiliary": branch,
            "loss.student": own,
            "out.auxiliary_logits": a,
        }

    return inputs, compute, h


def mean_teacher(d):
    h = {"consistency_weight": 30 * d.number()}

    def compute(v):
        s, t, y = v["student_logits"], v["teacher_logits"], v["labels"]
        squares = sum(
            ((softened(a) - softened(b)) ** 2).sum() for a, b in zip(s, t, strict=True)
        ) / (d.B * d.C)
        raw, kls, hard = ((s - t) ** 2).sum() / (d.B * d.C), kl(t, s), ce(s, y)
        parts = {
            "loss.consistency_mse": squares,
            "loss.consistency_kl": kls,
            "loss.symmetric_logit_mse": raw,
        }
        w = h["consistency_weight"]
        return {"loss": hard + w * squares, "loss.kl_variant": hard + w * kls, **parts}

    return (
        {"student_logits": d.logits(), "teacher_logits": d.logits(), "labels": d.labels},
        compute,
        h,
    )


def byot(d):
    h = {"T": d.T, "feature_loss_coefficient": d.number(), "loss_coefficient": 0.4}
    inputs = {
        "student_logits": d.logits(d.K),
        "labels": d.labels,
        "student_features.0": d.rand(d.B, 5),
    }
    for i in range(1, d.K):
        inputs[f"student_features.{i}"] = d.rand(d.B, 2 + i)
        inputs[f"param.adaptation.{i}.weight"], inputs[f"param.adaptation.{i}.bias"] = (
            d.rand(5, 2 + i),
            d.rand(5),
        )

    def compute(v):
        z, y, total = v["student_logits"], v["labels"], torch.zeros(()).double()
        for i in range(2, d.K):
            g = (
                v[f"student_features.{i}"] @ v[f"param.adaptation.{i}.weight"].T
                + v[f"param.adaptation.{i}.bias"]
            )
            total = total + torch.sqrt(((g - v["student_features.0"].detach()) ** 2).sum())
        shallow = sum(
            0.4 * soft(z[0].detach(), z[i], d.T) + 0.6 * ce(z[i], y) for i in range(1, d.K)
        )
        far = h["feature_loss_coefficient"] * total
        parts = {
            "loss.deepest_ce": ce(z[0], y),
            "loss.shallow_logits": shallow,
            "loss.shallow_features": far,
        }
        return {"loss": sum(parts.values()), **parts}

    return inputs, compute, h


def byot_unofficial(d):
    h = {"T": d.T, "alpha": d.python.random(), "beta": 1e-3}
    inputs = {"student_logits": d.logits(d.K), "labels": d.labels}
    inputs |= {f"student_features.{i}": d.rand(d.B, 4, 2, 1) for i in range(d.K)}

    def compute(v):
        z, y, far = v["student_logits"], v["labels"], 0.0
        deepest = v["student_features.0"].detach().flatten()
        for i in range(1, d.K):
            pairs = zip(v[f"student_features.{i}"].flatten(), deepest, strict=True)
            far = far + sum((a - b) ** 2 for a, b in pairs if a > 0 or b > 0)
        hard = sum(ce(x, y) for x in z)
        taught = d.T**2 * sum(soft(z[0].detach(), x, d.T) for x in z[1:])
        total = (1 - h["alpha"]) * hard + h["alpha"] * taught + 1e-3 * far
        return {"loss": total, "loss.ce": hard, "loss.kd": taught, "loss.feature": far}

    return inputs, compute, h


def bake(d):
    h = {"T": d.T, "omega": d.python.choice([0.2, 0.5, 0.9]), "lambda": d.number(), "intra_imgs": 3}
    inputs = {
        "student_logits": d.logits(),
        "student_features.0": d.rand(d.B, 6),
        "labels": d.labels,
    }

    def compute(v):
        z, features = v["student_logits"], v["student_features.0"].detach()
        unit = [x / torch.sqrt((x * x).sum()) for x in features]
        a = torch.zeros(d.B, d.B).double()
        for i in range(d.B):
            weights = {j: math.exp(float(unit[i] @ unit[j])) for j in others(i, d.B)}
            for j, w in weights.items():
                a[i, j] = w / sum(weights.values())
        p = torch.stack([softened(row, d.T) for row in z]).detach()
        q = p
        for _ in range(2000):  # propagation until nothing changes
            q = h["omega"] * a @ q + (1 - h["omega"]) * p
        rows = [softened(row, d.T) for row in z]
        pulled = (
            d.T**2
            * sum((t * (torch.log(t) - torch.log(s))).sum() for t, s in zip(q, rows, strict=True))
            / d.B
        )
        hard = ce(z, v["labels"])
        return {
            "loss": hard + h["lambda"] * pulled,
            "loss.ce": hard,
            "loss.kd": pulled,
            "out.targets": q,
        }

    return inputs, compute, h


def dcl_merge(d):
    h = {"K": d.K, "beta": 0.25, "eps": d.python.choice([1e-18, 1e-9])}
    params = [0.1 * d.rand(d.K, 3, 2), 0.1 * d.rand(d.K, 5)]
    params[1][:, 0], params[1][0, 1], params[1][:, 2] = 0, 0, 1e-4 * torch.arange(1, d.K + 1)
    params[1][:, 3] = 0.3

    def column(w, eps):
        if eps:
            n = [math.prod(abs(w[j]) for j in others(i, len(w))) for i in range(len(w))]
            return [x / (sum(n) + eps) for x in n]
        if 0 in w:
            return [(x == 0) / w.count(0) for x in w]
        return [1 / abs(x) / sum(1 / abs(y) for y in w) for x in w]

    def compute(v):
        values = {}
        for i, p in enumerate((v["student_params.0"], v["student_params.1"])):
            for eps, suffix in ((h["eps"], ""), (0.0, "_eps0")):
                columns = p.detach().flatten(1).T.tolist()
                alpha = exact([column(w, eps) for w in columns]).T.reshape(p.shape)
                merged = (alpha * p.detach()).sum(0)
                values[f"out.alpha{suffix}.{i}"], values[f"out.theta_wavg{suffix}.{i}"] = (
                    alpha,
                    merged,
                )
                values[f"out.student_params_after{suffix}.{i}"] = 0.25 * merged + 0.75 * p.detach()
        return values

    return {f"student_params.{i}": p for i, p in enumerate(params)}, compute, h


def ema_update(d):
    h = {"alpha": 0.9, "global_steps": [0, 1, 5, 8, 9, 10, 300]}
    inputs = {
        "student_params": d.rand(7),
        "teacher_params": d.rand(7),
        "global_steps": torch.tensor(h["global_steps"]),
    }

    def share(step):
        return step / (step + 1) if step / (step + 1) < 0.9 else 0.9

    def compute(v):
        s, t = v["student_params"].detach(), v["teacher_params"].detach()
        shares = [share(n) for n in h["global_steps"]]
        values = {"out.alpha": exact(shares)}
        values["out.teacher_after"] = torch.stack([a * t + (1 - a) * s for a in shares])
        for first in (0, 1):
            states = [t]
            for k in range(4):
                states.append(
                    share(first + k) * states[-1] + (1 - share(first + k)) * s * (1 + 0.1 * k)
                )
            values[f"out.trajectory_step_from_{first}"] = torch.stack(states[1:])
        return values

    return inputs, compute, h


def rampups(d):
    length, rate = d.python.randint(2, 50), d.python.choice([0.03, 0.3])
    tables = {
        f"sigmoid_rampup.{length}": lambda e: ramp(e, length),
        f"linear_rampup.{length}": lambda e: min(1, e / length),
        "cosine_rampdown.120": lambda e: math.cos(math.pi * e / 240) ** 2,
        "dkel_code": lambda e: coded(e, 0.1),
        "pcl_code": lambda e: coded(e, 1.0),
        "dkel_intended": lambda e: 0.1 * ramp(e, 80),
        "pcl_intended": lambda e: ramp(e, 80),
        f"dkel_ensemble_weight.exp_{rate}": lambda e: (
            math.exp(-rate * e) * (math.exp(-rate * e) > 0.01)
        ),
        f"warmup_epoch_over_{length}_one_based": lambda e: min(1, (e + 1) / length),
        f"warmup_epoch_over_{length}_zero_based": lambda e: min(1, e / length),
    }

    def compute(v):
        epochs = v["epochs"].tolist()
        return {f"out.{name}": exact([table(e) for e in epochs]) for name, table in tables.items()}

    return {"epochs": torch.arange(121)}, compute, {}


CASES = (
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


def write(folder, case, seed):
    d = Draw(seed)
    inputs, compute, h, *zeros = case(d)
    leaves = {
        k: t.double().requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()
    }
    values = compute(leaves)
    if "loss" in values:
        values["loss"].backward()
    tensors = {**inputs, **{k: t.detach().double() for k, t in values.items()}}
    kept = ("student", "ensemble", "trunk", "param")  # a teacher's gradient is never stored
    for k, t in leaves.items():
        if k.startswith(kept) and t.grad is not None:
            tensors[f"grad.{k}"] = torch.zeros_like(t) if f"grad.{k}" in sum(zeros, ()) else t.grad
    meta = {"hparams": json.dumps(h), "zero_gradients": json.dumps(sum(zeros, ()))}
    path = folder / f"{f'dcl_merge_k{d.K}' if case is dcl_merge else case.__name__}.safetensors"
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, path, meta)
    return path


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_slow_loop(tmp_path, case, seed):
    path = write(tmp_path, case, seed)
    for dtype in DTYPES:
        assert check_vector(path, dtype)


def test_every_strategy_has_a_slow_loop():
    assert {case.__name__ for case in CASES} == set(STRATEGIES)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_a_wrong_value_is_found(tmp_path, case):
    v = Vector(write(tmp_path, case, 3), torch.float64)
    name = "loss" if "loss" in v.expected else min(v.expected)
    v.expected[name] = v.expected[name] * (1 + 1e-8)
    with pytest.raises(AssertionError, match=name):
        v.check(*function_for(v.name)(v))


# ---------------------------------------------------------------------------------- exchange of DCL
def exact_average(w, eps):
    """The literal formula in fractions."""
    w = [Fraction(x) for x in w]
    n = [math.prod(abs(w[j]) for j in others(i, len(w))) for i in range(len(w))]
    return float(sum(a * x for a, x in zip(n, w, strict=True)) / (sum(n) + Fraction(eps)))


@pytest.mark.parametrize("networks", [2, 3, 6, 8, 12])
@pytest.mark.parametrize("eps", [1e-18, 0.0])
def test_dcl_average_of_any_size_of_weights(networks, eps):
    generator = torch.Generator().manual_seed(networks)
    sizes = 10 ** (16 * torch.rand(networks, 400, generator=generator) - 12)  # 1e-12 ... 1e4
    alike = 10 ** (16 * torch.rand(1, 400, generator=generator) - 12) * (
        1 + torch.rand(networks, 400, generator=generator)
    )
    for w in (sizes, alike):
        w = w * torch.randint(0, 2, w.shape, generator=generator).mul(2).sub(1)
        got = f.dcl_average(list(w), rule="paper" if eps else "eps-free", eps=eps)
        want = torch.tensor(
            [exact_average(column, eps) for column in w.T.tolist()], dtype=torch.float64
        )
        assert got.dtype == torch.float32 and got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=5e-5, atol=1e-37)
        double = f.dcl_average(w.double(), rule="paper" if eps else "eps-free", eps=eps)
        torch.testing.assert_close(double, want, rtol=1e-12, atol=1e-300)


def test_dcl_of_opposite_signs_zeros_and_equal_weights():
    w = torch.tensor([[0.2, 0.0, 0.3, 0.0, 1e-30], [-0.2, 5.0, 0.3, 0.0, 1e-30]])
    for rule in ("paper", "eps-free"):
        got = f.dcl_average(w, rule=rule)
        assert got[0] == got[1] == got[3] == 0
        torch.testing.assert_close(got[2], torch.tensor(0.3))
    assert (
        f.dcl_average(w, rule="paper")[4] < 1e-41 and f.dcl_average(w, rule="eps-free")[4] == 1e-30
    )
    torch.testing.assert_close(f.dcl_alphas(w, rule="eps-free").sum(0), torch.ones(5))
    assert torch.equal(f.dcl_alphas(w, rule="mean"), torch.full_like(w, 0.5))


def test_dcl_merges_dicts_as_tensors_and_keeps_the_inputs():
    networks = [
        {"a": torch.randn(3, 2), "b": torch.randn(4, dtype=torch.bfloat16)} for _ in range(3)
    ]
    before = [{k: t.clone() for k, t in n.items()} for n in networks]
    merged = f.dcl_merge(networks, beta=0.3)
    for key in "ab":
        alone = f.dcl_merge([n[key] for n in networks], beta=0.3)
        assert all(
            torch.equal(m[key], a) and a.dtype == networks[0][key].dtype
            for m, a in zip(merged, alone, strict=True)
        )
        assert all(torch.equal(n[key], b[key]) for n, b in zip(networks, before, strict=True))
    kept = f.dcl_merge(networks, beta=0.0)
    assert all(torch.equal(n["a"], k["a"]) for n, k in zip(networks, kept, strict=True))
    trained = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    assert not f.dcl_merge(trained)[0].requires_grad


# ------------------------------------------------------------------------------ KDCL's best mixture
@pytest.mark.parametrize("students", [2, 3, 6])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_linear_weights_meet_the_conditions_of_a_minimum(students, scale):
    generator = torch.Generator().manual_seed(students)
    z = scale * torch.randn(students, 50, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(7, (50,), generator=generator)
    a = f.kdcl_linear_weights(z, y)
    assert (a >= 0).all() and torch.allclose(a.sum(0), torch.ones(50).double(), rtol=0, atol=1e-14)
    a.requires_grad_()
    torch.nn.functional.cross_entropy((a.unsqueeze(2) * z).sum(0), y, reduction="sum").backward()
    above = a.grad - a.grad.amin(0)  # every weight in use has the least slope
    assert (above * a.detach()).max() < 1e-12 * scale


def test_linear_weights_of_equal_students_and_a_perfect_one():
    z, y = torch.randn(1, 6, 5).repeat(4, 1, 1), torch.randint(5, (6,))
    torch.testing.assert_close(f.kdcl_linear_weights(z, y), torch.full((4, 6), 0.25).double())
    z[2] = 50 * torch.nn.functional.one_hot(y, 5)
    target = f.kdcl_targets(z, y, rule="linear")
    assert torch.nn.functional.cross_entropy(target, y) < 1e-6
    assert f.kdcl_targets(
        torch.randn(3, 2, 5, 4, 4), torch.randint(5, (2, 4, 4)), rule="linear"
    ).shape == (2, 5, 4, 4)


def test_general_weights_of_equal_students_are_equal():
    z, y = torch.randn(1, 30, 4).repeat(3, 1, 1), torch.randint(4, (30,))
    torch.testing.assert_close(f.kdcl_general_weights(z, y), torch.full((3,), 1 / 3).double())
    z[0] += 0.1 * torch.randn(30, 4)
    w = f.kdcl_general_weights(z, y, ridge=0.1)
    assert w.min() > 0 and abs(w.sum() - 1) < 1e-12


# ------------------------------------------------------------------ precision, dense logits, errors
def logits(*shape, seed=0, dtype=torch.float64):
    return (
        2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).to(dtype)


def losses(dtype, tail=(), at=()):
    """Every loss by name, on logits (3, 2, 5, *tail), or on those of position `at` alone."""
    cut = (..., *at)
    z, m = (logits(3, 2, 5, *tail, seed=i, dtype=dtype)[cut] for i in (0, 1))
    e, y = (
        logits(2, 5, *tail, seed=2, dtype=dtype)[cut],
        torch.arange(2 * math.prod(tail)).reshape(2, *tail)[cut] % 5,
    )
    features = [logits(2, 3, seed=i, dtype=dtype) for i in range(3)]
    attention = f.okddip_attention(torch.stack(features)[:2], torch.stack(features)[1:])
    ensemble = f.one_ensemble(z, torch.softmax(features[0].float(), 1).to(dtype))
    return {
        "dml": lambda: totals.dml(z, y, temperature=2.0),
        "dml_tf": lambda: totals.dml_tf(z, y),
        "dml_okddip": lambda: totals.dml_okddip(z, y),
        "cl_paper": lambda: totals.cl_paper(z, y),
        "cl_okddip": lambda: totals.cl_okddip(z, y),
        "one": lambda: totals.one(z, ensemble, y),
        "okddip": lambda: totals.okddip(z, attention, y),
        "pcl": lambda: totals.pcl(z, e, m, y),
        "dkel": lambda: totals.dkel(z, e, m, y, ensemble_weight=0.4),
        **{f"kdcl-{rule}": lambda rule=rule: totals.kdcl(z, f.kdcl_targets(z, y, rule=rule), y)
           for rule in ("naive", "linear", "minlogit", "mean")},
        "sokd": lambda: totals.sokd(z[0], z[1], e, y),
        "mean_teacher": lambda: totals.mean_teacher(z[0], e, y),
        "byot": lambda: totals.byot(z, features, y),
        "byot_unofficial": lambda: totals.byot_unofficial(z, features, y),
        **({} if tail else {"bake": lambda: totals.bake(z[0], features[0], y)}),
    }  # fmt: skip


NAMES = list(losses(torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_taken_up_and_autocast_lowers_nothing(name):
    half, single, double = (
        losses(dtype)[name]() for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert half.dtype == single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(half.double(), double, rtol=0.05, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses(torch.float32)[name]()
    assert torch.equal(cast, single)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("bake", "byot", "byot_unofficial")])
def test_dense_logits_are_a_mean_over_positions(name):
    """(B, C, 2, 3) gives what its six positions give on average."""
    whole = losses(torch.float64, (2, 3))[name]()
    parts = [losses(torch.float64, (2, 3), (i, j))[name]() for i in range(2) for j in range(3)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-12, atol=0)


def test_scaled_gradient_keeps_every_value():
    x = torch.randn(5, requires_grad=True)
    y = totals.scale_gradient(x, 0.25)
    assert torch.equal(x, y)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 0.25))


def test_unlabelled_samples_count_in_the_batch_only():
    s, t, y = logits(4, 3), logits(4, 3, seed=1), torch.tensor([0, -1, 2, -1])
    want = (ce(s[[0, 2]], y[[0, 2]]) * 2) / 4 + 7 * f.consistency(s, t)
    torch.testing.assert_close(totals.mean_teacher(s, t, y, weight=7.0), want)


def test_byot_exempts_one_feature_or_none():
    a, b, c = (logits(2, 3, seed=i) for i in range(3))
    near, far = ((x - a).square().sum().sqrt() for x in (b, c))
    torch.testing.assert_close(f.byot_features([a, b, c]), far)
    torch.testing.assert_close(f.byot_features([a, b, c], exempt=2), near)
    torch.testing.assert_close(f.byot_features([a, b, c], exempt=None), near + far)


def test_bake_of_a_batch_of_one_and_of_sure_logits():
    assert torch.allclose(
        f.bake_targets(logits(1, 4), logits(1, 3)), torch.softmax(logits(1, 4) / 4, 1)
    )
    z = 900 * torch.eye(4)[torch.tensor([0, 1, 2, 0])]
    loss = totals.bake(z, torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert loss.isfinite()


def test_first_ema_step_counted_from_0_copies_the_student_exactly():
    student, teacher = torch.randn(9), torch.randn(9)
    assert torch.equal(f.ema_update(student, teacher, alpha=f.ema_alpha(0)), student)
    assert f.ema_alpha(998) == 998 / 999 and f.ema_alpha(10**6) == 0.999
    assert f.ema_update({"w": student.bfloat16()}, {"w": teacher})["w"].dtype == torch.float32


Z, Y, E = logits(3, 2, 5), torch.tensor([0, 1]), logits(2, 5)


@pytest.mark.parametrize("call, words", [
    (lambda: totals.dml(Z[:1], Y), "2 or more are needed, got logits of 1"),
    (lambda: totals.dml([Z[0], Z[1][:1]], Y), r"one shape .*, got \[\(2, 5\), \(1, 5\)\]"),
    (lambda: totals.dml(Z[0], Y), r"one shape \(B, C, ...\), got \[\(5,\), \(5,\)\]"),
    (lambda: totals.dml(Z, Y[:1]), r"shape \(B, ...\), got \(1,\) for logits \(2, 5\)"),
    (lambda: totals.dml(Z, Y, temperature=0), "temperature is 0; allowed: .* above 0"),
    (lambda: totals.cl_paper(Z, Y, temperature=-1), "temperature is -1; allowed"),
    (lambda: totals.cl_okddip(Z, Y, temperature=0), "temperature is 0; allowed: .* above 0"),
    (lambda: f.one_ensemble(Z, torch.ones(2, 2)), r"shape \(2, 3\), got \(2, 2\)"),
    (lambda: totals.one(Z, E[:1], Y), r"student_logits \(2, 5\), teacher_logits \(1, 5\)"),
    (lambda: f.okddip_targets(Z, torch.ones(2, 3)), r"shape \(2, 3, 3\), got \(2, 3\)"),
    (lambda: f.okddip_attention(Z, Z[:2]), r"queries \(3, 2, 5\), keys \(2, 2, 5\)"),
    (lambda: totals.pcl(Z, E, Z[:2], Y), r"student_logits \(3, 2, 5\), teacher_logits \(2, 2, 5\)"),
    (lambda: totals.dkel(Z, E, Z, Y, temperature=0), "temperature is 0; allowed: .* above 0"),
    (lambda: f.kdcl_targets(Z, Y, rule="best"), "rule is 'best'; allowed: 'naive', 'linear'"),
    (lambda: f.kdcl_targets(Z, Y, rule="general"), r"shape \(3,\), got None"),
    (lambda: totals.sokd(E, E, E[:1], Y), r"teacher_logits \(1, 5\)"),
    (lambda: totals.mean_teacher(E, E, Y, kind="mae"), "kind is 'mae'; allowed: 'mse', 'kl'"),
    (lambda: f.mutual_loss(Z, form="js"), "form is 'js'; allowed: 'kl', 'eps', 'soft-ce', 'tf'"),
    (lambda: f.mutual_loss(Z, target="all"), "target is 'all'; allowed: 'pairwise', 'ensemble'"),
    (lambda: totals.byot(Z, [E, E, E[:1]], Y), r"adapted_feature_2 \(1, 5\), deepest_feature"),
    (lambda: totals.bake(E, E, Y, omega=1.0), "omega is 1.0; allowed: .* from 0 below 1"),
    (lambda: totals.bake(E, E[:1], Y), r"got \(2, 5\) and \(1, 5\)"),
    (lambda: f.dcl_merge([E]), "2 or more networks share parameters, got 1"),
    (lambda: f.dcl_merge([]), "2 or more networks share parameters, got 0"),
    (lambda: f.dcl_merge([E, E[:1]]), r"one shape in all networks, got \[\(2, 5\), \(1, 5\)\]"),
    (lambda: f.dcl_merge([{"a": E}, {"b": E}]), r"\['a', 'b'\] are not in all"),
    (lambda: f.dcl_merge([{"n": Y}, {"n": Y}]), "parameter 'n' is torch.int64: pass parameters"),
    (lambda: f.dcl_merge([E, E], beta=2.0), "beta is 2.0; allowed: a finite number from 0 up to 1"),
    (lambda: f.dcl_merge([E, E], eps=-1.0), "eps is -1.0; allowed: a finite number from 0"),
    (lambda: f.dcl_merge([E, E], rule="median"), "rule is 'median'; allowed: 'paper'"),
    (lambda: f.ema_alpha(-1), "step is -1; allowed"),
    (lambda: f.ema_update(E, E[:1]), r"got \[\(2, 5\), \(1, 5\)\]"),
    (lambda: f.ema_update(E, E, alpha=1.5), "alpha is 1.5; allowed"),
])  # fmt: skip
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
