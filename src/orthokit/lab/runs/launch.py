"""Many runs: joblib tasks, each the command ``orthokit train`` in a process of its own.

Such a process has its own threads and device, and may die (of memory, say) without taking the others along. Progress and results
are read from the run's folder, so a task on another machine is followed the same way, as long as it shares the folder.
"""

import contextlib
import functools
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import joblib
import torch
from rich.markup import escape

from orthokit.checks import install
from orthokit.lab.atomic import IDLE, part_of, remove_parts, write
from orthokit.lab.recipes.recipe import check_all
from orthokit.lab.runs.control import follow
from orthokit.lab.runs.logs import Kind
from orthokit.lab.runs.progress import Display
from orthokit.lab.runs.run import LATER, SERVES, Run
from orthokit.lab.runs.summary import DamagedError

__all__ = ["QUEUED", "Pool", "run_all", "train_all", "workers"]

Backend = Literal["local", "ray"]
INTERRUPTED = 130
QUEUED = "queued.toml"
"""The recipe for the process that does the run. Each command writes a file of its own, as two commands may do the same runs."""
LOOK_EVERY = 0.5
Exit = tuple[int, str]
"""Exit status of a run, and the reason if it failed."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The machine or cluster on which many runs compute.

    Args:
        jobs: runs at a time; by default one a core on the CPU, ``per_device`` on each GPU. With ``backend="ray"`` the cluster's
            cores by default.
        per_device: runs at a time on each GPU.
        backend: this machine, or a Ray cluster through Ray's joblib backend.
        address: of the Ray cluster, such as ``"auto"`` or ``"ray://host:10001"``; by default one is started on this machine.
        root: where the images are.
        device: see ``orthokit.lab.training.hardware.Hardware``.
        threads: threads of each run on the CPU.
        log: see :class:`orthokit.lab.runs.logs.Log`.
        validate_every: epochs from one validation to the next.
    """

    jobs: int | None = None
    per_device: int = 1
    backend: Backend = "local"
    address: str | None = None
    root: Path = Path("data")
    device: str = "auto"
    threads: int = 1
    log: Kind | None = None
    validate_every: int = 1

    @property
    def devices(self) -> list[str]:
        """The GPUs of this machine to use, each as often as it takes runs; none for the CPU."""
        if self.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        return names * self.per_device

    @property
    def side_by_side(self) -> int:
        """Runs at a time on this machine."""
        return self.jobs or len(self.devices) or max(1, (os.cpu_count() or 1) // self.threads)

    def command(self, run: Run, recipe: Path) -> list[str]:
        """The command line of a run whose recipe is in that file."""
        folder = run.folder.absolute()  # a link stays one
        options = {
            "--name": folder.parent.name,
            "--out": folder.parent.parent,
            "--seeds": run.seed,
            "--root": self.root.resolve(),
            "--device": self.device,
            "--threads": self.threads,
            "--validate-every": self.validate_every,
            **({} if self.log is None else {"--log": self.log}),
        }
        code = run.recipe.code
        # -P: a run in a folder of somebody else's does not import what lies there.
        command = [sys.executable, "-P", "-m", "orthokit.cli", "train", str(recipe)]
        command += [str(part) for item in options.items() for part in item]
        return [*command, "--code", *map(str, code.folders)] if code and code.folders and run.recipe.local else command


@dataclass
class _Local:
    """Starts commands on this machine, hands out its GPUs, and passes an interruption on."""

    devices: "queue.Queue[str] | None"
    processes: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    stopping: bool = False

    def __call__(self, run: Run, pool: Pool) -> Exit:
        if self.stopping:
            return INTERRUPTED, ""
        device = self.devices.get() if self.devices else None
        try:
            return _execute(run, pool, device, self)
        finally:
            if self.devices and device is not None:
                self.devices.put(device)

    def stop(self) -> None:
        """Pass an interruption on to every process."""
        self.stopping = True
        for process in list(self.processes):
            process.terminate()  # SIGINT is ignored by what a script starts in the background


def _execute(run: Run, pool: Pool, device: str | None = None, local: _Local | None = None) -> Exit:
    """Do a run in a process of its own, with its output at the end of ``log.txt``, and a reason in ``failed.txt`` if it fails.

    The status is ``LATER`` where another command has the run.
    """
    folder = run.folder.absolute()
    recipe, log, failure = part_of(folder / QUEUED), folder / "log.txt", folder / "failed.txt"
    environment = os.environ | {"OMP_NUM_THREADS": str(pool.threads), SERVES: str(os.getpid())}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    try:
        if run.is_held():
            return LATER, ""
        if run.summary() is not None:  # by another command, meanwhile
            return 0, ""
        folder.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        remove_parts(folder / QUEUED, idle=IDLE)
        recipe.write_text(run.recipe.to_toml(), "utf-8")
        with log.open("ab") as output:
            start = output.tell()
            # A session of its own: a Ctrl-C of the terminal is passed on by us, once.
            options: dict[str, Any] = {"env": environment, "stdout": output, "stderr": output, "start_new_session": True}
            status = _wait(subprocess.Popen(pool.command(run, recipe), **options), local)
        if status in (0, LATER):
            return status, ""
        if local is not None and local.stopping:
            return INTERRUPTED, ""  # a process that was still starting may end in any way
        why = _why(status, log.read_bytes()[start:].decode("utf-8", "replace"))
        write(failure, why)
        return status, why
    except (OSError, ValueError) as error:  # such as a full disk, or a folder of another recipe by now
        return 2, str(error)
    finally:
        with contextlib.suppress(OSError):
            recipe.unlink(missing_ok=True)


def _wait(process: "subprocess.Popen[bytes]", local: _Local | None) -> int:
    """The exit status of a process, once it ends or ``local`` stops it."""
    if local is not None:
        local.processes.add(process)
        if local.stopping:
            process.terminate()
    try:
        return process.wait()
    finally:
        if local is not None:
            local.processes.discard(process)


def _why(status: int, output: str) -> str:
    """The reason why a process failed: the signal that killed it, or the last line that it wrote."""
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
    return next(reversed(output.strip().splitlines()), f"exit status {status}")


def _execute_here(work: Callable[[Run], object], run: Run, pool: Pool) -> Exit:
    """Do a run in this process; see :func:`_execute`."""
    torch.set_num_threads(pool.threads)
    try:
        work(run)
    except Exception as error:
        why = " ".join(f"{error}".split()) or type(error).__name__
        with contextlib.suppress(OSError):
            write(run.folder / "failed.txt", why)
        return getattr(error, "status", 2), why
    return 0, ""


def run_all(runs: Sequence[Run], pool: Pool, display: Display, work: Callable[[Run], object] | None = None) -> list[int]:
    """Do what is left of ``runs``; the exit status of each, 0 for those that were finished before.

    Args:
        runs: in the order in which they begin.
        pool: where they compute.
        display: shows them.
        work: does a run in whichever process calls it; it can be pickled. Where it is given, runs are so short that a process
            does many of them. By default each has a process of its own.

    A run that another command trains is left to that command, and taken up if that one leaves it unfinished.

    Raises:
        KeyboardInterrupt: interrupted, after every running one has saved a checkpoint.
        ModuleNotFoundError: ``backend="ray"`` without Ray.
        ValueError: a folder holds a run of another recipe.
    """
    remaining = []
    for run in runs:
        if (summary := run.summary()) is not None:
            display.finish(run, summary, before=True)
        else:
            remaining.append(run)
    if not remaining:
        return [0] * len(runs)
    exits: dict[Path, Exit] = {}
    most = len(remaining)
    execute = _in_workers(pool, most, work) if work else _remote(pool) if pool.backend == "ray" else _local(pool, most)
    with _following(remaining, display), execute as (task, jobs):
        later, busy = remaining, set[Path]()
        while later:
            for run in later:
                if run.folder not in busy and run.is_held():
                    display.say(f"{escape(run.name)} is being trained by another command; waiting for it")
                    busy.add(run.folder)
            while all(run.is_held() for run in later) and not getattr(task, "stopping", False):
                time.sleep(LOOK_EVERY)
            results = joblib.Parallel(n_jobs=jobs)(joblib.delayed(task)(run, pool) for run in later)
            exits |= {run.folder: each for run, each in zip(later, results, strict=True)}
            later = [run for run in later if exits[run.folder][0] == LATER]
    if getattr(task, "stopping", False):
        raise KeyboardInterrupt
    for run in remaining:
        status, why = exits[run.folder]
        is_finished = run.summary() is not None
        if status and not is_finished and not (run.folder / "failed.txt").is_file():
            display.fail(run, why)
        exits[run.folder] = 0 if is_finished else status or 1, why
    return [exits[run.folder][0] if run.folder in exits else 0 for run in runs]


def train_all(
    runs: Sequence[Run],
    pool: Pool,
    display: Display,
    *,
    download: bool = False,
    start: Callable[[Sequence[Run]], object] = lambda runs: None,
) -> int:
    """Do what is left of ``runs``, each in a process of its own; how many failed, those with damaged files among them.

    Args:
        runs: in the order in which they begin.
        pool: where they compute.
        display: shows them.
        download: whether to fetch images that are not there.
        start: called with the runs that are not damaged, once their images are there and their recipes fit.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: a recipe's network does not fit its images, or a folder holds a run of another recipe.
    """
    damage = {run.folder: why for run in runs if (why := run.damage()) is not None}
    sound = [run for run in runs if run.folder not in damage]
    check_all([run.recipe for run in sound if run.summary() is None], pool.root, download=download)
    start(sound)
    with display:
        for run in runs:
            if run.folder in damage:
                display.fail(run, damage[run.folder])
        return len(damage) + sum(status != 0 for status in run_all(sound, pool, display))


@contextlib.contextmanager
def _local(pool: Pool, most: int) -> Iterator[tuple[Any, int]]:
    devices = pool.devices
    slots: queue.Queue[str] = queue.Queue()
    for device in devices:
        slots.put(device)
    task = _Local(slots if devices else None)
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, lambda *_: task.stop()) for number in signals]
    try:
        with joblib.parallel_config("threading"):
            yield task, min(pool.side_by_side, most)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def workers(threads: int) -> Iterator[None]:
    """Send joblib's tasks to processes of this machine that do many tasks each, and that end when this process ends.

    Args:
        threads: threads of each process.

    Raises:
        OSError: one of the processes was killed.
    """
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=threads, initializer=follow, initargs=(os.getpid(),)):
            yield
    except BrokenProcessPool:
        raise OSError("a process was killed (out of memory?); the same command goes on, perhaps with fewer --jobs") from None


@contextlib.contextmanager
def _in_workers(pool: Pool, most: int, work: Callable[[Run], object]) -> Iterator[tuple[Any, int]]:
    with workers(pool.threads):
        yield functools.partial(_execute_here, work), min(pool.side_by_side, most)


@contextlib.contextmanager
def _remote(pool: Pool) -> Iterator[tuple[Any, int]]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"--backend ray needs Ray: {install('ray')}", name="ray") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's, on its own defaults
        ray.init(address=pool.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        register_ray()
        gpus = ray.cluster_resources().get("GPU", 0)
        options = {"num_gpus": 1 / pool.per_device} if gpus and pool.device in ("auto", "cuda") else {"num_cpus": pool.threads}
        jobs = pool.jobs or max(1, int(gpus * pool.per_device if gpus else ray.cluster_resources()["CPU"] // pool.threads))
        try:
            with joblib.parallel_config("ray", ray_remote_args=options):
                yield _execute, jobs
        finally:
            ray.shutdown()


def _rows(run: Run) -> list[dict[str, Any]]:
    """Epochs to show; none from a damaged file, which the run itself writes anew."""
    try:
        return run.metrics()
    except DamagedError:
        return []


@contextlib.contextmanager
def _following(runs: Sequence[Run], display: Display) -> Iterator[None]:
    """Show what appears in the folders of ``runs``."""
    counts, final, end = {id(run): len(_rows(run)) for run in runs}, set[int](), threading.Event()

    def look() -> None:
        for run in runs:
            if id(run) in final:
                continue
            rows = _rows(run)
            for row in rows[counts[id(run)] :]:
                display.row(run, row)
            counts[id(run)] = max(len(rows), counts[id(run)])
            failure = run.folder / "failed.txt"
            if (why := run.damage()) is not None:
                display.fail(run, why)
            elif (summary := run.summary()) is not None:
                display.finish(run, summary)
            elif failure.is_file():
                display.fail(run, failure.read_text("utf-8"))
            else:
                continue
            final.add(id(run))

    def follow() -> None:
        while not end.wait(LOOK_EVERY):
            with contextlib.suppress(OSError, ValueError):  # of a folder that somebody is changing; the last look tells
                look()

    for run in runs:
        (run.folder / "failed.txt").unlink(missing_ok=True)
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        end.set()
        follower.join()
        look()
