"""Small wrongs done to the kernels on purpose, each of which the checks on the emulated device must notice: a barrier
left out, an address off by one, fragments swapped, a tail skipped. What slips through here would slip through there."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from test_cuda_build import C11, CORE, FLAGS, ROOT, compiler
from test_cuda_engine_build import CHECKS
from test_cuda_engine_build import CORE as ENGINE_CORE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulated device switches stacks with ucontext"),
]


class Mutation(NamedTuple):
    """`right` stands once in the file of csrc/cuda, after `after`, and becomes `wrong`."""

    file: str
    right: str
    wrong: str
    after: str = ""


SYNC = "__syncthreads();"
CODER = {
    "the maximum is read before it has come": Mutation(
        "coding/coding.cu", "exchange_wait(exchange, true);", "cluster_begun();", "maximum_of_row("
    ),
    "sums are read before they have come": Mutation(
        "coding/coding.cu", "exchange_wait(&sums_come, at.warp == 0);", "", "intervals_kernel("
    ),
    "the entry is read before it is found": Mutation("coding/coding.cu", SYNC, "", "decode_kernel("),
    "the first rows of two levels only": Mutation(
        "coding/row_source.h", "(int64_t)outer * source.outer_stride_bytes", "0"
    ),
    "a whole chunk counts before the token too early": Mutation(
        "coding/row_tiles.h", "n_before >= chunk_end) *before", "n_before >= chunk_begin) *before"
    ),
    "the vector that holds the token's end is skipped": Mutation(
        "coding/row_tiles.h",
        "if (vector >= n_vectors) break;",
        "if (vector + 1 >= n_vectors) break;",
        "void lmc_tiles_weight_sum(",
    ),
    "vectors begin where the row begins": Mutation(
        "coding/row_tiles.h",
        "layout.n_head = to_boundary < vocab_size ? to_boundary : vocab_size;",
        "layout.n_head = 0;",
    ),
    "a token one too far": Mutation("coding/coding.cu", "n_elements + e;", "n_elements + e + 1;"),
}
STEP, PASS, ROWS = "transformer/attention_step.cu", "transformer/attention.cu", "transformer/rows.cu"
GRAPH = "transformer/transformer.cu"
ENGINE = {
    "values of a tile are overwritten while they are read": Mutation(PASS, SYNC, "", "void value_tile("),
    "a stage of a step is read before it has come": Mutation(
        STEP, "__pipeline_wait_prior(STEP_STAGES - 2);", "", "void weigh_values("
    ),
    "a stage of a step is overwritten while it is read": Mutation(STEP, SYNC, "", "void weigh_values("),
    "keys of a step are those of the next one": Mutation(
        STEP, "+ slot % KEY_BLOCK;", "+ (slot + 1) % KEY_BLOCK;", "void score_keys("
    ),
    "the last key of a stage is skipped": Mutation(STEP, "key < n; key++", "key + 1 < n; key++", "void weigh_values("),
    "a query sees the key after it": Mutation(PASS, "return key <= position &&", "return key <= position + 1 &&"),
    # Of other families.
    "a window is one too long": Mutation(PASS, "position - key < a.window", "position - key <= a.window"),
    "the first sums of a window are not its own": Mutation(PASS, "first_key == at.first_key ?", "first_key == 0 ?"),
    "keys before a window are weighed": Mutation(PASS, "uint32_t key = n_before;", "uint32_t key = 0;"),
    "all of a tile is seen": Mutation(PASS, "sees_all && is_seen<false>(", "sees_all || is_seen<false>("),
    "a tile of a ring is looked for where it would be without": Mutation(
        PASS, "IS_PLAIN ? first_key : first_key % a.capacity", "first_key"
    ),
    "a key is put beside its ring": Mutation(
        PASS, "slot = position % a.capacity;", "slot = position;", "void lmc_place_kernel("
    ),
    "a window of a step is one too short": Mutation(
        "transformer/attention_cache.h", "position - a.window + 1 : 0", "position - a.window + 2 : 0"
    ),
    "a step does not go around its ring": Mutation(STEP, "if (!IS_PLAIN && slot >= a.capacity)", "if (false)"),
    "values do not go around their ring": Mutation(STEP, "? at : at - ring_quads;", "? at : at;"),
    "queries of one block share their weights": Mutation(
        STEP, "&weights[q * apart + i];", "&weights[i];", "struct step_chains_t"
    ),
    "the last query of a group is another head's": Mutation(
        STEP, "QUERIES, n_shared - first_of_part", "QUERIES, n_shared"
    ),
    "a query meets the keys of another group": Mutation(
        PASS, "at.head / (a.n_heads / a.n_kv_heads)", "at.head % a.n_kv_heads"
    ),
    "scores are capped after the maximum": Mutation(
        PASS, "capped_score(a, scores[i / 4][i % 4]);", "scores[i / 4][i % 4];", "void score_tile("
    ),
    "outputs are finished while a stage is read": Mutation(
        "transformer/product.cu", SYNC + " /* none reads a stage any more */", ""
    ),
    "factors are not multiplied": Mutation(
        "transformer/product_tiles.h", "if (finish.factors != nullptr)", "if (false)"
    ),
    "an RMSNorm has a mean": Mutation(ROWS, "means[row] = 0.0f;", "means[row] = norm.input[0];"),
    "gains of one head for all": Mutation(ROWS, "row % norm.n_gains * norm.n_features;", "0;"),
    "the norm is not multiplied on its way to the state": Mutation(
        ROWS, "bias[i]), norm.multiplier, output[i]);", "bias[i]), 1.0f, output[i]);"
    ),
    "codes of another input are multiplied": Mutation(GRAPH, "if (!has_codes)", "if (false)"),
    "every layer has the positions of the first": Mutation(GRAPH, "f.model.cosines[kind]", "f.model.cosines[0]"),
    # Products, norms.
    "the last values of k are skipped": Mutation("transformer/product.cu", "if (left > 0) {", "if (left > 1) {"),
    "a stage of a product is read before it has come": Mutation("transformer/product.cu", SYNC, "", "auto meet"),
    "fragments of two tiles of tokens are swapped": Mutation(
        "transformer/product_int8.cu", "tokens[n / 2][n % 2]", "tokens[n / 2][1 - n % 2]"
    ),
    "the two tiles of a load are swapped": Mutation(
        "transformer/product_int8.cu", "first_row + lane % 16", "first_row + (lane ^ 8) % 16"
    ),
    "codes are read before they have come": Mutation(
        "transformer/product_int8.cu", "__pipeline_wait_prior(STAGES - 2);", "__pipeline_wait_prior(STAGES - 1);"
    ),
    "sums are stored where a warp still multiplies": Mutation(
        "transformer/product_int8.cu", SYNC + " /* none reads a stage any more */", ""
    ),
    "rows of a norm are overwritten while they are read": Mutation("transformer/rows.cu", SYNC, "", "void load_chunk("),
    "the last logits of a softmax are skipped": Mutation(
        "coding/softmax.cu", "if (begin < n) {", "if (begin + 1 < n) {"
    ),
}


class Bench:
    """A copy of csrc, its objects, and the program that checks them."""

    def __init__(self, folder: Path, c_sources: list[str], sources: list[str]) -> None:
        self.folder, self.program = folder, "program"
        self.sources = ["csrc/check/emulated/runtime.cpp", *sources]
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        self.objects = [*map(self.object_of, c_sources), *map(self.object_of, self.sources)]
        for source in c_sources:
            self.run(compiler("CC", "gcc", "cc"), *C11, *FLAGS, "-c", source, "-o", self.object_of(source))
        for source in self.sources:
            self.compile(source)

    def run(self, *command: str, check: bool = True, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=timeout)
        assert not check or done.returncode == 0, done.stderr[-3000:]
        return done

    @staticmethod
    def object_of(source: str) -> str:
        return source.replace("/", "-") + ".o"

    def compile(self, source: str) -> None:
        cxx = [compiler("CXX", "g++", "c++"), "-std=c++17", *FLAGS, "-Wno-error", "-Wno-unknown-pragmas"]
        self.run(*cxx, "-Icsrc/check/emulated", "-x", "c++", "-c", source, "-o", self.object_of(source))

    def check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.run(compiler("CXX", "g++", "c++"), *self.objects, "-pthread", "-o", self.program)
        return self.run(f"./{self.program}", *arguments, check=False, timeout=600)

    def users_of(self, source: str) -> list[str]:
        """A source itself, or those that include a header of csrc/cuda."""
        if not source.endswith(".h"):
            return [source]
        name = source.removeprefix("csrc/")
        return [one for one in self.sources if f'#include "{name}"' in (self.folder / one).read_text()]

    def mutated(self, mutation: Mutation, users: Callable[[str], list[str]], *arguments: str) -> str:
        path = self.folder / "csrc/cuda" / mutation.file
        text = path.read_text()
        begin = text.index(mutation.after) if mutation.after else 0
        at = text.index(mutation.right, begin)
        path.write_text(text[:at] + mutation.wrong + text[at + len(mutation.right) :])
        affected = users(f"csrc/cuda/{mutation.file}")
        try:
            for source in affected:
                self.compile(source)
            done = self.check(*arguments)
        finally:
            path.write_text(text)
            for source in affected:
                self.compile(source)
        return "" if done.returncode == 0 else done.stdout + done.stderr or f"exit status {done.returncode}"


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("coder"), CORE, ["csrc/check/cuda_emulated.cpp"])
    assert bench.check("1", "40").returncode == 0
    return bench


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/cuda").glob("*/*.cu"))]
    sources += [f"csrc/check/{name}.cpp" for name in CHECKS]
    c_sources = [*(f"csrc/core/{name}.c" for name in ENGINE_CORE), "csrc/check/transformer_cases.c"]
    bench = Bench(tmp_path_factory.mktemp("engine"), c_sources, sources)
    assert bench.check("1", "4").returncode == 0
    return bench


@pytest.mark.parametrize("name", CODER)
def test_the_coder_checks_notice(coder: Bench, name: str) -> None:
    # One translation unit: the program includes coding.cu.
    assert coder.mutated(CODER[name], lambda _: ["csrc/check/cuda_emulated.cpp"], "1", "40"), name


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_checks_notice(engine: Bench, name: str) -> None:
    assert engine.mutated(ENGINE[name], engine.users_of, "1", "4"), name
