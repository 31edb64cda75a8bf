"""Transition dimensions measured from data: how many dimensions a layer's outputs fill when its filters choose none of them.

Our reading of "with K replaced": each selected layer sees its true input, computed by the trained weights before it, and
only its own kernel is replaced, on the side; what flows on through the network is not altered. Hence a layer is measured by what
reaches it and not by the rank its own filters already have, which would only ever shrink if it were fed back into training.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from orthokit.checks import check_count, check_number, warn_once
from orthokit.kernel import kernel_of
from orthokit.layers import Layer, Where, convs, select
from orthokit.wrappers import unwrap

__all__ = ["Moments", "components", "estimate", "orthonormal_filters"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
"""Layers whose output is known for any kernel."""

PRECISION = torch.finfo(torch.float32).eps
"""Share of the variance that counts as rounding; activations are float32 in general."""

CHUNK = 2**22
"""Activations turned to float64 at once."""


def orthonormal_filters(groups: int, o: int, n: int, generator: torch.Generator) -> Float[Tensor, "{groups} {o} {n}"]:
    """Random filters, uniformly rotated: orthonormal for ``o <= n``, else a tight frame; float64, on the CPU.

    Filters have length 1, on tall layers in the mean square: their columns are orthogonal and of equal length ``sqrt(o / n)``,
    so that outputs keep all distances between inputs up to this factor.

    >>> tall = orthonormal_filters(1, 6, 3, torch.Generator().manual_seed(0))[0]
    >>> torch.allclose(tall.T @ tall, 2 * torch.eye(3, dtype=torch.float64))
    True
    """
    check_count("groups", groups)
    check_count("o", o)
    check_count("n", n)
    gauss = torch.randn(groups, max(o, n), min(o, n), dtype=torch.float64, device="cpu", generator=generator)
    q, triangle = torch.linalg.qr(gauss)
    frame: Tensor = q * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # else the rotation is not uniform
    return frame.mT.contiguous() if o <= n else frame * (o / n) ** 0.5


def components(covariance: Float[Tensor, "*b o o"], energy: float) -> Int[Tensor, "*b"]:
    """The least number of principal components that hold the share ``energy`` of the variance; 1 where there is none.

    A part of ``1.2e-7`` (float32 rounding) may be missing, so that ``energy = 1`` gives the numerical rank.

    Raises:
        ValueError: ``energy`` is outside ``(0, 1]``.

    >>> components(torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0])), 0.9), components(torch.eye(4), 1.0)
    (tensor(2), tensor(4))
    """
    check_number("energy", energy, 0, 1, open_low=True)
    energies = torch.linalg.eigvalsh(covariance).flip(-1).clamp(min=0).cumsum(-1)
    count: Tensor = (energies < (energy - PRECISION) * energies[..., -1:]).sum(-1) + 1
    return count


class Moments:
    """Running mean and covariance of vectors in groups, in float64 (Chan, Golub, LeVeque 1979); nothing else is kept.

    Attributes:
        count: vectors so far.
        mean: ``(groups, o)``.
        scatter: ``(groups, o, o)``, the sum of outer products of deviations from the mean.

    >>> moments = Moments(1, 2)
    >>> moments.add(torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]]]))
    >>> moments.add(torch.tensor([[[4.0, 0.0]]]))
    >>> moments.count, moments.mean[0].tolist(), moments.covariance[0].tolist()
    (3, [2.0, 0.0], [[2.6666666666666665, 0.0], [0.0, 0.0]])
    """

    def __init__(self, groups: int, o: int) -> None:
        self.count = 0
        self.mean = torch.zeros(groups, o, dtype=torch.float64, device="cpu")
        self.scatter = torch.zeros(groups, o, o, dtype=torch.float64, device="cpu")

    def add(self, vectors: Float[Tensor, "m groups o"]) -> None:
        """Take in ``m`` vectors of each group."""
        device = torch.device("cpu") if vectors.device.type == "mps" else vectors.device  # MPS has no float64
        self.mean, self.scatter = self.mean.to(device), self.scatter.to(device)
        for part in vectors.split(max(1, CHUNK // vectors.shape[1:].numel())):
            m = len(part)
            if m == 0:
                continue
            deviations = part.to(device).double().transpose(0, 1)  # (groups, m, o)
            mean = deviations.mean(1)
            deviations = deviations - mean.unsqueeze(1)
            apart, total = mean - self.mean, self.count + m
            self.scatter += deviations.mT @ deviations + apart.unsqueeze(2) * apart.unsqueeze(1) * (self.count * m / total)
            self.mean += apart * (m / total)
            self.count = total

    @property
    def covariance(self) -> Float[Tensor, "groups o o"]:
        """``scatter / count``; zero for a group whose vectors are all equal up to rounding."""
        covariance = self.scatter / max(1, self.count)
        spread = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        constant = spread <= PRECISION**2 * self.mean.square().sum(-1)
        return torch.where(constant[:, None, None], 0.0, covariance)


class _Probe:
    """A forward hook that measures what a layer would give for its input, with orthonormal filters and without a bias."""

    def __init__(self, layer: Layer, positions: int | None, seed: int) -> None:
        self.kind = next((kind for kind in KINDS if isinstance(layer.module, kind)), None)
        if self.kind is None or kernel_of.dispatch(type(layer.module)) is not kernel_of.dispatch(self.kind):
            raise TypeError(
                f"layer {layer.name!r}: a {type(layer.module).__name__} with a kernel view of its own is not supported, as its "
                f"output for another kernel is not known; estimate knows {', '.join(kind.__name__ for kind in KINDS)}. "
                "Leave it out with where="
            )
        kernel = layer.stored
        self.layer, self.positions, self.shape, self.n = layer, positions, kernel.weight.shape, kernel.n
        self.moments = Moments(kernel.groups, kernel.o)
        self.generator = torch.Generator().manual_seed(seed)  # each layer its own: it does not depend on which others are chosen
        self.twin: nn.Module | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x: Tensor = (args[0] if args else kwargs["input"]).detach()
        size = [args[1] if len(args) > 1 else kwargs.get("output_size")] if self.kind in TRANSPOSED else []
        x = x if x.dtype.itemsize >= 4 else x.float()
        self.twin = (self.twin or self._twin()).to(x.device, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = self.twin(x, *size)
        groups, o, _, *spatial = self.shape
        y = y if y.ndim > len(spatial) + 1 else y.unsqueeze(0)
        y = y.movedim(-1 - len(spatial), -1)
        available = y.shape[1:-1].numel()
        y = y.reshape(len(y), available, groups, o)
        if self.positions is not None and available > self.positions:
            y = y[:, torch.randperm(available, generator=self.generator, device="cpu")[: self.positions].to(y.device)]
        if not (x.isfinite().all() and y.isfinite().all()):
            raise FloatingPointError(
                f"layer {self.layer.name!r}: NaN or infinite activations reach it. Look for them in the data and in the weights "
                "before this layer"
            )
        self.moments.add(y.flatten(0, 1))

    def _twin(self) -> nn.Module:
        """A layer of the same geometry with orthonormal filters."""
        module = cast(Any, self.layer.module)
        groups, o, i, *size = self.shape
        weight = orthonormal_filters(groups, o, self.n, self.generator).reshape(self.shape)
        twin: Any
        if self.kind is nn.Linear:
            twin, weight = nn.Linear(i, o, bias=False, device="meta"), weight[0]
        else:
            options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            if self.kind in TRANSPOSED:
                options["output_padding"], weight = module.output_padding, weight.transpose(1, 2)
            kind = cast(Callable[..., nn.Module], self.kind)
            twin = kind(groups * i, groups * o, tuple(size), groups=groups, bias=False, device="meta", **options)
            weight = weight.flatten(0, 1)
        twin.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return cast(nn.Module, twin)

    def rank(self, energy: float) -> int:
        """The rank of the group that needs most."""
        _, o, *_ = self.shape
        most, count = min(o, self.n), self.moments.count
        if count <= most:
            warn_once(
                f"layer {self.layer.name!r}: {count} outputs fill less than {count} of {most} dimensions, whatever the data; "
                "estimate with more batches"
            )
        return min(int(components(self.moments.covariance, energy).max()), most)


def estimate(
    model: nn.Module,
    loader: Iterable[Any],
    energy: float = 0.95,
    *,
    where: Where = convs,
    key: Any = None,
    batches: int | None = None,
    positions: int | None = 256,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """The number of principal components that hold ``energy`` of the variance of each layer's output, for :class:`ranks`.

    Centred PCA over samples and positions of the layer's own output, before any normalisation that follows it, for the input it
    has in the network, with its kernel replaced by :func:`orthonormal_filters` (fixed, per group); the bias plays no part. So a
    layer whose filters have collapsed gets no smaller rank for that. Of a grouped layer each group is taken alone and the
    largest count stands for all, so that no group is asked for less than its outputs fill (ours). A layer called several times
    counts all its calls; of layers with tied weights the first is measured. A subclass of a known layer is taken as that layer.

    The model runs in evaluation mode without gradients, outside ``torch.compile`` and data-parallel wrappers. It is left as it
    was, also when something fails: modes, buffers, attributes, hooks, and the state of torch's global generators on the CPU and
    on CUDA. Per layer and group a mean and an ``o x o`` covariance are kept, in float64, besides the replaced kernels.

    Args:
        model: any module whose call takes one tensor.
        loader: batches on any device: tensors, tuples or lists with the tensor first, or whatever ``key`` picks it from.
        energy: share of the variance, in ``(0, 1]``; up to ``1.2e-7``, see :func:`components`.
        where: ``(name, module) -> bool``: Linear (all dimensions but the last are positions), Conv1d/2d/3d or
            ConvTranspose1d/2d/3d; every convolution by default.
        key: ``batch[key]`` is the input, for dictionaries and tuples.
        batches: stop after so many; None reads all.
        positions: of larger outputs so many are drawn at random for each batch, the same for its samples; None takes all.
        seed: of the private generators that draw kernels and positions.
        progress: show a bar, if standard error is a terminal.

    Returns:
        ``{layer name: r}`` with ``1 <= r <= min(o, n)``. A layer that was never called is missing, with a warning. Where all
        outputs are equal, ``r = 1``.

    Raises:
        ValueError: the loader is empty, a batch lacks ``key``, no layer is selected or called, or a number is out of range.
        TypeError: the loader's batches hold no tensor, or a selected layer is of another kind.
        FloatingPointError: NaN or infinite activations; the message names the first layer that meets them.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> grey = torch.randn(20, 1, 6, 6).expand(-1, 3, -1, -1)  # three equal channels: one dimension
    >>> r = estimate(model, [grey])
    >>> r["0"], ranks(r)(8, 3, "0")
    (1, 1)
    """
    check_number("energy", energy, 0, 1, open_low=True)
    for name, value in (("batches", batches), ("positions", positions)):
        if value is not None:
            check_count(name, value)
    check_count("seed", seed, 0)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, which runs on the data; got {type(model).__name__}")
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of batches such as [images] or a DataLoader; got a {type(loader).__name__}")
    probes = [_Probe(layer, positions, seed) for layer in select(model, where)]
    bare = unwrap(model)
    tensors = [*bare.parameters(), *bare.buffers()]
    if any(isinstance(tensor, UninitializedParameter) for tensor in tensors):
        raise ValueError("the model has lazy layers without weights yet; run one batch through it first")
    count = 0
    with ExitStack() as stack:
        stack.enter_context(_preserving(model))
        stack.enter_context(torch.no_grad())
        for probe in probes:
            handle = probe.layer.module.register_forward_hook(probe, with_kwargs=True)
            stack.callback(handle.remove)
        for batch in stack.enter_context(_bar(progress))(loader, batches):
            bare(_input_of(batch, key, count).to(tensors[0].device))
            count += 1
    if not count:
        raise ValueError("the loader gave no batch; one that is an iterator can be read only once")
    unseen = [probe.layer.name for probe in probes if probe.moments.count == 0]
    if len(unseen) == len(probes):
        raise ValueError(f"no selected layer was called in {count} batches: {', '.join(map(repr, unseen))}; pass another where=")
    if unseen:
        warn_once(f"never called, and left out: {', '.join(map(repr, unseen))}; use the same where= without them for ranks")
    return {probe.layer.name: probe.rank(energy) for probe in probes if probe.moments.count}


def _input_of(batch: Any, key: Any, index: int) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    value = batch
    if key is not None:
        try:
            value = batch[key]
        except (LookupError, TypeError):
            raise ValueError(f"batch {index}, a {type(batch).__name__}, has no entry key={key!r}") from None
    elif isinstance(batch, (tuple, list)) and batch:
        value = batch[0]
    if not isinstance(value, Tensor):
        hint = f"; pick it by key=, one of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else ""
        raise TypeError(f"a batch must be the input tensor, or hold it first; batch {index} gave a {type(value).__name__}{hint}")
    return value


@contextmanager
def _bar(progress: bool) -> Iterator[Callable[[Iterable[Any], int | None], Iterator[Any]]]:
    """A function that passes on a loader's batches, up to a limit, under a progress bar."""
    console = Console(stderr=True)
    columns = (TextColumn("estimating ranks"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:

        def pass_on(loader: Iterable[Any], limit: int | None) -> Iterator[Any]:
            try:
                total = len(loader) if isinstance(loader, Sized) else None
            except TypeError:  # a DataLoader over a stream
                total = None
            task = bar.add_task("", total=limit if total is None else min(total, limit or total))
            for batch in islice(loader, limit):
                yield batch
                bar.advance(task)

        yield pass_on


@contextmanager
def _preserving(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in eager execution; whatever a forward pass changes in modules or generators is put back after it."""
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    # Whether a buffer was written to is read off its version; an inference tensor has none and cannot be written to here.
    values = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda))
        if "torch._dynamo" in sys.modules:  # compiled code does not look at hooks that came after it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, *_ in modules:
                module.training = False
            yield
        finally:
            for module, attributes, buffers in modules:
                # Not only `training`: the old weight_norm, spectral_norm and prune write `.weight` in each forward pass.
                for name in module.__dict__.keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, version, value in values:
                    if buffer._version != version:
                        buffer.copy_(value)
