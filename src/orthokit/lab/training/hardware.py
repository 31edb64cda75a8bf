"""The hardware of a run: Lightning Fabric set up, and a record of the machine."""

import functools
import logging
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import orthokit
from orthokit.lab.training.fabric import Fabric
from orthokit.lab.training.fabric import __version__ as fabric_version

__all__ = ["Hardware", "environment", "fast_bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The devices and processes on which a run computes.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
        devices: processes on this machine, one a device; ``torchrun`` decides where it is used.
        strategy: how the processes share the work, a name of Fabric's; ``"auto"`` is DistributedDataParallel for more than one.
        threads: threads of each process on the CPU; PyTorch's choice by default.

    Raises:
        ValueError: the device is not there, or Fabric knows no such strategy.
    """

    device: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    threads: int | None = None

    def fabric(self, precision: str) -> Fabric:
        """Fabric, launched."""
        here, everywhere = (int(os.environ.get(name, 0)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if precision == "auto":
            precision = "bf16-mixed" if fast_bfloat16(self.device) else "32-true"
        for name in (
            "lightning_fabric",
            "lightning.fabric",
            "lightning.pytorch",
        ):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            fabric = Fabric(
                accelerator=self.device,
                devices=here or self.devices,
                num_nodes=everywhere // here if here else 1,
                strategy="ddp" if self.strategy == "auto" and max(everywhere, self.devices) > 1 else self.strategy,
                precision=precision,
            )
        except (RuntimeError, ImportError) as error:
            suffix = "" if self.strategy == "auto" else f" with --strategy {self.strategy}"
            raise ValueError(f"--device {self.device}{suffix} cannot be used here: {error}") from None
        fabric.launch()
        return fabric


def fast_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32, rather than emulating it."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        return False
    # Intel's vector units without AMX multiply bfloat16 at float32's peak: a Xeon trained at .7 to .8 of float32's speed.
    return _supports("amx_tile") or (_supports("avx512_bf16") and "Intel" not in _processor())


def _supports(instructions: str) -> bool:
    # Private to torch 2.6 ... 2.13, hence the detour: where the name is gone, float32 is always right.
    test = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return test is not None and test()


def environment(fabric: Fabric) -> dict[str, Any]:
    """Versions, hardware, numerics and the commit of this package, for the record of a run."""
    device = fabric.device
    versions = {name: version(name) for name in ("orthokit", "torch", "numpy")}
    return {
        "versions": {"python": platform.python_version(), "lightning": fabric_version} | versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": fabric.world_size,
        "precision": fabric._precision.precision,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
"""Instruction sets by which PyTorch and oneDNN choose kernels, and with them how sums are rounded."""


def _processor() -> str:
    # Names that virtual machines give a processor hide AMX.
    return _cpuinfo().get("model name", platform.processor() or platform.machine()) + ", AMX" * _supports("amx_tile")


def _cpu() -> dict[str, Any]:
    """Vendor, family, model and vector instructions of the processor, which its name may hide."""
    fields = _cpuinfo()
    flags = fields.get("flags", fields.get("Features", "")).split()
    keys = {
        "vendor": ("vendor_id", "CPU implementer"),
        "family": ("cpu family", "CPU architecture"),
        "model": ("model", "CPU part"),
    }
    identity = {key: next((fields[name] for name in names if name in fields), None) for key, names in keys.items()}
    return {"machine": platform.machine(), **identity, "instructions": [each for each in INSTRUCTIONS if each in flags]}


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The fields of ``/proc/cpuinfo`` for the first processor; none without Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _commit() -> str | None:
    """The commit of this package where it is run from a clone, marked where files differ from it."""
    folder = Path(orthokit.__file__).parent

    def git(*arguments: str) -> str:
        # A repository's own settings may name a program that watches its files: it is not started.
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a clone that merely contains site-packages does not count
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
