"""A command says what it does in one line, and at its end what to do next, to a person and not to a program."""

from pathlib import Path

import pytest
import torch
from torch import nn

from orthokit.cli import COMMANDS, STATUS, main
from orthokit.cli.after import after
from orthokit.cli.evidence import Compare, Evaluate, Power, Study
from orthokit.cli.lab import Demo, Machine, Sweep, Train
from orthokit.cli.look import List, Plan, Report


def test_the_overview_has_a_line_for_each_command(capsys):
    with pytest.raises(SystemExit):
        main([])
    out = capsys.readouterr().out
    commands, statuses = out.split("Exit status:")
    lines = [line for line in commands.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert lines[0].startswith("  demo ")
    assert all(len(line) <= 80 and line.endswith(".") for line in out.splitlines() if line.startswith("  "))
    assert [int(line.split()[0]) for line in statuses.strip().splitlines()] == list(STATUS)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (List("so"), "orthokit list"),
        (List("recipes"), "orthokit train nano+"),
        (Report((Path("a.pt"), Path("b.pt"))), "orthokit report a.pt --html"),
        (Report((Path("a.pt"),), operator=32), "orthokit report a.pt  "),
        (Report((Path("a.pt"),), html=Path("a.html")), "orthokit plan a.pt"),
        (Plan(Path("a.pt")), "ok.Regularizer("),
        (Train(("a+none", "a+strict"), machine=Machine(out=Path("there"))), "orthokit compare there"),
        (Train(("a+strict",), ((1, 2), (3,))), "orthokit train a+none --seeds 1 2 3, then orthokit compare runs"),
        (Train(("nano+digits+none",)), "orthokit train nano+digits+strict, then orthokit compare runs"),
        (Train(("own.toml",)), "train the same recipe without [regularizer], then orthokit compare runs"),
        (Evaluate((Path("runs"),)), "orthokit compare runs"),
        (Evaluate((Path("a.pt"), Path("runs"))), "orthokit report a.pt"),
        (Compare((Path("runs"), Path("more"))), "orthokit compare runs more --html page.html"),
        (Compare((Path("runs"),), html=Path("p.html")), "open p.html"),
        (Power(sd=1.0), "orthokit train"),
        (Study(Path("studies/nano.toml")), "orthokit study studies/nano.toml --html"),
    ],
)
def test_what_comes_next(command, text):
    assert after(command).startswith(text)


@pytest.mark.parametrize("command", [List(), Demo(), Report((Path("a.pt"),)), Sweep(Path("s.toml"))])
def test_nothing_is_said_twice(command):
    assert after(command) == ""


def test_only_a_person_is_told(tmp_path, capsys, monkeypatch):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    for terminal, form, expected in (("1", "table", 1), ("1", "json", 0), ("1", "csv", 0), ("0", "table", 0)):
        monkeypatch.setenv("TTY_COMPATIBLE", terminal)
        assert main(["plan", str(tmp_path / "a.pt"), "--linears", "--format", form]) == 0
        assert capsys.readouterr().out.count("next: ") == expected


def test_compare_names_what_can_be_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare"]) == 2
    assert capsys.readouterr().err == "orthokit: name folders of runs, such as runs, or a CSV file\n"
    Path("results/ledger").mkdir(parents=True)
    assert main(["compare"]) == 2
    message = "; a study compares its own runs: orthokit study FILE --no-train\n"
    assert capsys.readouterr().err.endswith(f"such as runs, or a CSV file{message}")
    Path("results/near").mkdir()
    assert main(["compare", "results/near"]) == 2
    assert capsys.readouterr().err.endswith(f"no finished run (summary.json) in results/near{message}")
