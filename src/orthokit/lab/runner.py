"""Many runs: joblib tasks, each the command ``orthokit train`` in a process of its own.

A process of its own has its own threads and device, and may die (of memory, say) without taking the others along. What a run has
to tell is in its folder, so a task on another machine is followed the same way, as long as it shares the folder.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import joblib
import torch

from orthokit.lab.display import Display
from orthokit.lab.files import write
from orthokit.lab.record import Run
from orthokit.lab.watch import SERVES

Backend = Literal["local", "ray"]
INTERRUPTED = 130
QUEUED = ".queued.toml"
"""The recipe for the process that does the run; ``recipe.toml`` is its own to write."""
LOOK_EVERY = 0.5


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where many runs compute.

    Args:
        jobs: runs at a time; by default one a core on the CPU, ``per_device`` on each GPU. With ``backend="ray"`` the cluster's
            cores by default.
        per_device: runs at a time on each GPU.
        backend: this machine, or a Ray cluster through Ray's joblib backend.
        address: of the Ray cluster, such as ``"auto"`` or ``"ray://host:10001"``; by default one is started on this machine.
        root: where the images are.
        device: as of ``orthokit.lab.hardware.Hardware``.
        threads: of each run on the CPU.
    """

    jobs: int | None = None
    per_device: int = 1
    backend: Backend = "local"
    address: str | None = None
    root: Path = Path("data")
    device: str = "auto"
    threads: int = 1

    @property
    def devices(self) -> list[str]:
        """The GPUs of this machine that are to be used, each as often as it takes runs; none for the CPU."""
        if self.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        return names * self.per_device

    def command(self, run: Run) -> list[str]:
        """The command line of a run whose recipe is in its folder."""
        folder = run.folder.absolute()  # a link stays one
        options = {
            "--name": folder.parent.name,
            "--out": folder.parent.parent,
            "--seeds": run.seed,
            "--root": self.root.resolve(),
            "--device": self.device,
            "--threads": self.threads,
        }
        recipe, code = str(folder / QUEUED), run.recipe.code
        # -P: a run in a folder of somebody else's does not import what lies there.
        command = [sys.executable, "-P", "-m", "orthokit.cli", "train", recipe]
        command += [str(part) for item in options.items() for part in item]
        return [*command, "--code", *map(str, code.folders)] if code and code.folders and run.recipe.own else command


@dataclass
class _Local:
    """Starts commands on this machine, hands out its GPUs, and passes an interruption on."""

    threads: int
    devices: "queue.Queue[str] | None"
    processes: set["subprocess.Popen[str]"] = field(default_factory=set)
    stopping: bool = False

    def __call__(self, command: list[str], folder: Path) -> int:
        if self.stopping:
            return INTERRUPTED
        device = self.devices.get() if self.devices else None
        try:
            return _execute(command, folder, self.threads, device, self)
        finally:
            if self.devices and device is not None:
                self.devices.put(device)

    def stop(self) -> None:
        """Pass it on."""
        self.stopping = True
        for process in list(self.processes):
            process.terminate()  # SIGINT is ignored by what a script starts in the background


def _execute(command: list[str], folder: Path, threads: int, device: str | None = None, local: _Local | None = None) -> int:
    """Run a command, its output into ``log.txt``; its exit status, which is noted in ``failed.txt`` unless it is 0."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), SERVES: str(os.getpid())}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failed.txt").unlink(missing_ok=True)
    with (folder / "log.txt").open("w") as log:
        # A session of its own: a Ctrl-C of the terminal is passed on by us, once.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, text=True)
    if local is not None:
        local.processes.add(process)
        if local.stopping:
            process.terminate()
    try:
        status = process.wait()
    finally:
        if local is not None:
            local.processes.discard(process)
    if status != 0 and local is not None and local.stopping:
        return INTERRUPTED  # while still starting it may have died of it in any way
    if status != 0:
        lines = (folder / "log.txt").read_text("utf-8", "replace").strip().splitlines()
        killed = f"killed by signal {-status}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
        write(folder / "failed.txt", killed if status < 0 else (lines[-1] if lines else f"exit status {status}"))
    return status


def run_all(runs: Sequence[Run], pool: Pool, display: Display) -> list[int]:
    """Do what is left of ``runs``; the exit status of each, 0 for those that were finished before.

    Raises:
        KeyboardInterrupt: interrupted, after every running one has saved a checkpoint.
        ModuleNotFoundError: ``backend="ray"`` without Ray.
        ValueError: a folder holds a run of another recipe.
    """
    left = []
    for run in runs:
        if (summary := run.summary()) is not None:
            display.done(run, summary, before=True)
            continue
        write(run.folder / QUEUED, run.recipe.to_toml())
        left.append(run)
    if not left:
        return [0] * len(runs)
    execute = _remote(pool) if pool.backend == "ray" else _local(pool, len(left))
    with _followed(left, display), execute as (task, jobs):
        found = joblib.Parallel(n_jobs=jobs)(joblib.delayed(task)(pool.command(run), run.folder.absolute()) for run in left)
    for run in left:
        (run.folder / QUEUED).unlink(missing_ok=True)
    if getattr(task, "stopping", False):
        raise KeyboardInterrupt
    codes = {run.folder: code or int(run.summary() is None) for run, code in zip(left, found, strict=True)}
    return [codes.get(run.folder, 0) for run in runs]


@contextlib.contextmanager
def _local(pool: Pool, most: int) -> Iterator[tuple[Any, int]]:
    devices = pool.devices
    slots: queue.Queue[str] = queue.Queue()
    for device in devices:
        slots.put(device)
    jobs = pool.jobs or len(devices) or max(1, (os.cpu_count() or 1) // pool.threads)
    task = _Local(pool.threads, slots if devices else None)
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.signal(number, lambda *_: task.stop()) for number in signals]
    try:
        with joblib.parallel_config("threading"):
            yield task, min(jobs, most)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _remote(pool: Pool) -> Iterator[tuple[Any, int]]:
    try:
        import ray
        from ray.util.joblib import register_ray
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--backend ray needs Ray: pip install 'orthokit[ray]'", name="ray") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's, on its own defaults
        ray.init(address=pool.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        register_ray()
        gpus = ray.cluster_resources().get("GPU", 0)
        options = {"num_gpus": 1 / pool.per_device} if gpus and pool.device in ("auto", "cuda") else {"num_cpus": pool.threads}
        jobs = pool.jobs or max(1, int(gpus * pool.per_device if gpus else ray.cluster_resources()["CPU"] // pool.threads))
        try:
            with joblib.parallel_config("ray", ray_remote_args=options):
                yield _Remote(pool.threads), jobs
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class _Remote:
    threads: int

    def __call__(self, command: list[str], folder: Path) -> int:
        return _execute(command, folder, self.threads)


@contextlib.contextmanager
def _followed(runs: Sequence[Run], display: Display) -> Iterator[None]:
    """Show what appears in the folders of ``runs``."""
    seen, ended, done = {id(run): len(run.metrics()) for run in runs}, set[int](), threading.Event()

    def look() -> None:
        for run in runs:
            if id(run) in ended:
                continue
            rows = run.metrics()
            for row in rows[seen[id(run)] :]:
                display.row(run, row)
            seen[id(run)] = max(len(rows), seen[id(run)])
            failed = run.folder / "failed.txt"
            if (summary := run.summary()) is not None:
                display.done(run, summary)
            elif failed.is_file():
                display.fail(run, failed.read_text("utf-8"))
            else:
                continue
            ended.add(id(run))

    def follow() -> None:
        while not done.wait(LOOK_EVERY):
            with contextlib.suppress(OSError, ValueError):  # of a folder that somebody is changing; the last look tells
                look()

    for run in runs:
        (run.folder / "failed.txt").unlink(missing_ok=True)
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()
        look()
