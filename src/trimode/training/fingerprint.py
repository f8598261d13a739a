"""What a preparation depends on, as one hash: if it changes, earlier work is worth nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from trimode._version import __version__
from trimode.checkpoint.model_cache import named_folder
from trimode.training.byte_bpe import tokenizer_folder
from trimode.training.manifest import FORMAT_VERSION
from trimode.training.prepare_config import PrepareConfig
from trimode.training.sources import Source

_LIBRARIES = ("tokenizers", "transformers", "numpy", "datasketch", "pyarrow", "datasets")


def fingerprint(config: PrepareConfig, sources: Iterable[Source]) -> str:
    """Hashes the config, the versions, and size and time of every local file that is read.

    Where the output lies and whether it may be replaced does not matter. The content of a data set
    on the hub is taken to be that of its name and revision.
    """
    fields = config.resolved()
    for name in ("output_dir", "overwrite"):
        del fields[name]
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, _versions(), fields]).encode())
    for file in (*_tokenizer_files(config), *_source_files(sources)):
        try:
            stat = file.stat()
            facts = (str(file.absolute()), stat.st_size, stat.st_mtime_ns)
        except OSError:
            facts = (str(file.absolute()), -1, -1)
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {"trimode": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _tokenizer_files(config: PrepareConfig) -> Iterator[Path]:
    if config.tokenizer is not None and named_folder(config.tokenizer).is_dir():
        folder = tokenizer_folder(config.tokenizer)
        for pattern in ("*token*.json", "*.jinja", "config.json", "*.model"):
            yield from sorted(folder.glob(pattern))
    if config.chat_template is not None:
        yield Path(config.chat_template)


def _source_files(sources: Iterable[Source]) -> Iterator[Path]:
    for source in sources:
        yield from source.files()
