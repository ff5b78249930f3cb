"""The callback in a real Trainer: ratios fall while a model learns and are those of score; training is as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # what Trainer needs

from llmcomp import Error, score  # noqa: E402
from llmcomp.adapters.trainer import CompressionCallback, in_memory_model  # noqa: E402
from llmcomp.data.tokenizers import ByteTokenizer  # noqa: E402

TEXT = (Path(__file__).parents[2] / "README.md").read_bytes()
HELD_OUT = [TEXT[12_000:12_400], TEXT[13_000:13_300]]


class Windows(torch.utils.data.Dataset):  # type: ignore[misc,name-defined]
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Any]:
        tokens = torch.tensor(list(TEXT[100 * i : 100 * i + 65]))
        return {"input_ids": tokens, "labels": tokens}


def train(folder: Path, *callbacks: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, attention_dropout=0.1, hidden_dropout=0.1,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, max_steps=24, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=1, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=list(callbacks))
    trainer.train()
    return trainer


@pytest.mark.slow
def test_the_ratio_falls_while_a_model_learns(tmp_path: Path) -> None:
    callback = CompressionCallback(HELD_OUT, "bytes", every=8)
    trainer = train(tmp_path, callback)
    assert [one["step"] for one in callback.history] == [8, 16, 24]
    assert callback.history[-1]["llmcomp_ratio"] < callback.history[0]["llmcomp_ratio"] < 1.1
    logged = [one for one in trainer.state.log_history if "llmcomp_ratio" in one]
    assert [one["llmcomp_bits_per_byte"] for one in logged] == [
        one["llmcomp_bits_per_byte"] for one in callback.history
    ]
    rows = score(HELD_OUT, in_memory_model(trainer.model, ByteTokenizer()), progress=False)
    bits = (8 * rows["coded_bytes"] + rows["side_bits"]).sum()
    assert callback.history[-1]["llmcomp_bits_per_byte"] == pytest.approx(bits / 700)
    # The loss of transformers on the same bytes, all but the first, in bits.
    trainer.model.eval()
    with torch.no_grad():
        tokens = torch.tensor([[0, *HELD_OUT[1][:120]]])
        loss = trainer.model(tokens, labels=tokens).loss.item() / 0.6931471805599453
    rows = score([HELD_OUT[1][:120]], in_memory_model(trainer.model, ByteTokenizer()), progress=False)
    assert rows["ideal_bits"][0] / 120 == pytest.approx(loss, rel=1e-3)


@pytest.mark.slow
def test_training_is_as_without_it(tmp_path: Path) -> None:
    """Dropout is off while the model is scored, and on again after."""
    plain = train(tmp_path / "plain").model.state_dict()
    watched = train(tmp_path / "watched", CompressionCallback(HELD_OUT, "bytes", every=5)).model.state_dict()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_mistakes() -> None:
    with pytest.raises(Error, match="no held-out data"):
        CompressionCallback([], "bytes")
    with pytest.raises(Error, match="every is 0"):
        CompressionCallback(HELD_OUT, "bytes", every=0)
    with pytest.raises(Error, match="fast tokenizer"):
        CompressionCallback(HELD_OUT, object())
