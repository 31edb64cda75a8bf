"""transformers: a callback adds the penalty's gradient in the optimizer's step. Needs the extra ``[transformers]``."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from orthokit.checks import check_choice, check_count, check_flag, install
from orthokit.integrations.logs import measure
from orthokit.integrations.optimizer import attach
from orthokit.kernel import Kernel, KernelMeasure
from orthokit.layers import Where, convs
from orthokit.regularizer import Regularizer
from orthokit.schedules import Schedule

__all__ = ["OrthoTrainerCallback"]

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    message = f"OrthoTrainerCallback needs transformers: {install('transformers')}"
    raise ModuleNotFoundError(message, name="transformers") from None


class OrthoTrainerCallback(TrainerCallback):
    """Regularizes the model that a ``transformers.Trainer`` trains, as if its loss had the penalty added.

    The gradient comes inside the optimizer's step: after gradient clipping, once however many batches were accumulated, unscaled
    under 16-bit precision. The schedule is in a checkpoint's ``trainer_state.json``; ``resume_from_checkpoint`` continues it.

    Whenever the Trainer logs its loss it also logs ``{name}/{layer}`` (each layer's penalty), ``{name}/total`` (what the penalty
    adds to the loss) and ``{name}/strength``, into ``trainer.state.log_history``. Callbacks that report elsewhere (TensorBoard,
    Weights & Biases, the progress bar) see them only if they come after this one: join with :meth:`add_to` for that.

    Args:
        penalty: a penalty of this package, or any callable ``Kernel -> Tensor`` with one value per leading dimension.
        strength: a number, or a schedule: a function from step to number.
        where: ``(name, module) -> bool``; every convolution by default. For a transformer, e.g. ``orthokit.linears``.
        scale: multiplies an unsquared penalty of each layer, e.g. :func:`orthokit.sqrt_filters`.
        include_frozen: let training start though all layers are frozen (to be thawed later), and log frozen layers too.
        every: act in each ``every``-th step of the optimizer only; see :class:`~orthokit.Regularizer`.
        step: the unit of the schedule: ``"epoch"``, or ``"batch"``, a step of the optimizer (all batches accumulated for it).
        report: log a summary of near-orthogonality too, as :func:`orthokit.log` does; takes about as long as a step's penalty.
        name: tells this callback's logs and state from those of others of its kind.

    Attributes:
        ortho: the :class:`~orthokit.Regularizer`, from the start of training on.

    Raises:
        ValueError: an argument is out of range. When training starts: no layer is selected, all are frozen, the optimizer does
            not train a selected layer, or weights are sharded (FSDP, DeepSpeed).

    .. code-block:: python

        callback = OrthoTrainerCallback(orthokit.Disentangled(), strength=1e-2, where=orthokit.linears)
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    # Not an ExportableState: transformers would rebuild the callback from JSON, which cannot hold a penalty.

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
        report: bool = False,
        name: str = "ortho",
    ) -> None:
        check_choice("step", step, ("epoch", "batch"))
        check_count("every", every)
        check_flag("report", report)
        self.penalty, self.strength, self.where, self.scale = penalty, strength, where, scale
        self.include_frozen, self.every, self.step, self.report, self.name = include_frozen, every, step, report, name
        self.ortho: Regularizer | None = None
        self._has_advanced, self._strength = False, 0.0
        self._handle: RemovableHandle | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Join the callbacks of ``trainer`` before all others, so that whatever reports its logs has ours."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        """Select the layers, attach to the optimizer, continue a resumed schedule."""
        self._detach()
        strategies = [kind for kind in ("fsdp", "deepspeed") if getattr(args, kind, None)]
        if strategies:
            raise ValueError(
                f"OrthoTrainerCallback needs whole weights and PyTorch's own optimizers; under {strategies[0]} a process has "
                "only a part of them. Use one device, or distributed data parallel"
            )
        self.ortho = Regularizer(
            model,
            self.penalty,
            strength=self.strength,
            where=self.where,
            scale=self.scale,
            include_frozen=self.include_frozen,
            every=self.every,
        )
        self._has_advanced = False
        states: Any = state.stateful_callbacks  # a dictionary, whatever its annotation says
        if (record := states.get(self._key)) is not None:
            if record["step"] != self.step:
                raise ValueError(
                    f"the checkpoint's schedule counts in step={record['step']!r}, this OrthoTrainerCallback in {self.step!r}; "
                    "pass the same"
                )
            self.ortho.load_state_dict(record)
        self._save(state)
        self._handle = attach(self.ortho, optimizer)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the strength of this step: logs come when the schedule has advanced."""
        assert self.ortho is not None
        self._strength = self.ortho.strength

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the schedule of batches; that of epochs too after the last batch of one.

        A checkpoint taken there, before ``on_epoch_end``, is resumed with the next epoch.
        """
        if self.step == "batch" or (state.epoch is not None and float(state.epoch).is_integer()):
            self._advance(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the schedule of epochs where their length is not known beforehand."""
        if self.step == "epoch" and not self._has_advanced:
            self._advance(state)
        self._has_advanced = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add our values to those of the Trainer."""
        if self.ortho is not None and logs is not None and "loss" in logs:
            values = measure(self.ortho, self._strength, self.name, report=self.report)
            logs.update(values)
            state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        self._detach()

    @property
    def _key(self) -> str:
        return f"orthokit/{self.name}"

    def _advance(self, state: TrainerState) -> None:
        assert self.ortho is not None
        self.ortho.step()
        self._has_advanced = True
        self._save(state)

    def _save(self, state: TrainerState) -> None:
        assert self.ortho is not None
        states: Any = state.stateful_callbacks
        states[self._key] = {**self.ortho.state_dict(), "step": self.step}

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
