"""A teacher that has learned something, without training: random features and a fitted head."""

from __future__ import annotations

import torch
from torch import nn

from kdtoolkit.data.loading import load
from kdtoolkit.features.preprocess import Preprocess

ROWS = 600


@torch.no_grad()
def fit_head(net: nn.Module, size: int | None = None) -> nn.Module:
    """Fit `net.fc` to the handwritten digits by least squares; returns the network, in eval mode.

    Args:
        net: A network of this package with ten classes and random weights.
        size: Pixels a side of the images; None keeps the 16 of the data.
    """
    data = load("digits", image_size=size)
    batch = next(iter(data.train.loader(ROWS)))
    x, labels = data.prepare_batch(batch, epoch=0, train=False, views=1)["x"], batch["y"]
    x = Preprocess.from_model(net, data.image_size)(x)
    net.train()
    net(x)  # statistics of BatchNorm
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    net(x)
    net.eval()
    features = net.forward_head(net.forward_features(x), pre_logits=True)
    features = torch.cat([features, torch.ones(len(x), 1)], 1).double()
    targets = torch.nn.functional.one_hot(labels, 10).double()
    ridge = 1e-3 * torch.eye(features.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(features.T @ features + ridge, features.T @ targets)
    net.fc.weight.copy_(10 * solved[:-1].T)
    net.fc.bias.copy_(10 * solved[-1])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return net
