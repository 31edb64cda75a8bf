"""Lightning: a callback adds the penalty's gradient in the optimizer's step. Needs ``lightning`` (extra ``[lightning]``).

``pytorch_lightning``, the same framework under its older name, is used where it alone is installed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.hooks import RemovableHandle

from orthokit.checks import check_choice, check_count, check_flag, install
from orthokit.integrations.logs import measure
from orthokit.integrations.optimizer import add_in_step, check_trained
from orthokit.kernel import Kernel, KernelMeasure
from orthokit.layers import Where, convs
from orthokit.regularizer import Regularizer
from orthokit.schedules import Schedule

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "lightning.pytorch"):
            raise
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ModuleNotFoundError as error:
            if error.name != "pytorch_lightning":
                raise
            message = f"OrthoCallback needs Lightning: {install('lightning')}"
            raise ModuleNotFoundError(message, name="lightning") from None

__all__ = ["OrthoCallback"]

# Their processes hold shards of the weights, or an optimizer of another kind than PyTorch's.
SHARDED = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
NEW: dict[str, Any] = {"steps": 0, "calls": {}}


class OrthoCallback(Callback):
    """Regularizes a ``LightningModule`` while a ``Trainer`` fits it, as if its ``training_step`` added the penalty to the loss.

    The gradient comes inside the optimizer's step: after gradient clipping, once however many batches were accumulated, unscaled
    under 16-bit precision, and in manual optimization too. With several optimizers each serves the layers it trains. A step whose
    ``training_step`` returned None still gets the penalty.

    The schedule is in the checkpoint. A callback that joins a run from a checkpoint without it begins its schedule there.

    Args:
        penalty: a penalty of this package, or any callable ``Kernel -> Tensor`` with one value per leading dimension.
        strength: a number, or a schedule: a function from step to number.
        where: ``(name, module) -> bool`` on the submodules of the ``LightningModule``; every convolution by default.
        scale: multiplies an unsquared penalty of each layer, e.g. :func:`orthokit.sqrt_filters`.
        include_frozen: let training start though all layers are frozen (to be thawed later), and log frozen layers too.
        every: act in each ``every``-th step of an optimizer only; see :class:`~orthokit.Regularizer`.
        step: the unit of the schedule: ``"epoch"``, or ``"batch"``, a batch after which an optimizer stepped (the accumulated
            batches before it do not count).
        log_every: after how many such batches to log ``{name}/{layer}`` (each layer's penalty), ``{name}/total`` (what the
            penalty adds to the loss) and ``{name}/strength``; None for the Trainer's ``log_every_n_steps``, 0 for never. They go
            to the loggers, and to ``trainer.callback_metrics``, where other callbacks can monitor them.
        report: log a summary of near-orthogonality too, as :func:`orthokit.log` does; takes about as long as a step's penalty.
        name: tells this callback's logs and state from those of others of its kind.

    Attributes:
        ortho: the :class:`~orthokit.Regularizer`, from the start of training on.

    Raises:
        ValueError: an argument is out of range. When training starts: no layer is selected, all are frozen, no optimizer trains a
            selected layer, or the strategy shards weights.

    .. code-block:: python

        Trainer(callbacks=[OrthoCallback(orthokit.Disentangled(), strength=1e-2)]).fit(module, batches)
    """

    def __init__(
        self,
        penalty: KernelMeasure,
        *,
        strength: float | Schedule,
        where: Where = convs,
        scale: Callable[[Kernel], float] | None = None,
        include_frozen: bool = False,
        every: int = 1,
        step: Literal["epoch", "batch"] = "epoch",
        log_every: int | None = None,
        report: bool = False,
        name: str = "ortho",
    ) -> None:
        super().__init__()
        check_choice("step", step, ("epoch", "batch"))
        if log_every is not None:
            check_count("log_every", log_every, 0)
        check_flag("report", report)
        self.penalty, self.strength, self.where, self.scale = penalty, strength, where, scale
        check_count("every", every)
        self.include_frozen, self.every = include_frozen, every
        self.step, self.log_every, self.report, self.name = step, log_every, report, name
        self.ortho: Regularizer | None = None
        self._last_count, self._began = -1, 0
        self._state: dict[str, Any] = NEW  # the regularizer's, while there is none
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; Lightning wants it unique."""
        return f"OrthoCallback({self.name!r})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew with every new Trainer; comes before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == trainer.current_epoch == 0:
            self.ortho, self._last_count, self._state = None, -1, NEW

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the layers and attach to the optimizers, which exist from here on."""
        self._detach()
        state = self._regularizer_state()
        if (strategy := type(trainer.strategy).__name__) in SHARDED:
            raise ValueError(
                f"OrthoCallback needs whole weights and PyTorch's own optimizers; under {strategy} a process has only a part of "
                "them. Use one device, or strategy='ddp'"
            )
        self.ortho = Regularizer(
            pl_module,
            self.penalty,
            strength=self.strength,
            where=self.where,
            scale=self.scale,
            include_frozen=self.include_frozen,
            every=self.every,
        )
        self.ortho.load_state_dict(state)
        if self._last_count < 0:
            self._last_count = self._count(trainer)
        check_trained(self.ortho, *trainer.optimizers)
        self._handles = [add_in_step(self.ortho, optimizer) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Bring the schedule up to the Trainer's own count, which is right wherever in an epoch a checkpoint was taken."""
        assert self.ortho is not None
        count = self._count(trainer)
        # Several optimizers count several steps a batch: one for us.
        steps = count - self._last_count if self.step == "epoch" else int(count > self._last_count)
        for _ in range(steps):
            self.ortho.step()
        self._last_count, self._began = count, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, where an optimizer has stepped and it is time to."""
        every = trainer.log_every_n_steps if self.log_every is None else self.log_every
        # The step that Lightning itself logs at, from 0 on; `global_step` counts the steps of all optimizers.
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped
        if every > 0 and trainer.global_step > self._began and (steps + 1) % every == 0:
            assert self.ortho is not None
            values = measure(self.ortho, self.ortho.strength, self.name, report=self.report)
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
            for logger in trainer.loggers:
                logger.log_metrics(values, step=steps)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as they were, also when training broke off."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The step of the schedule, its unit, and the Trainer's count at that step."""
        return {**self._regularizer_state(), "step": self.step, "seen": self._last_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of a saved :meth:`state_dict`.

        Raises:
            ValueError: it was saved by a callback whose schedule has another unit.
        """
        if (unit := state_dict["step"]) != self.step:
            raise ValueError(
                f"the checkpoint's schedule counts in step={unit!r}, this OrthoCallback in {self.step!r}; pass the same"
            )
        self._last_count = state_dict["seen"]
        self.ortho, self._state = None, {"steps": state_dict["steps"], "calls": dict(state_dict.get("calls", {}))}

    def _regularizer_state(self) -> dict[str, Any]:
        return self._state if self.ortho is None else self.ortho.state_dict()

    def _count(self, trainer: Trainer) -> int:
        return int(trainer.current_epoch if self.step == "epoch" else trainer.global_step)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
