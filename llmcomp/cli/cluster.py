"""The options of `llmcomp sweep` that say who computes, the array job for Slurm, and `llmcomp merge`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcomp.errors import Error

# Of a Slurm task beside the models: the interpreter, chunks, a batch.
_BASE_BYTES = 2 << 30


def add_options(parser: argparse.ArgumentParser, positive: Any) -> None:
    group = parser.add_argument_group("who computes (default: this process)")
    who = group.add_mutually_exclusive_group()
    who.add_argument("--workers", type=positive, metavar="N", help="N processes of this machine")
    who.add_argument(
        "--ray", nargs="?", const="", metavar="ADDRESS", help="a Ray cluster (default: RAY_ADDRESS, else this machine)"
    )
    who.add_argument(
        "--shards", type=positive, metavar="N", help="this is one of N workers on the --out folder, which all can see"
    )
    group.add_argument("--shard", type=int, metavar="I", help="which one (default: SLURM_ARRAY_TASK_ID)")
    group.add_argument(
        "--slurm", action="store_true", help="with --shards: print the array job of all N, do nothing else"
    )
    group.add_argument(
        "--lease", type=float, default=60.0, metavar="SECONDS",
        help="a worker on another machine is dead after so long without a sign of life (default: 60)",
    )  # fmt: skip
    group.add_argument(
        "--cpus", type=positive, default=1, metavar="N", help="of a worker of --ray or --slurm (default: 1)"
    )
    group.add_argument(
        "--gpus", type=float, metavar="SHARE", help="of a worker of --ray: 0.25 (default: 1 where --device is a card)"
    )


def who_computes(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `llmcomp.sweep` that the options stand for."""
    if not args.lease > 0:
        raise Error(f"--lease is {args.lease:g}, expected seconds above 0")
    if args.slurm and not args.shards:
        raise Error("--slurm prints an array job: say of how many workers with --shards N")
    if args.slurm:
        return {"dry_run": True}
    if args.ray is not None:
        from llmcomp.experiment.ray_cluster import RayCluster

        return {"executor": RayCluster(args.ray or None, cpus=args.cpus, gpus=args.gpus), "unit": "cell"}
    if args.workers:
        return {"workers": args.workers, "unit": "cell"}
    if args.shards or args.shard is not None:
        from llmcomp.experiment.processes import end_on_sigterm

        end_on_sigterm()
        return {"shard": _shard(args), "lease": args.lease, "unit": None}
    return {"unit": "cell"}


def _shard(args: argparse.Namespace) -> int:
    if args.shard is not None:
        return args.shard
    task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal():
        raise Error(f"which of the {args.shards} workers is this? Give --shard I (SLURM_ARRAY_TASK_ID is not set)")
    return int(task)


def print_job(args: argparse.Namespace, plan: Any) -> int:
    """The array job on standard output, and models.lock in the --out folder, so that workers need not ask the hub."""
    from llmcomp.experiment.estimate import in_time
    from llmcomp.models.lock import NAME, write_lock

    costs, out = plan.attrs["costs"], Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)  # where Slurm writes the logs
    except OSError as error:
        raise Error(f"{out}: cannot write results there: {error.strerror or error}") from error
    if plan.attrs["lock"].revisions:
        write_lock(out / NAME, plan.attrs["lock"])
    command = [shutil.which(sys.argv[0]) or "llmcomp", *(word for word in args.words if word != "--slurm")]
    memory = -(-(costs["memory_bytes"] + _BASE_BYTES) // (1 << 30))
    gpu = ["#SBATCH --gpus-per-task=1"] if str(args.device or "").startswith("cuda") else []
    lines = [
        "#!/bin/bash",
        f"# {costs['n_cells']} cells of {costs['n_checkpoints']} checkpoints; at most {costs['flops']:.3g} FLOP, "
        f"{in_time(costs['h200_seconds'])} of one H200.",
        "# Partition, account and time limit are yours: sbatch --partition=... --time=... FILE",
        "#SBATCH --job-name=llmcomp",
        f"#SBATCH --array=0-{args.shards - 1}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --chdir={shlex.quote(str(Path.cwd()))}",
        f"#SBATCH --output={shlex.quote(str(out / 'slurm-%A_%a.log'))}",
        f"#SBATCH --cpus-per-task={args.cpus}",
        f"#SBATCH --mem={memory}G",
        *gpu,
        "export LLMCOMP_THREADS=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
        f"exec {shlex.join(command)}",
    ]
    print(*lines, sep="\n")
    return 0


def tell_shard(args: argparse.Namespace, failed: Sequence[dict[str, Any]]) -> None:
    """What a worker says at its end; the table is for `llmcomp fit` and `merge`, when all are done."""
    if args.json:
        print(json.dumps({"out": args.out, "failed": failed}, indent=1, default=int))
    elif not args.quiet:
        print(f"every cell in {args.out} is settled; llmcomp fit {args.out}", file=sys.stderr)


def add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="+", help="folders (or files) of rows")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the Parquet file to write")


def merge(args: argparse.Namespace) -> int:
    from llmcomp.results import merge_rows

    path, n_rows = merge_rows(args.folder, args.output)
    if args.json:
        print(json.dumps({"file": str(path), "rows": n_rows}))
    elif not args.quiet:
        print(f"{path}: {n_rows:,} rows")
    return 0
