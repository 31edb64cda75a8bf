"""Schemas of the files that a run leaves, against which everything read from a run's folder is checked first.

A run's folder may be somebody else's, or damaged. Whatever lies there, reading it ends in plain data of these types, or in a
:class:`DamagedError` of one line that names the file and the key. Keys that a schema does not name may hold any bounded data.
"""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orthokit.checks import printable

__all__ = [
    "HUGE",
    "SEEDS",
    "Accuracy",
    "Attacks",
    "Corruptions",
    "DamagedError",
    "Divergence",
    "Environment",
    "Epoch",
    "Evaluation",
    "Features",
    "HistoryRow",
    "Noise",
    "Part",
    "Parts",
    "Place",
    "Record",
    "Resumable",
    "Scores",
    "Seed",
    "Spectrum",
    "Summary",
    "parse_json",
    "read",
    "read_lines",
    "read_text",
    "validate",
]

LARGEST = 2**26
"""Most bytes of a document; a summary with its history has 20,000."""
DEEPEST = 32
"""Most tables and lists inside each other."""
DIGITS = 19
"""Most digits of an integer."""
HUGE = 1e30
"""Larger numbers, infinite ones and NaN are not measurements."""


class DamagedError(ValueError):
    """A file of a run is not what a run writes."""


Number = int | float
"""A number; readers leave out those that are NaN, infinite or larger than :data:`HUGE`."""
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
SEEDS = 2**32
"""Seeds are below this, as numpy wants them."""
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Strength = Annotated[float, Field(gt=0, lt=1e6)]
Totals = dict[str, dict[str, Number | None]]
"""Near-orthogonality by part of the network."""


class Record(BaseModel):
    """A table of a file."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Scores(Record):
    """The scores of a network on some images."""

    accuracy: Share
    loss: Number | None = None


class Environment(Record):
    """``environment.json``: the machine and versions with which a run computed."""

    versions: dict[str, str | None] | None = None
    processor: str | None = None
    device: str | None = None
    commit: str | None = None
    precision: str | None = None
    cores: Count | None = None
    ranks: Count | None = None
    threads: Count | None = None


class Resumable(Environment):
    """``environment.json`` of a run that can go on: the numerics to go on with are there."""

    precision: str
    threads: int = Field(ge=1)


class Place(Record):
    """The arm and panel of a study to which a run belongs."""

    arm: str | None = None
    panel: str | None = None


class HistoryRow(Record):
    """A line of a summary's history."""

    epoch: Count
    validation: Share | None
    under: Annotated[float, Field(ge=0, le=2)] | None = None
    over: Annotated[float, Field(ge=0, le=2)] | None = None


class Epoch(Record):
    """A line of ``metrics.jsonl``."""

    epoch: Count
    validation: Scores | None
    orthogonality: dict[str, dict[str, Number]]
    train: Scores | None = None
    images_per_second: Number = 0.0


class Part(Record):
    """A part of an evaluation."""

    settings: dict[str, Any]


class Accuracy(Part):
    """Accuracy and calibration."""

    accuracy: Share | None = None
    nll: Number | None = None
    ece: Number | None = None


class Attacks(Part):
    """Accuracy under attacks, by their strength."""

    linf: list[Strength] = []
    l2: list[Strength] = []
    fgsm: list[Share] = []
    pgd: list[Share] = []
    pgd_l2: list[Share] = []


class Noise(Part):
    """Accuracy under noise, by its strength."""

    sigma: list[Strength] = []
    accuracy: list[Share] = []


class Corruptions(Part):
    """Accuracy by kind and severity of corruption."""

    accuracy: dict[str, Annotated[list[Share], Field(min_length=1)]] = {}


class Spectrum(Record):
    """The number of directions that the features of a layer use."""

    features: Number | None = None
    effective_rank: Number | None = None
    participation_ratio: Number | None = None
    mean_correlation: Number | None = None
    nc1: Number | None = None


class Features(Part):
    """Spectra of features, of the penultimate layer and stage by stage."""

    penultimate: Spectrum = Spectrum()
    stages: dict[str, Spectrum] = {}


class Parts(Record):
    """The parts of an evaluation."""

    accuracy: Accuracy | None = None
    attacks: Attacks | None = None
    noise: Noise | None = None
    corruptions: Corruptions | None = None
    features: Features | None = None
    orthogonality: Part | None = None
    __pydantic_extra__: dict[str, Part] = Field(init=False)


class Evaluation(Record):
    """``evaluation.json``."""

    version: Literal[1] = 1
    weights: str
    of: dict[str, Any] | None = None
    parts: Parts


class Divergence(Record):
    """``diverged.json``."""

    version: Literal[1] = 1
    seed: Seed
    why: str
    recipe: dict[str, Any]


class Summary(Record):
    """``summary.json``: the result of a run; kept by a study, with its evaluation and a few columns of its history."""

    version: Literal[1] = 1
    recipe: dict[str, Any]
    seed: Seed
    test: Scores
    validation: Scores | None
    train: Scores | None = None
    orthogonality: Totals
    ranks: dict[str, Count] | None = None
    fingerprint: str
    seconds: Number
    images_per_second: Number
    penalty_share: Number
    environment: Environment | None = None
    study: Place | None = None
    evaluation: Parts | None = None
    history: list[HistoryRow] | None = None


def read(schema: type[Record], path: Path) -> dict[str, Any]:
    """The plain data in a JSON file of a run.

    Raises:
        DamagedError: the file does not hold what ``schema`` asks for.
        FileNotFoundError: there is none.
    """
    return validate(schema, parse_json(read_text(path), path), path)


def read_lines(schema: type[Record], path: Path) -> list[dict[str, Any]]:
    """The plain data on each line of a file with a JSON object a line; see :func:`read`."""
    lines = read_text(path).splitlines()
    return [validate(schema, parse_json(line, path), f"{path}, line {k}", path) for k, line in enumerate(lines, 1)]


def validate(schema: type[Record], value: Any, source: object, path: Path | None = None) -> dict[str, Any]:
    """``value``, from a document of ``source``, if it fits ``schema``; else raise ``DamagedError``."""
    remove = f"remove {'it' if path is None else path.name} to run again"
    if not isinstance(value, dict):
        raise DamagedError(f"{source} is not what a run writes (a table is wanted; got {printable(repr(value), 60)}); {remove}")
    try:
        schema.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        suffix = "" if problem["type"] == "missing" else f"; got {printable(repr(problem['input']), 60)}"
        raise DamagedError(
            f"{source} is not what a run writes ({printable(key, 100)}: {problem['msg']}{suffix}); {remove}"
        ) from None
    return value


def parse_json(text: str, source: object) -> Any:
    """The value of a JSON text that a run may have written.

    Raises:
        DamagedError: the text is not JSON, or has keys that occur twice, large integers, lone surrogates or deep nesting.
    """
    try:
        value = json.loads(text, object_pairs_hook=_table, parse_int=_integer)
        _check_depth(value)
    except RecursionError:
        raise DamagedError(
            f"{source} is damaged (more than {DEEPEST} tables inside each other); remove it to run again"
        ) from None
    except ValueError as error:
        raise DamagedError(f"{source} is damaged ({error}); remove it to run again") from None
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {printable(twice, 60)} occurs twice")
    return table


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for each in level for item in _inside(each)]
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} tables inside each other")


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"half a character in {printable(value, 60)}") from None
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, dict):
        yield from value
        yield from value.values()


def read_text(path: Path, most: int = LARGEST) -> str:
    """The UTF-8 text of a regular file of bounded size, with or without a byte order mark.

    Raises:
        DamagedError: something else is there.
        FileNotFoundError: nothing is.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is damaged ({_kind(status.st_mode)}, not a file); remove it to run again")
        if status.st_size > most:
            raise DamagedError(f"{path} is damaged ({status.st_size:,} bytes, of at most {most:,}); remove it to run again")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} is damaged (it is not UTF-8: {error}); remove it to run again") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None


def _kind(mode: int) -> str:
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((name for name, test in kinds.items() if test(mode)), "a device")
