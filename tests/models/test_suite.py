"""Suites: the bundled files against published lists and counts, files of one's own, and the words that choose."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmcomp import pico
from llmcomp.errors import Error
from llmcomp.models import counts
from llmcomp.models import suite as suite_module
from llmcomp.models.registry import find_entry, list_models
from llmcomp.models.selection import select
from llmcomp.models.suite import Suite, SuiteModel, bundled_suites, checkpoints, load_suite, read_suite

# Parameters in all and without embeddings, as the model cards of Pythia print them (14m, 31m: sums over their files).
PYTHIA = {
    "14m": (14_067_712, 1_189_888),
    "31m": (30_494_720, 4_739_072),
    "70m": (70_426_624, 18_915_328),
    "160m": (162_322_944, 85_056_000),
    "410m": (405_334_016, 302_311_424),
    "1b": (1_011_781_632, 805_736_448),
    "1.4b": (1_414_647_808, 1_208_602_624),
    "2.8b": (2_775_208_960, 2_517_652_480),
    "6.9b": (6_857_302_016, 6_444_163_072),
    "12b": (11_846_072_320, 11_327_027_200),
}


def model_of(suite: str, size: str) -> SuiteModel:
    return next(model for model in load_suite(suite).models if model.size == size)


def revisions(model: SuiteModel, branches: Any = ()) -> list[str]:
    return [checkpoint.revision for checkpoint in checkpoints(model, branches)]


def test_pythia_is_whole() -> None:
    suite = load_suite("pythia")
    assert {m.size: (m.n_params, m.n_params_nonembedding) for m in suite.models} == PYTHIA
    assert len(suite.models) == 18
    names = {model.name for model in suite.models}
    assert {"EleutherAI/pythia-14m", "EleutherAI/pythia-12b-deduped"} <= names
    assert "EleutherAI/pythia-31m-deduped" not in names
    for model in suite.models:
        there = checkpoints(model)
        # Biderman et al. 2023: 154 checkpoints; 299,892,736,000 tokens in all.
        assert len(there) == len({c.revision for c in there}) == 154
        assert [c.revision for c in there[:12]] == [f"step{2**k if k >= 0 else 0}" for k in range(-1, 10)] + [
            "step1000"
        ]
        assert (there[-1].revision, there[-1].tokens, there[-1].seed) == ("step143000", 299_892_736_000, 1234)


def test_polypythias_have_fifty_one_runs_and_seeds() -> None:
    suite = load_suite("polypythias")
    assert len(suite.models) == 5 * 9 + 2 * 3
    by_name = {model.name: model for model in suite.models}
    assert by_name["EleutherAI/pythia-410m-seed9"].seed == 9
    assert by_name["EleutherAI/pythia-160m-data-seed2"].seed == 2
    assert "EleutherAI/pythia-160m-weight-seed4" not in by_name
    assert {m.n_params for m in suite.models if m.size == "31m"} == {PYTHIA["31m"][0]}
    default = select(suite)
    assert len(default) == 45 * 5
    assert [c.name for c in select(suite, models="70m", steps="last", seeds="2,5")] == [
        "EleutherAI/pythia-70m-seed2",
        "EleutherAI/pythia-70m-seed5",
    ]


@pytest.mark.parametrize(
    ("suite", "size", "names"),
    [
        # revisions.txt of allenai/OLMo-7B.
        ("olmo", "7B", ["step0-tokens0B", "step1000-tokens4B", "step2000-tokens9B", "step4000-tokens18B"]),
        ("olmo", "7B", ["step5000-tokens22B", "step56000-tokens248B", "step556000-tokens2460B"]),
        ("olmo2", "0425-1B", ["stage1-step10000-tokens21B", "stage1-step140000-tokens294B"]),
        ("olmo2", "0425-1B", ["stage1-step1907359-tokens4001B"]),
        ("smollm2", "360M", ["step-160000"]),
        ("smollm2", "1.7B", ["step-125000", "step-5000000"]),
        ("smollm3", "3B", ["stage1-step-40000", "stage1-step-3440000", "stage2-step-4200000", "stage3-step-4720000"]),
        ("amber", "Amber", ["ckpt_000", "ckpt_358", "main"]),
        ("gemstones", "1024x28", ["step_00002385", "step_00081090", "main"]),
        ("apertus", "8B", ["step50000-tokens210B", "step1194000-tokens5014B", "step1678000-tokens7047B"]),
        ("apertus", "8B", ["step1700000-tokens7232B", "step2600000-tokens14792B", "step2627139-tokens15T"]),
        ("datadecide", "1B", ["step69369-seed-default", "step2500-seed-large-aux-2"]),
        ("datadecide", "4M", ["step1250-seed-small-aux-3", "step5725-seed-default"]),
        ("marin", "8b", ["kestrel", "deeper-starling"]),
    ],
)
def test_revisions_have_the_names_that_are_published(suite: str, size: str, names: list[str]) -> None:
    assert set(names) <= set(revisions(model_of(suite, size)))


@pytest.mark.parametrize(
    ("suite", "size", "n_checkpoints"),
    [
        *[("olmo", "7B", 558), ("smollm3", "3B", 86 + 19 + 13), ("amber", "Amber", 360), ("apertus", "8B", 44)],
        *[("gemstones", "256x23", 175), ("datadecide", "20M", 3 * 13), ("datadecide", "530M", 48 + 2 * 43)],
    ],
)
def test_numbers_of_checkpoints(suite: str, size: str, n_checkpoints: int) -> None:
    assert len(revisions(model_of(suite, size))) == n_checkpoints


def test_names_that_only_the_hub_knows() -> None:
    """allenai/OLMo-2-1124-7B: tokens in names are rounded up; what fits no name of the suite is left out."""
    model = model_of("olmo2", "1124-7B")
    there = [
        "main",
        "stage1-step1000-tokens5B",
        "stage1-step928646-tokens3896B",
        "stage2-ingredient1-step1000-tokens5B",
    ]
    found = checkpoints(model, [*there, "step150-tokens1B"])
    assert [(c.step, c.tokens) for c in found] == [(1000, 4_194_304_000), (928_646, 928_646 * 4_194_304)]
    seventy = checkpoints(model_of("apertus", "70B"), ["step10000-tokens42B", "longctx-step5"])
    assert [(c.step, c.tokens) for c in seventy] == [(10_000, 42_000_000_000)]


def test_tokens_of_published_runs() -> None:
    last = {size: checkpoints(model_of("datadecide", size))[-1].tokens for size in ("4M", "150M", "1B")}
    # The card's table: 0.4, 15.0 and 100.0 billion.
    assert {size: round((tokens or 0) / 1e9, 1) for size, tokens in last.items()} == {
        "4M": 0.4,
        "150M": 15.0,
        "1B": 100.0,
    }
    for model in load_suite("delphi").models:
        (only,) = checkpoints(model)
        stated = float(model.size.rpartition("-")[2].removesuffix("Btokens")) * 1e9
        assert only.tokens == pytest.approx(stated, rel=0.02)
    eight = {c.step: c.tokens for c in checkpoints(model_of("apertus", "8B"))}
    assert eight[50_000] == 209_715_200_000
    assert eight[2_627_139] == pytest.approx(15e12, rel=0.001)


def test_seeds_of_one_repository_are_told_apart() -> None:
    model = next(m for m in load_suite("datadecide").models if m.name == "allenai/DataDecide-c4-4M")
    at_end = [c for c in checkpoints(model) if c.step == 5725]
    assert {c.name: c.seed for c in at_end} == {
        "allenai/DataDecide-c4-4M@default": 6198,
        "allenai/DataDecide-c4-4M@small-aux-2": 14,
        "allenai/DataDecide-c4-4M@small-aux-3": 15,
    }
    assert checkpoints(model_of("marin", "8b"))[0].name == "marin-community/marin-8b-base@kestrel"


# The sizes of the cards' tables, in millions.
DATADECIDE = dict(
    zip(
        ("4M", "6M", "8M", "10M", "14M", "16M", "20M", "60M", "90M", "150M", "300M", "530M", "750M", "1B"),
        (3.7, 6.0, 8.5, 9.9, 14.4, 16.0, 19.1, 57.1, 97.9, 151.9, 320.0, 530.1, 681.3, 1176.8),
        strict=True,
    )
)
# Sizes of model.safetensors on the hub, float32.
GEMSTONES = {"256x23": 194e6, "768x3": 415e6, "1280x15": 1.99e9, "1024x28": 2.17e9, "2560x8": 4.18e9, "3072x12": 8.03e9}


def test_counts_are_those_that_others_publish() -> None:
    for size, millions in DATADECIDE.items():
        assert (model_of("datadecide", size).n_params or 0) / 1e6 == pytest.approx(millions, abs=0.11)
    for size, n_bytes in GEMSTONES.items():
        assert 4 * (model_of("gemstones", size).n_params or 0) == pytest.approx(n_bytes, rel=0.004)


def count_by_transformers(model: SuiteModel) -> tuple[int, int]:
    """All parameters, and those without embeddings, of transformers' model of the shape; nothing is allocated."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert model.shape is not None
    heads = model.shape["num_attention_heads"]
    unsaid = {"num_key_value_heads": heads, "head_dim": model.shape["hidden_size"] // heads}
    unsaid |= {"tie_word_embeddings": False, "attention_bias": model.family == "gpt_neox"}
    config = transformers.AutoConfig.for_model(model.family, **(unsaid | dict(model.shape)))
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    tables = {id(table): table.numel() for table in (built.get_input_embeddings().weight, built.lm_head.weight)}
    total = sum(parameter.numel() for parameter in built.parameters())
    return total, total - sum(tables.values())


def shapes() -> dict[str, SuiteModel]:
    """One model of every shape; DataDecide's family is not one of transformers."""
    models = [model for name in bundled_suites() for model in load_suite(name).models]
    return {f"{model.family} {json.dumps(model.shape)}": model for model in models if model.family != "hf_olmo"}


def test_counts_are_those_of_the_architectures() -> None:
    by_family: dict[str, SuiteModel] = {}
    for model in shapes().values():
        smallest = by_family.setdefault(model.family, model)
        if (model.n_params or 0) < (smallest.n_params or 0):
            by_family[model.family] = model
    assert len(by_family) == 9
    for model in by_family.values():
        assert count_by_transformers(model) == (model.n_params, model.n_params_nonembedding), model.name


@pytest.mark.slow
def test_every_count_is_that_of_its_architecture() -> None:
    assert len(shapes()) > 40
    for model in shapes().values():
        assert count_by_transformers(model) == (model.n_params, model.n_params_nonembedding), model.name


def test_bundled_suites_are_those_that_come_with_llmcomp() -> None:
    bundled = {entry.name: entry.steps for entry in list_models() if entry.bundled}
    assert bundled == pico.MODEL_STEPS
    assert [entry.name for entry in list_models()[:5]] == list(pico.SUITE_NAMES)
    entry = find_entry("pythia-1.4b-deduped")
    assert entry is not None and entry.name == "EleutherAI/pythia-1.4b-deduped"


def test_every_file_says_where_its_facts_are_from() -> None:
    for name in bundled_suites():
        suite = load_suite(name)
        assert suite.name == name and suite.title and suite.sources
        assert all(model.family and model.licence and model.data and model.params for model in suite.models)


def a_suite(**changes: Any) -> dict[str, Any]:
    content = {
        "suite": "mine",
        "family": "gpt_neox",
        "repository": "me/tiny-{size}-seed{seed}",
        "seeds": [1, 2],
        "tokens_per_step": 100,
        "revisions": [{"name": "step{step:04}", "steps": [0, {"from": 1, "to": 8, "times": 2}]}],
        "models": [{"size": "s", "params": 1000}, {"size": "m", "params": 2000}],
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def written(where: Path, **changes: Any) -> Path:
    path = where / "mine.json"
    path.write_text(json.dumps(a_suite(**changes)))
    return path


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    assert [model.name for model in suite.models] == [f"me/tiny-{s}-seed{n}" for s in "sm" for n in (1, 2)]
    there = checkpoints(suite.models[0])
    assert [(c.revision, c.tokens, c.seed) for c in there] == [
        *[("step0000", 0, 1), ("step0001", 100, 1), ("step0002", 200, 1), ("step0004", 400, 1), ("step0008", 800, 1)]
    ]
    assert len(select(suite)) == 2 * 2 * 5
    assert load_suite(str(tmp_path / "mine.json")).name == "mine"
    folder = read_suite(written(tmp_path, repository=None, folder="runs/{size}/{seed}"))
    assert folder.models[0].name == str(tmp_path / "runs/s/1") and folder.models[0].is_folder


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(suite_module.__file__).parent / "suites" / "README.md").read_text()
    path = tmp_path / "mine.json"
    path.write_text(text.split("```json")[1].split("```")[0])
    suite = read_suite(path)
    assert [len(checkpoints(model)) for model in suite.models] == [6] * 6
    assert suite.models[-1].name == "me/tiny-m-seed3"
    # Every key of a file is explained.
    assert all(f"`{key}`" in text for key in (*suite_module._SUITE_KEYS, *suite_module._OWN_KEYS))
    assert all(key in text for key in suite_module._RULE_KEYS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modles": []}, "unknown key 'modles'"),
        ({"models": None}, "no 'models'"),
        ({"models": [{"size": "s", "parameters": 3}]}, "unknown key 'parameters'"),
        ({"models": [{"params": 3}]}, "no 'size'"),
        ({"models": [{"size": "s", "params": 3.5}]}, "params is 3.5, expected int"),
        ({"models": [{"size": "s", "params": -3}]}, "at least 0"),
        ({"models": [{"size": "s"}, {"size": "s"}]}, "two models are called me/tiny-s-seed1"),
        ({"repository": None}, "neither 'repository' nor 'folder'"),
        ({"repository": "me/{width}"}, "unknown field {width}"),
        ({"seeds": {"one": "1"}}, "seed 'one' has no number"),
        ({"revisions": [{"steps": [1]}]}, "no 'name'"),
        ({"revisions": [{"name": "a", "steps": "some"}]}, "expected a list or 'hub'"),
        ({"revisions": [{"name": "a", "steps": [{"from": 1, "to": 9}]}]}, "either by or times"),
        ({"revisions": [{"name": "a", "steps": [{"from": 1, "to": 9, "by": 0}]}]}, "never ends"),
        ({"revisions": [{"name": "a", "steps": [{"from": 0, "to": 9, "times": 2}]}]}, "never ends"),
        ({"revisions": [{"name": "a", "steps": [1.5]}]}, "steps has 1.5, expected numbers, ranges or null"),
        ({"revisions": [{"name": "a", "steps": [{"from": 0, "to": 2**62, "by": 1}]}]}, "more than 1,048,576 steps"),
        ({"revisions": [{"name": "a", "steps": [], "seeds": [{}]}]}, "seeds has {}, expected numbers or text"),
        ({"seeds": [[1]]}, "seeds has [1], expected numbers or text"),
        ({"models": [{"size": "s", "variants": [3]}]}, "variants has 3"),
        ({"title": 2**70}, "title is 1.180591620717411"),
        ({"sources": ["x", 7]}, "sources has 7, expected text"),
        ({"revisions": [{"name": "a", "round_tokens": "off"}]}, "round_tokens is 'off'"),
        ({"revisions": [{"name": "a-{seed}", "steps": [1], "seeds": [7]}]}, "unknown seed '7'"),
        ({"variants": [{"variant": "x"}], "models": [{"size": "s", "variants": ["y"]}]}, "unknown variant 'y'"),
        ({"grids": {"default": {"sizes": []}}}, "unknown key 'sizes'"),
        ({"tokens_per_step": True}, "tokens_per_step is True"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(Error) as error:
        read_suite(path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_rule_for_the_hub_that_is_no_pattern(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path, revisions=[{"name": "a{step}-{step}", "steps": "hub"}]))
    with pytest.raises(Error, match=r"the rule .*redefinition of group name 'step'"):
        checkpoints(suite.models[0], ["a1-1"])


def test_fields_are_not_padded_to_any_length(tmp_path: Path) -> None:
    rules = [{"name": "a{step:0999999999}", "steps": [1]}]
    assert checkpoints(read_suite(written(tmp_path, revisions=rules)).models[0])[0].revision == "a{step:0999999999}"


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for content, words in (("{", "no valid JSON"), ("[]", "expected a JSON object")):
        path.write_text(content)
        with pytest.raises(Error, match=words):
            read_suite(path)
    with pytest.raises(Error, match="No such file"):
        read_suite(tmp_path / "none.json")
    with pytest.raises(Error, match=r"no suite is called 'pythai'; there are amber, .* pythia"):
        load_suite("pythai")


def chosen(suite: Suite, **words: Any) -> list[tuple[str, int | None]]:
    return [(checkpoint.model.size, checkpoint.step) for checkpoint in select(suite, **words)]


def test_words_choose() -> None:
    pythia = load_suite("pythia")
    sizes = ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
    assert chosen(pythia) == [(s, n) for s in sizes[:5] for n in (1000, 8000, 32000, 128000, 143000)]
    assert chosen(pythia, models="70m..12b", steps="last") == [(size, 143000) for size in sizes]
    assert len(chosen(pythia, models="70m..12b", steps="all")) == 8 * 154
    assert len({c.name for c in select(pythia, models="all")}) == 18
    assert {c.name for c in select(pythia, models="70m-deduped,*-14m", steps="0")} == {
        "EleutherAI/pythia-70m-deduped",
        "EleutherAI/pythia-14m",
    }
    assert chosen(pythia, models="pythia-1b", steps="512..3000") == [("1b", n) for n in (512, 1000, 2000, 3000)]
    assert chosen(pythia, models=["70m"], steps=[4, "8,16"]) == [("70m", 4), ("70m", 8), ("70m", 16)]
    # 2e9 tokens are 953.7 steps of 2,097,152; 3e11 are all.
    assert chosen(pythia, models="70m", tokens="2e9,3e11") == [("70m", 1000), ("70m", 143000)]
    assert chosen(pythia, models="70m", tokens="1..2e7") == [("70m", n) for n in (1, 2, 4, 8)]


def test_steps_evenly_spread_over_the_logarithm() -> None:
    pythia = load_suite("pythia")
    steps = [step or 0 for _, step in chosen(pythia, models="70m", steps="log:12")]
    assert len(steps) == 12 and steps[0] == 1 and steps[-1] == 143000
    ratios = [after / before for before, after in itertools.pairwise(steps)]
    # 143,000 to the 11th root is 2.94; there are powers of two up to 512, and then every thousand.
    assert all(1.9 <= ratio <= 4.1 for ratio in ratios)
    assert chosen(pythia, models="70m", steps="log:1") == [("70m", 143000)]
    assert len(chosen(pythia, models="70m", steps="log:1000")) == 153


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"models": "71m"}, "no model '71m'; its sizes are 14m, 31m, 70m"),
        ({"models": "70m..2b"}, "no sizes '70m..2b'"),
        ({"steps": "1430"}, "no step 1430; the nearest are"),
        ({"steps": "log:0"}, "log:N"),
        ({"steps": "some"}, "'some' is no step"),
        ({"steps": "9..1"}, "from small to large"),
        ({"tokens": "1e15"}, "no checkpoint at 1e15 tokens"),
        ({"seeds": "3"}, "no seed '3'"),
        ({"steps": "1", "tokens": "1e9"}, "either steps or tokens"),
    ],
)
def test_words_that_mean_nothing(words: dict[str, Any], told: str) -> None:
    with pytest.raises(Error, match=told):
        select(load_suite("pythia"), **words)


def test_a_model_without_steps_is_chosen_whole_or_by_tokens() -> None:
    marin = load_suite("marin")
    assert [c.revision for c in select(marin, tokens="2.7e12")] == ["kestrel"]
    with pytest.raises(Error, match="has no steps, only kestrel"):
        select(marin, steps="last")
    with pytest.raises(Error, match="no revision is known"):
        select(load_suite("olmo3"))


def test_operations_are_those_that_torch_counts() -> None:
    """torch's counter counts every product of a pass, attention to all tokens; here only to those before."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    n_tokens, n_layers, n_heads, head = 24, 3, 4, 8
    shape = {"hidden_size": 32, "num_hidden_layers": n_layers, "num_attention_heads": n_heads}
    shape |= {"intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 64}
    for family, more in (
        ("gpt_neox", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"head_dim": head, "num_key_value_heads": 4}),
    ):
        config = transformers.AutoConfig.for_model(family, **shape, **more, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros((1, n_tokens), dtype=torch.long))
        to_all = 4 * n_layers * n_heads * head * n_tokens**2
        to_those_before = 4 * n_layers * n_heads * head * sum(range(1, n_tokens + 1))
        expected = counter.get_total_flops() - to_all + to_those_before
        assert counts.forward_flops(family, shape | more, n_tokens) == expected, family


def test_operations_of_training() -> None:
    model = model_of("pythia", "1.4b")
    assert model.shape is not None and model.n_params is not None
    exact = counts.training_flops("gpt_neox", model.shape, 2**21)
    # Three passes of 2 N for each token, N without the input embedding and the vectors, and attention to 1,024.5
    # tokens on average (Biderman et al., table 1: 24 layers, 2,048 wide).
    layers = 24 * 12 * 2048**2
    expected = 6.0 * 2**21 * (layers + 50304 * 2048 + 24 * 2 * 2048 * 1024.5)
    assert exact == pytest.approx(expected, rel=1e-12)
    assert counts.approximate_training_flops(model.n_params, 2**21) == pytest.approx(exact, rel=0.1)
    assert counts.forward_flops("mamba", model.shape, 5) is None
    assert counts.count_nonembedding({"vocab_size": 10, "hidden_size": 4, "tie_word_embeddings": False}, 100) == 20
    assert counts.count_nonembedding({"hidden_size": 4}, 100) is None
