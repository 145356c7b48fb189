"""The cost of a network: parameters, multiply-accumulates and latency.

The network that is measured is never changed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdtoolkit.features.tracing import eval_without_gradients
from kdtoolkit.utils.validation import check_whole_number

WARMUP_PASSES = 3  # forward passes of each network that are not timed
ROUNDS = 7  # the median of so many rounds counts
MAX_PASSES = 9  # of each network in a round, of which the fastest counts
# a clock that is too coarse (Windows) would read 0
IS_FINE = time.get_clock_info("thread_time").resolution < 1e-5
cpu_seconds = time.thread_time if IS_FINE else time.perf_counter
MAX_SECONDS = 10.0  # of all rounds; slow networks have fewer passes in a round, at least one


class Cost(NamedTuple):
    """What a network costs.

    Attributes:
        params: Number of all parameters.
        macs: Multiply-accumulates of one forward pass of one image.
        latency_ms: Milliseconds of one forward pass of a batch, on the CPU of one thread (see
            `measure_costs`); None where not measured.
    """

    params: int
    macs: int
    latency_ms: float | None = None


def measure_cost(
    model: nn.Module,
    input_size: Sequence[int],
    device: str | torch.device = "cpu",
    batch: int = 1,
    latency: bool = True,
) -> Cost:
    """Measure one network; see `measure_costs`.

    Args:
        model: The network.
        input_size: (C, H, W) of one image in pixels.
        device: Where the latency is measured.
        batch: Images in a batch, for the latency.
        latency: Whether to measure it.

    Returns:
        The cost.

    Example:
        >>> measure_cost(nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 10, 12), latency=False)
        Cost(params=216, macs=25920, latency_ms=None)
    """
    return measure_costs({"model": model}, input_size, device, batch, latency)["model"]


def measure_costs(
    models: Mapping[str, nn.Module],
    input_size: Sequence[int] | Mapping[str, Sequence[int]],
    device: str | torch.device = "cpu",
    batch: int = 1,
    latency: bool = True,
) -> dict[str, Cost]:
    """Measure parameters, multiply-accumulates (MACs) and latency of several networks.

    MACs are half of what torch's `FlopCounterMode` counts: convolutions, matrix products and
    attention; no norms, activations or pooling. They are counted on meta tensors, where nothing is
    computed, or on real ones where meta fails.

    The latency is the median of 7 rounds in eval mode without gradients. In a round the networks
    take turns, up to 9 passes each, of which the fastest counts, so that a change in the machine's
    load affects all alike. On the CPU one thread computes, and its processor time is measured:
    what a pass takes on a core of its own, whatever else runs. On other devices it is the time
    until the device has finished.

    Args:
        models: Networks by name.
        input_size: (C, H, W) of one image in pixels, or one for each network by name.
        device: Where the latency is measured.
        batch: Images in a batch, for the latency.
        latency: Whether to measure it.

    Returns:
        Costs by name.

    Raises:
        ValueError: If a size is missing or is not (C, H, W), or `batch` is below 1.
    """
    sizes = _input_sizes(models, input_size)
    check_whole_number("batch", batch, meaning="images")
    latencies = _measure_latencies(models, sizes, torch.device(device), batch) if latency else {}
    return {
        name: Cost(
            params=sum(parameter.numel() for parameter in model.parameters()),
            macs=_count_macs(model, sizes[name]),
            latency_ms=latencies.get(name),
        )
        for name, model in models.items()
    }


def _input_sizes(
    models: Mapping[str, nn.Module], input_size: Sequence[int] | Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    if not isinstance(input_size, Mapping):
        input_size = dict.fromkeys(models, input_size)
    missing = [name for name in models if name not in input_size]
    if missing:
        raise ValueError(
            f"input_size has no size for {missing}, only for {list(input_size)}; "
            "give (C, H, W) of each"
        )
    sizes = {name: tuple(input_size[name]) for name in models}
    for size in sizes.values():
        if len(size) != 3 or min(size) < 1:
            raise ValueError(
                f"input_size {size}: expected three sizes (C, H, W) of one image, "
                "such as (3, 32, 32)"
            )
    return sizes


def _count_macs(model: nn.Module, size: tuple[int, ...]) -> int:
    try:
        return _count_macs_of_copy(_copy_model(model, "meta"), size)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError):
        # no meta kernel, .item() on meta, no deepcopy, or a TorchScript module
        with _working_copy(model, None) as net:
            return _count_macs_of_copy(net, size)


def _count_macs_of_copy(net: nn.Module, size: tuple[int, ...]) -> int:
    # FlopCounterMode fails for some parameters that require gradients
    with eval_without_gradients(net), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(_zero_images(net, size, 1))
    return int(counter.get_total_flops()) // 2


def _measure_latencies(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    batch: int,
) -> dict[str, float]:
    """Milliseconds of a forward pass, by name."""
    with ExitStack() as copies:
        nets = {
            name: copies.enter_context(_working_copy(model, device))
            for name, model in models.items()
        }
        return _time_in_turns(nets, sizes, device, batch)


def _time_in_turns(
    nets: Mapping[str, nn.Module],
    sizes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    batch: int,
) -> dict[str, float]:
    inputs = {name: _zero_images(net, sizes[name], batch) for name, net in nets.items()}

    def time_all() -> dict[str, float]:
        return {name: _time_forward(net, inputs[name], device) for name, net in nets.items()}

    with torch.inference_mode(), _one_cpu_thread(device):
        for _ in range(WARMUP_PASSES):
            start = time.perf_counter()
            time_all()
            seconds = time.perf_counter() - start  # of one pass of each network
        passes = min(MAX_PASSES, max(1, int(MAX_SECONDS / ROUNDS / max(seconds, 1e-9))))
        rounds = [[time_all() for _ in range(passes)] for _ in range(ROUNDS)]
    return {
        name: 1000 * statistics.median(min(times[name] for times in turn) for turn in rounds)
        for name in nets
    }


@contextmanager
def _one_cpu_thread(device: torch.device) -> Iterator[None]:
    """One thread computes on the CPU; the number of threads is restored."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _time_forward(net: nn.Module, x: Tensor, device: torch.device) -> float:
    """Seconds of one forward pass: of the thread on the CPU, else until the device is done."""
    if device.type == "cpu":
        start = cpu_seconds()
        net(x)
        return cpu_seconds() - start
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", lambda: None)
    synchronize()
    start = time.perf_counter()
    net(x)
    synchronize()
    return time.perf_counter() - start


def _zero_images(net: nn.Module, size: tuple[int, ...], batch: int) -> Tensor:
    floats = (p for p in net.parameters() if p.is_floating_point())
    like = next(floats, torch.zeros(()))
    return torch.zeros(batch, *size, dtype=like.dtype, device=like.device)


def _copy_model(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """Copy a model in eval mode, without its hooks: a copied hook may write into the original."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    memo: dict[int, object] = {}
    if device == "meta":  # no data is copied
        for tensor in [*model.parameters(), *model.buffers()]:
            memo[id(tensor)] = _meta_copy(tensor)
    net = copy.deepcopy(model, memo)
    for module in net.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    return net.eval() if device is None else net.to(device).eval()


def _meta_copy(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta


@contextmanager
def _working_copy(model: nn.Module, device: torch.device | None) -> Iterator[nn.Module]:
    """A copy on `device`.

    A model that cannot be copied is used itself, on its own device, and left as it was.
    """
    try:
        net = _copy_model(model, device)
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
