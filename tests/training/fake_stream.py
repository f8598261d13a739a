"""A token stream in memory and a data folder on disk, for the tests of packing and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimode.training.manifest import FORMAT_VERSION, SPLITS, Manifest
from trimode.training.shard_writer import write_split
from trimode.training.shards import token_dtype

BOS, EOS, MASK = 0, 1, 2


class FakeStream:
    """Documents of given lengths, each `[bos] ... [eos]`, ids counted up so that each is known."""

    def __init__(self, lens: list[int], *, vocab_size: int = 64, seed: int | None = None) -> None:
        self.kind = "text"
        self.vocab_size = vocab_size
        self.bos_token_id, self.eos_token_id, self.mask_token_id = BOS, EOS, MASK
        self.document_ends = np.cumsum(np.array(lens, dtype=np.int64))
        self.num_tokens = int(self.document_ends[-1])
        self.num_documents = len(lens)
        if seed is None:
            ids = 3 + np.arange(self.num_tokens) % (vocab_size - 3)
        else:
            ids = np.random.default_rng(seed).integers(3, vocab_size, self.num_tokens)
        ids[self.document_ends - 1] = EOS
        ids[np.append(0, self.document_ends[:-1])] = BOS
        self._ids = ids.astype(np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int64."""
        return self._ids[start:stop].copy()

    def supervised(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] bool."""
        return np.ones(stop - start, dtype=bool)


class FakeChats(FakeStream):
    """Conversations of given lengths; all after the prompt is learned."""

    def __init__(self, lens: list[int], prompt_lens: list[int], *, seed: int | None = None) -> None:
        super().__init__(lens, seed=seed)
        self.kind = "chat"
        starts = np.append(0, self.document_ends[:-1])
        document = np.repeat(np.arange(len(lens)), lens)
        place = np.arange(self.num_tokens) - starts[document]
        self._is_supervised = place >= np.array(prompt_lens)[document]

    def supervised(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] bool."""
        return self._is_supervised[start:stop].copy()


def write_data(folder: Path, *, num_documents: int = 40, period: int | None = None) -> Path:
    """A prepared data folder, as `trimode prepare` writes it, no tokenizer.

    The documents are random, or count in a circle of `period` tokens.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    records = {}
    for split in SPLITS:
        lens = [int(n) for n in rng.integers(5, 60, num_documents)]
        stream = FakeStream(lens, seed=len(split))
        if period is not None:
            stream = FakeStream(lens, vocab_size=3 + period)
        starts = np.append(0, stream.document_ends[:-1])
        pairs = zip(starts, stream.document_ends, strict=True)
        records[split] = write_split(
            folder,
            split,  # type: ignore[arg-type]
            [stream.tokens(int(start), int(end)) for start, end in pairs],
            dtype=token_dtype(64),
            shard_tokens=500,
            num_bytes=0,
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype=token_dtype(64),
        vocab_size=64,
        bos_token_id=BOS,
        eos_token_id=EOS,
        mask_token_id=MASK,
        special_tokens={"<bos>": BOS, "<eos>": EOS, "<mask>": MASK},
        seed=0,
        train=records["train"],
        held_out=records["held_out"],
        packages=(),
        skipped={},
        skipped_packages=(),
        config={},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder
