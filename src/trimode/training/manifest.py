"""What is recorded about prepared data: the fields of `manifest.json` and how they are read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from trimode.errors import ConfigError

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 knew text only and no corrupt records; its data reads as it always did."""
MANIFEST_NAME = "manifest.json"
Split = Literal["train", "held_out"]
Kind = Literal["text", "chat"]
SPLITS: tuple[str, ...] = get_args(Split)


def token_dtype(vocab_size: int) -> str:
    """Returns the narrowest of `uint16` and `uint32` that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard: its file name, size and the checksums of its files.

    The last field is that of the file which says what is supervised; None where everything is.
    """

    file: str
    num_tokens: int
    num_documents: int
    sha256: str
    ends_sha256: str
    supervised_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class PackageRecord:
    """What one package, folder, file or data set gave to the corpus, after all filters."""

    kind: str
    name: str
    version: str
    licence: str
    split: str
    num_documents: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SplitRecord:
    """Totals of one split and its shards in order."""

    num_tokens: int
    num_documents: int
    num_bytes: int
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True, slots=True)
class CorruptRecord:
    """Corrupt records of one source: how many of how many, and the first few by place."""

    source: str
    num_records: int
    num_corrupt: int
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """How conversations became tokens.

    Attributes:
        template: The Jinja template, which the tokenizer in `tokenizer/` carries as well.
        template_source: `file`, `tokenizer` or `chatml`, which is the default.
        markers: How each of ChatML's markers is spelled: `token` of the tokenizer, `reserved X` (it
            took the place of the unused token X), `row N` (it took a free row of the model), or
            `text` (ordinary tokens). Empty where the template uses none.
        supervision: How the assistant's tokens were found: `generation` (the template marks them)
            or `increments` (the template was rendered message by message).
        num_supervised: Supervised tokens, by split.
    """

    template: str
    template_source: str
    markers: dict[str, str]
    supervision: str
    num_supervised: dict[str, int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about prepared data; `manifest.json` holds exactly these fields.

    Attributes:
        format_version: Of this layout.
        dtype: `uint16` or `uint32`, both little-endian on disk.
        vocab_size: Number of token ids, special ones included.
        bos_token_id: First token of every text; None if the tokenizer has none.
        eos_token_id: Last token of every document.
        mask_token_id: Never occurs in a shard unless a reused tokenizer produces it from text.
        special_tokens: Id of every special token.
        seed: Of the document order and of the choice within capped packages.
        train: Totals and shards.
        held_out: Totals and shards.
        packages: One record per package and split, sorted.
        skipped: Documents that were left out, by reason; `licence` counts packages.
        skipped_packages: `name: licence` of the packages left out for their licence.
        config: The resolved configuration.
        kind: `text`, or `chat` for conversations.
        corrupt: Sources with corrupt records.
        chat: Of conversations only.
    """

    format_version: int
    dtype: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int
    mask_token_id: int
    special_tokens: dict[str, int]
    seed: int
    train: SplitRecord
    held_out: SplitRecord
    packages: tuple[PackageRecord, ...]
    skipped: dict[str, int]
    skipped_packages: tuple[str, ...]
    config: dict[str, Any]
    kind: Kind = "text"
    corrupt: tuple[CorruptRecord, ...] = ()
    chat: ChatRecord | None = None

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Reads the manifest of a folder.

        Raises:
            ConfigError: Missing, not JSON, of another version, or with other fields.
        """
        path = Path(folder) / MANIFEST_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} is missing; {folder} is not a folder made by `trimode prepare`"
            ) from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON ({error})") from error
        found = fields.get("format_version") if isinstance(fields, dict) else None
        if found not in READABLE_VERSIONS:
            raise ConfigError(
                f"{path}: format_version is {found!r}, expected "
                f"{' or '.join(map(str, READABLE_VERSIONS))}"
            )
        try:
            for split in SPLITS:
                shards = tuple(ShardRecord(**shard) for shard in fields[split].pop("shards"))
                fields[split] = SplitRecord(shards=shards, **fields[split])
            fields["packages"] = tuple(PackageRecord(**record) for record in fields["packages"])
            fields["skipped_packages"] = tuple(fields["skipped_packages"])
            fields["corrupt"] = tuple(
                CorruptRecord(**{**record, "first": tuple(record["first"])})
                for record in fields.get("corrupt", ())
            )
            if fields.get("chat") is not None:
                fields["chat"] = ChatRecord(**fields["chat"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not the fields of a manifest ({error})") from error
