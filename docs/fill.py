"""Fill in the numbers of the README and of the cards: each is read where it was measured, none is typed.

A mark such as ``<!--=cost: SO-->1.3 to 14%<!--/-->`` says where its text comes from; readers see the text only. Marks are::

    cost: SO                                         share of a training step, the range over the networks of benchmarks/cost.json
    cost: SO; 8                                      the same at every eighth step
    gain: depth; strict; mean                        difference from the baseline with its interval: study; arm; panel; metric
    value: near; strict; ResNet-20; under_cos        mean of an arm; the panel may be left out where there is one
    tried: near; ocnn; 0.1                           validation accuracy at a strength
    use: SO                                          when to use a penalty
    tutorials: SO                                    the tutorials that begin with it, or use it
    cards                                            the overview table of the cards
    penalties                                        the table of the README
    modules                                          the penalties' part of the reference

    python docs/fill.py            # fill in; prints the files that changed
    python docs/fill.py --check    # change nothing; exit status 1 if something would
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import orthokit as ok
from orthokit.lab import study
from orthokit.lab.comparison.comparison import Comparison
from orthokit.lab.comparison.metrics import metric_of

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "src/orthokit/cards"
TUTORIALS = ROOT / "docs/tutorials"
COSTS = {"Disentangled": "strict"}
"""Names of penalties in benchmarks/cost.json, where they are others."""
MARK = re.compile(r"<!--=(?P<source>.*?)-->.*?<!--/-->", re.DOTALL)


def fill(text: str) -> str:
    """``text`` with all its marks filled in anew.

    Raises:
        ValueError: a mark names nothing that was measured.
    """
    return MARK.sub(lambda mark: f"<!--={mark['source']}-->{_read(mark['source'])}<!--/-->", text)


def _read(source: str) -> str:
    verb, _, rest = source.partition(":")
    try:
        return VERBS[verb](*(" ".join(each.split()) for each in rest.split(";") if rest))
    except (AttributeError, LookupError, OSError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"cannot fill in <!--={source}-->: {error!r}") from error


def cost(penalty: str, every: str = "1") -> str:
    """Share of a training step of ``add_grad_()``, from the cheapest to the dearest network."""
    shares = [f"{share:.2g}" for share in sorted(100 * step[penalty][every]["median"] for step in _steps(penalty))]
    return f"{shares[0]} to {shares[-1]}%" if len(shares) > 1 else f"{shares[0]}%"


def _steps(penalty: str) -> list[Any]:
    """The measured steps, one a network, among which this penalty is."""
    networks = json.loads((ROOT / "benchmarks/cost.json").read_text("utf-8"))["networks"]["cpu"].values()
    return [network["step"]["share"] for network in networks if penalty in network.get("step", {}).get("share", {})]


def gain(name: str, arm: str, panel: str = "", metric: str = "accuracy") -> str:
    """Difference from the baseline, with its interval: of a panel, or their ``mean``."""
    if panel == "mean":
        difference: Any = _comparison(name).contrasts[0].answers[arm]
    else:
        difference = _cell(name, arm, panel, metric).difference
    digits = 3 if metric.endswith("loss") else 2
    low, high = difference.interval
    return f"{difference.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def value(name: str, arm: str, panel: str = "", metric: str = "accuracy") -> str:
    """Mean of an arm over its seeds."""
    mean = _cell(name, arm, panel, metric).sample.mean
    if mean >= 100:
        return f"{mean:,.0f}"
    return f"{mean:.1f}" if mean >= 1 else f"{mean:.2g}".replace("e-0", "e-")


def tried(name: str, arm: str, strength: str) -> str:
    """Validation accuracy, in percent, at a strength that was tried."""
    trials = [trial for choice in _comparison(name).choices if choice.arm == arm for trial in choice.trials]
    return f"{next(trial.sample.mean for trial in trials if trial.strength == float(strength)):.1f}"


def use(penalty: str) -> str:
    """When to use a penalty, as it says itself."""
    return str(getattr(ok, penalty).use)


def tutorials(penalty: str) -> str:
    """Links to the tutorials: the first, those whose code makes this penalty, and how to compare it."""
    links = []
    for path in sorted(TUTORIALS.glob("*.py")):
        text = path.read_text("utf-8")
        if path.name[:2] in ("1_", "4_") or f"ok.{penalty}(" in text:
            links.append(f"[{text.splitlines()[1]}](../../../docs/tutorials/{path.name})")
    return "; ".join(links)


def penalties() -> str:
    """A line for each penalty: its card, when to use it, and where it is from."""
    lines = ["", "| penalty | use it when | from |", "|---|---|---|"]
    for penalty in ok.PENALTIES:
        card = CARDS / f"{penalty.name.lower()}.md"
        name = card.read_text("utf-8").split("\n", 1)[0].removeprefix("# ").partition(":")[0]
        link = penalty.source.rpartition(", ")[2]
        source = f"[{'code' if 'github' in link else link.rpartition('/')[2]}]({link})"
        lines.append(f"| [{name}]({card.relative_to(ROOT)}) | {penalty.use} | {source} |")
    return "\n".join([*lines, ""])


def _cell(name: str, arm: str, panel: str, metric: str) -> Any:
    panels = _comparison(name).cells(metric_of(metric))
    if not panel and len(panels) == 1:
        (panel,) = panels
    return panels[panel][arm]


@cache
def _comparison(name: str) -> Comparison:
    return study.plan(ROOT / "studies" / f"{name}.toml", out=ROOT / "runs", results=ROOT / "results").comparison()


def cards() -> str:
    """A line for each card: its title, its first sentence, its cost."""
    lines = ["", "| penalty | what it does | cost |", "|---|---|---|"]
    for penalty in ok.PENALTIES:
        title, _, benefit, *_ = (CARDS / (name := f"{penalty.name.lower()}.md")).read_text("utf-8").split("\n")
        measured = COSTS.get(penalty.name, penalty.name)
        share = cost(measured) if _steps(measured) else "not measured"
        lines.append(f"| [{title.removeprefix('# ')}]({name}) | {benefit} | {share} |")
    return "\n".join([*lines, ""])


def modules() -> str:
    """The reference of each penalty: what its module says, then its classes and functions under the names people write."""
    parts = [""]
    for module in dict.fromkeys(penalty.__module__ for penalty in ok.PENALTIES):
        public = [name for name in ok.__all__ if getattr(getattr(ok, name), "__module__", None) == module]
        title = " and ".join(penalty.name for penalty in ok.PENALTIES if penalty.__module__ == module)
        parts += [f"## {title}", "", "```{eval-rst}", f".. automodule:: {module}", "   :no-members:", "   :no-index:", ""]
        parts += [f".. auto{'class' if isinstance(getattr(ok, name), type) else 'function'}:: orthokit.{name}" for name in public]
        parts += ["```", ""]
    return "\n".join(parts)


VERBS = {
    "cost": cost,
    "gain": gain,
    "value": value,
    "tried": tried,
    "cards": cards,
    "penalties": penalties,
    "modules": modules,
    "use": use,
    "tutorials": tutorials,
}


def files() -> list[Path]:
    """What is filled in."""
    return [ROOT / "README.md", ROOT / "docs/reference/penalties.md", *sorted(CARDS.glob("*.md"))]


def main() -> int:
    changed = {path: text for path in files() if (text := fill(path.read_text("utf-8"))) != path.read_text("utf-8")}
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    return "--check" in sys.argv and bool(changed)


if __name__ == "__main__":
    sys.exit(main())
