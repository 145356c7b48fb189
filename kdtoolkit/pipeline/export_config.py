"""What an exported model says of its images: those that it was evaluated with."""

from __future__ import annotations

from typing import Any

from torch import nn

from kdtoolkit.features.model_inputs import get_pretrained_cfg, own_channels
from kdtoolkit.features.preprocess import Preprocess
from kdtoolkit.models.describe import set_config
from kdtoolkit.models.saving import updated_data_config
from kdtoolkit.pipeline.data_info import DataInfo


def data_config(net: nn.Module, info: DataInfo) -> dict[str, Any]:
    """Data configuration, as timm has it, of the images that a network was evaluated with.

    `timm.data.create_transform` of it makes these images, where timm has such a transform.

    Args:
        net: The network.
        info: The data.

    Returns:
        input_size, mean, std, crop_pct, crop_mode and interpolation.
    """
    terms, own = info.loaded.eval_terms, Preprocess.from_model(net, info.image_size)
    channels = own_channels(net) or info.channels
    size = own.size or (info.image_size if terms is None else terms.size)
    return {
        "input_size": (channels, *size),
        # images are not normalised for a network that names no mean
        "mean": own.mean or (0.0,) * channels,
        "std": own.std or (1.0,) * channels,
        "crop_pct": 1.0 if terms is None else terms.crop_pct,
        "crop_mode": "center" if terms is None else terms.crop_mode,
        "interpolation": "bilinear" if terms is None else terms.interpolation,
    }


def configure(net: nn.Module, info: DataInfo) -> None:
    """Let a network's timm configuration say what it was evaluated with, if it has one.

    Args:
        net: The network; its configuration is replaced.
        info: The data.
    """
    config = get_pretrained_cfg(net)
    if not config:
        return
    names = info.loaded.class_names
    labels = {"label_names": list(names)} if names else {}
    set_config(net, updated_data_config(config, data_config(net, info)) | labels)
