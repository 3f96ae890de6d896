"""A Heretic study's trials as JSON.

    python heretic_study.py JOURNAL [--plan N | --close]

Run by the Python of the environment that Heretic is installed in. `--plan N` has Heretic, when it is started
again, go on until N trials are complete: a trial that an interruption cut short counts for it otherwise. It also
changes the seed, with which Heretic would draw the same random trials again. `--close` declares the study
finished with the trials it has, so that Heretic shows its results; do that to a copy.
"""

from __future__ import annotations

import argparse
import json

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journal")
    parser.add_argument("--plan", type=int)
    parser.add_argument("--close", action="store_true")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(options.journal))
    if not storage.get_all_studies():  # interrupted before its first trial
        print("[]")
        return
    study = optuna.load_study(study_name="heretic", storage=storage)
    count = len(study.trials)
    complete = sum(trial.state == TrialState.COMPLETE for trial in study.trials)
    settings = json.loads(study.user_attrs["settings"])
    if options.close:
        settings["n_trials"] = count
        study.set_user_attr("settings", json.dumps(settings))
        study.set_user_attr("finished", True)
    elif options.plan is not None and options.plan > complete:
        settings |= {"n_trials": options.plan + count - complete, "seed": count}
        study.set_user_attr("settings", json.dumps(settings))
        study.set_user_attr("finished", False)
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
    print(json.dumps(trials))


if __name__ == "__main__":
    main()
