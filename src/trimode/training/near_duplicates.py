"""Finding documents that are nearly the same, or that consist largely of other documents.

Both compare sets of runs of words. MinHash signatures find documents of equal content without
comparing every pair; they are blind to a copy inside something longer, which `overlap` sees.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from trimode.errors import ConfigError

if TYPE_CHECKING:
    from datasketch import MinHash

NUM_HASHES = 128
SIGNATURE_WORDS = 5
OVERLAP_WORDS = 10

_WORD = re.compile(r"\w+|[^\w\s]")


def word_runs(text: str, *, length: int) -> np.ndarray:
    """Returns the hashes of all runs of `length` words and signs, white space ignored.

    Returns:
        [at least 1] uint32, sorted, without repeats. A text shorter than a run is one run.
    """
    words = np.fromiter(
        (zlib.crc32(word.encode()) for word in _WORD.findall(text)), dtype=np.uint64
    )
    num_runs = max(1, len(words) - length + 1)
    hashes = np.zeros(num_runs, dtype=np.uint64)
    for offset in range(min(length, len(words))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + num_runs]
        hashes ^= hashes >> np.uint64(29)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def signature(text: str) -> np.ndarray:
    """Returns a document's MinHash signature.

    Returns:
        [NUM_HASHES] unsigned integers. The share of equal entries of two signatures estimates the
        Jaccard similarity of the two sets of word runs.
    """
    minhash = _empty_minhash().copy()
    minhash.update_batch(word_runs(text, length=SIGNATURE_WORDS).tolist())
    return minhash.hashvalues


@cache
def _empty_minhash() -> MinHash:
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise ConfigError(
            "near duplicates are found with datasketch: `pip install trimode[train]`, "
            "or set near_duplicate_threshold to 1"
        ) from error
    return MinHash(num_perm=NUM_HASHES, seed=1, hashfunc=lambda run: run)


def first_of_each(signatures: Iterable[np.ndarray], *, threshold: float) -> Iterator[bool]:
    """Yields for each signature whether no earlier kept one is at least `threshold` similar to it.

    Order is preference: what comes first stays.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES)
    kept: list[np.ndarray] = []
    for hashvalues in signatures:
        minhash = _empty_minhash().copy()
        minhash.hashvalues = hashvalues
        is_new = not any(
            float(np.mean(kept[number] == hashvalues)) >= threshold
            for number in index.query(minhash)
        )
        if is_new:
            index.insert(len(kept), minhash)
            kept.append(hashvalues)
        yield is_new


def overlap(runs: np.ndarray, known: np.ndarray) -> float:
    """Returns the share of a document's word runs that occur among `known` ones.

    Args:
        runs: [R] from `word_runs`.
        known: [N] sorted, of the same length of run. May be empty.
    """
    if not len(known):
        return 0.0
    places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
    return float(np.mean(known[places] == runs))
