"""Test a finished run against baselines: `python -m experiments.evaluate RUN`.

Writes report.json, report.md and plots into the run folder. Baselines are fitted once and kept in
the run folder as ranks.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import time
from typing import Annotated

import numpy as np
import rich.console
import tyro

from onerec_jax import cli
from onerec_jax.data.examples import target_examples
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.evaluation import ranking, report
from onerec_jax.evaluation.baselines import evaluate_baseline, fit_markov, fit_popularity
from onerec_jax.evaluation.sasrec import default_config, fit_sasrec
from onerec_jax.files import read_json, write_text
from onerec_jax.generation.selection import diversity
from onerec_jax.models.onerec import resolve_dtype
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh
from onerec_jax.training.flops import count_parameters, train_flops

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "scikit-learn")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Protocol and budget of the test."""

    beam_width: int = 64
    """Beams a user; a list of ten items comes from their items."""
    batch_size: int = 128
    """Users at once."""
    exclude_seen: bool = False
    """Add a second table in which items of the history are no candidates. A list comes short where
    too few beams are left: widen --evaluation.beam-width for long histories."""
    baselines: bool = True
    """Fit popularity, Markov chain and SASRec beside the model."""
    resamples: int = 2000
    """Bootstrap samples of the users."""
    sasrec_epochs: int = 0
    """Most epochs of the SASRec baseline; 0: its own default."""

    def __post_init__(self):
        require_at_least(self, "evaluation.", beam_width=1, batch_size=1, resamples=1)
        require_at_least(self, "evaluation.", sasrec_epochs=0)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a finished run on its test part."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    evaluation: EvaluationConfig = EvaluationConfig()


def evaluate_model(run: Run, config: EvaluationConfig, seed: int) -> tuple[dict, dict]:
    """Test metrics of the best checkpoint, and its ranks by protocol."""
    test = target_examples(run.split.test_at)
    if not len(test):
        raise InputError(f"data set '{run.dataset.name}' has no test target: split it anew")
    mesh = make_mesh(data=1)
    generator = run.generator(mesh, beam_width=config.beam_width, batch_size=config.batch_size)
    variables = run.load_best()
    parameters = count_parameters(variables["params"])
    loss = generator.loss(variables, run.builder, test).mean(0)
    results = {
        "model": {
            "preset": run.config["settings"]["preset"],
            "parameters": sum(parameters.values()),
            "parameters_by_part": parameters,
            "train_flops": train_flops(run.model_config, run.spec),
            "compute_dtype": resolve_dtype(run.model_config.compute_dtype).name,
            "best_step": run.best_step,
        }
    }
    ranks = {}
    for suffix in ("", "_exclude_seen")[: 1 + config.exclude_seen]:
        seen = seen_items(run, test) if suffix else None
        found = generator.rank(variables, run.builder, test, seen=seen)
        ranks[f"onerec{suffix}"] = found.item_ranks
        parts = {"item": found.item_ranks}
        if not suffix:  # an ID is no candidate less because one of its items was seen
            parts["id"] = found.id_ranks
        results[f"test{suffix}"] = {
            part: ranking.summarize(ranking.ranking_metrics(values), seed, config.resamples)
            for part, values in parts.items()
        }
        results[f"test{suffix}"] |= {
            "coverage": ranking.coverage(found.lists, run.dataset.num_items),
            "prefixes": diversity(found.lists, run.ids.sids).mean(0).tolist(),
        }
    results["test"] |= {
        "legality_unmasked": generator.legality(variables, run.builder, test),
        "loss": float(loss.sum()),
        "loss_level": loss.tolist(),
        "users": len(test),
        "beam_width": config.beam_width,
    }
    return results, ranks


def seen_items(run: Run, examples) -> list[np.ndarray]:
    """Items of each example's history."""
    first = run.dataset.offsets[examples.user]
    rows = run.dataset.item_rows
    return [rows[a : a + n] for a, n in zip(first, examples.position, strict=True)]


def evaluate_baselines(
    run: Run, config: EvaluationConfig, seed: int, say=print
) -> tuple[dict, dict, dict]:
    """Ranks of the baselines on the test part, SASRec's budget, and seconds spent.

    The ranks are kept in `baselines.npz`; a second call with the same settings reads them.
    """
    split, data = run.split, run.dataset
    changes = {"max_epochs": config.sasrec_epochs} if config.sasrec_epochs else {}
    sasrec_config = default_config(split.train_end, seed=seed, **changes)
    settings = {"sasrec": dataclasses.asdict(sasrec_config), "exclude_seen": config.exclude_seen}
    npz, note = run.folder / "baselines.npz", run.folder / "baselines.json"
    if npz.exists() and note.exists():
        known = read_json(note)
        if known["settings"] == json.loads(json.dumps(settings)):
            return dict(np.load(npz)), known["sasrec"], known["seconds"]
    sequences = (data.offsets, data.item_rows, split.train_end)
    seconds, scores = {}, {}
    start = time.perf_counter()
    scores["popularity"] = fit_popularity(*sequences, data.num_items)
    scores["markov"] = fit_markov(*sequences, data.num_items)
    seconds["popularity and Markov"] = time.perf_counter() - start

    say(f"SASRec baseline, at most {sasrec_config.max_epochs} epochs")
    sasrec = fit_sasrec(
        *sequences, split.valid_at, data.num_items, sasrec_config, on_epoch=_epoch_line(say)
    )
    scores["sasrec_ce"] = sasrec.score
    seconds["SASRec"] = sasrec.seconds
    budget = {
        "epochs": sasrec.epochs,
        "best_epoch": sasrec.best_epoch,
        "seconds": sasrec.seconds,
        "still_rising": sasrec.still_rising,
        "stopped_by": sasrec.stopped_by,
    }
    ranks = {
        f"{name}{suffix}": evaluate_baseline(
            score, data.offsets, data.item_rows, split.test_at, run.tie_order, exclude_seen=exclude
        )
        for name, score in scores.items()
        for suffix, exclude in (("", False), ("_exclude_seen", True))
        if config.exclude_seen or not exclude
    }
    note.unlink(missing_ok=True)  # a kill while the ranks are written must not leave a match
    np.savez(npz, **ranks)
    write_text(
        note, json.dumps({"settings": settings, "sasrec": budget, "seconds": seconds}, indent=1)
    )
    return ranks, budget, seconds


def _epoch_line(say):
    def line(epoch):
        say("  " + "  ".join(f"{k} {v:.4g}" for k, v in epoch.items()))

    return line


def evaluate_run(run: Run, config: EvaluationConfig, seconds: dict, say=print) -> dict:
    """Tests the run, writes report.json, report.md and plots, returns the report.

    Args:
      seconds: time of earlier stages; those of the test are added.
    """
    seed = run.config["settings"]["seed"]
    start = time.perf_counter()
    say("testing the best checkpoint")
    result, ranks = evaluate_model(run, config, seed)
    seconds = seconds | {"test": time.perf_counter() - start}
    result |= {
        "command": run.config["command"],
        "dataset": {
            "name": run.dataset.name,
            "split": run.split.kind,
            **run.dataset.counts,
        },
        "semantic_ids": run.ids.manifest["quality"],
    }
    if config.baselines:
        baseline_ranks, result["sasrec"], baseline_seconds = evaluate_baselines(
            run, config, seed, say
        )
        seconds |= baseline_seconds
        for suffix in ("", "_exclude_seen")[: 1 + config.exclude_seen]:
            ours = ranking.ranking_metrics(ranks[f"onerec{suffix}"])["recall@10"]
            result[f"baselines{suffix}"], result[f"paired{suffix}"] = {}, {}
            for name in report.NAMES:
                theirs = ranking.ranking_metrics(baseline_ranks[f"{name}{suffix}"])
                result[f"baselines{suffix}"][name] = ranking.summarize(
                    theirs, seed, config.resamples
                )
                result[f"paired{suffix}"][name] = ranking.paired_difference(
                    ours, theirs["recall@10"], seed, config.resamples
                )
    result["evaluation"] = dataclasses.asdict(config)
    result["seconds"] = seconds
    result["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    result["plots"] = report.draw_plots(
        run.folder, result, run.metrics.read(), run.ids.sids, run.ids.codebook_size
    )
    write_text(run.folder / "report.md", report.markdown(result))
    write_text(run.folder / "report.json", json.dumps(result, indent=1))
    return result


def show(result: dict) -> None:
    """Print the tables and what they need to be read."""
    console = rich.console.Console(soft_wrap=True, highlight=False)
    for suffix in ("", "_exclude_seen"):
        if f"test{suffix}" in result:
            console.print(report.rich_table(result, suffix))
    console.print(
        f"IDs that exist among {result['test']['beam_width']} beams without the trie: "
        f"{result['test']['legality_unmasked']:.1%}; "
        f"coverage of the catalogue: {result['test']['coverage']:.1%}"
    )
    if "sasrec" in result:
        console.print(report.sasrec_budget(result["sasrec"]))
    for name, paired in result.get("paired", {}).items():
        low, high = paired["ci95"]
        console.print(
            f"Recall@10 minus {report.NAMES[name]}: {paired['difference']:+.4f} "
            f"\\[{low:+.4f}, {high:+.4f}]"
        )


def main(config: EvaluateConfig) -> None:
    """Evaluate one run again, keeping the seconds of its earlier stages."""
    run = Run.open(config.run)
    if not run.finished:
        raise InputError(
            f"{run.folder} is not trained to its end: run `{run.config['command']}` on"
        )
    path = run.folder / "report.json"
    earlier = read_json(path)["seconds"] if path.exists() else {}
    show(evaluate_run(run, config.evaluation, earlier))
    print(f"written to {run.folder}")


if __name__ == "__main__":
    cli.run(main, EvaluateConfig, prog="python -m experiments.evaluate")
