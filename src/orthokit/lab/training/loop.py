"""Training: one loop on Lightning Fabric, which brings devices, precision, processes and checkpoint files.

A run is a function of its recipe and seed. Order and augmentation are keyed by them (:mod:`orthokit.lab.data.augment`). The
global generator is seeded anew for every step, and a checkpoint holds all the rest: interrupted anywhere and started again, a
run ends with the same weights, on the CPU to the last bit.
"""

import contextlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orthokit as ok
from orthokit.checkpoint import order_metadata
from orthokit.lab.atomic import read_checkpoint, to_json, write, write_checkpoint
from orthokit.lab.data.augment import Batches, key_of
from orthokit.lab.data.images import Images, ImageSet
from orthokit.lab.networks.measures import flops, orthogonality
from orthokit.lab.recipes.recipe import Recipe, TrainSection, differences
from orthokit.lab.runs.control import Stop
from orthokit.lab.runs.progress import Watch
from orthokit.lab.runs.results import digest_of
from orthokit.lab.runs.run import SUMMARY, HeldError, Run
from orthokit.lab.training.clock import Clock
from orthokit.lab.training.fabric import Fabric, seed_everything
from orthokit.lab.training.hardware import Hardware, environment
from orthokit.schedules import Schedule

__all__ = ["DivergenceError", "Interruption", "Training", "learning_rate", "shapes", "train"]

SAVE_EVERY = 600.0
"""Seconds between checkpoints within an epoch; every epoch ends with one."""
SHOW_EVERY = 0.2
"""Seconds between two steps whose loss is shown."""
SAMPLE_EVERY = 50
"""Steps from one that is timed and shown to the next, on an accelerator, where reading the clock means waiting."""
COLUMNS = ("mean_cos", "max_cos", "copies", "mean_length_error", "residual", "tightness")


class DivergenceError(FloatingPointError):
    """The loss or a weight is NaN or infinite; the last checkpoint is from before."""

    status = 3
    """Exit status of the command line."""


class Interruption(KeyboardInterrupt):
    """A request to stop, obeyed after saving a checkpoint."""


def train(
    run: Run,
    *,
    root: Path = Path("data"),
    download: bool = False,
    hardware: Hardware | None = None,
    watch: Watch | None = None,
    validate_every: int = 1,
) -> dict[str, Any]:
    """Train ``run`` to its end, from its checkpoint if it has one, and return its summary; a finished run is not repeated.

    Args:
        run: recipe, seed and folder.
        root: where the images are.
        download: whether to fetch them if they are not.
        hardware: where to compute.
        watch: hears of every epoch, and of steps in between.
        validate_every: epochs from one validation to the next, the last epoch among them. Training itself does not depend on it.

    Raises:
        DivergenceError: the loss or a weight is no longer finite.
        Interruption: a request to stop (Ctrl-C or a termination signal); a checkpoint is saved.
        ValueError: the folder holds a run of another recipe; data, network and recipe do not fit.
        OSError: the folder cannot be written, or the disk is full; the last checkpoint is kept.
    """
    if (summary := run.summary()) is not None:
        return summary
    precision, hardware = run.recipe.train.precision, hardware or Hardware()
    watch = watch or Watch()
    before = run.environment()
    if before is not None:  # other numerics would give other weights
        precision, hardware = before["precision"], replace(hardware, threads=before["threads"])
    fabric = hardware.fabric(precision)
    first: bool = fabric.is_global_zero
    with run.hold(watch.say) if first else contextlib.nullcontext():
        fabric.barrier()
        if (summary := run.summary()) is not None:  # written by the process that held the folder
            return summary
        if run.environment() != before:
            raise HeldError(f"another process has begun {run.name} meanwhile; the same command goes on from there")
        with fabric.rank_zero_first():
            data = run.recipe.images(root, download=download and first)
        run.recipe.check(data)
        if first:
            run.divergence.unlink(missing_ok=True)
            write(run.folder / "recipe.toml", run.recipe.to_toml())
            if before is None:
                write(run.folder / "environment.json", to_json(environment(fabric)))
        with Stop() as stop:
            return Training(run, fabric, data, stop, watch, validate_every).fit()


def learning_rate(section: TrainSection, steps: int) -> Schedule:
    """The learning rate by step, with ``steps`` to an epoch."""
    schedule: Schedule
    if section.schedule == "cosine":
        schedule = ok.schedules.cosine(section.lr, 0.0, steps=section.epochs * steps)
    else:
        ends = [round(part * section.epochs * steps) for part in section.milestones]
        drops = {end: section.lr * section.gamma**k for k, end in enumerate(ends, 1)}
        schedule = ok.piecewise({0: section.lr} | drops)
    rising = round(section.warmup * steps)
    return ok.warmup(rising, schedule) if rising else schedule


def shapes(ortho: ok.Regularizer) -> dict[str, dict[str, Any]]:
    """The shape of each regularized layer, so that plans can be compared without the network."""
    kernels = {layer.name: layer.kernel for layer in ortho.layers}
    return {
        name: {"groups": kernel.matrix.shape[:-2].numel(), "o": kernel.o, "n": kernel.n, "stride": list(kernel.stride)}
        for name, kernel in kernels.items()
    }


class Training:
    """A run in progress."""

    def __init__(self, run: Run, fabric: Fabric, data: ImageSet, stop: Stop, watch: Watch, validate_every: int = 1) -> None:
        self.run, self.fabric, self.stop, self.watch, self.validate_every = run, fabric, stop, watch, validate_every
        self.section = section = run.recipe.train
        self.device: torch.device = fabric.device
        self.data = data.to(self.device)
        self.batches = Batches(self.data, section.batch, run.recipe.data.augment, run.seed, fabric.global_rank, fabric.world_size)
        self.steps = len(self.batches)  # in an epoch

        seed_everything(run.seed, verbose=False)  # a network of the user's own may draw from any generator
        self.model = run.recipe.build(data)
        if section.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        regularizer = run.recipe.regularizer
        self.ortho = regularizer.build(self.model) if regularizer else None
        groups: Any = self.model.parameters()
        if self.ortho is not None and regularizer is not None and not regularizer.decay:
            groups = self.ortho.param_groups(self.model, weight_decay=section.weight_decay)
        optimizer = torch.optim.SGD(
            groups,
            section.lr,
            section.momentum,
            weight_decay=section.weight_decay,
            nesterov=section.nesterov,
            foreach=True,
        )
        self.network, self.optimizer = fabric.setup(torch.compile(self.model) if section.compile else self.model, optimizer)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(section.ema), use_buffers=True) if section.ema else None
        )
        pairs = [] if self.average is None else list(zip(self.average.module.modules(), self.model.modules(), strict=True))
        self.buffer_pairs = [pair for pair in pairs if not isinstance(pair[0], nn.modules.batchnorm._NormBase)]
        self.buffer_pairs = [pair for pair in self.buffer_pairs if next(pair[0].buffers(recurse=False), None) is not None]
        self.lr = learning_rate(section, self.steps)

        self.clock = Clock(self.device)
        self.step = 0
        self.sums = self._zeros()
        self.elapsed = 0.0  # seconds of training in this epoch, over all interruptions
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._last_save = time.monotonic()

    def _zeros(self) -> Tensor:
        """Zeros for sums over the images of an epoch: loss, correct ones, number, penalty."""
        return torch.zeros(4, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)

    # ------------------------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end; return the summary, which is on disk then."""
        self.restore()
        # An epoch is done when its row is there. A checkpoint may be from between the epoch's last step and its row.
        for epoch in range(len(self.history), self.section.epochs):
            self.train_epoch(epoch)
            row = self.end_epoch(epoch)
            if self.fabric.is_global_zero:
                self.watch.row(self.run, row)
            if self.stopping(always=True) and epoch + 1 < self.section.epochs:
                raise Interruption(f"{self.run.name} stopped after epoch {epoch + 1}; the same command goes on from there")
        return self.finish()

    def train_epoch(self, epoch: int) -> None:
        """Do the steps of an epoch that are left."""
        self.model.train()
        if self.ortho is not None:
            self.ortho.load_state_dict({"steps": epoch, "calls": {"": self.step}})
        order, start, last_look = self.batches.order(epoch), time.perf_counter() - self.elapsed, time.monotonic()
        for index in range(self.step - epoch * self.steps, self.steps):
            self.clock.on = self.device.type == "cpu" or index % SAMPLE_EVERY == 0
            loss = self.train_step(epoch, index, order)
            self.step += 1
            self.elapsed = time.perf_counter() - start
            if self.clock.on:
                self._check(loss)
                if time.monotonic() - last_look > SHOW_EVERY and self.fabric.is_global_zero:
                    last_look = time.monotonic()
                    speed = (index + 1) * self.section.batch / self.elapsed
                    self.watch.step(self.run, self.step / self.steps, float(loss), speed)
            if index + 1 < self.steps and self.stopping():
                self.save()
                raise Interruption(f"{self.run.name} stopped in epoch {epoch + 1}; the same command goes on from there")
            if time.monotonic() - self._last_save > SAVE_EVERY and self.fabric.world_size == 1:
                self.save()
        self.clock.on = True

    def train_step(self, epoch: int, index: int, order: Tensor) -> Tensor:
        """Do one step; return the loss without the penalty."""
        torch.manual_seed(key_of(self.run.seed, self.step, self.fabric.global_rank) % 2**63)  # for dropout
        with self.clock("data"):
            images, labels = self.batches.get(epoch, index, order)
            images = self._laid_out(images)
        with self.clock("network"):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.step)
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.section.label_smoothing)
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
        with self.clock("penalty"):
            penalty = self._penalty()
        with self.clock("network"):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
                self._copy_buffers()
        with self.clock("record"), torch.no_grad():
            n = len(labels)
            right = (logits.argmax(-1) == labels).sum()
            self.sums += torch.stack([loss.detach() * n, right, torch.full_like(loss, n), penalty * n]).to(self.sums)
        return loss.detach()

    @torch.no_grad()
    def _copy_buffers(self) -> None:
        """Copy buffers into the averaged network, all but the statistics of batches, which are averaged.

        The mean of vectors that are to have length 1, as those of spectral normalisation, has another length.
        """
        for target_module, source_module in self.buffer_pairs:
            for target, source in zip(target_module.buffers(recurse=False), source_module.buffers(recurse=False), strict=True):
                target.copy_(source)

    def _laid_out(self, images: Tensor) -> Tensor:
        """``images`` in the memory layout of the recipe."""
        return images.contiguous(memory_format=torch.channels_last) if self.section.channels_last else images

    def _penalty(self) -> Tensor:
        """Add the penalty's gradient; return its value, 0 without a penalty."""
        if self.ortho is None:
            return torch.zeros((), device=self.device)
        try:
            return self.ortho.add_grad_()
        except FloatingPointError as error:
            raise self._divergence(str(error)) from None

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Validate, record the epoch, save; return its line of ``metrics.jsonl``."""
        if self.fabric.world_size > 1:  # each process has normalised its own part of the batches
            for buffer in (*self.model.buffers(), *self.final_model.buffers()):
                if buffer.is_floating_point():
                    buffer.copy_(self.fabric.all_reduce(buffer, reduce_op="mean"))
        sums: Tensor = self.fabric.all_reduce(self.sums, reduce_op="sum")
        loss, right, images, penalty = sums.tolist()
        self._check(sums[0])
        with self.clock("evaluate"):
            due = (self.section.epochs - epoch - 1) % self.validate_every == 0  # counted from the last
            validation = self.evaluate(self.data.validation) if due and self.data.validation is not None else None
        with self.clock("record"):
            totals = orthogonality(self.final_model, spectrum=False)
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.step,
            "lr": self.lr(self.step - 1),
            "train": {"loss": loss / images, "accuracy": right / images},
            "validation": validation,
            "penalty": penalty / images,
            "strength": self.ortho.strength if self.ortho else 0.0,
            "orthogonality": {part: {key: total[key] for key in COLUMNS if key in total} for part, total in totals.items()},
            "images_per_second": images / self.elapsed,
            "seconds": self._seconds(),
        }
        seconds = row["seconds"]
        row["penalty_share"] = seconds["penalty"] / (seconds["data"] + seconds["network"] + seconds["penalty"])
        self.history.append(row)
        self.elapsed, self.sums, self.clock.seconds = 0.0, self._zeros(), {}
        if validation is not None and (self.best is None or validation["accuracy"] > self.best["accuracy"]):
            self.best = {"epoch": epoch + 1, **validation}
            self.save_weights("best")
        self.save()
        return row

    def _seconds(self) -> dict[str, float]:
        """Seconds of the epoch by part; those of steps scaled up from the sampled ones."""
        seconds = {"data": 0.0, "network": 0.0, "penalty": 0.0} | self.clock.seconds
        if self.device.type != "cpu":
            for part in ("data", "network", "penalty"):
                seconds[part] *= self.steps / math.ceil(self.steps / SAMPLE_EVERY)
        return {part: round(value, 4) for part, value in seconds.items()} | {"training": round(self.elapsed, 4)}

    def finish(self) -> dict[str, Any]:
        """Test the trained network, once; write weights and summary."""
        row = self.history[-1]
        test = self.evaluate(self.data.test)
        summary: dict[str, Any] = {
            "name": self.run.folder.parent.name,
            "seed": self.run.seed,
            "test": test,
            "validation": row["validation"],
            "best": self.best,
            "train": row["train"],
            "orthogonality": orthogonality(self.final_model),
            "ranks": self.ortho.ranks if self.ortho else {},
            "layers": shapes(self.ortho) if self.ortho else {},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "flops": flops(self.model, self.data.test.pixels.shape[1:]),
            "images": {"train": len(self.data.train), "test": len(self.data.test)},
            "fingerprint": self.data.fingerprint,
            "images_per_second": sum(r["images_per_second"] for r in self.history) / len(self.history),
            "penalty_share": sum(r["penalty_share"] for r in self.history) / len(self.history),
            "seconds": sum(r["seconds"]["training"] for r in self.history),
            "environment": self.run.environment(),
            "recipe": self.run.recipe.to_dict(),
        }
        summary["weights"] = digest_of(self.save_weights("last"))
        if self.fabric.is_global_zero:
            write(self.run.folder / SUMMARY, to_json(summary))
        self.fabric.barrier()
        return summary

    # ------------------------------------------------------------------------------------------------------------------------

    @property
    def final_model(self) -> nn.Module:
        """The network that is evaluated and saved: the averaged one where there is one."""
        average: nn.Module | None = None if self.average is None else self.average.module
        return self.model if average is None else average

    @torch.no_grad()
    def evaluate(self, images: Images, batch: int = 500) -> dict[str, float]:
        """Mean loss and accuracy of :attr:`final_model`, the images shared among the processes."""
        model = self.final_model
        model.eval()
        sums = self._zeros()
        own = slice(self.fabric.global_rank, None, self.fabric.world_size)  # this process's images
        for pixels, labels in zip(images.pixels[own].split(batch), images.labels[own].split(batch), strict=True):
            inputs = self._laid_out(self.data.normalise(pixels))
            with self.fabric.autocast():
                logits = model(inputs)
            logits = logits.float()
            right = (logits.argmax(-1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, right, torch.full_like(loss, len(labels)), torch.zeros_like(loss)]).to(sums)
        total: Tensor = self.fabric.all_reduce(sums, reduce_op="sum")
        self._check(total[0])
        return {"loss": float(total[0] / total[2]), "accuracy": float(total[1] / total[2])}

    def stopping(self, always: bool = False) -> bool:
        """Whether any process is requested to stop; several processes ask each other every tenth step, or ``always``."""
        if self.fabric.world_size == 1:
            return self.stop.is_requested
        if not always and self.step % 10:
            return False
        requests = self.fabric.all_reduce(torch.tensor(float(self.stop.is_requested), device=self.device), reduce_op="sum")
        return bool(requests > 0)

    def _check(self, value: Tensor, quantity: str = "the loss") -> None:
        if not value.isfinite():
            raise self._divergence(f"{quantity} is {value.item():g}")

    def _divergence(self, quantity: str) -> DivergenceError:
        epoch, index = divmod(self.step, self.steps)
        position = f"in epoch {epoch + 1}, step {index + 1}"
        if self.fabric.is_global_zero:
            self.run.diverge(f"{quantity} {position}")
        remark = f"{self.run.checkpoint} is from before" if self.run.checkpoint.is_file() else "no checkpoint was saved before"
        return DivergenceError(f"{self.run.name} diverged {position}: {quantity}; {remark}. Lower train.lr, or add train.warmup")

    # ------------------------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        progress = {
            "step": self.step,
            "sums": self.sums,
            "elapsed": self.elapsed,
            "seconds": self.clock.seconds,
            "history": self.history,
            "best": self.best,
        }
        states = {name: part.state_dict() for name, part in self._parts().items()}
        return {**states, "progress": progress, "of": self._of()}

    def _parts(self) -> dict[str, Any]:
        """The objects whose state a checkpoint holds."""
        average = {} if self.average is None else {"averaged": self.average}
        return {"model": self.model, "optimizer": self.optimizer, **average}

    def _of(self) -> dict[str, Any]:
        """The run that a checkpoint belongs to. If any of this differed, the run would end with other weights."""
        return {
            "seed": self.run.seed,
            "precision": self.fabric._precision.precision,
            "threads": torch.get_num_threads(),
            "recipe": self.run.recipe.to_dict(),
        }

    def restore(self) -> None:
        """Go on from the run's checkpoint, if there is one.

        Raises:
            ValueError: the checkpoint is damaged, or of another version, recipe or network.
        """
        if not self.run.checkpoint.is_file():
            return
        try:
            self._load(read_checkpoint(self.run.checkpoint))
        except ValueError as error:
            raise ValueError(
                f"{self.run.checkpoint} cannot be read: {error}. To go on with {self.run.name}, put back the file that was "
                "written; to train it again from the beginning, and lose what it has learned so far, remove it"
            ) from None
        if self.fabric.is_global_zero:
            self._write_metrics()

    def _load(self, state: Any) -> None:
        """Take over the state in a checkpoint.

        Raises:
            ValueError: the state is not one of this run.
        """
        try:
            self._check_of(state.get("of", self._of()))
            progress, states = state["progress"], {name: state[name] for name in self._parts()}
            self.step, self.elapsed, self.history, self.best = (progress[key] for key in ("step", "elapsed", "history", "best"))
            self.sums, self.clock.seconds = progress["sums"].to(self.device), progress["seconds"]
            epochs = [row["epoch"] for row in self.history]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is whole, but not a checkpoint of this version of orthokit ({error!r})") from None
        try:
            for name, part in self._parts().items():
                part.load_state_dict(states[name])
        except Exception as error:  # of anybody's network
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"it is of another network than the recipe builds now ({reason})") from None
        if epochs != [*range(1, len(epochs) + 1)] or not 0 <= self.step - len(epochs) * self.steps <= self.steps:
            raise ValueError(f"it is at step {self.step} of {self.steps} to an epoch, but has the epochs {epochs}")

    def _check_of(self, of: dict[str, Any]) -> None:
        current = self._of()
        if (recipe := Recipe.of(of["recipe"])) != self.run.recipe:
            raise ValueError(f"it is of another recipe ({differences(recipe, self.run.recipe)})")
        for key in ("seed", "precision", "threads"):
            if of[key] != current[key]:
                raise ValueError(f"it is of a run with {key} {of[key]}, and this one has {current[key]}")

    def save(self) -> None:
        """Write a checkpoint of the present step, at once and whole."""
        parameters = [value.detach() for value in self.final_model.state_dict().values() if value.is_floating_point()]
        self._check(torch.stack([value.sum(dtype=torch.float32) for value in parameters]).sum(), "a weight")
        with self.clock("record"):
            state = self._state()
            if self.fabric.world_size > 1:
                state["progress"]["sums"] = self.fabric.all_reduce(self.sums, reduce_op="sum") / self.fabric.world_size
            if self.fabric.is_global_zero:
                self._write_metrics()
                write_checkpoint(self.run.checkpoint, state)
            self.fabric.barrier()
            self._last_save = time.monotonic()

    def _write_metrics(self) -> None:
        write(self.run.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))

    def save_weights(self, name: str) -> dict[str, Tensor]:
        """Write ``<name>.safetensors``: the weights of :attr:`final_model`, with their run and recipe; return the weights."""
        weights = {key: value.detach().cpu().contiguous() for key, value in self.final_model.state_dict().items()}
        if self.fabric.is_global_zero:
            metadata = {
                "run": self.run.name,
                "epoch": str(self.step // self.steps),
                "classes": str(self.data.classes),
                "recipe": json.dumps(self.run.recipe.to_dict()),
                **order_metadata(weights),
            }
            write(self.run.folder / f"{name}.safetensors", save(weights, metadata))
        return weights
