"""This tool's frontier against Heretic's on one model, judged by one evaluator.

    python benchmarks/frontier.py                  # hours: Heretic's 200 trials are most of it

Heretic (from PyPI, in an environment of its own, run by its own program) searches with its defaults but 32
answer tokens; both tools see the same training and validation prompts and the same chats. Then every model of
both frontiers is judged on the test prompts, which neither saw. Each stage leaves its result in the work
folder: an interrupted run goes on where it stopped, a finished stage isn't run again (`--redo` it). Linux only:
CPU seconds are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # when imported from elsewhere, as the tests do

import frontier_prompts
import frontier_verdict
import heretic_run
from frontier_evaluator import Evaluator, cached, fingerprint

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "frontier.json"
HERETIC = "heretic-llm==1.4.0"
STAGES = ("heretic", "ours", "export", "evaluate", "verdict")
HERETIC_TOKENS = 32
HERETIC_BATCH = 60  # its search for a good one depends on who else uses the machine; 20 to 60 are alike
ANSWER_TOKENS, QUICK_TOKENS = 100, 32
QUICK_MODELS, QUICK_PROMPTS = 3, 40
QUIET = 0.5
ENOUGH_ALONE = 5  # trials that nothing ran beside, to tell how long one takes
SEED = 0


class Job:
    """The options, and where each stage leaves its result."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.expanduser().resolve()
        self.model = str(options.model)
        self.venv = self.work / "venv"
        self.heretic = options.reuse.resolve() if options.reuse else self.work / "heretic"
        self.ours = options.ours.resolve() if options.ours else self.work / "ours"
        self.ours_times = self.ours.with_name(self.ours.name + "-times.json")
        self.export = self.work / "heretic-export"
        self.evaluations = self.work / ("evaluations-quick" if options.quick else "evaluations")
        self.timing = self.work / "heretic-timing"

    @property
    def frontier_file(self) -> Path:
        return self.export / "frontier.json"

    def trial_folder(self, index: int) -> Path:
        return self.export / f"trial-{index:03d}"

    def evaluation(self, name: str) -> Path:
        return self.evaluations / f"{name}.json"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


# --- Heretic ---------------------------------------------------------------------------------------------


def heretic_stage(job: Job) -> None:
    """Run or resume Heretic's study."""
    make_environment(job)
    if job.options.reuse:
        say(f"Heretic's study in {job.heretic} is taken as it is")
        return
    if not (job.heretic / "config.toml").is_file():
        heretic_run.write_config(job.heretic, heretic_settings(job))
    if any((job.heretic / heretic_run.JOURNALS).glob("*.jsonl")):
        plan = ("--plan", str(job.options.trials))
        if len(heretic_run.study(job.venv, heretic_run.journal_of(job.heretic), *plan)) >= job.options.trials:
            return
    heretic_run.run(job.venv, job.heretic, job.model, job.options.threads, say)


def make_environment(job: Job) -> None:
    """Heretic's environment: a virtual one in the work folder."""
    if (job.venv / "bin" / "heretic").is_file():
        return
    say(f"installing {HERETIC} into {job.venv}")
    subprocess.run([sys.executable, "-m", "venv", str(job.venv)], check=True)
    pip = [
        str(job.venv / "bin" / "pip"),
        "install",
        "--quiet",
        "--constraint",
        str(HERE.parent / "constraints-cpu.txt"),
    ]
    subprocess.run([*pip, HERETIC], check=True)


def heretic_settings(job: Job) -> dict[str, Any]:
    """Heretic's config.toml: its defaults but what the comparison fixes."""
    return {
        "dtypes": ["bfloat16"],
        "batch_size": HERETIC_BATCH,
        "max_response_length": HERETIC_TOKENS,
        "response_prefix": "",
        "n_trials": job.options.trials,
        "seed": SEED,
        "study_checkpoint_dir": heretic_run.JOURNALS,
        "system_prompt": frontier_prompts.own_system_prompt(job.model) or frontier_prompts.HERETIC_SYSTEM_PROMPT,
        **frontier_prompts.write_heretic_prompts(job.work / "prompts"),
    }


def export_stage(job: Job) -> None:
    """Have Heretic save the models of its frontier that are not judged yet.

    Works on a copy of the study, finished with the trials it has, so that it can be tried on a study that runs.
    """
    journal = heretic_run.journal_of(job.heretic)
    trials = heretic_run.study(job.venv, journal)
    known = json.loads(job.frontier_file.read_text()) if job.frontier_file.is_file() else {}
    if known.get("trials") == len(trials) and not _to_save(job, known):
        return
    heretic_run.copy_study(job.venv, job.heretic, job.export)
    say(f"Heretic: its frontier after {len(trials)} trials")
    by_index = {trial["index"]: trial for trial in trials}

    def choose(shown: list[heretic_run.Trial]) -> dict[int, Path]:
        front = [by_index[trial.index] for trial in shown]
        found = {"trials": len(trials), "frontier": front, "pick": frontier_verdict.heretic_pick(front)["index"]}
        job.frontier_file.write_text(json.dumps(found, indent=1) + "\n")
        return _to_save(job, found)

    heretic_run.save_models(job.venv, job.export, job.model, job.options.threads, choose, say)


def _to_save(job: Job, front: dict[str, Any]) -> dict[int, Path]:
    """The trials to judge whose models are neither saved nor judged, and where they go."""
    return {
        index: job.trial_folder(index)
        for index in _spread(job, front)
        if not heretic_run.is_saved(job.trial_folder(index)) and not job.evaluation(f"heretic-{index}").is_file()
    }


def _spread(job: Job, front: dict[str, Any]) -> list[int]:
    """The trials to judge: the whole frontier, or in a quick run its pick and its ends."""
    indices = [trial["index"] for trial in front["frontier"]]
    if not job.options.quick or len(indices) <= QUICK_MODELS:
        return indices
    return [index for index in indices if index in (indices[0], front["pick"], indices[-1])]


def time_heretic(job: Job, count: int) -> None:
    """Time some trials more in a copy of the study, for a quiet machine; `verdict` uses them."""
    load = os.getloadavg()[0]
    if load > QUIET:
        say(f"the load is {load:.1f}: these times will be those of a busy machine")
    heretic_run.copy_study(job.venv, job.heretic, job.timing)
    journal = heretic_run.journal_of(job.timing)
    heretic_run.study(job.venv, journal, "--plan", str(len(heretic_run.study(job.venv, journal)) + count))
    heretic_run.run(job.venv, job.timing, job.model, job.options.threads, say)
    laps = heretic_run.trial_times(job.timing)
    result = {
        "load_before": load,
        "startup_seconds": sum(lap["seconds"] for lap in laps if lap["trial"] == 0),
        "seconds_per_trial": [lap["seconds"] for lap in laps if lap["trial"]],
        "cpu_seconds_per_trial": [lap["cpu_seconds"] for lap in laps if lap["trial"]],
    }
    (job.timing / "timing.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"{median(result['seconds_per_trial']):.1f} s a trial, {result['startup_seconds']:.1f} s before the first")


def heretic_times(job: Job) -> dict[str, Any]:
    """Seconds of all of Heretic's trials: as they went, and as they would on a quiet machine where timed."""
    laps = heretic_run.trial_times(job.heretic)
    trials = [lap for lap in laps if lap["trial"]]
    starts = [lap["seconds"] for lap in laps if not lap["trial"]]
    file = job.timing / "timing.json"
    timed = json.loads(file.read_text()) if file.is_file() else None
    wall = sum(lap["seconds"] for lap in laps)
    # its own threads make a load of as many: while the load is no higher, nothing else runs
    alone = [lap["seconds"] for lap in trials if lap["load"] <= job.options.threads]
    quiet = None
    if timed:
        quiet = timed["startup_seconds"] + median(timed["seconds_per_trial"]) * len(trials)
    elif len(alone) >= ENOUGH_ALONE:
        quiet = min(starts) + median(alone) * len(trials)
    return {
        "trials": len({lap["trial"] for lap in trials}),
        "starts": len(starts),
        "measured_seconds": wall,
        "heretic_seconds": quiet or wall,
        "heretic_cpu_seconds": sum(lap["cpu_seconds"] for lap in laps),
        "mean_load": sum(lap["load"] for lap in laps) / max(1, len(laps)),
        "alone": {"trials": len(alone), "seconds_per_trial": median(alone) if alone else None},
        "timed_apart": timed,
    }


# --- Ours ------------------------------------------------------------------------------------------------


def ours_stage(job: Job) -> None:
    """Run `abliterate run`, timed from the outside."""
    if job.options.ours or (job.ours / "results.json").is_file():
        return
    system_prompt = _explicit_system_prompt(job)
    command = [
        str(Path(sys.executable).with_name("abliterate")), "run", job.model, "--method", job.options.method,
        "--out", str(job.ours), "--overwrite", "--target", "bundled", "--baseline", "bundled", "--seed", str(SEED),
        *(["--system-prompt", system_prompt] if system_prompt else []), *shlex.split(job.options.ours_options),
    ]  # fmt: skip
    say("ours: " + shlex.join(["abliterate", *command[1:]]).replace(str(job.work), "WORK"))
    load, start = os.getloadavg()[0], time.time()
    environment = dict(os.environ, OMP_NUM_THREADS=str(job.options.threads))
    process = subprocess.Popen(command, env=environment)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.terminate()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"abliterate run failed with exit code {process.returncode}")
    seconds, cpu = time.time() - start, usage.ru_utime + usage.ru_stime
    times = {"seconds": seconds, "cpu_seconds": cpu, "load_before": load, "load_after": os.getloadavg()[0]}
    job.ours_times.write_text(json.dumps(times) + "\n")


def our_points(job: Job) -> list[dict[str, Any]]:
    """Our frontier: name, recipe's file, and seconds from the start until it was there; one is the pick."""
    document = json.loads((job.ours / "results.json").read_text())
    times = json.loads(job.ours_times.read_text()) if job.ours_times.is_file() else {}
    whole, cpu = times.get("seconds"), times.get("cpu_seconds")
    # a point counts from the run's start; what the process did outside its stages (imports first of all) is added
    outside = max(0.0, whole - sum(document["timings_s"].values())) if whole else 0.0
    # a method that finds one edit has no frontier but that
    listed = document.get("frontier") or [{"recipe": "recipe.safetensors", "chosen": True}]
    points = []
    for number, point in enumerate(listed):
        seconds = point["seconds"] + outside if "seconds" in point else whole
        points.append(
            {
                "name": f"ours {number}",
                "recipe": job.ours / point["recipe"],
                "seconds": seconds,
                # the process's own count up to then where the point has it, else its share of the whole
                "cpu_seconds": point.get("cpu_seconds", cpu and whole and cpu * seconds / whole),
                "pick": point["chosen"],
            }
        )
    return points


def _explicit_system_prompt(job: Job) -> str | None:
    """None where the chat template writes its own, which Heretic is then given too."""
    return None if frontier_prompts.own_system_prompt(job.model) else frontier_prompts.HERETIC_SYSTEM_PROMPT


# --- Judging ---------------------------------------------------------------------------------------------


def evaluate_stage(job: Job) -> dict[str, Any]:
    """Judge the original and every model of both frontiers; returns what the verdict needs.

    Heretic's saved models are removed once they are judged, unless they are to be kept.
    """
    held = frontier_prompts.held_out(QUICK_PROMPTS if job.options.quick else job.options.test_prompts)
    tokens = QUICK_TOKENS if job.options.quick else ANSWER_TOKENS
    evaluator = Evaluator(job.model, held.target, held.baseline, _explicit_system_prompt(job), tokens)
    settings = evaluator.settings

    def judged(name: str, identity: str, make: Any) -> dict[str, Any]:
        known = job.evaluation(name).is_file()
        start = time.time()
        document = cached(job.evaluation(name), {**settings, "model": identity}, make)
        if not known:
            refusal, divergence = document["refusal"], document["divergence"] or {"first_token": 0, "answer": 0}
            say(
                f"{name}: refused {refusal['refused']} of {refusal['total']}, divergence "
                f"{divergence['first_token']:.4f} and {divergence['answer']:.4f} ({time.time() - start:.0f} s)"
            )
        return document

    original = {**judged("original", settings["original"], evaluator.original), "name": "original"}
    front = json.loads(job.frontier_file.read_text())
    wanted = _spread(job, front)
    heretic = []
    for trial in (trial for trial in front["frontier"] if trial["index"] in wanted):
        index, folder = trial["index"], job.trial_folder(trial["index"])
        identity = json.dumps(trial)
        document = judged(f"heretic-{index}", identity, lambda folder=folder: evaluator.folder(saved(folder)))
        if not job.options.keep_models:
            shutil.rmtree(folder, ignore_errors=True)
        document |= {"name": f"Heretic {index}", "pick": index == front["pick"], "its_own": trial}
        heretic.append(document)
    ours = []
    for point in our_points(job):
        recipe = point.pop("recipe")
        name = point["name"].replace(" ", "-")
        ours.append(judged(name, fingerprint(recipe), lambda recipe=recipe: evaluator.recipe(recipe)) | point)
    return {"original": original, "heretic": heretic, "ours": ours}


def saved(folder: Path) -> Path:
    """The folder, when Heretic's model is in it."""
    if not heretic_run.is_saved(folder):
        raise SystemExit(f"{folder.name} was judged otherwise before and its model is gone; run with --redo evaluate")
    return folder


def verdict_stage(job: Job, judged: dict[str, Any]) -> dict[str, Any]:
    """Hold the bars against what was judged; write the results."""
    from abliterate.common.files import whole_file

    times = heretic_times(job)
    rows, bars = frontier_verdict.verdict(judged["original"], judged["heretic"], judged["ours"], times)
    settings = judged["original"].pop("settings")
    for model in (*judged["heretic"], *judged["ours"]):
        model.pop("settings", None)
    document = {
        "command": "python benchmarks/frontier.py" + _options_said(job.options),
        "model": Path(job.model).name,
        "threads": job.options.threads,
        "notes": notes(job, times, settings),
        "bars": bars,
        "rows": [frontier_verdict.named(row) for row in rows],
        "times": times | {"ours": json.loads(job.ours_times.read_text()) if job.ours_times.is_file() else None},
        "evaluation": settings,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": versions(job),
        **judged,
    }
    output: Path = job.options.output or (job.work / "quick.json" if job.options.quick else RESULTS)
    with whole_file(output) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
    with whole_file(output.with_suffix(".md")) as temporary:
        temporary.write_text(frontier_verdict.markdown(document), encoding="utf-8")
    for bar in bars:
        say(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['bar']}: {bar['found']}")
    return document


def _options_said(options: argparse.Namespace) -> str:
    """The options that change what is judged."""
    quick = " --quick" if options.quick else ""
    return quick + (f" --test-prompts {options.test_prompts}" if options.test_prompts else "")


def notes(job: Job, times: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What a reader of the numbers should know."""
    own = frontier_prompts.own_system_prompt(job.model)
    found = [
        f"Heretic: {times['trials']} trials, its defaults but {HERETIC_TOKENS} answer tokens, bfloat16, a batch of "
        f"{HERETIC_BATCH}, seed {SEED}"
        + (", and for a system prompt the one that the model's chat template writes" if own else ""),
        f"judged on {settings['target_prompts']} target and {settings['baseline_prompts']} baseline prompts of the "
        f"test split, {settings['max_new_tokens']} tokens, greedy, weights in bfloat16; divergence, text and "
        "questions are computed in float32 from these weights (in bfloat16 any change at all rounds activations "
        "otherwise: 0.002 nats at the first token here)",
        f"Heretic took {times['measured_seconds']:.0f} s by the clock and {times['heretic_cpu_seconds']:.0f} CPU "
        f"seconds, at a mean load of {times['mean_load']:.1f}",
    ]
    if timed := times["timed_apart"]:
        found.append(
            f"its time counts as {median(timed['seconds_per_trial']):.1f} s a trial, the median of "
            f"{len(timed['seconds_per_trial'])} timed apart at a load of {timed['load_before']:.1f} before"
        )
    elif times["alone"]["trials"] >= ENOUGH_ALONE:
        found.append(
            f"its time counts as {times['alone']['seconds_per_trial']:.1f} s a trial, the median of the "
            f"{times['alone']['trials']} beside which nothing else ran, and its quickest start"
        )
    if job.ours_times.is_file():
        ours = json.loads(job.ours_times.read_text())
        found.append(
            f"abliterate took {ours['seconds']:.0f} s by the clock and {ours['cpu_seconds']:.0f} CPU seconds, its own "
            f"measurements included, at a load of {ours['load_before']:.1f} before"
        )
    if times["starts"] > 1:
        found.append(f"Heretic's run was interrupted and resumed {times['starts'] - 1} times")
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def versions(job: Job) -> dict[str, str]:
    """Versions of what ran on either side."""
    names = ("heretic-llm", "torch", "transformers", "peft", "optuna")
    script = f"import json\nfrom importlib.metadata import version\nprint(json.dumps([version(n) for n in {names!r}]))"
    python = str(job.venv / "bin" / "python")
    theirs = json.loads(subprocess.run([python, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("abliterate", "torch", "transformers")},
        **{
            name if name.startswith("heretic") else f"Heretic's {name}": v
            for name, v in zip(names, theirs, strict=True)
        },
    }


# --- The command -----------------------------------------------------------------------------------------


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    from abliterate.models.demo import cache

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="folder or Hub id (the demo model)")
    parser.add_argument("--work", type=Path, default=cache() / "frontier", help="where stages leave their results")
    parser.add_argument("--trials", type=int, default=200, help="Heretic's trials (200)")
    parser.add_argument("--threads", type=int, default=2, help="threads of either tool (2)")
    parser.add_argument("--method", default="fit", help="method of abliterate run (fit)")
    parser.add_argument("--ours-options", default="", help="more options for abliterate run, in one string")
    parser.add_argument("--reuse", type=Path, metavar="FOLDER", help="a folder Heretic ran in, finished or not")
    parser.add_argument("--ours", type=Path, metavar="FOLDER", help="what abliterate run wrote, instead of running it")
    parser.add_argument("--test-prompts", type=int, metavar="N", help="most test prompts a side (all, 200 and 250)")
    parser.add_argument("--quick", action="store_true", help="40 + 40 prompts, 32 tokens, 3 of Heretic's models")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma-separated ({','.join(STAGES)})")
    parser.add_argument("--redo", choices=STAGES[1:4], help="forget this stage's result first")
    parser.add_argument("--time-heretic", type=int, metavar="N", help="only time N trials more, on a quiet machine")
    parser.add_argument("--keep-models", action="store_true", help="keep Heretic's saved models")
    parser.add_argument("--output", type=Path, help="where the JSON goes, and a .md beside it")
    options = parser.parse_args(arguments)
    unknown = set(options.stages.split(",")) - set(STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    return options


def forget(job: Job, stage: str) -> None:
    """Remove what a stage left."""
    left = {"ours": job.work / "ours", "export": job.export, "evaluate": job.evaluations}
    shutil.rmtree(left[stage], ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    options = options_from(arguments)
    # a polite kill stops Heretic too, as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; run the same command to go on"))
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # before torch is imported
    if options.model is None:
        from abliterate.models.demo import demo_model

        options.model = demo_model()
    job = Job(options)
    job.work.mkdir(parents=True, exist_ok=True)
    if options.time_heretic:
        time_heretic(job, options.time_heretic)
        return
    if options.redo:
        forget(job, options.redo)
    stages = options.stages.split(",")
    if "heretic" in stages:
        heretic_stage(job)
    if "ours" in stages:
        ours_stage(job)
    if "export" in stages:
        export_stage(job)
    if "evaluate" in stages or "verdict" in stages:
        judged = evaluate_stage(job)
        if "verdict" in stages and not all(bar["met"] for bar in verdict_stage(job, judged)["bars"]):
            raise SystemExit("missed a bar")


if __name__ == "__main__":
    main()
