"""Checks of whether arms may be compared: differences besides the declared factor, equal arms, choices by test accuracy."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from orthokit.lab.comparison.metrics import METRICS, Metric
from orthokit.lab.own import is_own
from orthokit.lab.recipes.sections import NetworkSection
from orthokit.lab.runs.results import Result, Row
from orthokit.layers import select
from orthokit.penalties import Disentangled
from orthokit.spec import penalty_of, where_of

__all__ = [
    "Panel",
    "flags",
    "gaps",
    "incomparable_parts",
    "list_names",
    "missing_numbers",
    "plain",
    "refusals",
    "repetitions",
    "undeclared_differences",
    "under",
]


@dataclass(frozen=True, eq=False)
class Panel:
    """Runs that should differ in the factor alone: the results of each arm, by seed."""

    name: str
    values: dict[str, Any]
    """Values of the keys that tell panels apart, such as ``network.depth``."""
    arms: dict[str, tuple[Result, ...]]

    @property
    def results(self) -> list[Result]:
        """The results of all arms."""
        return [result for _, result in self]

    @property
    def recorded(self) -> bool:
        """Whether its runs are the lab's, with recipe, images and environment on record."""
        return not any(isinstance(result, Row) for result in self.results)

    @property
    def depth(self) -> int | None:
        """The depth of the network, if the recipe has one."""
        if not self.recorded:
            return None
        depth = self.results[0].recipe.to_dict()["network"].get("depth")
        return depth if isinstance(depth, int) else None

    def __iter__(self) -> Iterator[tuple[str, Result]]:
        """Pairs of arm and result."""
        return ((arm, result) for arm, results in self.arms.items() for result in results)

    def by(self, look: Callable[[Result], Any]) -> dict[Any, list[str]]:
        """The values that ``look`` finds, and the arms that have them."""
        arms_by_value: dict[Any, list[str]] = {}
        for arm, result in self:
            arms_by_value.setdefault(look(result), []).append(arm)
        return {value: list(dict.fromkeys(arms)) for value, arms in arms_by_value.items()}


def under(key: str, sections: Iterable[str]) -> bool:
    """Whether a recipe's key is one of ``sections``, or in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def plain(value: str | None) -> str:
    """A value of ``orthokit.lab.recipes.recipe.flatten`` for a reader."""
    return "absent" if value is None else value.strip('"')


def list_names(names: Sequence[str], most: int = 4) -> str:
    """Some names, those with a comma quoted, and how many more.

    >>> from orthokit.lab.comparison.comparability import list_names
    >>> list_names(["none", "so, scaled", "strict"], most=2)
    'none, "so, scaled" and 1 more'
    """
    text = ", ".join(f'"{name}"' if "," in name else name for name in names[:most])
    return text + (f" and {len(names) - most} more" if len(names) > most else "")


def _arms_text(values: Mapping[Any, Iterable[str]]) -> str:
    return "; ".join(f"{value} in {list_names(list(arms))}" for value, arms in values.items())


def undeclared_differences(flat: Sequence[tuple[str, dict[str, str]]], factor: Sequence[str]) -> list[str]:
    """A sentence for each key, besides the factor, in which the flattened recipes of arms differ."""
    sentences = []
    for key in dict.fromkeys(key for _, each in flat for key in each if not under(key, factor)):
        values: dict[str, dict[str, None]] = {}
        for arm, each in flat:
            values.setdefault(plain(each.get(key)), {})[arm] = None
        if len(values) > 1:
            sentences.append(
                f"runs differ in {key}, which is not the declared factor ({', '.join(factor)}): {_arms_text(values)}"
            )
    return sentences


def refusals(panel: Panel, factor: Sequence[str]) -> list[str]:
    """Sentences on what makes the comparison in a panel meaningless."""
    advice = "declare it with --factor, keep such runs apart with --by, or see it flagged with --anyway"
    sentences = [f"{each}; {advice}" for each in undeclared_differences([(arm, result.flat) for arm, result in panel], factor)]
    if len(values := panel.by(lambda result: result.summary["fingerprint"][:12])) > 1:
        sentences.append(f"runs are of different images (fingerprint): {_arms_text(values)}")
    for arm, results in panel.arms.items():
        settings = [{key: value for key, value in r.flat.items() if under(key, factor)} for r in results]
        if differing := [
            key for key in dict.fromkeys(key for each in settings for key in each) if len({e.get(key) for e in settings}) > 1
        ]:
            several = list(dict.fromkeys(plain(each.get(differing[0])) for each in settings))
            sentences.append(f"{arm} is the name of more than one arm: {differing[0]} is {' and '.join(several)}")
    return [f"{panel.name}: {each}" for each in sentences]


def repetitions(results: Iterable[Result]) -> list[str]:
    """A sentence for each recipe and seed that has several runs, which are one run."""
    folders: dict[tuple[str, int], list[str]] = {}
    for result in results:
        folders.setdefault((result.recipe.to_toml(), result.seed), []).append(str(result.source.parent))
    return [f"the same run counts {len(names)} times: {list_names(names)}" for names in folders.values() if len(names) > 1]


def flags(panel: Panel, baseline: str) -> list[str]:
    """Sentences that a reader must know before believing a comparison in a panel."""
    sentences = []
    for words, reader in NUMERICS.items():
        if len(values := panel.by(partial(_environment_text, reader))) > 1:
            sentences.append(f"different {words}, which can move a result as far as another seed does: {_arms_text(values)}")
    sentences += _commits(panel)
    return [*_in(panel, [*_equal(panel), *_selections(panel)]), *gaps(panel, baseline), *_in(panel, sentences)]


def gaps(panel: Panel, baseline: str) -> list[str]:
    """Sentences on what arms of a panel lack: the baseline, or seeds that others have."""
    sentences = []
    if baseline not in panel.arms:
        sentences.append(f"no run of the baseline {baseline}, hence no differences")
    seeds = {arm: " ".join(str(result.seed) for result in results) for arm, results in panel.arms.items()}
    if len(set(seeds.values())) > 1:
        sentences.append("arms have different seeds: " + "; ".join(f"{each} in {arm}" for arm, each in seeds.items()))
    return _in(panel, sentences)


def _in(panel: Panel, sentences: Iterable[str]) -> list[str]:
    return [f"{panel.name}: {each}" for each in sentences]


Environment = Mapping[str, Any]


def _environment_text(reader: Callable[[Environment], object], result: Result) -> str:
    return str(reader(result.summary["environment"]))


def _version(package: str, environment: Environment) -> object:
    versions = environment.get("versions")
    return versions.get(package) if isinstance(versions, Mapping) else None


def _device(environment: Environment) -> object:
    """The processor or accelerator by name, and of a processor what its name may hide: family, model and instructions."""
    if environment.get("device") != "cpu":
        return environment.get("device")
    if not isinstance(cpu := environment.get("cpu"), Mapping):
        return environment.get("processor")
    instructions = "+".join(cpu.get("instructions") or ["no vector instructions"])
    return f"{environment.get('processor')} (family {cpu.get('family')}, model {cpu.get('model')}, {instructions})"


def _commits(panel: Panel) -> list[str]:
    """A sentence, where runs of one seed are of different commits, so that arms differ in code too."""
    by_seed: dict[int, set[str]] = {}
    for _, result in panel:
        by_seed.setdefault(result.seed, set()).add(_commit(result))
    if all(len(commits) == 1 for commits in by_seed.values()):
        return []
    arms: dict[tuple[str, ...], list[str]] = {}
    for arm, results in panel.arms.items():
        arms.setdefault(tuple(dict.fromkeys(map(_commit, results))), []).append(arm)
    apart = "arms share no commit of orthokit: what the code changed between them cannot be told from what the arms do"
    partly = "arms were run at different commits of orthokit, and code that changed may round otherwise"
    reason = partly if set.intersection(*map(set, arms)) else apart
    return [f"{reason}: {_arms_text({list_names(commits): each for commits, each in arms.items()})}"]


def _commit(result: Result) -> str:
    commit = result.summary["environment"].get("commit")
    return f"{commit[:8]}{'+changes' * commit.endswith('+changes')}" if isinstance(commit, str) else "an unknown commit"


NUMERICS: dict[str, Callable[[Environment], object]] = {
    "precision": lambda environment: environment.get("precision"),
    "devices": _device,
    "numbers of processes": lambda environment: environment.get("ranks"),
    "versions of torch": partial(_version, "torch"),
    "versions of orthokit": partial(_version, "orthokit"),
}
"""Properties in words, and how each is read from ``environment.json``."""


def _equal(panel: Panel) -> list[str]:
    """Sentences on arms that are one arm: equal plans, or the very same results."""
    sentences = []
    plans, unread = dict[str, Any](), dict[str, list[str]]()
    for arm, results in panel.arms.items():
        try:
            plans[arm] = _plan(results[0])
        except Exception as error:  # of whatever options a summary names
            unread.setdefault(" ".join(f"{error}".split())[:300], []).append(arm)
    sentences += [f"plans of {list_names(arms)} are not compared: {why}" for why, arms in unread.items()]
    for (one, a), (two, b) in itertools.combinations(panel.arms.items(), 2):
        first, second = ({r.seed: (r.summary["test"], r.summary.get("train")) for r in arm} for arm in (a, b))
        seeds = first.keys() & second.keys()
        if plans.get(one) is not None and plans[one] == plans.get(two):
            sentences.append(
                f"{one} and {two} have equal plans (orthokit plan): they are the same arm, and what differs is chance"
            )
        elif seeds and all(first[seed] == second[seed] for seed in seeds):
            sentences.append(f"{one} and {two} have the very same results in every shared seed: they are the same arm")
    return sentences


def _plan(result: Result) -> Any:
    """A value that equal plans of a disentangled norm share; None for any other penalty.

    Raises:
        ValueError: the plan cannot be told.
    """
    section = result.recipe.regularizer
    penalty = section and penalty_of(section.penalty)
    if section is None or not isinstance(penalty, Disentangled):
        return None
    rest = {**section.model_dump(), "penalty": repr(replace(penalty, relax=None, form="pairs", count="expected"))}
    ranks = result.summary.get("ranks") or {}
    if penalty.relax is None or all(filters == ranks.get(name) for name, filters in _filters(result).items()):
        return rest, "strict"
    return rest, penalty.form, penalty.count if penalty.form == "pairs" else None, ranks


def _filters(result: Result) -> Mapping[str, Any]:
    """The filters in a group of each regularized layer: as the summary says, or as a built-in network has them."""
    if isinstance(layers := result.summary.get("layers"), Mapping):
        return {name: layer.get("o") if isinstance(layer, Mapping) else None for name, layer in layers.items()}
    recipe = result.recipe
    if is_own(recipe.network.kind):
        raise ValueError(f"{result.source} does not hold its layers' shapes, and {recipe.network.kind} is not imported here")
    assert recipe.regularizer is not None
    return _built_in(recipe.network.model_dump_json(), recipe.regularizer.where)


@lru_cache(maxsize=256)
def _built_in(network: str, where: str) -> Mapping[str, int]:
    """The filters of each layer of one of our networks, which many runs share."""
    with torch.device("meta"):  # shapes are enough
        model = NetworkSection.model_validate_json(network).build(channels=3, classes=10).to_empty(device="cpu")
    return {layer.name: layer.kernel.o for layer in select(model, where_of(where))}


def _selections(panel: Panel) -> list[str]:
    """Signs that something was, or is about to be, chosen by test accuracy."""
    sentences = []
    with_penalty = {arm: results for arm, results in panel.arms.items() if results[0].recipe.regularizer is not None}
    if bare := [arm for arm, results in with_penalty.items() if not results[0].recipe.data.validation]:
        sentences.append(
            f"no validation images in {list_names(bare)} (data.validation = 0): nothing here shows that their strength was "
            "chosen on others than the test images"
        )
    alike: dict[str, list[str]] = {}
    for arm, results in with_penalty.items():
        section = results[0].recipe.regularizer
        assert section is not None
        alike.setdefault(repr(section.model_dump(exclude={"strength"})), []).append(arm)
    sentences += [
        f"{list_names(arms)} differ in strength alone: to choose among them by these figures is to select on the test set; "
        "choose by validation accuracy, on other seeds (orthokit sweep)"
        for arms in alike.values()
        if len(arms) > 1
    ]
    swept = [arm for arm, results in panel.arms.items() if any(_of_a_sweep(result) for result in results)]
    if swept:
        sentences.append(
            f"runs of a sweep, which chose among them: {list_names(swept)}; compare on seeds that took no part in it"
        )
    return sentences


def _of_a_sweep(result: Result) -> bool:
    above = result.source.resolve().parents
    return len(above) > 2 and (above[2] / "sweep.json").is_file()


def incomparable_parts(panels: Sequence[Panel]) -> tuple[list[str], list[str]]:
    """Parts of evaluations made with different settings, and sentences on these and on parts that some runs lack."""
    results = [result for panel in panels for result in panel.results]
    differing, missing = [], dict[int, list[str]]()
    for part in dict.fromkeys(part for result in results for part in result.parts):
        forms = [_form(result.parts[part]) for result in results if part in result.parts]
        if len(set(forms)) > 1:
            differing.append(part)
        elif len(forms) < len(results):
            missing.setdefault(len(results) - len(forms), []).append(part)
    sentences = [
        f"not evaluated in {count} of {len(results)} runs, whose arms are left out there: {', '.join(parts)}"
        for count, parts in missing.items()
    ]
    if differing:
        sentences.append(
            f"evaluated with different settings, hence left out: {', '.join(differing)}; orthokit evaluate them alike"
        )
    return differing, [*sentences, *missing_numbers(panels, METRICS)]


def missing_numbers(panels: Sequence[Panel], metrics: Sequence[Metric]) -> list[str]:
    """A sentence for each metric and panel in which some runs have no number, and others have."""
    sentences = []
    for metric in metrics:
        for panel in panels:
            pairs = [(arm, result) for arm, result in panel if _is_measured(metric, result)]
            none = [(arm, result.seed) for arm, result in pairs if metric.read(result) is None]
            if 0 < len(none) < len(pairs):
                text = list_names([f"{arm} (seed {seed})" for arm, seed in none])
                sentences.append(f"{panel.name}: no {metric.label}, or no finite one, of {text}; these arms are left out of it")
    return sentences


def _is_measured(metric: Metric, result: Result) -> bool:
    return metric.part is None or metric.part in result.parts


def _form(part: dict[str, Any]) -> str:
    """The settings of a part and the lengths of its lists: what must be equal for its numbers to compare.

    Shares of images that are right clean have the lengths of what they are shares of; early evaluations lack them.
    """
    lengths = {key: len(value) for key, value in _lists(part) if "kept" not in key}
    return json.dumps([part["settings"], lengths], sort_keys=True)


def _lists(value: Any, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Dotted keys of the lists in a nested dictionary."""
    if isinstance(value, list):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _lists(item, f"{prefix}.{key}")
