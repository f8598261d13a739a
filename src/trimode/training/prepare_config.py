"""What `trimode prepare` is told: `PrepareConfig`, with every check that needs no file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from trimode.errors import ConfigError
from trimode.training.byte_bpe import MIN_VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """A data set that the library `datasets` reads.

    Attributes:
        path: Folder written by its `save_to_disk`, name of a builder (`json`, `csv`, `parquet`,
            `text`, ...) that goes with `data_files`, folder of data files, or name on the hub.
        name: Configuration of the data set, where it has several.
        split: Which split; `train[:1000]` and the like work as there.
        data_files: Files for a builder.
        revision: Version on the hub. Without one, what is there today is read.
        streaming: Read it without storing it first. The position is kept, so that an interrupted
            run goes on without reading all again.
        max_records: Read no more than so many; null reads all.
    """

    path: str
    name: str | None = None
    split: str = "train"
    data_files: tuple[str, ...] = ()
    revision: str | None = None
    streaming: bool = False
    max_records: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot work."""
        if self.max_records is not None and self.max_records < 1:
            raise ConfigError(f"max_records is {self.max_records}, expected at least 1 or null")


@dataclass(frozen=True, slots=True)
class Filters:
    """The limits that differ between text and chat where the config leaves them open."""

    min_document_bytes: int
    near_duplicate_threshold: float
    max_held_out_overlap: float


# Conversations of one set share prompts and phrases on purpose: nearly the same is not the same.
_FILTERS = {"text": Filters(200, 0.7, 0.2), "chat": Filters(0, 1.0, 1.0)}


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """What to prepare and how. At least one source is needed.

    Attributes:
        output_dir: Folder to create.
        kind: `text`, or `chat` for conversations of which the assistant's part is learned.
        folders: Folders to search for files with one of `extensions`.
        files: Text files, whatever their endings.
        jsonl: Files with one JSON object a line; `*` and `?` may stand in a name.
        parquet: Parquet files; `*` and `?` may stand in a name.
        datasets: What the library `datasets` reads.
        text_field: Field of a record that holds the text.
        messages_field: Field of a record that holds the conversation, for `kind: chat`.
        take_ids: Whether a conversation with `prompt_ids` and `answer_ids` (JSONL, `datasets`) is
            these tokens, as a model wrote them; false encodes its messages like any other.
        split_field: Field of a record that says `train` or `held_out`; null draws by
            `held_out_share`.
        packages: Names of installed Python packages, or `installed` for all of them. Only those
            with a permissive licence are used, and of them only `.py` files.
        stdlib: Whether to use Python's standard library.
        extensions: File name endings looked for in `folders`.
        include_tests: Whether test folders of packages, folders and the library are used as well.
        vocab_size: Size of the vocabulary to learn.
        tokenizer: Name of a model, or folder of a checkpoint, of a tokenizer or of prepared data,
            whose tokenizer to use instead of learning one. Needed for `kind: chat`.
        mask_token: Mask token of that tokenizer, where it declares none.
        chat_template: File with the Jinja template of a conversation; null takes the tokenizer's
            own, and ChatML where it has none.
        min_document_bytes: Shorter documents are skipped; null is 200 for text, 0 for chat.
        max_document_bytes: Longer documents are skipped.
        near_duplicate_threshold: Similarity (0 to 1) of the sets of five-word runs from which two
            documents count as the same; 1 drops exact copies only. Null is 0.7 for text, 1 for
            chat.
        max_held_out_overlap: Share of a training document's ten-word runs that may occur in
            held-out text; with more it is left out. Unrelated code nearly always stays below 0.1;
            1 turns the check off. Null is 0.2 for text, 1 for chat.
        max_package_share: Most bytes that one installed package may have, as a share of all bytes
            before the cut; what is over is left out document by document, drawn by `seed`. With
            fewer than 1 / max_package_share packages nothing is cut.
        held_out_share: Share of the documents, packages aside, that are held out, drawn by their
            names. Packages are held out whole, by a fixed list of names.
        shard_tokens: Most tokens of a shard.
        seed: Of the document order and of what a capped package keeps.
        overwrite: Whether an existing output is replaced.
    """

    output_dir: str
    kind: Literal["text", "chat"] = "text"
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    jsonl: tuple[str, ...] = ()
    parquet: tuple[str, ...] = ()
    datasets: tuple[DatasetPart, ...] = ()
    text_field: str = "text"
    messages_field: str = "messages"
    take_ids: bool = True
    split_field: str | None = None
    packages: tuple[str, ...] = ()
    stdlib: bool = False
    extensions: tuple[str, ...] = (".py",)
    include_tests: bool = False
    vocab_size: int = 4096
    tokenizer: str | None = None
    mask_token: str | None = None
    chat_template: str | None = None
    min_document_bytes: int | None = None
    max_document_bytes: int = 200_000
    near_duplicate_threshold: float | None = None
    max_held_out_overlap: float | None = None
    max_package_share: float = 0.1
    held_out_share: float = 0.04
    shard_tokens: int = 1 << 24
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot work."""
        self._check_sources()
        self._check_tokenizer()
        filters = self.filters
        if not 0 <= filters.min_document_bytes <= self.max_document_bytes:
            raise ConfigError(
                f"min_document_bytes is {filters.min_document_bytes}, expected 0 to "
                f"max_document_bytes ({self.max_document_bytes})"
            )
        shares = asdict(filters) | {"max_package_share": self.max_package_share}
        for name in ("near_duplicate_threshold", "max_held_out_overlap", "max_package_share"):
            if not 0.0 < shares[name] <= 1.0:
                raise ConfigError(f"{name} is {shares[name]}, expected above 0 and up to 1")
        if not 0.0 <= self.held_out_share < 1.0:
            raise ConfigError(f"held_out_share is {self.held_out_share}, expected 0 to below 1")
        default = type(self).__dataclass_fields__["held_out_share"].default
        if self.split_field is not None and self.held_out_share != default:
            raise ConfigError(
                f"held_out_share is {self.held_out_share} beside split_field, which decides: leave "
                "one out"
            )
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens is {self.shard_tokens}, expected at least 1")
        for extension in self.extensions:
            if not extension.startswith("."):
                raise ConfigError(f"extensions: {extension!r} must start with a dot, as in `.py`")

    def _check_sources(self) -> None:
        records = bool(self.jsonl or self.parquet or self.datasets)
        texts = [name for name in ("folders", "files", "packages", "stdlib") if getattr(self, name)]
        if self.kind == "chat" and texts:
            raise ConfigError(
                f"{texts[0]} only goes with `kind: text`; conversations come from jsonl, parquet "
                "or datasets"
            )
        if not (records or texts):
            raise ConfigError(
                "no source: give folders, files, jsonl, parquet, datasets, packages or "
                "`stdlib: true`"
            )

    def _check_tokenizer(self) -> None:
        if not MIN_VOCAB_SIZE <= self.vocab_size < 1 << 32:
            raise ConfigError(
                f"vocab_size is {self.vocab_size}, expected at least {MIN_VOCAB_SIZE} "
                f"(the special tokens and one token for each byte)"
            )
        if self.mask_token is not None and self.tokenizer is None:
            raise ConfigError("mask_token only goes with `tokenizer`; a learned one has its own")
        if self.kind == "chat" and self.tokenizer is None:
            raise ConfigError(
                "tokenizer is missing: `kind: chat` needs the folder of the checkpoint, or of the "
                "data, that the model comes from"
            )
        if not self.take_ids and self.kind != "chat":
            raise ConfigError("take_ids only goes with `kind: chat`")
        if self.chat_template is not None and self.kind != "chat":
            raise ConfigError("chat_template only goes with `kind: chat`")

    @property
    def filters(self) -> Filters:
        """The limits with what null stands for filled in."""
        usual = asdict(_FILTERS[self.kind])
        given = {name: getattr(self, name) for name in usual}
        return Filters(**{n: usual[n] if given[n] is None else given[n] for n in usual})

    def resolved(self) -> dict[str, Any]:
        """All fields, with what null stands for filled in."""
        return asdict(self) | asdict(self.filters)
