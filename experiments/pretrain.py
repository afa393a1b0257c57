"""Pretrain OneRec: `python -m experiments.pretrain`.

Without flags: MovieLens latest-small, semantic IDs from titles and genres, the `tiny` preset, a
test beside three baselines, and recommendations in words. A killed or interrupted run goes on when
the same command is given again; a finished one is shown.

    python -m experiments.pretrain --data runs/data/beauty --vectors vectors.npy --preset v1-0.015b
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import sys
import time

import jax
import numpy as np

from experiments import evaluate, recommend
from experiments.describe import describe_model
from experiments.prepare import PrepareConfig, prepare
from experiments.pretrain_config import DEMO, PretrainConfig, settings
from experiments.stage import RUNS, checked_mesh, follow_up, seconds_of_training
from experiments.tokenize import say, with_alignment_preset
from onerec_jax import cli, distributed
from onerec_jax.config import PRESETS
from onerec_jax.data.compress import compress
from onerec_jax.data.examples import (
    Examples,
    check_batch_size,
    target_examples,
    train_examples,
)
from onerec_jax.data.features import build_feature_spec, positive_actions
from onerec_jax.data.lifelong import Snapshots
from onerec_jax.data.mapped import MappedBatches, write_mapped
from onerec_jax.data.pipeline import TrainStream
from onerec_jax.data.schema import Dataset, load_dataset
from onerec_jax.data.session_lists import session_examples
from onerec_jax.data.splits import make_split
from onerec_jax.distributed import first_then_all
from onerec_jax.errors import InputError
from onerec_jax.evaluation.ranking import ranking_metrics
from onerec_jax.files import read_json, write_text
from onerec_jax.run import Run, settings_hash
from onerec_jax.serving.recommender import Recommender
from onerec_jax.sharding import MeshConfig, local_mesh
from onerec_jax.tokenizer import report
from onerec_jax.tokenizer.build import tokenize
from onerec_jax.tokenizer.config import Files, TokenizerConfig, files_key
from onerec_jax.tokenizer.semantic_ids import SemanticIds
from onerec_jax.training.flops import train_flops
from onerec_jax.training.loop import Work, fit
from onerec_jax.training.memory import check_fits, device_limit, step_memory
from onerec_jax.training.optimizer import make_optimizer
from onerec_jax.training.step import Trainer

# --------------------------------------------------------------------------------------- stages


def find_data(config: PretrainConfig) -> pathlib.Path:
    """The data set folder; MovieLens is prepared if none is named and it is not there yet."""
    if config.data is not None:
        return config.data
    folder = RUNS / "data" / "movielens"
    if not folder.exists():
        print("preparing MovieLens latest-small")
        prepare(PrepareConfig(source="movielens", out=folder))
    return folder


def find_semantic_ids(config: PretrainConfig, dataset: Dataset, mesh) -> pathlib.Path:
    """The folder of semantic IDs; made if none is named and these settings have none yet."""
    files = Files(config.vectors, config.tokens, config.pairs)
    if config.semantic_ids is not None:
        if files != Files():
            raise InputError(
                "--vectors, --tokens and --pairs make semantic IDs, --semantic-ids names them: "
                "give one"
            )
        return config.semantic_ids
    key = {
        "tokenizer": dataclasses.asdict(config.tokenizer),
        "data": dataset.fingerprint,
        "files": files_key(files),
    }
    folder = RUNS / "semantic_ids" / f"{dataset.name}-{settings_hash(key)}"
    if not folder.exists():
        print(f"making semantic IDs for {dataset.num_items:,} items")
        tokenizer = tokenize(dataset, config.tokenizer, files, mesh=mesh, say=say)
        tokenizer.save(folder)
        report.show({**tokenizer.report, "readable": []})
        print(f"more on them in {folder}/report.md")
    return folder


def find_lifelong(config: PretrainConfig, dataset: Dataset, ids) -> pathlib.Path | None:
    """The folder of compressed lives; made if none is named. None where no life is too long."""
    slots = config.model.slots("lifelong")
    if config.lifelong is not None:
        if not slots:
            raise InputError("--lifelong is given, but the model's lifelong pathway is off")
        return config.lifelong
    if not slots or np.diff(dataset.offsets).max() <= slots:
        return None
    settings = dataclasses.replace(config.compression, max_clusters=slots)
    key = {
        "compression": dataclasses.asdict(settings),
        "data": dataset.fingerprint,
        "semantic_ids": ids.fingerprint,
    }
    folder = RUNS / "lifelong" / f"{dataset.name}-{settings_hash(key)}"
    if not folder.exists():
        print(f"compressing {dataset.num_users:,} lives to at most {slots} clusters")
        compress(dataset, ids.vectors, settings, folder, say=say)
    return folder


def open_run(config: PretrainConfig, data_folder, ids_folder, lifelong_folder, dataset, ids):
    """Creates or continues the run folder."""
    if ids.manifest["dataset_fingerprint"] != dataset.fingerprint:
        raise InputError(
            f"--semantic-ids {ids_folder} were made for another data set than {data_folder}: "
            "run experiments.tokenize on it"
        )
    snapshots = None
    if lifelong_folder is not None:
        snapshots = Snapshots.load(lifelong_folder, dataset)
    eligible = None
    if config.targets == "positive":
        eligible = positive_actions(dataset, config.positive)
    split = make_split(dataset, eligible)
    if config.targets == "sessions":
        examples = session_examples(dataset, split, config.sessions)
    else:
        examples = train_examples(split, eligible)
    check_batch_size(config.train.batch_size, examples)  # before a folder is made
    values = settings(config)
    key = values | {"data": dataset.fingerprint, "semantic_ids": ids.fingerprint}
    if snapshots is not None:
        key["lifelong"] = snapshots.fingerprint
    name = f"{dataset.name}-{config.preset}-{settings_hash(key)}"
    return Run.create(
        config.run or RUNS / name,
        settings=values,
        command=shlex.join(["python", "-m", "experiments.pretrain", *sys.argv[1:]]),
        data_folder=data_folder,
        ids_folder=ids_folder,
        dataset=dataset,
        ids=ids,
        spec=build_feature_spec(
            dataset,
            split,
            ids,
            config.positive,
            config.features,
            clustered=snapshots is not None,
        ),
        lifelong_folder=lifelong_folder,
        snapshots=snapshots,
    )


def training_stream(config: PretrainConfig, run: Run) -> TrainStream:
    """Training batches; for worker processes the log is written out once, to be mapped."""
    mapped = None
    if config.pipeline.workers:
        key = {
            "data": run.dataset.fingerprint,
            "semantic_ids": run.ids.fingerprint,
            "features": run.spec.to_json(),
            "lifelong": run.config["lifelong"],
        }
        folder = RUNS / "mapped" / f"{run.dataset.name}-{settings_hash(key)}"

        def write():
            if not folder.exists():
                print(f"writing the log for the workers to {folder}")
                write_mapped(folder, run.builder)

        first_then_all(write)
        mapped = MappedBatches(folder, run.model_config)
    if run.session_rule is None:
        examples = train_examples(run.split, run.eligible)
    else:
        examples = run.session_lists("train")
        tell_sessions(run, examples.counts)
    return TrainStream(
        run.builder,
        examples,
        config.pipeline,
        config.train.batch_size,
        config.seed,
        run.split.train_end,
        positive_targets=run.eligible is not None,
        mapped=mapped,
    )


def tell_sessions(run: Run, counts: dict) -> None:
    """Prints what the criteria kept, and writes it into the run folder."""
    told = {k: v for k, v in counts.items() if v is not None}
    least = told.pop("min_watch_s", None)
    line = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in told.items())
    print(f"training sessions: {line}" + (f"; watch time from {least:,.1f} s" if least else ""))
    if not jax.process_index():
        write_text(run.folder / "sessions.json", json.dumps(counts, indent=1))


def validation_examples(run: Run, users: int, seed: int) -> Examples:
    """The validation part, or a fixed sample of so many users or session lists (0: all)."""
    if run.session_rule is None:
        examples, named = target_examples(run.split.valid_at), "validation target: split it anew"
    else:
        examples = run.session_lists("valid")
        named = "validation session that passes: see --sessions.combine, or give a longer log"
    if not len(examples):
        raise InputError(f"data set '{run.dataset.name}' has no {named}")
    if 0 < users < len(examples):
        rng = np.random.default_rng(seed)
        examples = examples[np.sort(rng.choice(len(examples), users, replace=False))]
    return examples


def make_validation(config: PretrainConfig, run, mesh):
    """Validation on a fixed sample of users: NTP loss and item metrics by beam search.

    Of session lists, it is the loss of whole lists, and metrics of their first items.
    """
    examples = validation_examples(run, config.validate_users, config.seed)
    generator = run.generator(
        mesh, beam_width=config.validate_beam_width, batch_size=config.evaluation.batch_size
    )

    def validate(variables) -> dict[str, float]:
        loss = generator.loss(variables, run.builder, examples).sum(-1).mean()
        found = generator.rank(variables, run.builder, examples)
        metrics = {k: float(v.mean()) for k, v in ranking_metrics(found.item_ranks).items()}
        score = -float(loss) if config.select_by == "loss" else metrics["ndcg@10"]
        return {"loss": float(loss), **metrics, "score": score}

    return validate


def train(config: PretrainConfig, run, mesh):
    """Trains to the end or to the early stop, from the latest checkpoint if there is one."""
    stream = training_stream(config, run)
    examples = stream.examples
    one = run.builder(examples.user[:1], examples.position[:1], rows=examples[:1].rows)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    if limit := device_limit():
        users, shape = config.train.batch_size, MeshConfig(**mesh.shape)
        memory = step_memory(config.model, run.spec, optimizer, shape, users=users)
        check_fits(memory, limit)
    trainer = Trainer(
        run.model(train=True),
        optimizer,
        mesh,
        one,
        seed=config.seed,
        accumulate=config.train.accumulate,
    )
    parameters = sum(x.size for x in jax.tree.leaves(trainer.abstract_state.params))
    print(
        f"training {config.preset}, {parameters:,} parameters, on {len(examples):,} examples, "
        f"mesh {' x '.join(f'{k} {v}' for k, v in mesh.shape.items())}, in {run.folder}"
    )
    return fit(
        trainer,
        stream,
        run.checkpoints,
        run.metrics,
        config.train,
        seed=config.seed,
        validate=make_validation(config, run, mesh),
        work=functools.partial(work, run),
        profile=config.profile,
    )


def work(run: Run, batch) -> Work:
    """Of a training step on a batch, padding left out."""
    names = "short", "positive", "lifelong"
    # Copies: a view would keep the whole batch until the FLOPs are asked for.
    lengths = {name: np.array(getattr(batch, name).length) for name in names}
    mean = float(batch.target_count.mean())

    def flops(dropped: float) -> float:
        return float(train_flops(run.model_config, run.spec, mean, lengths, dropped).sum())

    return Work(mean * len(batch.target_count), flops)


def finished_report(run: Run, config: PretrainConfig) -> dict | None:
    """The run's report, if it has one of these evaluation settings."""
    path = run.folder / "report.json"
    if not path.exists():
        return None
    found = read_json(path)
    return found if found["evaluation"] == dataclasses.asdict(config.evaluation) else None


def show_recommendations(config: PretrainConfig, run: Run, users: int = 3, n: int = 5) -> None:
    """A few users of the test part: what they did, what the model says, what came."""
    examples = target_examples(run.split.test_at)
    recommender = Recommender(run, run.load_best())
    options = {"n": n, "beam_width": config.evaluation.beam_width}
    rng = np.random.default_rng(0)
    for i in rng.choice(len(examples), min(users, len(examples)), replace=False):
        user, position = recommender.catalogue.users[examples.user[i]], int(examples.position[i])
        life = recommender.catalogue.history(examples.user[i])
        (listed,) = recommender.recommend([user], position=position, **options)
        print(f"\nuser {user}")
        recommend.show(recommender.catalogue, life[:position], listed)
        print(f"what came next: {recommender.catalogue.title(life[position])}")


# ----------------------------------------------------------------------------------------- main


def main(config: PretrainConfig) -> None:
    """Data, semantic IDs, training, test, recommendations."""
    if config.describe:
        return describe_model(
            config.preset,
            config.model,
            config.tokenizer,
            config.train,
            config.optimizer,
            config.mesh,
            targets=config.model.session_items * config.pipeline.targets_per_user,
        )
    if config.deterministic:
        cli.use_deterministic_kernels()

    if config.profile is not None and config.profile.exists():
        raise InputError(f"--profile {config.profile} exists: give a new folder")
    if config.distributed:
        distributed.start(config.cluster)
    with distributed.quiet_unless_first(), distributed.ends_with_others():
        run_stages(config)


def run_stages(config: PretrainConfig) -> None:
    """All but the description; in every process of a distributed run."""
    mesh = checked_mesh(config, config.model)
    seconds, start = {}, time.perf_counter()
    data_folder = first_then_all(lambda: find_data(config))
    dataset = load_dataset(data_folder)
    seconds["prepare"] = time.perf_counter() - start
    start = time.perf_counter()
    # By one process, on its own devices, whatever the number of processes.
    here = mesh if jax.process_count() == 1 else local_mesh()
    ids_folder = first_then_all(lambda: find_semantic_ids(config, dataset, here))
    ids = SemanticIds.load(ids_folder)
    seconds["tokenize"] = time.perf_counter() - start
    start = time.perf_counter()
    lifelong_folder = first_then_all(lambda: find_lifelong(config, dataset, ids))
    if lifelong_folder is not None:
        seconds["compress lives"] = time.perf_counter() - start
    run = first_then_all(
        lambda: open_run(config, data_folder, ids_folder, lifelong_folder, dataset, ids)
    )

    result = finished_report(run, config)
    if result is not None:
        print(f"{run.folder} is finished: showing its report")
    else:
        seconds["train"] = seconds_of_training(run, lambda: train(config, run, mesh))
        if jax.process_count() > 1:
            run.checkpoints.close()
            print(f"trained; test it with one process: {follow_up('evaluate', run.folder)}")
            return
        result = evaluate.evaluate_run(run, config.evaluation, seconds)
    evaluate.show(result)
    show_recommendations(config, run)
    print(f"\neverything lies in {run.folder}: report.md, report.json, plots, checkpoints")
    print(f"more: {follow_up('recommend', run.folder)} --user ID")


def run_command(argv: list[str] | None = None) -> None:
    """The command line; `argv` replaces the process's own flags."""
    argv = sys.argv[1:] if argv is None else argv
    preset = cli.flag_value(argv, "--preset") or "tiny"
    if preset not in PRESETS:
        print(f"error: --preset {preset}: choose one of {', '.join(PRESETS)}", file=sys.stderr)
        raise SystemExit(2)
    changes = DEMO if preset == "tiny" else {}
    tokenizer = with_alignment_preset(TokenizerConfig(), argv)
    default = PretrainConfig(preset=preset, model=PRESETS[preset], tokenizer=tokenizer, **changes)
    cli.run(main, PretrainConfig, prog="python -m experiments.pretrain", default=default, argv=argv)


if __name__ == "__main__":
    run_command()
