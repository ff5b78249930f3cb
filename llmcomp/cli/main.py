"""The command `llmcomp`: its arguments and its errors. What a command calls is in commands.py and its siblings.

Exit status: 0 done, 1 failed (one line on stderr that says what and what to do), 2 usage, and as gzip: a file skipped;
3 parts of a salvaged archive are lost, and stderr says which.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from llmcomp.cli import claims, cluster
from llmcomp.cli import commands as cli_commands
from llmcomp.cli import parser_tree as parser_tree_
from llmcomp.errors import Error

Command = Callable[[argparse.Namespace], int]

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    args.words = argv
    _refuse_options_as_files(parser, args, argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # File names may hold what the terminal's encoding has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("default" if args.debug else "once", UserWarning)
        warnings.showwarning = _show_warning
        try:
            return args.command(args)
        except BrokenPipeError:
            # The reader of the output is gone; Python must not complain of it again when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (Error, OSError, KeyboardInterrupt) as error:
            if args.debug:
                raise
            interrupted = isinstance(error, KeyboardInterrupt)
            return cli_commands.complain("interrupted" if interrupted else error, _INTERRUPTED if interrupted else 1)


def parser_tree() -> tuple[parser_tree_.Command, ...]:
    """All commands with their options."""
    return tuple(parser_tree_.commands(_parser()))


def _completion(args: argparse.Namespace) -> int:
    from llmcomp.cli import completion

    sys.stdout.write(completion.script(args.shell, "llmcomp", parser_tree()))
    return 0


def _refuse_options_as_files(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """argparse takes "-9" and "-x y" for files; a file with such a name comes behind "--", as for every command."""
    n_options = argv.index("--") if "--" in argv else len(argv)
    for word in argv[:n_options]:
        if word.startswith("-") and word != "-" and word in _files(args):
            hint = "there are no levels, -m chooses a model" if word[1:].isdecimal() else "a file comes behind --"
            parser.error(f"unrecognized arguments: {word} ({hint})")


def _files(args: argparse.Namespace) -> Sequence[str]:
    found = getattr(args, "file", ())
    return [found] if isinstance(found, str) else found


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"llmcomp: warning: {message}", file=sys.stderr)


# Long: some lines a command.
def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-q", "--quiet", action="store_true", help="no progress bars, no plan")
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="llmcomp", description="How well language models compress: every bit that is counted decodes."
    )
    parser.add_argument("--version", action="version", version=f"llmcomp {cli_commands.version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str, to: Any = commands) -> argparse.ArgumentParser:
        found = to.add_parser(name, parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}.")
        found.set_defaults(command=command)
        return found

    demo = add("demo", cli_commands.demo, "code, decode, fit and draw the bundled models on the bundled samples")
    demo.add_argument("--out", default="demo-results", metavar="FOLDER", help="default: %(default)s")
    demo.add_argument("--chunks", type=_positive, metavar="N", help="chunks of every sample")
    data = commands.add_parser("data", help="list, download and check data sets")
    _add_data(data.add_subparsers(title="actions", metavar="ACTION", required=True), add)
    score = add("score", cli_commands.score, "score one model on one data set, one row a chunk")
    score.add_argument("model", help="a name, a folder (./NAME) or a name of the Hugging Face hub")
    score.add_argument("--step", type=int, help="training step (default: the last)")
    score.add_argument("--verify", action="store_true", help="decode every payload again")
    score.add_argument(
        "--adapt",
        action="store_true",
        help="print also what the model mixed with what each chunk teaches reaches",
    )
    score.add_argument("--out", metavar="FILE", help="write the rows as Parquet")
    score.add_argument("--token-bits", action="store_true", help="rows hold the bits of every token, too")
    _add_scoring(score, several=False)
    verify = add("verify", claims.verify, "certify that the bits per byte of any predictor are real, or tell why not")
    claims.add_verify(verify)
    _add_data_choice(verify, required=False)
    _add_engine(verify)
    fresh = add("fresh", claims.fresh, "score models on a folder of texts that are newer than they are, by category")
    claims.add_fresh(fresh)
    _add_engine(fresh)
    compare = add("compare", claims.compare, "compare two models on the same data, and say whether it means anything")
    claims.add_compare(compare)
    _add_data_choice(compare, required=True)
    _add_engine(compare)
    _add_sweep(
        add("sweep", cli_commands.sweep, "score a grid of models, steps and data sets; what is finished is kept")
    )
    cluster.add_merge(add("merge", cluster.merge, "write the rows of one or several folders of results as one file"))
    fit = add("fit", cli_commands.fit, "fit the scaling law CR(P, S) = a + b P^-alpha + c S^-beta")
    _add_results(fit)
    fit.add_argument("--form", default="additive", help="form of the law (default: %(default)s)")
    fit.add_argument("--x", default="params,step", metavar="AXES", help="one axis or two (default: %(default)s)")
    fit.add_argument("--holdout", action="store_true", help="fit the smaller sizes and steps, predict the next ones")
    fit.add_argument("--report", action="store_true", help="print data, method, result and hold-out (Markdown)")
    fit.add_argument("--latex", action="store_true", help="print LaTeX")
    plot = add("plot", cli_commands.plot, "draw the figures")
    _add_results(plot)
    plot.add_argument("--out", metavar="FOLDER", help="default: figures/ in the folder of results")
    plot.add_argument("--format", action="append", metavar="EXT", help="png, pdf, svg (default: png and pdf)")
    _add_archive(add("compress", cli_commands.compress, "compress files to FILE.llmc"), compress=True)
    _add_archive(add("decompress", cli_commands.compress, "decompress FILE.llmc"), compress=False)
    info = add("info", cli_commands.info, "say what an archive needs, what a model takes, or what is installed")
    info.add_argument("file", nargs="*", metavar="FILE.llmc|MODEL", help="none: this installation")
    info.add_argument("-s", "--step", type=int, help="training step of a model (default: the last)")
    info.add_argument("--engine", choices=("exact", "exact-int8", "torch"), help="of a model (default: the best)")
    add("selftest", cli_commands.selftest, "check that this machine computes the bits that all others do")
    bench = add(
        "bench",
        cli_commands.bench,
        "measure coder and engine on this machine, the engine beside torch, or the work of a whole sweep",
    )
    _add_bench(bench)
    completion = add("completion", _completion, "print a completion script: bash, zsh or fish")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    _add_models(add("models", cli_commands.models, "list suites and models, or check their revisions on the hub"))
    return parser


def _add_data(actions: Any, add: Callable[..., argparse.ArgumentParser]) -> None:
    add("list", cli_commands.data_list, "list data sets and where they lie", actions)
    fetch = add("fetch", cli_commands.data_fetch, "download, check and unpack into the cache folder", actions)
    fetch.add_argument("name", nargs="+")
    manifest = add("manifest", cli_commands.data_manifest, "write the SHA-256 of every chunk", actions)
    check = add("check", cli_commands.data_check, "compare the chunks with a manifest", actions)
    inspect = add("inspect", cli_commands.data_inspect, "show what would be scored, and score nothing", actions)
    for action in (manifest, check, inspect):
        action.add_argument("dataset", metavar="NAME[=PATH]")
        if action is not inspect:
            action.add_argument("file", metavar="MANIFEST.json")
        _add_chunks(action)


def _add_chunks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chunks",
        type=_positive,
        metavar="N",
        help="how many chunks of each data set are scored: N that are drawn over the whole of it, and N + M begin with "
        "the same N (default: 2,048, or all where there are fewer)",
    )
    parser.add_argument(
        "--chunk-bytes",
        type=_positive,
        default=2048,
        metavar="N",
        help="every chunk is compressed alone, so a longer one gives a better ratio (default: %(default)s)",
    )
    parser.add_argument(
        "--draw",
        choices=("spread", "first"),
        default="spread",
        help="spread: chunks drawn over the data (default); first: the first of each text, which are neighbours; "
        "pictures and speech are always drawn",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    parser.add_argument(
        "--whole", action="store_true", help="whole files and rows instead of chunks, read with sliding windows"
    )


def _add_data_choice(parser: argparse.ArgumentParser, required: bool, **how: Any) -> None:
    parser.add_argument(
        "--dataset",
        metavar="NAME[=PATH]",
        required=required,
        help="text, image or speech (bundled samples), a fetched data set, image=FOLDER, speech=FOLDER, or any name = "
        "files: enwik8=FILE, dna=FOLDER, 'code=src/**/*.py', text=logs.jsonl:message, text=part.parquet:body, "
        "text=hf:NAME,split=test:COLUMN",
        **how,
    )
    _add_chunks(parser)


def _add_scoring(parser: argparse.ArgumentParser, several: bool) -> None:
    how: dict[str, Any] = {"action": "append"} if several else {}
    _add_data_choice(parser, required=not several, **how)
    parser.add_argument("--protocol", choices=("lossless", "published"), help="default: lossless", **how)
    parser.add_argument("--mapping", choices=("bytes", "latin1", "shift", "ascii"), help="default: bytes", **how)
    _add_engine(parser)
    _add_max_memory(parser)


def _add_max_memory(parser: Any) -> None:
    parser.add_argument(
        "--max-memory",
        type=_memory,
        metavar="SIZE",
        help="what weights and batches may take: bytes, 8GB, 500MiB, or a share of all memory (0.5); default: all that "
        "is free",
    )


def _add_engine(parser: Any) -> None:
    parser.add_argument(
        "--engine", choices=("exact", "exact-int8", "torch"), default="exact", help="default: %(default)s"
    )
    parser.add_argument("--device", help="of the exact and the torch engine: cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the torch engine")
    parser.add_argument("--attention", choices=("sdpa", "eager"), help="of the torch engine")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--suite",
        metavar="NAME",
        help="pico (default), pythia, ... (`llmcomp models`), or a suite's file (*.json)",
    )
    which.add_argument(
        "--model", action="append", help="a name, a folder (./NAME) or a name of the hub; may be repeated"
    )
    parser.add_argument("--step", action="append", type=int, metavar="N", help="training step; may be repeated")
    _add_choice(parser)
    parser.add_argument("--lock", metavar="FILE", help="pin revisions to it (default: models.lock in the --out folder)")
    parser.add_argument(
        "--disk", metavar="SIZE", help="of weights at once: 50GB; revisions are deleted when their cells are done"
    )
    _add_scoring(parser, several=True)
    parser.add_argument("--baselines", action="store_true", help="add gzip, xz, PNG, FLAC, random models, ...")
    parser.add_argument("--verify", action="store_true", help="decode every payload again")
    parser.add_argument("--out", default="results", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--resume", action="store_true", help="the default: what is finished is never computed again")
    cluster.add_options(parser, _positive)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """Which checkpoints of a suite."""
    parser.add_argument("--models", metavar="WORDS", help="of a suite: 70m,410m or 70m..1b or all (default: its grid)")
    parser.add_argument("--steps", metavar="WORDS", help="1000,8000 or 1000..8000 or log:12 or last or all")
    parser.add_argument("--tokens", metavar="WORDS", help="instead of steps, by tokens seen: 2e9,2e10 or log:8")
    parser.add_argument("--seeds", metavar="WORDS", help="1,2 or 1..9 or all")


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="*",
        metavar="WORD",
        help="none: the suites; SUITE: its models; check SUITE or check MODEL: ask the hub for the digests of their "
        "revisions and tell which have equal weights, lack files or have changed",
    )
    _add_choice(parser)
    parser.add_argument("--lock", metavar="FILE", help="of check: compare with it; written if it is not there")
    parser.add_argument("--update", action="store_true", help="of check: write what the hub has now into the lock")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        choices=("speed", "engine", "sweep", "precision"),
        default="speed",
        help="default: %(default)s",
    )
    _add_bench_engine(parser.add_argument_group("bench engine"))
    sweep = parser.add_argument_group("bench sweep")
    sweep.add_argument("--suite", choices=("pico", "pythia"), default="pythia", help="default: %(default)s")
    sweep.add_argument(
        "--random-weights", action="store_true", help="the default, and all there is: nothing is downloaded"
    )
    sweep.add_argument(
        "--chunks", type=_positive, metavar="N", help="of each data set (default: 2,048; on a CPU 1; precision: 16)"
    )
    sweep.add_argument("--sizes", type=_positive, metavar="N", help="the N smallest models (default: all; on a CPU 1)")
    sweep.add_argument("--checkpoints", type=_positive, metavar="N", help="of each model (default: 5; on a CPU 1)")
    _add_engine(sweep)
    _add_max_memory(sweep)
    precision = parser.add_argument_group("bench precision: what the dtypes of the torch engine cost in bits")
    precision.add_argument("--model", action="append", help="a name or a folder (default: pico-595k); may be repeated")
    precision.add_argument("--step", type=int, help="training step (default: the last)")
    precision.add_argument(
        "--dataset", action="append", metavar="NAME[=PATH]", help="default: the bundled samples; may be repeated"
    )


def _add_bench_engine(group: Any) -> None:
    group.add_argument("--shapes", nargs="+", metavar="NAME", help="models or parts of names (default: 70m 160m pico)")
    group.add_argument("--threads", nargs="+", type=_positive, default=[1, 2], metavar="N", help="default: 1 2")
    group.add_argument("--seconds", type=float, default=5.0, help="about so long for each side of a row (default: 5)")
    group.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of all threads; bench sweep too",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default="results", help="folder of a sweep (default: %(default)s)")
    parser.add_argument("--published", action="store_true", help="the 75 published cells instead")


# Long: some lines an option.
def _add_archive(parser: argparse.ArgumentParser, compress: bool) -> None:
    parser.add_argument("file", nargs="*", default=["-"], help="files; - or none: standard input to standard output")
    parser.add_argument(
        "-m", "--model", help=f"default: {cli_commands.DEFAULT_MODEL if compress else 'the one that the archive names'}"
    )
    parser.add_argument("-s", "--step", type=int, help="training step (default: the last)")
    parser.add_argument("-d", "--decompress", action="store_true", default=not compress, help="decompress")
    parser.add_argument("-t", "--test", action="store_true", help="decode and compare checksums, write nothing")
    parser.add_argument("-l", "--list", action="store_true", help="list what archives hold")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell of every file: bytes, ratio, speed")
    parser.add_argument("-r", "--recursive", action="store_true", help="take the files in folders, and those below")
    parser.add_argument(
        "-T", "--threads", type=_threads, metavar="N", help="threads (default: LLMCOMP_THREADS, or all)"
    )
    parser.add_argument("-k", "--keep", action="store_true", help="keep the input files")
    parser.add_argument("-f", "--force", action="store_true", help="overwrite, take links")
    parser.add_argument("-c", "--stdout", action="store_true", help="write to standard output, keep the input files")
    parser.add_argument("-o", "--output", metavar="FILE", help="write to FILE, keep the input file")
    parser.add_argument(
        "--download", action="store_true", help="let an archive download the model that it names from the hub"
    )
    parser.add_argument("--salvage", action="store_true", help="write the intact segments of a damaged archive")
    parser.add_argument("--mapping", choices=("bytes", "latin1", "shift", "ascii"), default="bytes")
    parser.add_argument("--overlap", type=int, metavar="N", help="tokens of the window before that a window sees")
    parser.add_argument(
        "--no-mix", action="store_true", help="by the model alone, without what a segment itself teaches"
    )
    parser.add_argument(
        "--no-stock", action="store_true", help="by the model alone, even where deflate or LZMA make a segment smaller"
    )
    parser.add_argument(
        "--salt", type=_hexadecimal, metavar="HEX", help="16 bytes, for the same archive from a pipe each time"
    )
    segments = parser.add_mutually_exclusive_group()
    segments.add_argument("--segment-bytes", type=_positive, metavar="N", help="bytes that can be decoded alone")
    segments.add_argument(
        "--solid", action="store_true", help="the largest segments, of 1 MiB: smaller, but no part is at hand as fast"
    )
    _add_engine(parser)
    # To decompress, the archive says it.
    parser.set_defaults(engine=None)


def _memory(text: str) -> int | float:
    from llmcomp.models.memory import parse_memory

    try:
        return parse_memory(text)
    except Error as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _hexadecimal(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not hexadecimal") from None


def _threads(text: str) -> int | None:
    """0 is all, as for xz and zstd."""
    return _positive(text) if text != "0" else None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value
