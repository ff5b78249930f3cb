"""The commands of `llmcomp`: parsed arguments in, calls out, results printed. No logic: what a command does is in the
module that it calls, imported when the command runs. A function a command: the file is as long as there are many."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmcomp.errors import Error, printable

# Exit status of a salvage that could not read all of the original.
PARTLY_LOST = 3
# Rows of results that are held at once, for what needs single chunks: some 400 MB.
_ROWS_HELD = 1 << 20
DEFAULT_MODEL = "pico-595k"


def demo(args: argparse.Namespace) -> int:
    from llmcomp.experiment.demo import N_CHUNKS, run_demo

    demo = run_demo(args.out, args.chunks or N_CHUNKS, progress=not args.quiet)
    if args.json:
        files = [str(path) for path in demo.figures]
        tables = {"cells": _records(demo.cells), "baselines": _records(demo.baselines)}
        print_json({**tables, "laws": demo.laws.to_dict(), "figures": files})
        return 1 if demo.failed else 0
    columns = ["model", "params", "step", "modality", "chunks", "bytes_in", "coded_bytes", "ratio"]
    print(demo.cells[columns].to_string(index=False, float_format="%.4f"))
    print(
        demo.baselines.pivot(index="model", columns="modality", values="ratio").to_string(
            na_rep="", float_format="%.4f"
        )
    )
    print(f"\n{demo.summary}\n\n{demo.laws}\n\nFigures:", *demo.figures, sep="\n")
    return _report_failures(demo.failed)


def score(args: argparse.Namespace) -> int:
    from llmcomp.data.datasets import load_dataset
    from llmcomp.results import cells, write_rows
    from llmcomp.scoring.score import adaptive_ratio, score

    data = load_dataset(args.dataset, **chunk_options(args))
    model, protocol = _model(args.model, args), args.protocol or "lossless"
    options = {"verify": args.verify, "max_memory": args.max_memory, "progress": not args.quiet, "adapt": args.adapt}
    options["token_bits"] = args.token_bits
    rows = score(data, model, protocol, args.mapping, **options)  # type: ignore[arg-type]
    if args.out:
        write_rows(args.out, rows)
    columns = ["model", "step", "dataset", "protocol", "mapping", "chunks", "bytes_in", "covered", "ratio", "stderr"]
    columns += ["bits_per_byte", "bits_per_token"]
    table = cells(rows)[columns]
    print_table(table.assign(adaptive_ratio=adaptive_ratio(rows)) if args.adapt else table, args)
    return 0


# Long: a line an argument.
def sweep(args: argparse.Namespace) -> int:
    from llmcomp.cli import cluster
    from llmcomp.experiment.sweep import sweep

    who = {"dry_run": args.dry_run} | cluster.who_computes(args)
    with contextlib.ExitStack() as stack:
        if args.json or args.slurm:  # standard output is for the table or the job alone, not for a plan
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        rows = sweep(
            args.model or args.suite or "pico",
            args.steps or args.step,
            args.dataset,
            args.out,
            protocol=args.protocol,
            mapping=args.mapping,
            **chunk_options(args),
            engine=args.engine,
            device=args.device,
            dtype=args.dtype,
            attention=args.attention,
            verify=args.verify,
            max_memory=args.max_memory,
            baselines=args.baselines,
            sizes=args.models,
            seeds=args.seeds,
            tokens=args.tokens,
            lock=args.lock,
            disk=args.disk,
            **who,
        )
    if args.slurm:
        return cluster.print_job(args, rows)
    if args.dry_run:
        if args.json:
            print_json(_records(rows))
        return 0
    columns = [
        "model",
        "params",
        "step",
        "dataset",
        "protocol",
        "mapping",
        "unit",
        "chunks",
        "bytes_in",
        "ratio",
        "stderr",
    ]
    if who["unit"] is None:
        cluster.tell_shard(args, rows.attrs["failed"])
    elif len(rows):
        print_table(rows[columns], args)
    return _report_failures(rows.attrs["failed"])


def fit(args: argparse.Namespace) -> int:
    from llmcomp.law.fit import fit_scaling_law

    axes = tuple(args.x.split(","))
    laws = fit_scaling_law(_results(args), x=axes, form=args.form)
    held_out = [laws.holdout(axis) for axis in axes] if args.holdout else []
    if args.json:
        found = laws.to_dict()
        print_json({"laws": found, "holdout": [one.to_dict() for one in held_out]} if held_out else found)
    elif args.report:
        print(printable(laws.report("latex" if args.latex else "markdown")))
    else:
        print(printable(laws.to_latex() if args.latex else str(laws)))
        for one in held_out:
            print("", printable(one.to_latex() if args.latex else str(one)), sep="\n")
    return 0


def plot(args: argparse.Namespace) -> int:
    from llmcomp.law.figures import plot_all

    out = args.out or ("figures" if args.published else Path(args.folder) / "figures")
    paths = [str(path) for path in plot_all(_results(args), out, formats=args.format or ("png", "pdf"))]
    if args.json:
        print_json(paths)
    else:
        print(*paths, sep="\n")
    return 0


def _results(args: argparse.Namespace) -> Any:
    from llmcomp.results import count_rows, published, read_cells, read_rows

    if args.published:
        return published(baseline=args.command is plot)
    n_rows = count_rows(args.folder)
    if n_rows <= _ROWS_HELD:
        return read_rows(args.folder)
    print(f"llmcomp: {n_rows:,} chunks are read cell by cell: nothing is said about single chunks", file=sys.stderr)
    return read_cells(args.folder)


# Long: what options exclude each other is refused before any file is touched.
def compress(args: argparse.Namespace) -> int:
    from llmcomp.cli import files
    from llmcomp.codec.files import Skipped

    if args.recursive and (args.output or args.stdout):
        raise Error("-r writes a file beside each that it reads: leave -o and -c out")
    if args.output and args.stdout:
        raise Error("-c and -o both say where to write: leave one out")
    if args.output and len(args.file) > 1:
        raise Error(f"-o names one file, but there are {len(args.file)} files to read")
    given = args.file
    args.file = files.found_in(given, args.recursive, bool(args.decompress or args.test or args.list or args.salvage))
    if args.recursive and not args.file:
        raise Error(f"{', '.join(given)}: no file to read")
    if args.list:
        return _list(args)
    decompress = args.decompress or args.test or args.salvage
    has_data_on_stdout = args.stdout or args.output == "-" or (args.output is None and "-" in args.file)
    if args.json and has_data_on_stdout and not args.test:
        raise Error("--json and the data cannot both be on standard output: name a file with -o")
    if not decompress and args.stdout and len(args.file) > 1:
        raise Error(
            f"{len(args.file)} archives on one standard output could not be told apart: compress one file at once"
        )
    name = args.model or (None if decompress else DEFAULT_MODEL)
    model = None if name is None else _archive_model(name, args, decompress)
    status, reports = 0, []
    for file in args.file:
        try:
            with files.threads(args.threads):
                report, found = _convert_or_ask(file, model, decompress, args)
            reports.append(report)
            if args.verbose:
                files.tell(report)
            # A failure says more than a loss, a loss more than a file that was skipped.
            status = status if status == 1 else found or status
        except Skipped as error:
            status = status or complain(error, 2)
        except Error as error:
            # gzip goes on with the next file, too.
            if args.debug:
                raise
            status = complain(_naming(file, error), 1)
    if args.json:
        print_json([report._asdict() for report in reports])
    return status


def _naming(file: str, error: Error) -> str:
    text = str(error)
    return text if text.startswith((f"{file}:", f"{file} ", f"{file}.llmc")) else f"{file}: {text}"


def _convert_or_ask(file: str, model: Any, decompress: bool, args: argparse.Namespace) -> tuple[Any, int]:
    """One file's report and exit status; what an archive has to download for itself is asked for, where a person can
    be."""
    from llmcomp.models.hub import DownloadNeeded

    try:
        return _convert(file, model, decompress, args, args.download)
    except DownloadNeeded as error:
        if "-" in args.file or not _is_agreed(_naming(file, error)):
            raise
    return _convert(file, model, decompress, args, download=True)


def _is_agreed(question: str) -> bool:
    """A yes at a terminal, which both streams must be; the one place where an answer is read from standard input."""
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        return False
    print(f"llmcomp: {question}. Download it now? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _convert(file: str, model: Any, decompress: bool, args: argparse.Namespace, download: bool) -> tuple[Any, int]:
    """One file's report and exit status; gzip's rule: the input goes when the output stands, unless it is to be kept or
    has another name."""
    from llmcomp.codec import files

    output = "-" if args.stdout else args.output
    # Of a model that the archive names; any other was loaded there.
    options: dict[str, Any] = {"progress": not args.quiet, "device": args.device if model is None else None}
    if decompress:
        options["download"] = download
    if args.test:
        return files.test_file(file, model, **options), 0
    options |= {"output": output, "force": args.force}
    if args.salvage:
        report, summary = files.salvage_file(file, model, **options)
        for first, end in summary.lost:
            print(f"llmcomp: {file}: bytes {first} to {end or 'the end'} are lost", file=sys.stderr)
        return report, PARTLY_LOST if summary.lost else 0
    options["keep"] = args.keep or output is not None
    if decompress:
        return files.decompress_file(file, model, **options), 0
    coding = {"mapping": args.mapping, "overlap": args.overlap}
    if args.segment_bytes:
        coding["segment_bytes"] = args.segment_bytes
    if args.solid:
        from llmcomp.codec.container import SEGMENT_BYTES_MAX

        coding["segment_bytes"] = SEGMENT_BYTES_MAX
    if args.no_mix:
        coding["mix"] = False
    if args.no_stock:
        coding["stock"] = False
    if args.salt is not None:
        coding["salt"] = args.salt
    return files.compress_file(file, model, **options, **coding), 0


def _list(args: argparse.Namespace) -> int:
    from llmcomp.codec.archive import listing

    found, status = _read_archives(args.file)
    if args.json:
        print_json([{"file": file, **vars(about), "ratio": about.ratio} for file, about in found])
    else:
        print(listing(found))
    return status


def info(args: argparse.Namespace) -> int:
    if not args.file:
        return _installation(args)
    names = [file for file in args.file if file != "-" and not Path(file).is_file() and not file.endswith(".llmc")]
    if names:
        return _about_models(names, args)
    archives, status = _read_archives(args.file)
    found = [
        {"file": file, **vars(about), "ratio": about.ratio, "model_is": about.how_to_get} for file, about in archives
    ]
    if args.json:
        print_json(found)
    for archive in () if args.json else found:
        _print_pairs(archive.items())
    return status


def _about_models(names: Sequence[str], args: argparse.Namespace) -> int:
    from llmcomp.models.about import about

    if len(names) < len(args.file):
        raise Error(f"{', '.join(names)}: no archive; ask about models and archives in separate commands")
    reports = [about(name, args.step, engine=args.engine) for name in names]
    if args.json:
        print_json([report.to_dict() for report in reports])
    else:
        print("\n\n".join(map(str, reports)))
    return 0


def _read_archives(files: Sequence[str]) -> tuple[list[tuple[str, Any]], int]:
    """What archives say of themselves. A file that is none is reported, and the rest goes on."""
    from llmcomp.codec.archive import info

    found, status = [], 0
    for file in files:
        try:
            if file == "-" and sys.stdin is None:
                raise Error("standard input is closed")
            found.append((file, info(file if file != "-" else sys.stdin.buffer)))
        except Error as error:
            status = complain(_naming(file, error), 1)
    return found, status


def _installation(args: argparse.Namespace) -> int:
    import importlib.util

    from huggingface_hub import constants

    from llmcomp import coding
    from llmcomp.coding import cuda
    from llmcomp.data import download

    have = {name: importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "ray")}
    facts = {
        "version": version(),
        "backends": " ".join(coding.backends()),
        "backend": coding.backend_in_use(),
        "threads": coding.threads_in_use(),
        "torch engine": "yes" if have["torch"] and have["transformers"] else "no: pip install llmcomp-exact[torch]",
        **{f"CUDA {key}": value for key, value in cuda.cuda_info().items()},
        "ray": "yes" if have["ray"] else "no: pip install llmcomp-exact[ray]",
        "data folder": str(download.cache_folder()),
        "model folder": constants.HF_HUB_CACHE,
    }
    if args.json:
        print_json(facts)
    else:
        _print_pairs(facts.items())
    return 0


def selftest(args: argparse.Namespace) -> int:
    from llmcomp.conformance.cases import all_cases
    from llmcomp.conformance.selftest import COLUMNS, markdown_row, places
    from llmcomp.conformance.selftest import selftest as run_selftest
    from llmcomp.progress import tqdm

    outcomes = []
    found_places = places()
    with tqdm(total=len(found_places) * len(all_cases()), disable=args.quiet or None, leave=False) as bar:
        for place in found_places:
            outcomes.append(run_selftest(place, lambda name: bar.update()))
    if args.json:
        print_json([{**one.row(), **one._asdict()} for one in outcomes])
    else:
        print(markdown_row(dict(zip(COLUMNS, COLUMNS, strict=True))), f"|{'---|' * len(COLUMNS)}", sep="\n")
        print(*(markdown_row(one.row()) for one in outcomes), sep="\n")
        for one in outcomes:
            notes = [*(f"FAILED {line}" for line in one.failures), *(f"not computed: {line}" for line in one.refused)]
            print(*(f"{one.place.name}: {line}" for line in notes), sep="\n", end="\n" if notes else "")
    if n_failed := sum(len(one.failures) for one in outcomes):
        return complain(f"{n_failed} cases failed: archives of this machine may not decode elsewhere", 1)
    return 0


def bench(args: argparse.Namespace) -> int:
    if args.what == "sweep":
        from llmcomp.bench.sweep import run_sweep_benchmark

        scale = {"n_chunks": args.chunks, "n_sizes": args.sizes, "n_checkpoints": args.checkpoints}
        options = {"device": args.device, "dtype": args.dtype, "attention": args.attention}
        options |= {"max_memory": args.max_memory, "clock": args.clock}
        found = run_sweep_benchmark(args.suite, args.engine, **scale, **options, progress=not args.quiet)
        if args.json:
            print_json(found.to_dict())
        else:
            print(found)
        return 0
    if args.what == "precision":
        return _bench_precision(args)
    if args.what == "engine":
        return _bench_engine(args)
    from llmcomp.bench.speed import run_benchmarks

    print_table(run_benchmarks(), args)
    return 0


def _bench_engine(args: argparse.Namespace) -> int:
    from llmcomp.bench.engine import SHAPES_DEFAULT, run_engine_benchmark

    how = {"engine": args.engine, "seconds": args.seconds, "clock": args.clock, "progress": not args.quiet}
    table = run_engine_benchmark(args.shapes or SHAPES_DEFAULT, args.threads, **how)
    if args.json:
        print_json(table.to_dict())
    else:
        print(table)
    return 0


def _bench_precision(args: argparse.Namespace) -> int:
    from llmcomp.bench.precision import DTYPES, N_CHUNKS, run_precision_benchmark

    table = run_precision_benchmark(
        args.model or [DEFAULT_MODEL],
        args.step,
        args.dataset or ("text", "image", "speech"),
        dtypes=(args.dtype,) if args.dtype else DTYPES,
        n_chunks=args.chunks or N_CHUNKS,
        device=args.device,
        attention=args.attention,
        max_memory=args.max_memory,
        progress=not args.quiet,
    )
    print_table(table, args)
    return 0


def models(args: argparse.Namespace) -> int:
    match args.what:
        case ["check", name]:
            return _check_models(name, args)
        case []:
            return _list_suites(args)
        case [suite]:
            return _list_models(suite, args)
    raise Error("expected no word, a suite, or: check SUITE, check MODEL")


def _list_suites(args: argparse.Namespace) -> int:
    import pandas as pd

    from llmcomp.models.families import FAMILIES
    from llmcomp.models.registry import known_steps, list_models
    from llmcomp.models.suite import bundled_suites, load_suite

    if args.json:
        print_json([entry._asdict() for entry in list_models()])
        return 0
    rows = []
    for name in bundled_suites():
        suite = load_suite(name)
        sizes = list(dict.fromkeys(model.size for model in suite.models))
        most = max((len(known_steps(model)) for model in suite.models), default=0)
        listed = all(model.is_listed for model in suite.models)
        shown = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        steps = f"{'' if listed else 'on the hub, at least '}{most}"
        rows.append([name, len(suite.models), shown, steps, suite.models[0].family, suite.models[0].licence])
    table = pd.DataFrame(rows, columns=["suite", "models", "sizes", "steps", "family", "licence"])
    print_table(table, args)
    print(f"\nFamilies of the exact engines (folders and names of the hub, too): {', '.join(FAMILIES)}")
    print("Any other causal model of transformers runs by the torch engine; llmcomp info MODEL says which, and why.")
    return 0


def _list_models(name: str, args: argparse.Namespace) -> int:
    import pandas as pd

    from llmcomp.models.registry import known_steps
    from llmcomp.models.suite import load_suite

    suite = load_suite(name)
    rows = []
    for model in suite.models:
        steps = known_steps(model)
        shown = f"{len(steps)} from {steps[0]} to {steps[-1]}" if steps else "on the hub" if not model.is_listed else ""
        counts = [model.n_params, model.n_params_nonembedding]
        rows.append([model.name, model.family, *counts, list(steps) if args.json else shown, model.seed, model.data])
    columns = ["name", "family", "params", "n_params_nonembedding", "steps", "seed", "data"]
    print_table(pd.DataFrame(rows, columns=columns), args)
    for uncertain in () if args.json else suite.uncertain:
        print(f"uncertain: {uncertain}")
    return 0


def _check_models(name: str, args: argparse.Namespace) -> int:
    from llmcomp.models.check import check_revisions, find_checkpoints
    from llmcomp.models.lock import read_lock, write_lock

    there = args.lock is not None and Path(args.lock).exists()
    old = read_lock(args.lock) if there else None
    words = {"models": args.models, "steps": args.steps, "seeds": args.seeds, "tokens": args.tokens}
    report = check_revisions(find_checkpoints(name, **words), old, progress=not args.quiet)
    if args.lock and (args.update or not there):
        if old is not None:
            report.lock = old.merged(report.lock)
        write_lock(args.lock, report.lock)
    if args.json:
        print_json(report.to_dict())
    else:
        print(report)
    return 1 if report.faults else 0


def data_list(args: argparse.Namespace) -> int:
    import dataclasses

    import pandas as pd

    from llmcomp.data.datasets import list_datasets

    table = pd.DataFrame([dataclasses.asdict(entry) for entry in list_datasets()])
    table["path"] = ["" if path is None else str(path) for path in table["path"]]
    print_table(table, args)
    return 0


def data_fetch(args: argparse.Namespace) -> int:
    from llmcomp.data.download import fetch

    paths = []
    for name in args.name:
        paths.append(str(fetch(name, progress=not args.quiet)))
        if not args.json:
            print(paths[-1])
    if args.json:
        print_json(paths)
    return 0


def data_manifest(args: argparse.Namespace) -> int:
    from llmcomp.data.datasets import load_dataset, write_manifest

    write_manifest(load_dataset(args.dataset, **chunk_options(args)), args.file)
    return 0


def data_check(args: argparse.Namespace) -> int:
    from llmcomp.data.datasets import check_manifest, load_dataset

    check_manifest(load_dataset(args.dataset, **chunk_options(args)), args.file)
    return 0


def data_inspect(args: argparse.Namespace) -> int:
    from llmcomp.data.datasets import load_dataset
    from llmcomp.data.inspection import inspect

    found = inspect(load_dataset(args.dataset, **chunk_options(args)))
    if args.json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0


# Shared by commands.


def complain(error: object, status: int) -> int:
    """One line on stderr; returns the status."""
    text = " ".join(str(error).split()) or type(error).__name__
    # Names in files of others may hold what a terminal takes for commands.
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    print(f"llmcomp: {text}", file=sys.stderr)
    return status


def version() -> str:
    """Of this installation."""
    from llmcomp.version import __version__

    return __version__


def _model(name: str, args: argparse.Namespace) -> Any:
    from llmcomp.models.load import load_model

    options = {"device": args.device, "dtype": args.dtype, "attention": args.attention}
    return load_model(name, args.step, args.engine, **options)


def _archive_model(name: str, args: argparse.Namespace, decompress: bool) -> Any:
    """The model that was named: loaded, or, to decompress, to be loaded with the engine that the archive says."""
    from llmcomp.models.load import NamedModel

    if not decompress:
        args.engine = args.engine or "exact"
        return _model(name, args)
    given = {"device": args.device, "dtype": args.dtype, "attention": args.attention}
    return NamedModel(name, args.step, args.engine, {key: value for key, value in given.items() if value is not None})


def chunk_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of chunks, in the words of `load_dataset`."""
    found = {"n_chunks": args.chunks, "chunk_bytes": args.chunk_bytes, "seed": args.seed, "draw": args.draw}
    return found | {"whole": args.whole, "progress": not args.quiet}


def _report_failures(failed: list[dict[str, Any]]) -> int:
    if failed:
        print(f"llmcomp: {len(failed)} cells failed, the first: {failed[0]['reason']}", file=sys.stderr)
    return 1 if failed else 0


def print_table(table: Any, args: argparse.Namespace) -> None:
    if args.json:
        print_json(_records(table))
    else:
        print(printable(table.to_string(index=False, float_format="%.4g")))


def _records(table: Any) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))


def print_json(value: Any) -> None:
    """JSON has no NaN and no infinity: null."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=1))


def _print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    for name, value in pairs:
        print(f"{name.replace('_', ' '):22} {value}")
