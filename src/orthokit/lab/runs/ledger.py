"""The ledger: a record of each finished run, by recipe and seed, in text files that are small enough to commit.

``<folder>/<digest>.jsonl`` holds the runs of one recipe, a line a seed. Its first line holds the recipe and what runs of one
recipe have in common; the line of a seed holds only what differs from that. Files are replaced whole, under a lock, so that
processes which finish runs at once lose none. In git, ``merge=union`` joins the lines of two branches.

A run belongs to its recipe and seed, not to a study: every study that asks for the same run reads the same line.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import Field

from orthokit.lab.atomic import write
from orthokit.lab.recipes.recipe import Recipe, differences
from orthokit.lab.runs.results import Result, result_of
from orthokit.lab.runs.run import SUMMARY
from orthokit.lab.runs.summary import DamagedError, Record, Seed, Summary, parse_json, read_text, validate

__all__ = ["Divergent", "Head", "Ledger", "entries", "is_ledger"]

VERSION = 1
LOCK = ".lock"
SHARED = ("recipe", "ranks", "parameters", "flops", "images", "fingerprint", "environment", "layers")
"""Keys that the runs of a recipe have in common, if they are of one machine and one commit."""
OWN = ("name", "study")
"""Keys that belong to the folder of a run, not to its recipe and seed."""
LOCAL = ("platform",)
"""Keys of an environment that name the machine."""


class Head(Record):
    """The first line of a file."""

    version: int = Field(ge=1, le=VERSION)
    recipe: dict[str, Any]


class Divergent(Record):
    """The line of a seed with which training could not go on."""

    seed: Seed
    diverged: str


@dataclass(frozen=True)
class _File:
    """The lines of a file: for each seed a summary, or why training diverged; and the lines that could not be read."""

    head: Mapping[str, Any]
    runs: Mapping[int, Mapping[str, Any]]
    damage: Mapping[str, str] = field(default_factory=dict)
    """Reasons, by the line as it stands."""


@dataclass(frozen=True)
class Ledger:
    """The runs in a folder.

    >>> from pathlib import Path
    >>> from orthokit.lab.runs.ledger import Ledger
    >>> Ledger(Path("nowhere")).all()
    []
    """

    folder: Path

    def file(self, recipe: Recipe) -> Path:
        """The file with the runs of a recipe."""
        return self.folder / f"{recipe.digest}.jsonl"

    def get(self, recipe: Recipe, seed: int) -> Result | None:
        """The run of this recipe and seed, or None if there is none, or if it diverged.

        Raises:
            DamagedError: the file of the recipe is not a ledger's, or holds another recipe. Of a damaged line see
                :meth:`damage`.
        """
        file = self.file(recipe)
        run = _read(file).runs.get(seed)
        if run is None or "diverged" in run:
            return None
        result = _result(run, file)
        if result.recipe != recipe:
            raise DamagedError(f"{file} holds runs of another recipe ({differences(result.recipe, recipe)}); remove it")
        return result

    def divergence(self, recipe: Recipe, seed: int) -> str | None:
        """The reason why training this recipe with this seed could not go on; None if it could."""
        return _read(self.file(recipe)).runs.get(seed, {}).get("diverged")

    def of(self, recipes: Iterable[Recipe], seeds: Sequence[int]) -> list[Result]:
        """The runs of these recipes and seeds, as far as there are any."""
        runs = (self.get(recipe, seed) for recipe in recipes for seed in seeds)
        return [run for run in runs if run is not None]

    def all(self) -> list[Result]:
        """Every run, recipe by recipe."""
        return [run for path in sorted(self.folder.glob("*.jsonl")) for run in entries(path)[0]]

    def damage(self, recipes: Iterable[Recipe]) -> list[str]:
        """A sentence for each line of these recipes' files that could not be read."""
        return [why for path in dict.fromkeys(map(self.file, recipes)) for why in _read(path).damage.values()]

    def put(self, summary: Mapping[str, Any]) -> None:
        """Keep the result of a run: ``summary.json`` with its ``evaluation`` and ``history``.

        Evaluations of the same training with other settings stay beside the new ones. Another training of the same recipe and
        seed replaces the one that is there, unless that one was evaluated further.

        Raises:
            ValueError: the summary is not what a run writes.
        """
        validate(Summary, dict(summary), "the summary")
        recipe, seed = Recipe.of(summary["recipe"]), summary["seed"]
        run = {key: value for key, value in summary.items() if key not in OWN}
        run["recipe"] = recipe.to_dict()
        run["environment"] = {key: value for key, value in (run.get("environment") or {}).items() if key not in LOCAL}
        self._write(recipe, seed, run)

    def put_divergence(self, recipe: Recipe, seed: int, why: str) -> None:
        """Keep the reason why training could not go on."""
        self._write(recipe, seed, {"seed": seed, "diverged": why})

    def _write(self, recipe: Recipe, seed: int, run: dict[str, Any]) -> None:
        path = self.file(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            file = _read(path)
            runs = {**file.runs, seed: _join(file.runs.get(seed), run)}
            if runs[seed] == file.runs.get(seed):
                return
            head = file.head or {"version": VERSION} | {key: run[key] for key in SHARED if key in run} | {
                "recipe": recipe.to_dict()
            }
            lines = [json.dumps(_less(runs[each], head)) for each in sorted(runs)]
            write(path, "\n".join([json.dumps(head), *lines, *file.damage]) + "\n")


def _less(run: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a run: only what differs from the head. None stands for what the head has and the run lacks."""
    if "diverged" in run:
        return dict(run)
    missing = {key: None for key in SHARED if key in head and key not in run}
    return {key: value for key, value in run.items() if key not in head or head[key] != value} | missing


def entries(path: Path) -> tuple[list[Result], list[str]]:
    """The runs of a file, and a sentence for each line that cannot be read."""
    file = _read(path)
    runs = [_result(run, path) for _, run in sorted(file.runs.items()) if "diverged" not in run]
    return runs, list(file.damage.values())


def _result(run: Mapping[str, Any], path: Path) -> Result:
    """The run of a line, as if it lay in a folder of its own below the recipe's digest."""
    return result_of(dict(run), path.with_suffix("") / str(run["seed"]) / SUMMARY)


def is_ledger(path: Path) -> bool:
    """Whether a file of JSON lines is a ledger's, by its first line."""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline(2**20))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(head, dict) and {"version", "recipe"} <= set(head)


def _join(old: Mapping[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """One record made of two of the same recipe and seed."""
    if old is None or "diverged" in old:
        return new
    if "diverged" in new:  # on another machine it did not
        return dict(old)
    before, after = old.get("evaluation") or {}, new.get("evaluation") or {}
    if any(old[key] != new[key] for key in ("test", "validation")):  # another training
        return dict(old) if len(before) > len(after) else new
    otherwise = {part: list(values) for part, values in (old.get("otherwise") or {}).items()}
    for part, value in before.items():
        if part in after and value["settings"] != after[part]["settings"]:
            otherwise.setdefault(part, []).append(value)
    for part, value in after.items():
        if part in otherwise:
            otherwise[part] = [each for each in otherwise[part] if each["settings"] != value["settings"]]
    record = new | {"evaluation": {**before, **after}}
    return record | ({"otherwise": rest} if (rest := {part: each for part, each in otherwise.items() if each}) else {})


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).splitlines() if line.strip()] if path.is_file() else []


def _read(path: Path) -> _File:
    try:
        state = path.stat()
    except FileNotFoundError:
        return _File({}, {})
    return _parse(path, (state.st_ino, state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=4096)
def _parse(path: Path, state: tuple[int, ...]) -> _File:
    """The file as it was in this ``state``."""
    heads: list[dict[str, Any]] = []
    runs: dict[int, Mapping[str, Any]] = {}
    damage: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        source = f"{path}, line {number}"
        try:
            value = parse_json(line, source)
            if not heads or (isinstance(value, dict) and "version" in value):
                heads.append(validate(Head, value, source, path))
                continue
            seed, run = _run(heads, value, source, path)
            runs[seed] = _join(runs.get(seed), dict(run))
        except DamagedError as error:
            if not heads:
                raise
            damage[line] = f"{str(error).rpartition('; remove ')[0] or error}; mend or remove the line"
    if not heads:
        raise DamagedError(f"{path} is empty; remove it")
    return _File(heads[0], runs, damage)


def _run(heads: Sequence[dict[str, Any]], value: Any, source: str, path: Path) -> tuple[int, Mapping[str, Any]]:
    """The seed and the record of a line, below the last of ``heads``; a merge in git may leave several."""
    if isinstance(value, dict) and "diverged" in value:
        return validate(Divergent, value, source, path)["seed"], value
    if isinstance(value, dict):
        value = {key: item for key, item in heads[-1].items() if key != "version" and value.get(key, item) is not None} | {
            key: item for key, item in value.items() if not (item is None and key in SHARED)
        }
    run = validate(Summary, value, source, path)
    return run["seed"], run
