"""Hostile documents, recipes and command lines, made from good ones by a seeded generator.

``python tests/fuzz.py [COUNT]`` tries COUNT of each kind and counts tracebacks and hangs; the tests try some.
"""

# ruff: noqa: E501

import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orthokit.cli import main

LIMIT = 20
"""Seconds that a case may take."""


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def nested_tables(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 10**6, 10**12, 10**19, 10**400, -(10**400), 0.5, 1e-320, 1e300, -1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\u202e",
        "$\\frac{",
        "=1+1",
        "<b>",
        "../..",
        "/",
        "~" * 99,
    ),
    *("x" * 100_000, [], {}, [1], {"a": 1}, [None], [[]], {"": 1}, {"name": "so"}, {"name": "chain", "parts": [1]}, [1, "a"]),
    *(nested(200), nested_tables(200), list(range(2000)), {f"key{k}": k for k in range(2000)}),
)
WORDS = (
    "true",
    "null",
    "NaN",
    "Infinity",
    "1e999",
    "[" * 5000,
    '{"a":' * 5000,
    '"',
    "}",
    "]",
    ",",
    "\\ud800",
    "\x00",
    "9" * 5000,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value inside."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutated(document: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """``document`` with one to three values replaced, removed or added."""
    result = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        *above, key = chance.choice(list(places(result)))
        table: Any = result
        for each in above:
            table = table[each]
        kind = chance.random()
        if kind < 0.75:
            table[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind < 0.9:
            del table[key]
        elif isinstance(table, dict):
            table[chance.choice(("x", "\x1b[31m", "\ud800", "", "name", "extends", "a" * 5000))] = copy.deepcopy(
                chance.choice(VALUES)
            )
        if not result:
            return result
    return result


def broken(text: str, chance: random.Random) -> bytes:
    """``text`` cut, with strange words in it, or in another encoding."""
    place = chance.randrange(len(text))
    kind = chance.randrange(6)
    if kind == 0:
        return text[:place].encode()
    if kind == 1:
        return text.encode("utf-16")
    if kind == 2:
        return b"\xef\xbb\xbf" + text.encode()
    if kind == 3:
        return text[:place].encode() + bytes(chance.randrange(256) for _ in range(4)) + text[place:].encode()
    if kind == 4:
        return text.replace('": ', '": 1, "x": ', 1).encode() + b"{}"
    return (text[:place] + chance.choice(WORDS) + text[place:]).encode("utf-8", "surrogatepass")


def odd_file(path: Path, chance: random.Random) -> None:
    """Something else than a file of a few kilobytes under ``path``."""
    path.unlink(missing_ok=True)
    kind = chance.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        path.touch()
        os.truncate(path, 10**10)
    else:
        path.symlink_to("/nowhere")


class Hang(BaseException):
    """A case took longer than LIMIT."""


@contextlib.contextmanager
def limited(seconds: float = LIMIT) -> Iterator[None]:
    """Raise Hang after ``seconds``."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(arguments: list[str], seconds: float = LIMIT) -> tuple[str, str]:
    """What becomes of a command line in this process: ``""`` or what is wrong with it, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with limited(seconds), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status = main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except Hang:
        return "hang", out.getvalue() + err.getvalue()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last.filename).name}:{last.name}", out.getvalue() + err.getvalue()
    text = out.getvalue() + err.getvalue()
    if bad := {c for c in text if not c.isprintable() and c != "\n" and c != "\xa0"}:
        return f"prints {sorted(bad)!r:.60}", text
    if status not in (0, 2, 4):
        return f"status {status}", text
    if status == 2 and "Parsing error" not in text and text.count("\n") > 4:
        return "several lines", text
    return "", text


def runs(folder: Path, kind: str, chance: random.Random) -> None:
    """Six runs of two arms, of which one is hostile."""
    from made_up import made_up

    for result in made_up({"none": 0.0, "so": 1.0}, depths=(8,), seeds=3):
        each = folder / result.source.parent
        each.mkdir(parents=True)
        rows = [
            {
                "epoch": row["epoch"],
                "train": {"loss": 1.0, "accuracy": 0.5},
                "validation": {"loss": 1.0, "accuracy": row["validation"]},
                "orthogonality": {"under": {"mean_cos": row["under"]}, "over": {"mean_cos": row["over"]}},
                "images_per_second": 100.0,
            }
            for row in result.history
        ]
        documents = {
            "summary.json": [result.summary],
            "evaluation.json": [{"weights": "0" * 64, "of": {}, "parts": result.parts}],
            "metrics.jsonl": rows,
        }
        hostile = result.seed == 1 and result.summary["study"]["arm"] == "so"
        for name, lines in documents.items():
            path, texts = each / name, [json.dumps(line) for line in lines]
            if hostile and name == kind:
                way, place = chance.random(), chance.randrange(len(lines))
                if way < 0.1:
                    odd_file(path, chance)
                    continue
                if way < 0.3:
                    path.write_bytes(broken("\n".join(texts), chance))
                    continue
                with contextlib.suppress(ValueError):
                    texts[place] = json.dumps(mutated(lines[place], chance))
            path.write_text("\n".join(texts))


def try_runs(seed: int, folder: Path) -> tuple[str, str]:
    """Compare runs of which one is hostile, with every kind of output."""
    chance = random.Random(seed)
    runs(folder, chance.choice(("summary.json", "summary.json", "evaluation.json", "metrics.jsonl")), chance)
    outputs = {"--csv": "c.csv", "--markdown": "c.md", "--latex": "c.tex"} | ({"--html": "c.html"} if seed % 8 == 0 else {})
    actual = tried(["compare", str(folder / "runs"), *(str(x) for k, v in outputs.items() for x in (k, folder / v))])
    for file in folder.glob("c.*"):
        if bad := {c for c in file.read_text("utf-8") if not c.isprintable() and c != "\n" and c != "\xa0"}:
            return f"writes {sorted(bad)!r:.40} into {file.suffix}", actual[1]
    return actual


def recipe_text(chance: random.Random) -> bytes:
    """A hostile recipe."""
    import tomli_w

    good = {
        "data": {"name": "digits", "pad": 1, "validation": 100},
        "network": {"kind": "resnet", "depth": 8},
        "train": {"epochs": 1, "batch": 64, "lr": 0.1, "warmup": 0.5, "milestones": [], "schedule": "cosine"},
        "regularizer": {
            "strength": chance.choice((0.1, {"name": "piecewise", "pieces": {"0": 0.1, "1": 0.01}})),
            "penalty": chance.choice(
                ("so", {"name": "srip", "steps": 2}, {"name": "disentangled", "relax": {"name": "share", "q": 0.1}})
            ),
            "where": "convs & ~stem",
        },
    }
    if chance.random() < 0.25:
        return broken(tomli_w.dumps(good), chance)
    try:
        return tomli_w.dumps(mutated(good, chance)).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError):
        return b"a = " + b"[" * 3000


def try_recipe(seed: int, folder: Path) -> tuple[str, str]:
    """Resolve a hostile recipe and build its network and penalty, as training does first."""

    from orthokit.lab.recipes.compose import load

    chance, path = random.Random(seed), folder / "r.toml"
    path.write_bytes(recipe_text(chance))
    try:
        with limited():
            recipe = load(path)
            recipe.to_toml()
            recipe.to_dict()
            if recipe.network.model_extra == {"depth": 8} and recipe.data.name == "digits" and recipe.regularizer is not None:
                recipe.regularizer.build(recipe.network.build(1, 10))
    except (ValueError, OSError) as error:
        return "", str(error)
    except Hang:
        return "hang", ""
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(last.filename).name}:{last.name}", str(error)[:300]
    return "", "accepted"


COMMANDS = {
    "report": (["NET"], {"--format": ("json", "x"), "--layers": ("*", None, "[", "\x1b"), "--picture": ("p.png", "p.xyz", "no/such/p.png", "/dev/full")}),
    "plan": (["NET"], {"--share": ("0.1", "nan", "-1", "1e400"), "--fraction": ("0.5", "2"), "--floor": ("0", "-1", "9" * 400), "--feasible": (None,), "--count": ("fewest", "x")}),
    "power": (["--sd", "0.3"], {"--effect": ("0.3", "0", "-1", "nan", "inf", "1e-300", "1e300"), "--seeds": ("3", "0", "-1", "1000000000"), "--comparisons": ("1", "0", "1000000000", "9" * 400), "--alpha": ("0.05", "0", "1", "nan"), "--chance": ("0.8", "0", "1", "1.5")}),
    "compare": (["RUNS"], {"--baseline": ("none", "\x1b", ""), "--metric": ("accuracy", "speed", "x"), "--by": ("network", None, "data.x", "x"), "--factor": ("regularizer", None, "[/x]"), "--csv": ("/dev/full", "no\x00", "/dev/null", "."), "--title": ("\x1b]0;x\x07", "", "$x$")}),
    "list": ([], {"so": (None,), "[/x]": (None,), "\x1b": (None,)}),
    "train": (["RECIPE"], {"--seeds": ("-1", "x", "9" * 400, None), "--name": ("../../x", "/abs", "a/b", "", ".", "a\x00b"), "--devices": ("-1", "0", "100000"), "--threads": ("-1", "0"), "--strategy": ("deepspeed", "x"), "--set": ("train.epochs=0", "x", None, "a=" + "[" * 3000), "--jobs": ("0", "-1")}),
}  # fmt: skip


def try_command(seed: int, folder: Path) -> tuple[str, str]:
    """A command line with strange options; none of them can train."""
    import torch

    chance = random.Random(seed)
    torch.save({"0.weight": torch.ones(4, 3, 2, 2)}, folder / "n.pt")
    runs(folder, "", chance)
    (folder / "r.toml").write_text('data = { name = "nothing" }')
    name = chance.choice(list(COMMANDS))
    positional, options = COMMANDS[name]
    files = {"NET": folder / "n.pt", "RUNS": folder / "runs", "RECIPE": folder / "r.toml"}
    line = [name, *(str(files.get(word, word)) for word in positional)]
    for option in chance.sample(list(options), min(len(options), chance.choice((1, 1, 2, 3)))):
        value = chance.choice(options[option])
        line += [option] if value is None else [option, value]
    with contextlib.chdir(folder):
        what, text = tried(line)
    return what, f"{line!r:.300}\n{text}"


KINDS: dict[str, Callable[[int, Path], tuple[str, str]]] = {"runs": try_runs, "recipe": try_recipe, "command": try_command}


def attack(kind: str, seeds: range) -> Counter[str]:
    """What was wrong in how many cases."""
    actual: Counter[str] = Counter()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            what, text = KINDS[kind](seed, Path(folder))
        if what:
            actual[what] += 1
            if actual[what] == 1 and __name__ == "__main__":
                print(f"  {kind} {seed}: {what}: {text[-300:]!r}", flush=True)
    return actual


if __name__ == "__main__":
    import orthokit.lab.reporting.page  # noqa: F401  # what a first case would wait for

    counts = dict(zip(KINDS, map(int, sys.argv[1:]), strict=False))
    for kind, count in counts.items():
        found = attack(kind, range(count))
        print(
            f"{kind}: {found.total()} of {count}", *(f"  {n:4d} {what}" for what, n in found.most_common()), sep="\n", flush=True
        )
