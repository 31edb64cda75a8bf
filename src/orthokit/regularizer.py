"""The Regularizer: binds a penalty to the layers of a model."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orthokit.advice import name_layers, warn_of_long_filters
from orthokit.audit import warn_of_selection
from orthokit.checks import check_count, check_flag, check_number, warn_once
from orthokit.engine import Engine
from orthokit.groups import param_groups
from orthokit.kernel import Kernel, KernelMeasure, sources, sqrt_filters
from orthokit.layers import Where, convs, select
from orthokit.penalties import PENALTIES
from orthokit.penalties.base import HasNearest, is_squared
from orthokit.schedules import Schedule, as_schedule, check_strength, constant

__all__ = ["MOST_STEPS", "Regularizer", "sqrt_filters"]


MOST_STEPS = 2**53
"""Steps that a schedule can still tell apart as floating-point numbers."""


class Regularizer:
    """``strength * sum`` of a penalty over the selected layers of a model.

    Call it and add the result to the loss, or call :meth:`add_grad_` just before the optimizer's step: the gradient is the same.
    Layers are selected once; their weights are read at every call, in float32 or better and outside autocast, equal shapes in
    one batch. Nothing is stored on the model.

    An unsquared penalty of a layer in ``g`` groups is divided by ``sqrt(g)``, so that a grouped layer is not pulled harder than a
    dense one.

    Args:
        model: any module; wrappers (DataParallel, DistributedDataParallel, ``torch.compile``) are looked through.
        penalty: a penalty of this package, or any callable ``Kernel -> Tensor`` with one value per leading dimension.
        strength: a number, or a schedule: a function from step to number.
        where: ``(name, module) -> bool``; every convolution by default.
        scale: multiplies an unsquared penalty of each layer, e.g. :func:`sqrt_filters`; a function ``Kernel -> float``
            of the layer's own kernel, a constant to autograd.
        include_frozen: count layers none of whose parameters ask for a gradient, too. They are left out at each call otherwise.
        every: act at each ``every``-th call only, the first one included, then ``every`` times as hard; other calls give 0. Calls
            that can train are counted: not those under ``torch.no_grad()``, nor :meth:`per_layer`. A squared penalty overshoots,
            and diverges, where ``lr * strength * every / (1 - momentum)`` is not well below 1/4; an unsquared one does not.
        shard: under DistributedDataParallel each rank measures a part of the layers, of about equal cost, and the averaging of
            gradients brings the parts together. The value of a call is then this rank's part times the number of ranks.

    Attributes:
        layers: the selected layers, each a (name, module).
        ranks: the transition dimension of each layer by name, of a penalty that relaxes; else empty.
        steps: how often :meth:`step` was called.

    Raises:
        ValueError: no layer is selected, all of them are frozen, or ``strength`` is negative, NaN or infinite.
        TypeError: an argument is of the wrong kind, or a selected layer has no kernel view.

    >>> model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    >>> for layer in (model[0], model[2]):
    ...     _ = nn.init.dirac_(layer.weight).data.mul_(2)  # Gram matrix diag(4, 4)
    >>> ortho = Regularizer(model, orthokit.SO(), strength=0.1)
    >>> ortho(), ortho.per_layer()
    (tensor(3.6000, grad_fn=<MulBackward0>), {'0': 18.0, '2': 18.0})
    """

    def __init__(
        self,
        model: nn.Module,
        penalty: KernelMeasure,
        *,
        strength: float | Schedule,
        where: Where = convs,
        scale: Callable[[Kernel], float] | None = None,
        include_frozen: bool = False,
        every: int = 1,
        shard: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if isinstance(penalty, type) or not callable(penalty):
            name = penalty.__name__ if isinstance(penalty, type) else repr(penalty)
            raise TypeError(f"penalty must be an instance such as orthokit.SO(); got {name}")
        self.model, self.penalty, self.schedule, self.scale = model, penalty, as_schedule(strength), scale
        check_count("every", every)
        check_flag("include_frozen", include_frozen)
        check_flag("shard", shard)
        self.include_frozen, self.every, self.shard = include_frozen, every, shard
        self.steps = 0
        self._calls: Counter[str] = Counter()
        self.layers = select(model, where)
        if not include_frozen and all(layer.frozen for layer in self.layers):
            raise ValueError(f"all {len(self.layers)} selected layers are frozen; unfreeze some, or pass include_frozen=True")
        if scale is not None:
            if not callable(scale):
                raise TypeError(f"scale must be a function Kernel -> float such as orthokit.sqrt_filters; got {scale!r}")
            with torch.no_grad():
                for layer in self.layers:
                    check_number(f"scale of layer {layer.name!r}", scale(layer.kernel))
        if scale is not None and is_squared(penalty, otherwise=True):
            warn_once(f"scale= does nothing here: it applies to unsquared penalties, and {penalty!r} is squared")
        self._engine = Engine(model, self.layers, penalty, scale=scale, include_frozen=include_frozen)
        self.ranks = self._engine.ranks
        warn_of_selection(model, self.layers, self._engine.zeros)
        _ = self.strength  # a schedule that gives no valid strength fails here
        warn_of_long_filters(penalty, self.schedule, self.layers, self.ranks)

    @property
    def strength(self) -> float:
        """The strength at the present step."""
        strength = self.schedule(self.steps)
        check_strength(f"strength at step {self.steps}", strength)
        return float(strength)

    def __call__(self) -> Tensor:
        """``strength * sum of the layers' penalties``, a scalar to add to the loss.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers (on the CPU: see Note [full precision]).
            ValueError: a layer was replaced or removed in the model since, or moved and frozen (``get_peft_model``).
        """
        strength = self._due() if torch.is_grad_enabled() else self.strength
        mine = self._share() if self.shard else None
        value = self._engine.value(mine) if strength > 0 else self._engine.sum(())
        return strength * (1 if mine is None else dist.get_world_size()) * value

    def _due(self, key: str = "") -> float:
        """The strength of this call, counted under ``key``: 0 but for each ``every``-th, which makes up for the others."""
        strength = self.strength
        if self.every == 1:
            return strength
        due = self._calls[key] % self.every == 0
        self._calls[key] += 1
        return due * strength * self.every

    def per_layer(self) -> dict[str, float]:
        """Each layer's penalty by name, before the strength; their sum times :attr:`strength` is what a call returns."""
        return self._engine.per_layer()

    def _share(self) -> Collection[int] | None:
        """Indices of the layers that this process measures; None where there is only one process.

        The dearest layer first, each goes to the process with the least to do.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        for layer in self.layers:
            if any(hasattr(p, "full_tensor") for p in layer.module.parameters()):
                raise TypeError(f"shard=True is for DistributedDataParallel; layer {layer.name!r} is sharded already")
        shares: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        costs, load = self._engine.costs, [0] * len(shares)
        for index in sorted(range(len(self.layers)), key=lambda index: (-costs[index], index)):
            process = load.index(min(load))
            shares[process].append(index)
            load[process] += costs[index]
        return shares[dist.get_rank()]

    def add_grad_(self, scale: float | Tensor = 1.0, *, only: Collection[Tensor] | None = None) -> Tensor:
        """Add the gradient of ``self()`` times ``scale`` to ``.grad`` of the parameters behind the kernels; return the value.

        Call it between ``loss.backward()`` and the optimizer's step: after gradient clipping, so that the penalty is not clipped,
        and with a ``GradScaler`` after ``scaler.unscale_(optimizer)``. No hook of the model or of autograd sees it.

        Args:
            scale: factor of the gradient, for whoever scales gradients by hand.
            only: parameters to serve; by default all.
        """
        return self._add_grad_(scale, only, self._due)

    def _add_grad_(
        self,
        scale: float | Tensor,
        only: Collection[Tensor] | None,
        due: Callable[[str], float],
    ) -> Tensor:
        """:meth:`add_grad_` with the strength that ``due`` gives for the name under which the call is counted."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "add_grad_ needs autograd, which torch.inference_mode() switches off for good; use torch.no_grad()"
            )
        if self.shard:
            raise RuntimeError(
                "add_grad_() runs after gradients are averaged, so with shard=True each process would add only its own layers: "
                "add the value of a call to the loss instead"
            )
        wanted = None if only is None else set(map(id, only))
        if not isinstance(scale, Tensor):
            check_number("scale", scale, -math.inf)
        elif scale.numel() != 1:
            raise ValueError(f"scale must be one number; got a tensor of shape {tuple(scale.shape)}")
        else:
            scale = scale.reshape(())
        strength = due(self._first(wanted))
        value = self._engine.add_grads_(strength * scale, wanted) if strength > 0 else self._engine.sum(())
        return strength * value

    def _first(self, wanted: set[int] | None) -> str:
        """Under which name calls for some of the parameters are counted: optimizers of one model step at their own pace."""
        if wanted is None or self.every == 1:
            return ""
        return next((layer.name for layer in self.layers if any(id(p) in wanted for p in layer.module.parameters())), "")

    @torch.no_grad()
    def retract_(self, rate: float = 1.0) -> None:
        """Move every kernel the part ``rate`` of the way to the penalty's nearest minimum, in closed form and in place.

        Call it after the optimizer's step: decoupled from the gradient, as AdamW decouples weight decay, so that neither
        momentum nor the optimizer's scaling touches it. Neither strength nor schedule applies. ``rate=1`` keeps the kernels
        on the minimum; the optimizer's state is not changed. Frozen layers do not move, counted or not.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the message names the layers.
            TypeError: the penalty has no method ``nearest``: see :class:`orthokit.penalties.base.HasNearest`.
            ValueError: ``rate`` is not in (0, 1]; a relaxation whose nearest minimum is not known in closed form; or a layer
                whose weight is computed (parametrized, pruned, sharded) and cannot be set.
        """
        check_number("rate", rate, 0, 1, open_low=True)
        if not isinstance(self.penalty, HasNearest):
            able = ", ".join(kind.__name__ for kind in PENALTIES if issubclass(kind, HasNearest))
            raise TypeError(f"{self.penalty!r} does not know its nearest minimum in closed form; use one of {able}")
        moves = []
        for stack in (part for whole in self._engine.read() for part in whole.split()):
            try:
                targets = self.penalty.nearest(stack.kernel())
            except FloatingPointError as error:
                raise name_layers(stack.layers, error) from None
            for layer, target in zip(stack.layers, targets, strict=True):
                with torch.enable_grad():
                    own = layer.kernel
                weight, behind = own.weight.detach(), sources(layer.module, layer.weight, own)
                if not any(parameter.requires_grad for parameter in behind):
                    continue  # frozen: with include_frozen=True it counts, but nothing may move it
                if len(behind) != 1 or weight.data_ptr() != behind[0].data_ptr() or weight.numel() != behind[0].numel():
                    raise ValueError(f"the weight of layer {layer.name!r} is computed from others and cannot be set; see where=")
                moves.append((weight, target.reshape(weight.shape).to(weight.dtype)))
        for weight, target in moves:
            weight.lerp_(target, rate)

    def param_groups(self, model: nn.Module, *, weight_decay: float, decay_biases_and_norms: bool = True) -> list[dict[str, Any]]:
        """:func:`orthokit.param_groups` of this regularizer alone: weight decay on all but the regularized kernels."""
        return param_groups(model, self, weight_decay=weight_decay, decay_biases_and_norms=decay_biases_and_norms)

    def step(self) -> None:
        """Advance the schedule by one, in whatever unit you call it: batches or epochs."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: the step of the schedule, and with ``every=`` the calls so far."""
        return {"steps": self.steps, "calls": dict(self._calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of a saved :meth:`state_dict`."""
        if not isinstance(state, Mapping) or "steps" not in state:
            raise ValueError(f"not the state of a Regularizer: expected {{'steps': ...}}, got {state!r:.200}")
        calls = state.get("calls", {})
        check_count("steps", state["steps"], 0, MOST_STEPS)
        if not isinstance(calls, Mapping) or not all(isinstance(name, str) for name in calls):
            raise ValueError(f"not the state of a Regularizer: calls must map names of layers to counts, got {calls!r:.200}")
        for name, count in calls.items():
            check_count(f"calls of {name!r}", count, 0, MOST_STEPS)
        self.steps = int(state["steps"])
        self._calls = Counter({name: int(count) for name, count in calls.items()})

    def __repr__(self) -> str:
        strength = self.schedule.strength if isinstance(self.schedule, constant) else self.schedule
        return f"Regularizer({self.penalty!r}, strength={strength}, {len(self.layers)} layers)"
