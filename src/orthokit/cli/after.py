"""The last line of a command on a terminal: what to do next."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orthokit.cli.evidence import Compare, Evaluate, Power, Study
from orthokit.cli.lab import Train
from orthokit.cli.look import List, Plan, Report

__all__ = ["after"]

BOTH = "orthokit train nano+digits+none nano+digits+strict --seeds 0 1 2"


def after(command: Any) -> str:
    """A command to go on with, and what it is for; empty where the output of ``command`` ends with one.

    >>> after(Evaluate(paths=(Path("runs"),)))
    'orthokit compare runs  (what the arms gained)'
    """
    match command:
        case List(name=None):
            return ""
        case List(name="recipes"):
            return f"{BOTH}  (two arms; a minute)"
        case List():
            return "orthokit list  (the other penalties)"
        case Report(operator=int(), checkpoints=(first, *_)):
            return f"orthokit report {first}  (the filters of the same layers, in figures and a word)"
        case Report(html=None, checkpoints=(first, _, *_)):
            return f"orthokit report {first} --html report.html  (a page with pictures)"
        case Report(html=html, checkpoints=(first, *_)) if html is not None:
            return f"orthokit plan {first}  (which layers are tall, and what a relaxed penalty asks of them)"
        case Plan():
            return "ok.Regularizer(model, ok.Disentangled(relax=ok.feasible()), strength=0.1)  (in your training loop)"
        case Train(recipes=recipes, machine=machine) if len(recipes) > 1:
            return f"orthokit compare {machine.out}  (what the arms gained)"
        case Train(recipes=recipes, seeds=seeds, machine=machine):
            return f"{_other(recipes, seeds)}, then orthokit compare {machine.out}"
        case Evaluate(paths=paths):
            files = [path for path in paths if path.suffix]
            if files:
                return f"orthokit report {files[0]}  (how orthogonal each layer is)"
            return f"orthokit compare {_joined(paths)}  (what the arms gained)"
        case Compare(html=None, runs=runs):
            return f"orthokit compare {_joined(runs)} --html page.html  (the same with figures)"
        case Compare(html=html):
            return f"open {html} in a browser"
        case Power():
            return f"{BOTH}  (with as many seeds as you need)"
        case Study(file=file, html=None):
            return f"orthokit study {file} --html page.html  (a page with every table and figure)"
        case Study(html=html):
            return f"open {html} in a browser"
    return ""


def _other(recipes: Iterable[str], seeds: Iterable[Iterable[int]]) -> str:
    """The command that trains the other arm of a comparison with a single recipe."""
    (recipe,) = recipes
    *parts, penalty = recipe.split("+")
    if not parts:
        return "train the same recipe without [regularizer]"
    other = "+".join([*parts, "strict" if penalty == "none" else "none"])
    given = " ".join(str(seed) for each in seeds for seed in each)
    return f"orthokit train {other}" + (f" --seeds {given}" if given else "")


def _joined(paths: Iterable[Path]) -> str:
    return " ".join(map(str, paths))
