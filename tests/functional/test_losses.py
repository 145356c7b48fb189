"""Every function against a slow loop over its paper's equation; half precision; errors."""

import itertools
import math

import pytest
import torch

from kdtoolkit import functional as f


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def softmax(z, temperature=1.0):
    powers = [math.exp(v / temperature) for v in z]
    return [p / sum(powers) for p in powers]


def close(got, want):
    assert got.ndim == 0
    torch.testing.assert_close(
        got.double(), torch.as_tensor(want, dtype=torch.float64), rtol=1e-12, atol=0
    )


def positions(logits):
    """(B, C, ...) as a list of lists of C numbers, one a position."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist()


@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 3, 2), (2, 3, 5)])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_kd(shape, temperature):
    student, teacher = rand(*shape), rand(*shape, seed=1)
    total = []
    for s, t in zip(positions(student), positions(teacher), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        total.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    close(f.kd(student, teacher, temperature=temperature), sum(total) / len(total))
    assert f.kd(student, student).abs() < 1e-15


@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 3, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ce(shape, smoothing):
    logits = rand(*shape)
    labels = torch.randint(
        shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(2)
    )
    total = []
    for z, y in zip(positions(logits), labels.flatten().tolist(), strict=True):
        log = [math.log(p) for p in softmax(z)]
        total.append(-(1 - smoothing) * log[y] - smoothing * sum(log) / len(log))
    close(f.ce(logits, labels, label_smoothing=smoothing), sum(total) / len(total))


@pytest.mark.parametrize(
    "function, shape",
    [(f.logits_mse, (3, 4)), (f.logits_mse, (2, 3, 2, 2)), (f.fitnet, (2, 3, 4, 2))],
)
def test_squared_differences(function, shape):
    a, b = rand(*shape), rand(*shape, seed=1)
    squares = [
        (x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    ]
    close(function(a, b), sum(squares) / len(squares))


def loop_attention(feature, p):
    maps = []
    for image in feature:
        q = [
            sum((v if p.is_integer() else abs(v)) ** p for v in image[:, i, j].tolist())
            for i in range(image.shape[1])
            for j in range(image.shape[2])
        ]
        norm = math.sqrt(sum(v * v for v in q))
        maps.append([v / norm for v in q])
    return maps


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_at(p):
    students = [rand(3, 4, 2, 2), rand(3, 2, 4, 2, seed=1)]
    teachers = [rand(3, 5, 2, 2, seed=2), rand(3, 6, 2, 2, seed=3)]
    pooled = students[1].unflatten(2, (2, 2)).mean(3)  # (3, 2, 2, 2): rows in pairs
    want = 0.0
    for s, t in ((students[0], teachers[0]), (pooled, teachers[1])):
        a, b = (list(itertools.chain(*loop_attention(f, p))) for f in (s, t))
        want += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    close(f.at(students, teachers, p=p), want)


def loop_maximum(feature):
    """|f| of the strongest channel at every position, with unit length."""
    maps = []
    for image in feature:
        q = [
            max(abs(v) for v in image[:, i, j].tolist())
            for i in range(image.shape[1])
            for j in range(image.shape[2])
        ]
        norm = math.sqrt(sum(v * v for v in q))
        maps.append([v / norm for v in q])
    return maps


def test_at_with_the_maximum_over_channels():
    students = [rand(3, 4, 2, 2) - 0.5, rand(3, 2, 4, 2, seed=1) - 0.5]
    teachers = [rand(3, 5, 2, 2, seed=2) - 0.5, rand(3, 6, 2, 2, seed=3) - 0.5]
    pooled = students[1].unflatten(2, (2, 2)).mean(3)
    want = 0.0
    for s, t in ((students[0], teachers[0]), (pooled, teachers[1])):
        a, b = (list(itertools.chain(*loop_maximum(f))) for f in (s, t))
        want += sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    close(f.at(students, teachers, p="max"), want)


def test_the_maximum_is_the_limit_of_the_power_means():
    feature = rand(2, 3, 4, 4)
    powers = f.attention(feature, p=40.0)
    at_40 = torch.nn.functional.normalize(powers ** (1 / 40.0), dim=1)
    torch.testing.assert_close(at_40, f.attention(feature, p="max"), atol=0.02, rtol=0)


def test_the_maximum_reaches_the_strongest_channel():
    feature = torch.tensor([1.0, -3.0, 2.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    feature[0, 0, 0, 1] = 5.0
    feature.requires_grad_(True)
    f.attention(feature, p="max")[0, 0].backward()
    reached = feature.grad.nonzero()[:, 1:].tolist()
    assert reached == [[0, 0, 1], [1, 0, 0]]  # (channel, row, column)


@pytest.mark.parametrize("call, message", [
    (lambda x: f.at(x, x), r"student_features is one tensor \(2, 3, 4, 4\).*put it in a list"),
    (lambda x: f.at([x], x), r"teacher_features is one tensor"),
    (lambda x: f.sp(x, x), "student_features is one tensor"),
    (lambda x: f.srkd(x, x), "student_features is one tensor"),
    (lambda x: f.at([1], [x]), "student_features holds 1; allowed: tensors"),
    (lambda x: f.at(3, [x]), "student_features is 3; allowed: a list of features"),
    (lambda x: f.at([x], [x], p="min"), "p is 'min'; allowed: .* above 0 up to 64 .*'max'"),
    (lambda x: f.at([x], [x], p=0), "p is 0; allowed"),
    (lambda x: f.attention(x, p=True), "p is True; allowed"),
    (lambda x: f.attention(x[0], p=2), r"a feature map \(B, C, H, W\), got \(3, 4, 4\)"),
    (lambda x: f.at([x[0]], [x]), r"feature maps \(B, C, H, W\) are pooled"),
])  # fmt: skip
def test_features_of_another_form_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(rand(2, 3, 4, 4))


@pytest.mark.parametrize("p, sign", [(2.0, 1), (3.0, -1), (1.5, 1)])
def test_attention_of_a_negated_feature(p, sign):
    feature = rand(2, 3, 4, 4)
    assert torch.equal(f.attention(-feature, p=p), sign * f.attention(feature, p=p))


def test_sp():
    students, teachers = (
        [rand(4, 3, 2, 2), rand(4, 5, seed=1)],
        [rand(4, 2, 3, 3, seed=2), rand(4, 6, 2, seed=3)],
    )
    want = 0.0
    for s, t in zip(students, teachers, strict=True):
        grams = []
        for feature in (s.reshape(4, -1).tolist(), t.reshape(4, -1).tolist()):
            gram = [
                [sum(x * y for x, y in zip(a, b, strict=True)) for b in feature] for a in feature
            ]
            grams.append([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in gram])
        want += sum((grams[1][i][j] - grams[0][i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    close(f.sp(students, teachers), want)


def test_srkd():
    students, resets = (
        [rand(2, 3), rand(2, 2, 2, seed=1)],
        [rand(2, 3, seed=2), rand(2, 2, 2, seed=3)],
    )
    want = 0.0
    for s, r in zip(students, resets, strict=True):
        squares = [
            (a - b) ** 2 for a, b in zip(s.flatten().tolist(), r.flatten().tolist(), strict=True)
        ]
        want += sum(squares) / len(squares)
    close(f.srkd(students, resets), want)


LOSSES = {
    "kd": lambda dtype: f.kd(rand(4, 5, dtype=dtype), rand(4, 5, seed=1, dtype=dtype)),
    "ce": lambda dtype: f.ce(rand(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 4])),
    "logits_mse": lambda dtype: f.logits_mse(
        rand(4, 5, dtype=dtype), rand(4, 5, seed=1, dtype=dtype)
    ),
    "fitnet": lambda dtype: f.fitnet(
        rand(4, 5, 2, 2, dtype=dtype), rand(4, 5, 2, 2, seed=1, dtype=dtype)
    ),
    "at": lambda dtype: f.at(
        [rand(4, 5, 4, 4, dtype=dtype)], [rand(4, 3, 2, 2, seed=1, dtype=dtype)]
    ),
    "sp": lambda dtype: f.sp(
        [300 * rand(4, 5, 4, 4, dtype=dtype)], [300 * rand(4, 3, seed=1, dtype=dtype)]
    ),
    "srkd": lambda dtype: f.srkd([rand(4, 5, dtype=dtype)], [rand(4, 5, seed=1, dtype=dtype)]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_taken_up(name, dtype):
    half, whole = LOSSES[name](dtype), LOSSES[name](torch.float64)
    assert half.dtype == torch.float32 and whole.dtype == torch.float64
    torch.testing.assert_close(half.double(), whole, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_lower_a_loss(name):
    plain = LOSSES[name](torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = LOSSES[name](torch.float32)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


def test_errors():
    with pytest.raises(
        ValueError, match=r"equal shapes, got \(2, 3\) and \(2, 4\): put an Adapter"
    ):
        f.fitnet(rand(2, 3), rand(2, 4))
    for function in (f.at, f.sp, f.srkd):
        with pytest.raises(ValueError, match="got 1 and 2"):
            function([rand(2, 3, 2, 2)], [rand(2, 3, 2, 2)] * 2)
        with pytest.raises(ValueError, match="got 0 and 0"):
            function([], [])
