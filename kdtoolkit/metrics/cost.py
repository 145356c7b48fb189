"""What a network costs: parameters, multiply-accumulates, latency. The model that is measured is never changed."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdtoolkit.features.tracing import quiet

WARMUP, REPEATS = 5, 21  # forward passes of each network


class Cost(NamedTuple):
    """params: all parameters; macs: multiply-accumulates of one forward pass of one image; latency_ms: median
    milliseconds of one forward pass of the batch, None when not measured."""

    params: int
    macs: int
    latency_ms: float | None = None


def cost(
    model: nn.Module,
    input_size: Sequence[int],
    device: str | torch.device = "cpu",
    batch: int = 1,
    latency: bool = True,
) -> Cost:
    """Cost of one network; see `costs`."""
    return costs({"model": model}, input_size, device, batch, latency)["model"]


def costs(
    models: Mapping[str, nn.Module],
    input_size: Sequence[int] | Mapping[str, Sequence[int]],
    device: str | torch.device = "cpu",
    batch: int = 1,
    latency: bool = True,
) -> dict[str, Cost]:
    """Parameters, MACs and latency of several networks.

    input_size: (C, H, W) of one image, or {name: (C, H, W)} where each network has its own. Latency: median of 21
    passes after 5 to warm up, eval mode, no gradients, `batch` images on `device`; the networks take turns, so that a
    change in the machine's load hits all alike.
    MACs: half of what torch's FlopCounterMode counts: convolutions, matrix products and attention; no norms,
    activations or pooling. Counted on meta tensors, where nothing is computed, or on real ones where meta fails.
    """
    sizes = _sizes(models, input_size)
    if batch < 1:
        raise ValueError(f"batch {batch}: expected at least 1 image")
    times = _latencies(models, sizes, torch.device(device), batch) if latency else {}
    return {
        name: Cost(
            sum(p.numel() for p in model.parameters()), _macs(model, sizes[name]), times.get(name)
        )
        for name, model in models.items()
    }


def _sizes(
    models: Mapping[str, nn.Module], input_size: Sequence[int] | Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    if not isinstance(input_size, Mapping):
        input_size = dict.fromkeys(models, input_size)
    missing = [name for name in models if name not in input_size]
    if missing:
        raise ValueError(
            f"input_size has no size for {missing}, only for {list(input_size)}; give (C, H, W) of each"
        )
    sizes = {name: tuple(input_size[name]) for name in models}
    for size in sizes.values():
        if len(size) != 3 or min(size) < 1:
            raise ValueError(
                f"input_size {size}: expected three sizes (C, H, W) of one image, such as (3, 32, 32)"
            )
    return sizes


def _macs(model: nn.Module, size: tuple[int, ...]) -> int:
    try:
        return _count(_copy(model, "meta"), size)
    except (
        RuntimeError,
        NotImplementedError,
        TypeError,
    ):  # no meta kernel, .item() on meta, or no deepcopy
        with _working_copy(model, None) as net:
            return _count(net, size)


def _count(net: nn.Module, size: tuple[int, ...]) -> int:
    with (
        quiet(net),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):  # it trips over parameters that learn
        net(_image(net, size, 1))
    return counter.get_total_flops() // 2


def _latencies(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    batch: int,
) -> dict[str, float]:
    with ExitStack() as copies:
        nets = {
            name: copies.enter_context(_working_copy(model, device))
            for name, model in models.items()
        }
        return _take_turns(nets, sizes, device, batch)


def _take_turns(
    nets: Mapping[str, nn.Module],
    sizes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    batch: int,
) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in nets}
    inputs = {name: _image(net, sizes[name], batch) for name, net in nets.items()}
    with torch.inference_mode():
        for turn in range(WARMUP + REPEATS):
            for name, net in nets.items():
                seconds = _seconds(lambda net=net, x=inputs[name]: net(x), device)  # type: ignore[misc]
                if turn >= WARMUP:
                    taken[name].append(seconds)
    return {name: 1000 * statistics.median(seconds) for name, seconds in taken.items()}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    wait = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _image(net: nn.Module, size: tuple[int, ...], batch: int) -> Tensor:
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(batch, *size, dtype=like.dtype, device=like.device)


def _copy(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """Copy in eval mode, without forward hooks (a copied hook may write into the live model's store)."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    memo: dict[int, object] = {}
    if device == "meta":  # no data is copied
        for tensor in [*model.parameters(), *model.buffers()]:
            meta = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = (
                nn.Parameter(meta, tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else meta
            )
    net = copy.deepcopy(model, memo)
    for module in net.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    return net.eval() if device is None else net.to(device).eval()


@contextmanager
def _working_copy(model: nn.Module, device: torch.device | None) -> Iterator[nn.Module]:
    """A copy on `device`; a model that cannot be copied is used itself, on its own device, and left as it was."""
    try:
        net = _copy(model, device)
    except (RuntimeError, TypeError):
        net = None
    if net is not None:
        yield net
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode
