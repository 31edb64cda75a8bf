"""Studies: one file says what is trained, evaluated and compared; results are kept in a folder small enough to commit.

.. code-block:: toml

    title = "Four penalties on a small budget"
    question = "Which of four penalties gains on a small budget?"
    recipe = "nano+cifar10"                          # parts of recipes, a file, or several, merged in order
    seeds = [0, 1, 2]

    [arms]                                           # parts of recipes, laid over it; the first one is the baseline
    none = {}
    strict = "strict"                                # short for { extends = "strict" }

    [networks]                                       # the panels, if there are several
    "ResNet-8" = { network.depth = 8 }
    "ResNet-20" = { network.depth = 20 }

    [factors]                                        # more panels: every combination
    "train.epochs" = [10, 20]

    [tune]                                           # strengths by validation accuracy: see orthokit.lab.comparison.tuning
    seeds = [100, 101, 102]
    values = [0.01, 0.03, 0.1, 0.3]

    [evaluate]
    images = 1000

A study may itself extend another, and say in what it differs; with another ``baseline`` or ``metric`` that is a second
question to the same runs. The primary question is written down before the runs:

.. code-block:: toml

    contrasts = ["tall - strict", "tall - wide only"]    # averaged over all panels, adjusted after Holm over these two
    blocks = "seed"                                      # all verdicts by a test with seeds as blocks; Welch's by default

File names are relative to the file that gives them.

Each run is kept as one line of the ledger, ``<results>/ledger`` (:mod:`orthokit.lab.runs.ledger`), by its recipe and seed,
whichever study trained the run. If the line holds the requested evaluation, the run is done, even if its weights are gone. The
same holds for runs by which strengths are chosen, and for runs that diverged.
"""

from orthokit.lab.study.plan import LEDGER, Plan, Task, plan
from orthokit.lab.study.run import Event, Outcome, run
from orthokit.lab.study.schema import Study

__all__ = ["LEDGER", "Event", "Outcome", "Plan", "Study", "Task", "plan", "run"]
