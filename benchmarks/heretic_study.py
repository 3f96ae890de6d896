"""A Heretic study's trials, and how many are planned, as JSON.

Run by the Python of the environment that Heretic is installed in.

    python heretic_study.py JOURNAL [--close]

`--close` declares the study finished with the trials it has, so that Heretic shows its results when it is
started again. Do that to a copy.
"""

from __future__ import annotations

import json
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


def main(journal: str, close: bool) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name="heretic", storage=JournalStorage(JournalFileBackend(journal)))
    if close:
        settings = json.loads(study.user_attrs["settings"])
        settings["n_trials"] = len(study.trials)
        study.set_user_attr("settings", json.dumps(settings))
        study.set_user_attr("finished", True)
    trials = [
        {
            "index": trial.user_attrs.get("index"),
            "state": trial.state.name,
            "scores": trial.values,
            "refusals": trial.user_attrs.get("refusals"),
            "prompts": trial.user_attrs.get("n_bad_prompts"),
            "base_refusals": trial.user_attrs.get("base_refusals"),
            "divergence": trial.user_attrs.get("kl_divergence"),
            "seconds": trial.duration.total_seconds() if trial.duration else None,
        }
        for trial in study.trials
    ]
    print(json.dumps({"planned": json.loads(study.user_attrs["settings"])["n_trials"], "trials": trials}))


if __name__ == "__main__":
    main(sys.argv[1], "--close" in sys.argv[2:])
