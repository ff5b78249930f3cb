"""The model in the real evaluation harness: a task's bits per byte are those of coded bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval")

from llmcomp import Error, load_model, score  # noqa: E402
from llmcomp.adapters.lm_eval import LlmcompLM  # noqa: E402

pytestmark = pytest.mark.slow
TEXT = (Path(__file__).parents[2] / "README.md").read_text()
DOCUMENTS = [TEXT[:1800], TEXT[2000:2900], "Größe: 3 µm"]

TASK = """
task: own_texts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""


def test_bits_per_byte_of_a_task_are_those_that_are_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "own_texts.yaml").write_text(TASK.format(data=data))
    found = lm_eval.simple_evaluate(
        model=LlmcompLM("pico-13k"),
        tasks=["own_texts"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["own_texts"]
    chunks = [text.encode() for text in DOCUMENTS]
    rows = score(chunks, load_model("pico-13k"), progress=False)
    bits = float((rows["ideal_bits"] + rows["side_bits"]).sum())
    assert found["bits_per_byte,none"] == pytest.approx(bits / sum(map(len, chunks)), rel=1e-9)
    # And within the coder's few bits a document of what the payloads take.
    assert 0 <= 8 * rows["coded_bytes"].sum() - bits < 16 * len(chunks)


class Request:
    def __init__(self, *args: str):
        self.args = args


def test_a_continuation_has_what_the_whole_has_more_than_its_context() -> None:
    lm = LlmcompLM("pico-13k")
    context, ends = "The archive keeps every", [" byte", " zebra"]
    found = lm.loglikelihood([Request(context, end) for end in ends])
    for end, (log_p, _) in zip(ends, found, strict=True):
        rows = score([context.encode(), (context + end).encode()], load_model("pico-13k"), progress=False)
        shared = np.diff(rows["ideal_bits"])[0] * math.log(2)
        assert log_p == pytest.approx(-shared, rel=1e-6)
    assert found[0][0] > found[1][0]


def test_the_likeliest_continuation_is_greedy() -> None:
    lm = LlmcompLM("pico-13k")
    model = lm._model
    tokens = model.tokenizer.encode_bytes(b"The cat sat on the")
    row = model.logits(np.concatenate([[model.tokenizer.bos_token], tokens])[None])[0, -1, : model.vocab_size]
    best = model.tokenizer.decode_bytes([int(row.argmax())]).decode()
    assert model.tokenizer.encode_bytes(b"The cat sat on the" + best.encode()).tolist()[:-1] == tokens.tolist()
    assert lm.loglikelihood([Request("The cat sat on the", best)])[0][1]
    assert not lm.loglikelihood([Request("The cat sat on the", "Q")])[0][1]


def test_an_empty_document_costs_nothing_and_generation_is_refused() -> None:
    lm = LlmcompLM("pico-13k")
    assert lm.loglikelihood_rolling([Request(""), Request("ab")], disable_tqdm=True)[0] == 0
    with pytest.raises(Error, match="likelihoods"):
        lm.generate_until([])
