"""Pages of the site that are written when it is built: the commands, and the evidence."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import fill
import tyro

from orthokit.cli import COMMANDS, STATUS
from orthokit.lab import study
from orthokit.lab.reporting import markup, page, tables

DOCS = Path(__file__).parent
ITEM = re.compile(r"[│ ] (?P<name>(?:-|[A-Z{\[])\S*(?: \S+)*?)(?: {2,}(?P<text>.*))?")
"""A line of a help text that begins an option or a positional argument."""
TUTORIAL = re.compile(r"\btutorials/(\w+)\.py\)")
"""The end of a link to a tutorial."""
MARKUP, MASKED = re.compile(r"[<>*_`|~\[\]\\]"), r"\\\g<0>"

COMMANDS_PAGE = """\
# Commands

This page lists every command of `orthokit` with its options, as `orthokit COMMAND --help` prints them. [Install](install.md) the
package first. Begin with `orthokit demo`, or with `orthokit report` on a checkpoint of yours.

## Exit status

| status | meaning |
|---|---|
{status}

`ORTHOKIT_DEBUG=1` in the environment keeps the traceback of an error.
"""

COMMANDS_END = "Next: [look at a checkpoint](report.md), or [train and compare](lab.md).\n"


def on_site(text: str) -> str:
    """A page with its links to tutorials, results and cards changed to those of the site.

    ``](../results/STUDY.md)`` becomes ``](evidence/STUDY.md)``, and the same from a folder deeper.
    """
    text = TUTORIAL.sub(r"learn/\1.rst)", text)
    for source, target in {"results": "evidence", "src/orthokit/cards": "penalties"}.items():
        text = re.sub(rf"\]\(((?:\.\./)*)\.\./{source}/", rf"](\1{target}/", text)
    return text


def help_of(name: str) -> str:
    """What ``orthokit NAME --help`` prints, on lines that are not broken."""
    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="1000"), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(COMMANDS[name], prog=f"orthokit {name}", args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
    return printed.getvalue()


def command(name: str) -> str:
    """The section of a command: usage, description, and a definition for each option."""
    usage, *lines = help_of(name).splitlines()
    description: list[str] = []
    items: list[tuple[str, str]] = []
    for line in lines:
        if (match := ITEM.fullmatch(line.rstrip(" │"))) is not None:
            items.append((match["name"], match["text"] or ""))
        elif items and line[1:].startswith(" " * 5) and line.strip(" │"):
            items[-1] = items[-1][0], f"{items[-1][1]} {line.strip(' │')}".strip()
        elif not items and not line.startswith((" ", "╭", "│")):
            description.append(line)
    if len(items) < 2:
        raise ValueError(f"no options could be read from the help of {name!r}")
    usage = usage.removeprefix("usage: ").replace("{None}|", "")
    parts = [f"## orthokit {name}", f"```text\n{usage}\n```", "\n".join(description).strip()]
    return "\n\n".join([*parts, *(_definition(option, text) for option, text in items if option != "-h, --help")]) + "\n"


def _definition(option: str, text: str) -> str:
    text, _, default = text.rpartition(" (default: ") if text.endswith(")") and " (default: " in text else (text, "", "")
    default = default.removesuffix(")")
    shown = "" if default in ("", "None", "False") else f" Default: `{default}`."
    option = option.replace("{None}|", "").replace("{None,", "{")
    return f"`{option}`\n: {MARKUP.sub(MASKED, text)}{shown}"


def commands() -> None:
    """Write ``commands.md``."""
    status = "\n".join(f"| {number} | {meaning} |" for number, meaning in STATUS.items())
    parts = [COMMANDS_PAGE.format(status=status), *map(command, COMMANDS), COMMANDS_END]
    (DOCS / "commands.md").write_text("\n\n".join(parts), encoding="utf-8")


def evidence() -> None:
    """Copy the results, as links between pages are not found through a symbolic link, and build what is not kept beside them."""
    shutil.rmtree(DOCS / "evidence", ignore_errors=True)
    shutil.copytree(DOCS.parent / "results", DOCS / "evidence", ignore=shutil.ignore_patterns("ledger"))
    for readme in sorted((DOCS / "evidence").glob("*/README.md")):
        _pages(readme)
    overview = DOCS / "evidence/STUDY.md"
    pages = "\n```{toctree}\n:glob:\n:hidden:\n\nquestions/*\n*/README\n```\n"
    overview.write_text(overview.read_text("utf-8") + pages, encoding="utf-8")


def _pages(readme: Path) -> None:
    """Beside the tables of a study: a page with every figure, the numbers, the tables for LaTeX; linked below its title."""
    folder, root = readme.parent, DOCS.parent
    plan = study.plan(root / "studies" / f"{folder.name}.toml", out=root / "runs", results=root / "results")
    comparison = plan.comparison()
    (folder / "page.html").write_text(page.page(comparison, command=plan.command), encoding="utf-8")
    (folder / "numbers.csv").write_text(tables.numbers(comparison).to_csv(), encoding="utf-8")
    (folder / "tables.tex").write_text(markup.latex(comparison), encoding="utf-8")
    links = "[Every figure on one page](page.html) · [all numbers (CSV)](numbers.csv) · [tables (LaTeX)](tables.tex)"
    file = Path(shutil.copy(plan.file, folder)).name
    title, rest = readme.read_text("utf-8").replace(f"../../studies/{file}", file).split("\n", 1)
    readme.write_text(f"{title}\n\n{links}\n{rest}", encoding="utf-8")


def cards() -> None:
    """Copy the cards, their numbers filled in anew."""
    shutil.rmtree(DOCS / "penalties", ignore_errors=True)
    (DOCS / "penalties").mkdir()
    for card in fill.CARDS.glob("*.md"):
        if card.stem == "recommended":  # a part of other pages
            continue
        text = fill.fill(card.read_text("utf-8")).replace("../../../docs/", "../").replace("../../../results/", "../../results/")
        pages = "\n```{toctree}\n:glob:\n:hidden:\n\n*\n```\n" if card.stem == "index" else ""
        (DOCS / "penalties" / card.name).write_text(text + pages, encoding="utf-8")
