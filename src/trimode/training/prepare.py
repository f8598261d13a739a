"""From documents to token shards: `prepare` is the pipeline, `PrepareConfig` says what goes in.

The steps: read and filter; drop duplicates, held-out documents being first in line; cap packages
that dominate; learn a tokenizer on the training half; encode and write. Meanwhile texts wait in a
spool file on disk, so memory stays small and a source that changes during the run does no harm.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from trimode.errors import ConfigError
from trimode.training.byte_bpe import (
    MIN_VOCAB_SIZE,
    encode_documents,
    load_tokenizer,
    special_token_ids,
    train_tokenizer,
)
from trimode.training.corpus import (
    Entry,
    Progress,
    Spool,
    capped,
    read_entries,
    shuffled,
    without_copies,
    without_held_out_text,
    without_near_duplicates,
)
from trimode.training.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    PackageRecord,
    Split,
    SplitRecord,
)
from trimode.training.shards import token_dtype, write_split
from trimode.training.sources import Package, Selection, Skipped

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """What to prepare and how. At least one source is needed.

    Attributes:
        output_dir: Folder to create.
        folders: Folders to search for files with one of `extensions`.
        jsonl: Files with one JSON object a line.
        jsonl_field: Field of such an object that holds the text.
        packages: Names of installed Python packages, or `installed` for all of them. Only those
            with a permissive licence are used, and of them only `.py` files.
        stdlib: Whether to use Python's standard library.
        extensions: File name endings looked for in `folders`.
        include_tests: Whether test folders of packages, folders and the library are used as well.
        vocab_size: Size of the vocabulary to learn.
        tokenizer: Folder of an existing tokenizer to use instead of learning one.
        mask_token: Mask token of that tokenizer, where it declares none.
        min_document_bytes: Shorter documents are skipped.
        max_document_bytes: Longer documents are skipped.
        near_duplicate_threshold: Similarity (0 to 1) of the sets of five-word runs from which two
            documents count as the same; 1 drops exact copies only.
        max_held_out_overlap: Share of a training document's ten-word runs that may occur in
            held-out text; with more it is left out. Unrelated code nearly always stays below 0.1;
            1 turns the check off.
        max_package_share: Most bytes that one installed package may have, as a share of all bytes
            before the cut; what is over is left out document by document, drawn by `seed`. With
            fewer than 1 / max_package_share packages nothing is cut.
        held_out_share: Share of the documents of `folders` and `jsonl` that are held out, drawn by
            their names. Packages are held out whole, by a fixed list of names.
        shard_tokens: Most tokens of a shard.
        seed: Of the document order and of what a capped package keeps.
        overwrite: Whether an existing output is replaced.
    """

    output_dir: str
    folders: tuple[str, ...] = ()
    jsonl: tuple[str, ...] = ()
    jsonl_field: str = "text"
    packages: tuple[str, ...] = ()
    stdlib: bool = False
    extensions: tuple[str, ...] = (".py",)
    include_tests: bool = False
    vocab_size: int = 4096
    tokenizer: str | None = None
    mask_token: str | None = None
    min_document_bytes: int = 200
    max_document_bytes: int = 200_000
    near_duplicate_threshold: float = 0.7
    max_held_out_overlap: float = 0.2
    max_package_share: float = 0.1
    held_out_share: float = 0.04
    shard_tokens: int = 1 << 24
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot work."""
        if not (self.folders or self.jsonl or self.packages or self.stdlib):
            raise ConfigError("no source: give folders, jsonl, packages or `stdlib: true`")
        if not MIN_VOCAB_SIZE <= self.vocab_size < 1 << 32:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, expected at least {MIN_VOCAB_SIZE} "
                f"(the special tokens and one token for each byte)"
            )
        if not 0 <= self.min_document_bytes <= self.max_document_bytes:
            raise ConfigError(
                f"min_document_bytes is {self.min_document_bytes}, expected 0 to "
                f"max_document_bytes ({self.max_document_bytes})"
            )
        for name in ("near_duplicate_threshold", "max_held_out_overlap", "max_package_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected above 0 and up to 1")
        if not 0.0 <= self.held_out_share < 1.0:
            raise ConfigError(f"held_out_share is {self.held_out_share}, expected 0 to below 1")
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens is {self.shard_tokens}, expected at least 1")
        if self.mask_token is not None and self.tokenizer is None:
            raise ConfigError("mask_token only goes with `tokenizer`; a learned one has its own")
        for extension in self.extensions:
            if not extension.startswith("."):
                raise ConfigError(f"extensions: {extension!r} must start with a dot, as in `.py`")

    @property
    def selection(self) -> Selection:
        """The part of this configuration that says which documents are wanted."""
        return Selection(
            folders=self.folders,
            jsonl=self.jsonl,
            jsonl_field=self.jsonl_field,
            packages=self.packages,
            stdlib=self.stdlib,
            extensions=self.extensions,
            include_tests=self.include_tests,
            min_document_bytes=self.min_document_bytes,
            max_document_bytes=self.max_document_bytes,
            held_out_share=self.held_out_share,
        )


def prepare(config: PrepareConfig, *, progress: Progress | None = None) -> Manifest:
    """Makes a folder of token shards, all of it or nothing.

    Args:
        config: What goes in.
        progress: Called now and then during the run.

    Returns:
        The manifest, as written into the folder.

    Raises:
        ConfigError: The output exists, a source is wrong, or no training document is left.
    """
    report = progress or _no_progress
    output = Path(config.output_dir).absolute()
    _refuse_existing(output, overwrite=config.overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise ConfigError(
            f"output_dir: nothing can be written beside {output} ({error.strerror})"
        ) from error
    try:
        spool_path = partial / "spool"
        spool = Spool(spool_path)
        try:
            manifest = _fill(partial, spool, config, report)
        finally:
            spool.close()
        spool_path.unlink()
        (partial / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        partial.chmod(0o755)
        _move_into_place(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _no_progress(step: str, done: int, total: int | None) -> None:
    pass


def _fill(folder: Path, spool: Spool, config: PrepareConfig, report: Progress) -> Manifest:
    """Writes everything but the manifest into a folder, and returns the manifest."""
    skipped = Skipped()
    entries = _select(spool, config, skipped, report)
    train = [entry for entry in entries if not entry.is_held_out]
    held_out = [entry for entry in entries if entry.is_held_out]
    if not train:
        raise ConfigError(_nothing_left(skipped, num_held_out=len(held_out)))
    if not held_out:
        logger.warning("no document is held out: a model cannot be evaluated on this data")
    tokenizer = _tokenizer(spool, train, config, report)
    tokenizer.save_pretrained(folder / "tokenizer")
    dtype = token_dtype(len(tokenizer))

    def write(split: Split, chosen: list[Entry]) -> SplitRecord:
        texts = spool.texts(chosen, lambda done: report(f"encoding {split}", done, len(chosen)))
        return write_split(
            folder,
            split,
            encode_documents(tokenizer, texts),
            dtype=dtype,
            shard_tokens=config.shard_tokens,
            num_bytes=sum(entry.num_bytes for entry in chosen),
        )

    return Manifest(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        special_tokens=special_token_ids(tokenizer),
        seed=config.seed,
        train=write("train", train),
        held_out=write("held_out", held_out),
        packages=_package_records(entries),
        skipped={reason: count for reason, count in sorted(skipped.reasons.items()) if count},
        skipped_packages=tuple(skipped.packages),
        config=asdict(config),
    )


def _select(spool: Spool, config: PrepareConfig, skipped: Skipped, report: Progress) -> list[Entry]:
    """Reads all sources and returns the entries of the corpus in their final order."""
    with_signatures = config.near_duplicate_threshold < 1.0
    entries = read_entries(
        spool,
        config.selection,
        skipped=skipped,
        with_signatures=with_signatures,
        report=report,
    )
    entries = without_copies(entries, skipped=skipped)
    if with_signatures:
        entries = without_near_duplicates(
            entries, threshold=config.near_duplicate_threshold, skipped=skipped, report=report
        )
    if config.max_held_out_overlap < 1.0:
        entries = without_held_out_text(
            entries, spool, max_overlap=config.max_held_out_overlap, skipped=skipped, report=report
        )
    entries = capped(entries, max_share=config.max_package_share, seed=config.seed, skipped=skipped)
    return shuffled(entries, seed=config.seed)


def _tokenizer(
    spool: Spool, train: list[Entry], config: PrepareConfig, report: Progress
) -> PreTrainedTokenizerFast:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, mask_token=config.mask_token)
    tokenizer = train_tokenizer(
        spool.texts(train, lambda done: report("tokenizer", done, len(train))),
        vocab_size=config.vocab_size,
        num_texts=len(train),
    )
    if len(tokenizer) < config.vocab_size:
        logger.warning(
            "the corpus is small: it gave %d of %d tokens", len(tokenizer), config.vocab_size
        )
    return tokenizer


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


def _move_into_place(partial: Path, output: Path) -> None:
    """Renames the finished folder; an old output is moved aside first and removed last."""
    if not output.exists():
        os.replace(partial, output)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    os.replace(output, aside)
    try:
        os.replace(partial, output)
    except OSError:
        os.replace(aside, output)
        raise
    shutil.rmtree(aside)
