"""From documents to token shards: `prepare` is the pipeline.

The steps: read and filter; drop duplicates, held-out documents being first in line; cap packages
that dominate; learn a tokenizer on the training half; encode and write. Meanwhile texts wait in a
spool file on disk, so memory stays small and a source that changes during the run does no harm.
Every step leaves its result in the workspace, where a run that was cut off goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from trimode.checkpoint.whole_folder import is_disk_full
from trimode.errors import ConfigError
from trimode.training.byte_bpe import (
    encode_documents,
    load_tokenizer,
    special_token_ids,
    train_tokenizer,
)
from trimode.training.chat import ChatFormat
from trimode.training.corpus import (
    Progress,
    capped,
    read_entries,
    shuffled,
    without_copies,
    without_held_out_text,
    without_near_duplicates,
)
from trimode.training.documents import Package, Skipped
from trimode.training.fingerprint import fingerprint
from trimode.training.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    CorruptRecord,
    Manifest,
    PackageRecord,
    Split,
    SplitRecord,
    token_dtype,
)
from trimode.training.prepare_config import PrepareConfig
from trimode.training.shard_log import ShardLog
from trimode.training.shard_writer import SupervisedDocument, write_split
from trimode.training.sources import Source, open_sources, plain_text_of
from trimode.training.spool import Entry, Spool
from trimode.training.workspace import Workspace, write_whole

logger = logging.getLogger(__name__)

_CHOSEN = "chosen.json"


def prepare(config: PrepareConfig, *, progress: Progress | None = None) -> Manifest:
    """Makes a folder of token shards, all of it or nothing.

    A run that is killed, interrupted or out of disk space leaves its work beside the output, and
    the same call goes on from there if neither the config nor a source has changed. The result is
    the same, byte for byte.

    Args:
        config: What goes in.
        progress: Called now and then during the run.

    Returns:
        The manifest, as written into the folder.

    Raises:
        ConfigError: The output exists, a source is wrong, or no training document is left.
        CapacityError: The disk is full.
    """
    report = progress or _no_progress
    output = Path(config.output_dir).resolve()
    chat = ChatFormat.load(config) if config.kind == "chat" else None
    text_of = chat.text_of if chat is not None else plain_text_of(config.text_field)
    if config.tokenizer is not None and chat is None:
        load_tokenizer(config.tokenizer, mask_token=config.mask_token)  # refused before the work
    sources = open_sources(config, text_of=text_of)
    mark = fingerprint(config, sources)
    with Workspace.opened(output) as work:
        if work.is_finished(mark):
            work.discard()
            return Manifest.read(output)
        _refuse_existing(output, overwrite=config.overwrite)
        work.begin(mark)
        try:
            manifest = _Preparation(work, config, chat, report).run(sources)
        except ConfigError as error:
            if not is_disk_full(error):
                work.discard()
            raise
        work.publish()
    return manifest


def _no_progress(step: str, done: int, total: int | None) -> None:
    pass


class _Preparation:
    """One run of the pipeline in its workspace; every step does only what is not done yet."""

    def __init__(
        self,
        work: Workspace,
        config: PrepareConfig,
        chat: ChatFormat | None,
        report: Progress,
    ) -> None:
        self.work, self.config, self.chat, self.report = work, config, chat, report

    def run(self, sources: Sequence[Source]) -> Manifest:
        """Fills the workspace's output, manifest last, and returns the manifest."""
        if (self.work.output / MANIFEST_NAME).is_file():
            return Manifest.read(self.work.output)
        with_signatures = self.config.filters.near_duplicate_threshold < 1.0
        spool = Spool(self.work, with_signatures=with_signatures)
        try:
            read_entries(spool, sources, with_signatures=with_signatures, report=self.report)
            entries, skipped = self._chosen(spool)
            manifest = self._write(spool, entries, skipped)
        finally:
            spool.close()
        write_whole(self.work.output / MANIFEST_NAME, manifest.to_json().encode())
        return manifest

    def _chosen(self, spool: Spool) -> tuple[list[Entry], Skipped]:
        """The entries of the corpus in their final order, and all that was left out."""
        skipped = Skipped.from_fields(spool.skipped.to_fields())
        known = self.work.read(_CHOSEN)
        if known is not None:
            skipped.reasons.update(known["reasons"])
            return [spool.entries[number] for number in known["numbers"]], skipped
        before = skipped.reasons.copy()
        entries = _choose(spool, self.config, skipped, self.report)
        number_of = {entry: number for number, entry in enumerate(spool.entries)}
        reasons = dict(skipped.reasons - before)
        numbers = [number_of[entry] for entry in entries]
        self.work.write(_CHOSEN, {"numbers": numbers, "reasons": reasons})
        return entries, skipped

    def _write(self, spool: Spool, entries: list[Entry], skipped: Skipped) -> Manifest:
        """Writes everything but the manifest into the output, and returns the manifest."""
        halves: dict[Split, list[Entry]] = {
            "train": [entry for entry in entries if not entry.is_held_out],
            "held_out": [entry for entry in entries if entry.is_held_out],
        }
        if not halves["train"]:
            raise ConfigError(_nothing_left(skipped, num_held_out=len(halves["held_out"])))
        if not halves["held_out"]:
            logger.warning("no document is held out: a model cannot be evaluated on this data")
        tokenizer = self._tokenizer(spool, halves["train"])
        log = ShardLog(self.work)
        splits = {s: self._split(s, halves[s], spool, tokenizer, log) for s in halves}
        return Manifest(
            format_version=FORMAT_VERSION,
            dtype=token_dtype(len(tokenizer)),
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            mask_token_id=tokenizer.mask_token_id,
            special_tokens=special_token_ids(tokenizer),
            seed=self.config.seed,
            train=splits["train"],
            held_out=splits["held_out"],
            packages=_package_records(entries),
            skipped={reason: n for reason, n in sorted(skipped.reasons.items()) if n},
            skipped_packages=tuple(skipped.packages),
            config=self.config.resolved(),
            kind=self.config.kind,
            corrupt=_corrupt_records(skipped),
            chat=None if self.chat is None else self.chat.record(log.num_supervised),
        )

    def _tokenizer(self, spool: Spool, train: list[Entry]) -> PreTrainedTokenizerFast:
        """The tokenizer as it is stored, learned or copied if it is not there yet."""
        folder = self.work.output / "tokenizer"
        if not folder.is_dir():
            partial = self.work.folder / "tokenizer.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self._new_tokenizer(spool, train).save_pretrained(partial)
            os.replace(partial, folder)
        return load_tokenizer(folder, mask_token=None)

    def _new_tokenizer(self, spool: Spool, train: list[Entry]) -> PreTrainedTokenizerFast:
        config = self.config
        if self.chat is not None:
            return self.chat.tokenizer
        if config.tokenizer is not None:
            return load_tokenizer(config.tokenizer, mask_token=config.mask_token)
        tokenizer = train_tokenizer(
            spool.texts(train, lambda done: self.report("tokenizer", done, len(train))),
            vocab_size=config.vocab_size,
            num_texts=len(train),
        )
        if len(tokenizer) < config.vocab_size:
            logger.warning(
                "the corpus is small: it gave %d of %d tokens", len(tokenizer), config.vocab_size
            )
        return tokenizer

    def _split(
        self,
        split: Split,
        entries: list[Entry],
        spool: Spool,
        tokenizer: PreTrainedTokenizerFast,
        log: ShardLog,
    ) -> SplitRecord:
        """The shards of one split; those that an earlier run has finished stay."""
        done = log.shards(split)
        num_done = sum(shard.num_documents for shard in done)
        left = entries[num_done:]
        texts = spool.texts(
            left, lambda n: self.report(f"encoding {split}", num_done + n, len(entries))
        )
        documents: Iterator[SupervisedDocument] | Iterator = (
            encode_documents(tokenizer, texts) if self.chat is None else self.chat.encode_all(texts)
        )
        return write_split(
            self.work.output,
            split,
            documents,
            dtype=token_dtype(len(tokenizer)),
            shard_tokens=self.config.shard_tokens,
            num_bytes=sum(entry.num_bytes for entry in entries),
            done=done,
            on_shard=lambda shard: log.add(split, shard),
        )


def _choose(spool: Spool, config: PrepareConfig, skipped: Skipped, report: Progress) -> list[Entry]:
    """The entries of the corpus in their final order."""
    filters = config.filters
    entries = without_copies(spool.entries, skipped=skipped)
    if filters.near_duplicate_threshold < 1.0:
        entries = without_near_duplicates(
            entries, threshold=filters.near_duplicate_threshold, skipped=skipped, report=report
        )
    if filters.max_held_out_overlap < 1.0:
        entries = without_held_out_text(
            entries, spool, max_overlap=filters.max_held_out_overlap, skipped=skipped, report=report
        )
    entries = capped(entries, max_share=config.max_package_share, seed=config.seed, skipped=skipped)
    return shuffled(entries, seed=config.seed)


def _package_records(entries: list[Entry]) -> tuple[PackageRecord, ...]:
    members: dict[tuple[Package, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        members[entry.package, "held_out" if entry.is_held_out else "train"].append(entry)
    return tuple(
        PackageRecord(
            kind=package.kind,
            name=package.name,
            version=package.version,
            licence=package.licence,
            split=split,
            num_documents=len(members[package, split]),
            num_bytes=sum(entry.num_bytes for entry in members[package, split]),
        )
        for package, split in sorted(members)
    )


def _corrupt_records(skipped: Skipped) -> tuple[CorruptRecord, ...]:
    return tuple(
        CorruptRecord(tally.source, tally.num_records, tally.num_corrupt, tuple(tally.first))
        for tally in skipped.tallies.values()
        if tally.num_corrupt
    )


def _nothing_left(skipped: Skipped, *, num_held_out: int) -> str:
    counts = [f"{reason} {count}" for reason, count in sorted(skipped.reasons.items()) if count]
    counts += [f"held out {num_held_out}"] if num_held_out else []
    return f"no training document left; skipped: {', '.join(counts) or 'none, none were found'}"


def _refuse_existing(output: Path, *, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"output_dir: {output} exists and is not prepared data; give another folder"
        )
    if not overwrite:
        raise ConfigError(
            f"output_dir: {output} is already prepared; give another folder or `overwrite: true`"
        )
