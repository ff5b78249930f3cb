"""compare: which of two models compresses some data better, and whether the difference means anything.

Both models code the same chunks. What is compared is their bits per byte over all bytes, d = sum(bits_a - bits_b) / sum
(bytes): a ratio of sums over clusters of chunks. Its standard error is that of the linearised residuals, clusters being
drawn independently (Cochran, Sampling Techniques, 3rd ed., 1977, 6.4 and 9A.9), its interval Student's with one degree
of freedom fewer than clusters. Clusters are documents, for chunks of one document resemble one another: their own
spread would make every difference look surer than it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmcomp.data.datasets import load_dataset
from llmcomp.display import Shown
from llmcomp.errors import Error
from llmcomp.models.load import load_model
from llmcomp.results import check_rows, cluster_of
from llmcomp.scoring.score import score

if TYPE_CHECKING:
    import pandas as pd

# Fewer clusters have an interval that says nothing.
CLUSTERS_MIN = 5


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Of models a and b on the same bytes. `difference` is a's bits per byte minus b's: below 0, a is better.

    `low`, `high`: its interval at `level`, NaN where there are too few clusters. `clusters`: how many there are, and
    `unit` what they are: "documents", "stretches" of neighbouring chunks, or "chunks". `wins`: clusters in which a
    takes fewer bits.
    """

    a: str
    b: str
    dataset: str
    bytes_in: int
    chunks: int
    documents: int
    bits_per_byte_a: float
    bits_per_byte_b: float
    bits_per_token_a: float
    bits_per_token_b: float
    difference: float
    stderr: float
    low: float
    high: float
    level: float
    p_value: float
    clusters: int
    unit: str
    wins: int

    @property
    def better(self) -> str | None:
        """The name of the better model, None where the interval holds 0 or is not known."""
        if self.high < 0:
            return self.a
        return self.b if self.low > 0 else None

    @property
    def verdict(self) -> str:
        """One sentence: whether the difference means anything, and for which data."""
        if self.clusters < CLUSTERS_MIN:
            return (
                f"{self.clusters} {self._unit}: too few to tell whether the difference would be there in others; "
                f"expected {CLUSTERS_MIN} or more"
            )
        share = abs(self.difference) / max(self.bits_per_byte_a, self.bits_per_byte_b)
        if self.better is None:
            found = f"no difference that means anything: the interval holds 0 ({self.clusters} {self._unit})"
        else:
            found = (
                f"{self.better} is better by {share:.2%}, and the difference means something "
                f"(p = {self.p_value:.2g}, {self.clusters} {self._unit})"
            )
        return (
            found
            if self.unit != "stretches"
            else f"{found}; of other documents than these {self.documents} it says little"
        )

    @property
    def _unit(self) -> str:
        return "stretches of neighbouring chunks" if self.unit == "stretches" else self.unit

    def _facts(self) -> dict[str, Any]:
        return {
            "": f"{self.a} and {self.b}",
            f"bits per byte of {self.a}": self.bits_per_byte_a,
            f"of {self.b}": self.bits_per_byte_b,
            "difference": f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]",
            "clusters": f"{self.clusters} {self.unit}",
            "better": self.better or "neither",
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "better": self.better, "verdict": self.verdict}

    def __str__(self) -> str:
        width = max(len(self.a), len(self.b), 10)
        return "\n".join(
            [
                f"{self.dataset or 'data'}: {self.bytes_in:,} bytes, {self.chunks} chunks, {self.documents} documents",
                f"{'':{width}}  bits per byte  bits per token",
                f"{self.a:{width}}  {self.bits_per_byte_a:13.4f}  {self.bits_per_token_a:14.4f}",
                f"{self.b:{width}}  {self.bits_per_byte_b:13.4f}  {self.bits_per_token_b:14.4f}",
                f"{'difference':{width}}  {self.difference:+13.4f}  {self.level:.0%} interval "
                f"{self.low:+.4f} to {self.high:+.4f}",
                self.verdict,
            ]
        )


def compare(
    a: Any,
    b: Any,
    dataset: Any,
    *,
    n_chunks: int | None = None,
    chunk_bytes: int = 2048,
    seed: int = 0,
    mapping: str | None = None,
    overlap: int | None = None,
    level: float = 0.95,
    device: str | None = None,
    progress: bool = True,
) -> Comparison:
    """How many bits per byte models `a` and `b` need for the same data, and the paired difference with its interval.

    a, b: models, or what `load_model` takes. dataset: a data set, what `load_dataset` takes by name (with `n_chunks`,
    `chunk_bytes` and `seed`), or several bytes objects, each a document. Protocol "lossless", with `mapping`, `overlap`
    and `device` as in `score`. level: of the interval.

    Raises:
        Error: as `score` and `load_dataset`, or a level that is not between 0 and 1.
    """
    if isinstance(dataset, str):
        dataset = load_dataset(dataset, n_chunks, chunk_bytes, seed, progress)
    models = [load_model(model, device=device) for model in (a, b)]
    options: dict[str, Any] = {"mapping": mapping, "overlap": overlap, "progress": progress}
    rows_a, rows_b = (score(dataset, model, **options) for model in models)
    return compare_rows(rows_a, rows_b, level=level)


# Long: a line a field of what is found.
def compare_rows(
    a: pd.DataFrame, b: pd.DataFrame, documents: Sequence[str] | None = None, *, level: float = 0.95
) -> Comparison:
    """As `compare`, of the rows of `score` or of one cell of `sweep`; both of the same chunks.

    documents: the document of each chunk number; None: the column `document` of `a`, else each chunk is one.
    """
    if not 0 < level < 1:
        raise Error(f"level {level} is not between 0 and 1")
    a, b = (check_rows(rows).sort_values("chunk", ignore_index=True) for rows in (a, b))
    same = len(a) == len(b) and (a["chunk"] == b["chunk"]).all() and (a["bytes_in"] == b["bytes_in"]).all()
    if not len(a) or not same or a["chunk"].duplicated().any():
        raise Error(f"rows of {len(a)} and {len(b)} chunks are not of the same data: expected the same chunks in both")
    names = list(a["document"]) if documents is None else [documents[number] for number in a["chunk"]]
    # Where documents are not named, each chunk is one.
    named = [document or f"chunk {number}" for document, number in zip(names, a["chunk"], strict=True)]
    n_bytes = a["bytes_in"].to_numpy(np.float64)
    bits_a, bits_b = (8 * n_bytes * rows["ratio"].to_numpy(np.float64) for rows in (a, b))
    clusters, unit = _clusters(a, named)
    difference, stderr = _ratio_of_sums(bits_a - bits_b, n_bytes, clusters)
    n_clusters = int(clusters.max()) + 1
    low, high, p_value = _interval(difference, stderr, n_clusters, level)
    won = np.bincount(clusters, bits_a) < np.bincount(clusters, bits_b)
    tokens_a, tokens_b = (float(rows["tokens"].sum()) for rows in (a, b))
    return Comparison(
        a=_label(a),
        b=_label(b),
        dataset=str(a["dataset"].iloc[0]),
        bytes_in=int(n_bytes.sum()),
        chunks=len(a),
        documents=len(set(named)),
        bits_per_byte_a=float(bits_a.sum() / n_bytes.sum()),
        bits_per_byte_b=float(bits_b.sum() / n_bytes.sum()),
        bits_per_token_a=float(bits_a.sum() / tokens_a),
        bits_per_token_b=float(bits_b.sum() / tokens_b),
        difference=difference,
        stderr=stderr,
        low=low,
        high=high,
        level=level,
        p_value=p_value,
        clusters=n_clusters,
        unit=unit,
        wins=int(won.sum()),
    )


def _label(rows: pd.DataFrame) -> str:
    name, step = rows["model"].iloc[0], rows["step"].iloc[0]
    return f"{name} step{int(step)}" if rows["step"].notna().iloc[0] else str(name)


def _clusters(rows: pd.DataFrame, documents: list[str]) -> tuple[npt.NDArray[np.int64], str]:
    """The number of each chunk's cluster (`results.cluster_of`), and what clusters are."""
    places = rows[["chunk", "offset"]].assign(document=documents)
    clusters = np.unique(cluster_of(places), return_inverse=True)[1].astype(np.int64)
    n_clusters, n_documents = int(clusters.max()) + 1, len(set(documents))
    if n_clusters == n_documents:
        return clusters, "documents"
    return clusters, "stretches" if n_clusters < len(rows) else "chunks"


def _ratio_of_sums(
    differences: npt.NDArray[np.float64], n_bytes: npt.NDArray[np.float64], clusters: npt.NDArray[np.int64]
) -> tuple[float, float]:
    """sum(differences) / sum(n_bytes) and its standard error over clusters; NaN for one cluster."""
    found = float(differences.sum() / n_bytes.sum())
    residuals = np.bincount(clusters, differences - found * n_bytes)
    m = len(residuals)
    if m < 2:
        return found, math.nan
    return found, math.sqrt(m / (m - 1) * float(residuals @ residuals)) / float(n_bytes.sum())


def _interval(difference: float, stderr: float, n_clusters: int, level: float) -> tuple[float, float, float]:
    """Low, high and the two-sided p-value of no difference."""
    from scipy import stats

    if n_clusters < CLUSTERS_MIN or not stderr > 0:
        # Equal models differ by nothing at all.
        return (difference, difference, 1.0) if stderr == 0 and difference == 0 else (math.nan, math.nan, math.nan)
    t = stats.t(n_clusters - 1)
    half = float(t.ppf((1 + level) / 2)) * stderr
    return difference - half, difference + half, float(2 * t.sf(abs(difference) / stderr))
