"""Made inputs for the tests of data preparation: source text, folders, installed packages."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from trimode.training.prepare import PrepareConfig


def make_code(seed: int, *, num_lines: int = 40) -> str:
    """Source text that shares few runs of words with that of another seed."""
    draw = random.Random(seed)
    names = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(60)]
    return "".join(
        f"{' ' * 4 * draw.randrange(3)}{draw.choice(names)} = {draw.choice(names)}"
        f"({draw.choice(names)}, {draw.randrange(99)})\n"
        for _ in range(num_lines)
    )


def make_config(tmp_path: Path, **changes: object) -> PrepareConfig:
    """A config with one folder of six documents and a vocabulary that fits such a corpus."""
    folder = tmp_path / "docs"
    if not folder.exists():
        folder.mkdir()
        for seed in range(6):
            (folder / f"m{seed}.py").write_text(make_code(seed))
    plain = PrepareConfig(
        output_dir=str(tmp_path / "out"),
        folders=(str(folder),),
        vocab_size=400,
        held_out_share=0.0,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def make_package(site: Path, name: str, files: dict[str, str], *, licence: str = "MIT") -> None:
    """Lays out an installed distribution: its files and the metadata that names them."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    fields = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n"
    (info / "METADATA").write_text(fields)
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
