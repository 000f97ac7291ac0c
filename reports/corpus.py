"""Metrics of a whole corpus, which are no mean over items: BLEU, length-controlled win rates.

What they need of each item are counts that add up; a score is a function of their sums. So a
corpus' score, its interval and a paired difference come from the records, without the model.
sacrebleu tokenizes and counts.

Shapes: n items, K counts, B draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reports.statistics import DRAWS, EXACT_FLIPS, Paired, Values, careful

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
ORDERS = 4  # n-grams up to this length


@dataclass(frozen=True)
class CorpusMetric:
    """A score of a whole corpus, from counts that add up over its items."""

    width: int  # K
    of_item: Callable[..., tuple[list[int], float]]  # of what was said, and of the reference
    of_sums: Callable[[Array], Array]  # summed counts (B, K) to fractions (B,)
    signature: Callable[[], str]  # names the arithmetic and its version


def bleu_counts(said: str, reference: str) -> tuple[list[int], float]:
    """An item's counts and its own BLEU, a fraction.

    (2 + 2·ORDERS) counts: tokens said, tokens of the reference, n-grams that agree, n-grams said.
    The item's own BLEU is smoothed and of the orders that it has; only signs of differences use it.
    """
    from sacrebleu.metrics.bleu import BLEU

    found = BLEU(effective_order=True).sentence_score(said, [reference])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals], found.score / 100


def bleu(sums_BK: Array) -> Array:
    r"""BLEU (B,) of summed counts, fractions (Papineni et al. 2002, smoothed as mteval-v13a).

        BLEU = min(1, exp(1 − reference/said)) · (Π_o agree_o / all_o)^{1/ORDERS}

    The k-th order from below in which nothing agrees has 2^−k / all_o instead; without any word in
    common BLEU is 0. What sacrebleu computes from the same sums, for all draws at once: one call of
    it for each of ten thousand draws takes seconds.
    """
    said, reference = sums_BK[:, 0], sums_BK[:, 1]
    agree, total = sums_BK[:, 2 : 2 + ORDERS], sums_BK[:, 2 + ORDERS :]
    missed = agree == 0
    smoothed = np.where(missed, 0.5 ** missed.cumsum(axis=1), agree)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(smoothed) - np.log(total)
        short = np.minimum(0.0, 1 - reference / said)
        score = np.exp(short + logs.mean(axis=1))
    nothing = missed.all(axis=1) | (total == 0).any(axis=1) | (said == 0)
    return np.asarray(np.where(nothing, 0.0, score))


def bleu_signature() -> str:
    """sacrebleu's line that names what it did, with its version."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def stacked(frame: pd.DataFrame, metric: str) -> Array:
    """The counts of scored items, (n, K); ValueError if a row has none."""
    lists: list[Any] = list(frame["counts"]) if "counts" in frame else [None] * len(frame)
    width = CORPUS_METRICS[metric].width
    short = [at for at, found in enumerate(lists) if found is None or len(found) != width]
    if short:
        first = frame.iloc[short[0]]
        raise ValueError(
            f"{metric} of item {first.doc_id} of {first.task}: no {width} counts beside its score; "
            "derive the scores again with `kfuse rescore`"
        )
    return np.array([list(found) for found in lists], dtype=np.float64).reshape(-1, width)


def corpus_score(counts_nK: Array, metric: str) -> float:
    """The corpus' score, a fraction; ValueError if there is no item."""
    if not len(counts_nK):
        raise ValueError(f"{metric}: no item was scored, so there is no corpus")
    return float(CORPUS_METRICS[metric].of_sums(counts_nK.sum(axis=0)[None])[0])


def corpus_interval(
    counts_nK: Array, metric: str, generator: np.random.Generator, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentiles over items drawn, n − 1 of n (Koehn 2004; Rao & Wu 1988); None for one item."""
    drawn = draws(counts_nK[None], metric, generator, DRAWS)[0]
    if len(counts_nK) < 2 or np.ptp(drawn) == 0:
        return None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draws(
    counts_RnK: Array, metric: str, generator: np.random.Generator, number: int
) -> npt.NDArray[np.float64]:
    """(R, B) scores of R rows on the same drawn items, n − 1 of n with replacement."""
    n = counts_RnK.shape[1]
    times = generator.multinomial(max(1, n - 1), np.full(n, 1 / n), size=number).astype(np.float64)
    score = CORPUS_METRICS[metric].of_sums
    return np.stack([score(times @ counts) for counts in counts_RnK])


def paired_corpus(
    counts_nK: Array,
    reference_nK: Array,
    metric: str,
    generator: np.random.Generator,
    signs: Values,
    level: float = 0.95,
) -> Paired:
    """The gain in a corpus' score over the reference with an interval and a p-value.

    signs (n,): of each item's difference, for the counts of better and worse. The interval has the
    percentiles of the difference on the same drawn items (Koehn 2004), and `null_variance` is their
    variance, read with care (`statistics.careful`): that of swapped rows has the gain in it. The
    p-value is that of approximate randomisation, which swaps the two rows' items (Riezler & Maxwell
    2005): all ways of swapping where few items differ, else DRAWS of them. ValueError for unlike
    shapes or no item.
    """
    if counts_nK.shape != reference_nK.shape:
        raise ValueError(f"{metric}: counts {counts_nK.shape} beside {reference_nK.shape}")
    gain = corpus_score(counts_nK, metric) - corpus_score(reference_nK, metric)
    both = draws(np.stack([counts_nK, reference_nK]), metric, generator, DRAWS)
    spread = both[0] - both[1]
    low = high = None
    if len(counts_nK) > 1 and np.ptp(spread) > 0:
        low, high = (float(x) for x in np.quantile(spread, [(1 - level) / 2, (1 + level) / 2]))
    swapped = _swapped(counts_nK, reference_nK, metric, generator)
    near = abs(gain) * (1 - 1e-9)
    extreme = int((np.abs(swapped) >= near).sum())
    exact = len(swapped) < DRAWS
    p_value = extreme / len(swapped) if exact else (1 + extreme) / (1 + len(swapped))
    sign = np.sign(np.asarray(signs, dtype=np.float64))
    return Paired(
        gain=gain,
        low=low,
        high=high,
        p_value=p_value,
        null_variance=float(
            np.var(spread) * careful(len(counts_nK) - 1) ** 2
            if len(counts_nK) > 1
            else np.mean(swapped**2)
        ),
        n=len(counts_nK),
        better=int((sign > 0).sum()),
        worse=int((sign < 0).sum()),
    )


def _swapped(
    one_nK: Array, other_nK: Array, metric: str, generator: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Gains with some items' rows exchanged: all ways, or DRAWS of them."""
    differ = np.flatnonzero((one_nK != other_nK).any(axis=1))
    shift = (other_nK - one_nK)[differ]
    if len(differ) <= EXACT_FLIPS:
        turn = np.arange(2 ** len(differ))[:, None] >> np.arange(len(differ)) & 1
    else:
        turn = generator.integers(2, size=(DRAWS, len(differ)))
    moved = turn.astype(np.float64) @ shift
    score = CORPUS_METRICS[metric].of_sums
    return score(one_nK.sum(axis=0) + moved) - score(other_nK.sum(axis=0) - moved)


LENGTHS = 100 * np.sinh(np.linspace(-5, 5, 51))  # how much longer, in characters; middles of bins


def win_counts(preferred: float, longer: float) -> tuple[list[int], float]:
    """An item's counts and its preference, a fraction of half points.

    2 × 51 counts: items, and half points won, by how much longer the answer is than the other's.
    """
    at = int(np.abs(LENGTHS - longer).argmin())
    counts = [0] * (2 * len(LENGTHS))
    counts[at] = 1
    counts[len(LENGTHS) + at] = round(2 * preferred)
    return counts, preferred


def lc_win_rate(sums_BK: Array) -> Array:
    r"""Length-controlled win rate (B,): what the win rate would be for answers of equal length.

        P(win) = σ(θ + φ tanh(Δ / sd(Δ))),   LC = σ(θ)

    θ and φ of largest likelihood, by Newton's method, both held within ±20; Δ is how much longer
    the answer is. AlpacaEval 2 (2404.04475, section 3). Relative to the paper: without its term for
    an instruction's difficulty, which was fitted once over its leaderboard's models and is not
    published as a formula; lengths are taken to the nearest of 51 values.
    """
    bins = len(LENGTHS)
    many, won = sums_BK[:, :bins], sums_BK[:, bins:] / 2
    total = many.sum(axis=1, keepdims=True)
    mean = (many * LENGTHS).sum(axis=1, keepdims=True) / total
    sd = np.sqrt((many * (LENGTHS - mean) ** 2).sum(axis=1, keepdims=True) / total)
    z = np.tanh(LENGTHS / np.where(sd > 0, sd, np.inf))
    theta, phi = np.zeros_like(total), np.zeros_like(total)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(theta + phi * z, -40, 40)))
        off, spread = won - many * p, many * p * (1 - p) + 1e-9 * many
        g0, g1 = off.sum(1, keepdims=True), (off * z).sum(1, keepdims=True)
        h00, h01 = spread.sum(1, keepdims=True), (spread * z).sum(1, keepdims=True)
        h11 = (spread * z**2).sum(1, keepdims=True) + 1e-9
        det = h00 * h11 - h01**2
        det = np.where(det > 1e-12, det, np.inf)
        step0, step1 = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        # Without lengths that differ only θ is left.
        alone = ~np.isfinite(det)
        step0 = np.where(alone, g0 / h00, step0)
        theta = np.clip(theta + np.clip(step0, -2, 2), -20, 20)
        phi = np.clip(phi + np.clip(step1, -2, 2), -20, 20)
    return np.asarray((1 / (1 + np.exp(-theta)))[:, 0])


CORPUS_METRICS: dict[str, CorpusMetric] = {
    "bleu": CorpusMetric(2 + 2 * ORDERS, bleu_counts, bleu, bleu_signature),
    "lc_win_rate": CorpusMetric(
        2 * len(LENGTHS), win_counts, lc_win_rate, lambda: "logistic in tanh(length), 51 lengths"
    ),
}
