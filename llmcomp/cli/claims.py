"""The commands `verify`, `compare` and `fresh`: arguments, calls and output. What they do is in llmcomp/claims."""

from __future__ import annotations

import argparse
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

from llmcomp.atomic_write import write_beside
from llmcomp.cli.commands import chunk_options, print_json, print_table
from llmcomp.errors import Error


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="*", metavar="FILE", help="each one document; or --dataset")
    predictor = parser.add_mutually_exclusive_group(required=True)
    predictor.add_argument("-m", "--model", help="a model, as for score")
    predictor.add_argument("--command", metavar="WORDS", dest="program", help="a command that speaks the line protocol")
    predictor.add_argument(
        "--callable",
        metavar="WHERE",
        help="MODULE:NAME or FILE.py:NAME, what gives the probabilities of the next token",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="of a command or callable (default: tokens are bytes)")
    parser.add_argument("--claim", type=float, metavar="X", help="bits per byte that are claimed")
    parser.add_argument("--step", type=int, help="training step of a model (default: the last)")
    parser.add_argument("--out", metavar="FILE.json", help="write the certificate")


def verify(args: argparse.Namespace) -> int:
    from llmcomp.claims.predictors import CommandPredictor, ImportedPredictor, NamedModel, Recipe
    from llmcomp.claims.verify import verify

    predictor: Recipe
    if args.program is not None:
        words = shlex.split(args.program)
        if not words:
            raise Error("the command is empty")
        predictor = CommandPredictor(tuple(words))
    elif args.callable is not None:
        predictor = ImportedPredictor(args.callable)
    else:
        options = {"step": args.step, "engine": args.engine, "device": args.device}
        options |= {"dtype": args.dtype, "attention": args.attention}
        predictor = NamedModel(args.model, {name: value for name, value in options.items() if value is not None})
    found = verify(predictor, _data(args), tokenizer=args.tokenizer, claim=args.claim, progress=not args.quiet)
    if args.out:
        found.write(args.out)
    if args.json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0 if found.valid else 1


def _data(args: argparse.Namespace) -> Any:
    from llmcomp.data.datasets import load_dataset

    if bool(getattr(args, "file", ())) == bool(args.dataset):
        raise Error("expected files or --dataset, one of the two")
    if args.dataset:
        return load_dataset(args.dataset, **chunk_options(args))
    try:
        return [Path(file).read_bytes() for file in args.file]
    except OSError as error:
        raise Error(f"{error.filename}: {error.strerror or error}") from error


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a model, as for score, or NAME@STEP")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--level", type=float, default=0.95, help="of the interval (default: %(default)s)")
    parser.add_argument("--mapping", choices=("bytes", "latin1", "shift", "ascii"), help="default: bytes")


def compare(args: argparse.Namespace) -> int:
    from llmcomp.claims.compare import compare
    from llmcomp.models.load import load_model

    options = {"device": args.device, "dtype": args.dtype, "attention": args.attention}
    models = [load_model(*_name_and_step(text), args.engine, **options) for text in (args.a, args.b)]
    found = compare(models[0], models[1], _data(args), level=args.level, mapping=args.mapping, progress=not args.quiet)
    if args.json:
        print_json(found.to_dict())
    else:
        print(found)
    return 0


def _name_and_step(text: str) -> tuple[str, int | None]:
    name, at, step = text.rpartition("@")
    return (name, int(step)) if at and name and step.isdecimal() else (text, None)


def add_fresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="texts, in subfolders that are their categories, or without any")
    parser.add_argument("-m", "--model", action="append", required=True, help="as for compare; repeated, one or more")
    parser.add_argument("--not-before", metavar="DATE", help="refuse files changed before it (2026-11-01)")
    parser.add_argument("--out", metavar="FILE.csv", help="write the table")


def fresh(args: argparse.Namespace) -> int:
    from llmcomp.claims.fresh_texts import fresh_texts
    from llmcomp.models.load import load_model

    options = {"device": args.device, "dtype": args.dtype, "attention": args.attention}
    models = [load_model(*_name_and_step(text), args.engine, **options) for text in args.model]
    table = fresh_texts(args.folder, models, not_before=_seconds(args.not_before), progress=not args.quiet)
    if args.out:
        write_beside(args.out, table.to_csv(index=False).encode())
    print_table(table.drop(columns="sha256") if not args.json else table, args)
    return 0


def _seconds(date: str | None) -> float | None:
    try:
        return None if date is None else datetime.fromisoformat(date).timestamp()
    except ValueError:
        raise Error(f"{date!r} is no date: expected YYYY-MM-DD") from None
