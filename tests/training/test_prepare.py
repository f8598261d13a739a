"""`trimode prepare`: the pipeline from sources to a finished folder, and the command."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.training.made_documents import make_code, make_config, make_package
from trimode.cli.main import main
from trimode.errors import ConfigError
from trimode.training import document_filter
from trimode.training.documents import HELD_OUT_PACKAGES
from trimode.training.manifest import Manifest
from trimode.training.prepare import PrepareConfig, prepare
from trimode.training.shards import TokenShards


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path to install packages into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def decode_documents(folder: Path, split: str) -> set[str]:
    """The texts of a split, as its own tokenizer gives them back."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    shards = TokenShards.open(folder, split)
    starts = [0, *shards.document_ends[:-1]]
    return {
        tokenizer.decode(shards.tokens(int(start), int(end)), skip_special_tokens=True)
        for start, end in zip(starts, shards.document_ends, strict=True)
    }


class TestPipeline:
    def test_documents_come_back_whole(self, tmp_path: Path) -> None:
        """Off by one at a document's end shows as a missing last token or two joined texts."""
        config = make_config(tmp_path)
        manifest = prepare(config)
        texts = {file.read_text() for file in (tmp_path / "docs").iterdir()}
        assert decode_documents(tmp_path / "out", "train") == texts
        assert manifest.train.num_documents == 6
        assert manifest.to_json() == Manifest.read(tmp_path / "out").to_json()
        assert manifest.special_tokens["<|reserved_10|>"] == 15

    def test_two_runs_are_byte_identical(self, tmp_path: Path) -> None:
        """Hash seeds, folder order or threads leaking in would make every corpus its own."""
        config = make_config(tmp_path, held_out_share=0.3)
        prepare(config)
        before = read_tree(tmp_path / "out")
        files = sorted((tmp_path / "docs").iterdir())
        texts = [file.read_text() for file in files]
        for file in files:
            file.unlink()
        for file, text in reversed(list(zip(files, texts, strict=True))):
            file.write_text(text)
        prepare(replace(config, overwrite=True))
        after = read_tree(tmp_path / "out")
        assert before.pop("manifest.json") != after.pop("manifest.json")  # says overwrite: true
        assert before == after

    def test_the_seed_orders_the_documents(self, tmp_path: Path) -> None:
        """A seed that changes nothing."""
        one = prepare(make_config(tmp_path))
        two = prepare(make_config(tmp_path, seed=1, output_dir=str(tmp_path / "two")))
        assert one.train.num_tokens == two.train.num_tokens
        assert one.train.shards[0].sha256 != two.train.shards[0].sha256

    def test_held_out_by_package(self, tmp_path: Path, site: Path) -> None:
        """A held-out package in training makes every held-out number a lie."""
        assert {"flask", "json", "rich"} <= HELD_OUT_PACKAGES
        make_package(site, "Flask", {"flask/a.py": make_code(1), "flask/b.py": make_code(2)})
        make_package(site, "other_one", {"other_one.py": make_code(3)})
        config = make_config(tmp_path, folders=(), packages=("flask", "Other.One"))
        manifest = prepare(config)
        assert decode_documents(tmp_path / "out", "held_out") == {make_code(1), make_code(2)}
        assert decode_documents(tmp_path / "out", "train") == {make_code(3)}
        records = {record.name: record for record in manifest.packages}
        assert records["flask"].split == "held_out"
        assert records["flask"].num_documents == 2
        assert records["other-one"].licence == "MIT"
        assert records["other-one"].version == "1.0"

    def test_stdlib_modules_are_packages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Taken as one package, the library could not be split; with its tests it is no prose."""
        library = tmp_path / "lib"
        for number, path in enumerate(
            ["json/decoder.py", "abc.py", "test/x.py", "site-packages/x.py", "ctypes/test/x.py"]
        ):
            (library / path).parent.mkdir(parents=True, exist_ok=True)
            (library / path).write_text(make_code(number))
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
        manifest = prepare(make_config(tmp_path, folders=(), stdlib=True))
        assert [(p.name, p.split, p.licence) for p in manifest.packages] == [
            ("abc", "train", "PSF-2.0"),
            ("json", "held_out", "PSF-2.0"),
        ]
        assert manifest.skipped == {"tests": 1}

    def test_near_duplicates_across_the_split(self, tmp_path: Path, site: Path) -> None:
        """Looking for duplicates within each half only leaves held-out text in training."""
        code, lines = make_code(1), make_code(1).splitlines()
        changed = "\n".join(lines[:20] + ["# changed"] + lines[21:])
        make_package(site, "flask", {"flask/a.py": code})
        # Sorts before the held-out package and is read first: it must give way all the same.
        make_package(site, "aaa", {"aaa/equal.py": code, "aaa/near.py": changed})
        make_package(site, "bbb", {"bbb/own.py": make_code(2)})
        manifest = prepare(make_config(tmp_path, folders=(), packages=("flask", "aaa", "bbb")))
        assert decode_documents(tmp_path / "out", "train") == {make_code(2)}
        assert decode_documents(tmp_path / "out", "held_out") == {code}
        assert manifest.skipped == {"duplicate": 1, "near-duplicate": 1}

    def test_held_out_text_inside_a_longer_document(self, tmp_path: Path, site: Path) -> None:
        """A package that ships a changed copy of a held-out one is far from similar to it."""
        make_package(site, "flask", {"flask/a.py": make_code(1)})
        files = {"aaa/long.py": make_code(3, num_lines=80) + make_code(1), "aaa/b.py": make_code(4)}
        make_package(site, "aaa", files)
        config = make_config(tmp_path, folders=(), packages=("flask", "aaa"))
        manifest = prepare(config)
        assert manifest.skipped == {"held-out text": 1}
        assert decode_documents(tmp_path / "out", "train") == {make_code(4)}

    def test_package_share(self, tmp_path: Path, site: Path) -> None:
        """One huge package would otherwise be most of what the model learns."""
        names = ["big", "one", "two", "three"]
        for number, name in enumerate(names):
            count = 40 if name == "big" else 4
            files = {f"{name}/{i}.py": make_code(100 * number + i) for i in range(count)}
            make_package(site, name, files)
        config = make_config(tmp_path, folders=(), packages=tuple(names), max_package_share=0.3)
        manifest = prepare(config)
        sizes = {record.name: record.num_documents for record in manifest.packages}
        assert sizes == {"big": 15, "one": 4, "three": 4, "two": 4}  # 0.3 of 52, by bytes
        assert manifest.skipped == {"package share": 25}
        alone = make_config(tmp_path, folders=(), packages=("big",), output_dir=str(tmp_path / "1"))
        assert prepare(alone).train.num_documents == 40

    def test_own_source_is_never_used(self, tmp_path: Path) -> None:
        """A model trained on the program that trains it would change with every commit."""
        source = Path(document_filter.__file__).parent
        with pytest.raises(ConfigError, match="no training document left; skipped: own source"):
            prepare(make_config(tmp_path, folders=(str(source),)))

    def test_empty_corpus(self, tmp_path: Path) -> None:
        """Without a check the tokenizer trains on nothing and the reader fails much later."""
        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "short.py").write_text("x = 1\n")
        with pytest.raises(ConfigError, match="no training document left; skipped: too short 1"):
            prepare(make_config(tmp_path))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["docs"]

    def test_existing_output(self, tmp_path: Path) -> None:
        """A second run must neither mix into the first nor delete a folder that is not ours."""
        config = make_config(tmp_path)
        prepare(config)
        with pytest.raises(ConfigError, match="already prepared; .*overwrite: true"):
            prepare(config)
        prepare(replace(config, overwrite=True, seed=5))
        assert Manifest.read(tmp_path / "out").seed == 5
        with pytest.raises(ConfigError, match="is not prepared data"):
            prepare(replace(config, output_dir=str(tmp_path / "docs"), overwrite=True))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "out"]

    def test_interrupted_run_leaves_the_old_output(self, tmp_path: Path) -> None:
        """Ctrl-C in the middle; what is left of it must not change what the next run gives."""
        config = make_config(tmp_path)
        prepare(config)

        def interrupt(step: str, done: int, total: int | None) -> None:
            if step == "encoding train":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(replace(config, overwrite=True, seed=5), progress=interrupt)
        assert Manifest.read(tmp_path / "out").seed == 0
        prepare(replace(config, overwrite=True, seed=5))
        assert Manifest.read(tmp_path / "out").seed == 5
        assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "out"]

    def test_reused_tokenizer(self, tmp_path: Path) -> None:
        """Going on from a checkpoint needs its ids, and its mask may be an undeclared token."""
        prepare(make_config(tmp_path))
        folder = tmp_path / "out" / "tokenizer"
        again = make_config(tmp_path, output_dir=str(tmp_path / "2"), tokenizer=str(folder))
        assert prepare(again).train.shards == Manifest.read(tmp_path / "out").train.shards
        data = replace(again, output_dir=str(tmp_path / "5"), tokenizer=str(tmp_path / "out"))
        assert prepare(data).train.shards == Manifest.read(tmp_path / "out").train.shards
        other = replace(again, output_dir=str(tmp_path / "3"), mask_token="<|reserved_3|>")
        assert prepare(other).mask_token_id == 8
        with pytest.raises(ConfigError, match="'<nope>' is not a token"):
            prepare(replace(other, output_dir=str(tmp_path / "4"), mask_token="<nope>"))
        with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
            prepare(replace(again, output_dir=str(tmp_path / "4"), tokenizer=str(tmp_path)))

    def test_tokenizer_without_a_first_token(self, tmp_path: Path) -> None:
        """Qwen's has none: a BOS made up would stand before every text that it never saw there."""
        prepare(make_config(tmp_path))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
        tokenizer.bos_token = None
        tokenizer.save_pretrained(tmp_path / "other")
        config = make_config(
            tmp_path, output_dir=str(tmp_path / "2"), tokenizer=str(tmp_path / "other")
        )
        manifest = prepare(config)
        assert Manifest.read(tmp_path / "2").bos_token_id is None
        assert manifest.train.num_tokens == Manifest.read(tmp_path / "out").train.num_tokens - 6
        assert TokenShards.open(tmp_path / "2", "train").bos_token_id is None

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"folders": ()}, "no source"),
            ({"vocab_size": 100}, "vocab_size is 100, expected at least 272"),
            ({"near_duplicate_threshold": 0.0}, "near_duplicate_threshold is 0.0"),
            ({"held_out_share": 1.0}, "held_out_share is 1.0"),
            ({"extensions": ("py",)}, "'py' must start with a dot"),
            ({"min_document_bytes": 9, "max_document_bytes": 5}, "min_document_bytes is 9"),
            ({"mask_token": "x"}, "only goes with `tokenizer`"),
        ],
    )
    def test_wrong_values(self, tmp_path: Path, changes: dict[str, object], message: str) -> None:
        """A value that cannot work must be refused before minutes of reading."""
        with pytest.raises(ConfigError, match=message):
            make_config(tmp_path, **changes)


class TestSources:
    def test_skip_reasons_are_counted(self, tmp_path: Path) -> None:
        """A file that vanishes without a count is a hole in the corpus that nobody sees."""
        config = make_config(
            tmp_path, max_document_bytes=6000, extensions=(".py", ".md"), held_out_share=0.0
        )
        folder = tmp_path / "docs"
        contents: dict[str, bytes] = {
            "binary.py": b"x = 1\0" * 100,
            "latin.py": "é = 1\n".encode("latin-1") * 100,
            "generated.py": b"# This file was generated by a tool.\n" + make_code(10).encode(),
            "minified.py": b"x=1;" * 400,
            "table.py": b"VALUES = [\n" + b"    0x1f, 'a',\n" * 90 + b"]\n",
            "long.py": make_code(11, num_lines=400).encode(),
            "short.py": b"x = 1\n",
            "image.png": b"\x89PNG",
            "_vendor/copy.py": make_code(12).encode(),
            "tests/test_it.py": make_code(13).encode(),
            "equal.py": make_code(0).encode(),
            "prose.md": b"long lines are fine in prose " * 90,
        }
        for name, raw in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(raw)
        (folder / "broken.py").symlink_to("nowhere.py")
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "x.py").write_text(make_code(14))
        manifest = prepare(config)
        assert manifest.skipped == {
            "binary": 1,
            "duplicate": 1,
            "extension": 1,
            "generated": 3,
            "tests": 1,
            "too long": 1,
            "too short": 1,
            "undecodable": 1,
            "unreadable": 1,
            "vendored": 1,
        }
        assert manifest.train.num_documents == 7  # six and the prose

    def test_missing_sources(self, tmp_path: Path) -> None:
        """A source with a typing mistake must not become a smaller corpus."""
        with pytest.raises(ConfigError, match="nowhere is not a folder"):
            prepare(make_config(tmp_path, folders=(str(tmp_path / "nowhere"),)))
        with pytest.raises(ConfigError, match=r"nowhere\.jsonl cannot be read"):
            prepare(make_config(tmp_path, jsonl=(str(tmp_path / "nowhere.jsonl"),)))
        with pytest.raises(ConfigError, match="packages: no-such-thing not installed"):
            prepare(make_config(tmp_path, packages=("No_such.thing",)))
        with pytest.raises(ConfigError, match="packages: trimode not installed"):
            prepare(make_config(tmp_path, packages=("trimode",)))

    def test_packages_without_a_permissive_licence(self, tmp_path: Path, site: Path) -> None:
        """A copyleft package in the corpus is a licence broken in every checkpoint."""
        make_package(site, "free", {"free.py": make_code(1)})
        make_package(site, "copyleft", {"copyleft.py": make_code(2)}, licence="GPL-3.0-or-later")
        config = make_config(tmp_path, folders=(), packages=("free", "copyleft"))
        manifest = prepare(config)
        assert [record.name for record in manifest.packages] == ["free"]
        assert manifest.skipped == {"licence": 1}
        assert manifest.skipped_packages == ("copyleft: GPL-3.0-or-later",)


class TestCommand:
    def test_summary_and_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Progress on stdout would make the JSON unreadable for machines."""
        config = make_config(tmp_path)
        file = tmp_path / "data.yaml"
        file.write_text(f"output_dir: {config.output_dir}\nfolders: [{config.folders[0]}]\n")
        assert main(["prepare", str(file), "vocab_size=400"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith(f"wrote {config.output_dir}\ntrain:")
        assert "encoding train: 1 of" in err
        assert main(["prepare", str(file), "vocab_size=400"]) == 2
        assert "already prepared" in capsys.readouterr().err
        assert main(["prepare", str(file), "vocab_size=400", "overwrite=true", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["vocab_size"] == 400

    def test_shipped_config_is_valid(self) -> None:
        """A renamed field would break the documented command."""
        from trimode.cli.config_file import read_config

        path = Path(__file__).parents[2] / "configs" / "pocket_data.yaml"
        assert read_config(PrepareConfig, path).stdlib


def read_tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
