"""A model by its timm name: check the name and the tag of the weights, create, download."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import is_model_pretrained
from torch import nn


@dataclass(frozen=True)
class LoadRequest:
    """Arguments of `load_model`.

    Attributes:
        num_classes: Number of classes; None takes that of the source.
        pretrained: Whether to load weights; None decides by the source.
        role: How messages call the model, such as "teacher".
        options: Arguments of the model's constructor.
    """

    num_classes: int | None
    pretrained: bool | None
    role: str
    options: Mapping[str, Any]

    @property
    def loads_weights(self) -> bool:
        """Whether weights are loaded from a source that has some."""
        return self.pretrained is not False


def check_name(name: str, role: str) -> None:
    """Check that timm knows an architecture and the tag of its weights.

    Args:
        name: timm's name, "architecture" or "architecture.tag".
        role: How messages call the model.

    Raises:
        ValueError: If timm does not know it.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"{role}: unknown model {name!r}; {hint}See timm.list_models()")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(architecture)]
    if tag and tag not in tags:
        raise ValueError(
            f"{role}: {architecture} has no weights tagged {tag!r}; its tags: "
            f"{', '.join(tags) or 'none'}"
        )


def create_timm_model(
    name: str, request: LoadRequest, num_classes: int | None, pretrained: bool
) -> nn.Module:
    """Create a model with timm.

    Args:
        name: timm's name, or "local-dir:PATH".
        request: Arguments of `load_model`.
        num_classes: Number of classes, in place of that of the request; None takes timm's.
        pretrained: Whether timm loads weights.

    Returns:
        The model.

    Raises:
        ValueError: If its constructor does not take the options.
    """
    options = {"pretrained": pretrained, "num_classes": num_classes, **request.options}
    try:
        model: nn.Module = timm.create_model(name, **options)
    except TypeError as error:
        given = ", ".join(key for key, value in options.items() if value is not None)
        raise ValueError(
            f"{request.role}: {name} does not take these options ({given}): {error}"
        ) from error
    return model


def download_model(name: str, request: LoadRequest, pretrained: bool) -> nn.Module:
    """Create a model whose weights timm may download.

    Args:
        name: timm's name, or "hf-hub:ID".
        request: Arguments of `load_model`.
        pretrained: Whether timm loads weights.

    Returns:
        The model.

    Raises:
        OSError: If the download fails.
        ValueError: If timm cannot build the model.
    """
    role = request.role
    try:
        return create_timm_model(name, request, request.num_classes, pretrained)
    except _download_errors() as error:
        raise OSError(
            f"{role}: the download failed for {name!r} ({type(error).__name__}: "
            f"{shorten_message(error)}); to use a local copy "
            'pass "local-dir:PATH" of a folder or the path of a .safetensors file'
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{role}: {name!r} cannot be built: {shorten_message(error)}") from error


def _download_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError

    # the bases are the error of the HTTP library, whichever it is
    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (OSError, *bases)


def load_by_name(name: str, request: LoadRequest) -> nn.Module:
    """Load a model by its timm name, with published weights where the request or a tag says so.

    Args:
        name: timm's name, "architecture" or "architecture.tag".
        request: Arguments of `load_model`.

    Returns:
        The model.

    Raises:
        ValueError: If timm does not know the name, or has no weights for it.
        OSError: If the download fails.
    """
    check_name(name, request.role)
    loads = "." in name if request.pretrained is None else request.pretrained
    if not loads:
        return create_timm_model(name, request, request.num_classes, pretrained=False)
    if not is_model_pretrained(name):
        raise ValueError(
            f"{request.role}: {name} has no published weights; pass pretrained=False to "
            "load_model(), or weights: a folder or a .safetensors file in place of the name, or "
            f"{request.role}_weights=... of distill()"
        )
    return download_model(name, request, pretrained=True)


def shorten_message(error: BaseException) -> str:
    """Return the first lines of an error message as one line.

    Args:
        error: The error.

    Returns:
        The first four lines that are not blank, cut off after 400 characters.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:400]
