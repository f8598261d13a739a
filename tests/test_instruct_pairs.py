"""benchmarks/instruct_pairs.py: which functions become conversations, and what is said in them."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trimode.training.prepare import prepare
from trimode.training.prepare_config import PrepareConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "instruct_pairs.py"
POCKET_MODEL = ROOT / "src" / "trimode" / "assets" / "pocket"

SENTENCE = "Return the sum of all the numbers."
BODY = """\
    total = 0
    for number in numbers:
        total += number
    return total
"""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("instruct_pairs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def _function(name: str = "total", docstring: str = SENTENCE, body: str = BODY) -> str:
    return f'def {name}(numbers):\n    """{docstring}"""\n{body}'


def _code_in(pair) -> str:
    """The function in a conversation, from whichever side shows all of it."""
    return pair.question.split("\n\n", 1)[1] if pair.kind == "document" else pair.answer


def test_every_kind_is_what_its_name_says(script: ModuleType) -> None:
    """A reader must know from the first words what is wanted, and the answer must be all of it."""
    names = [f"total_{number}" for number in range(40)]
    pairs = list(script.pairs_of("\n\n".join(map(_function, names))))
    by_kind = {pair.kind: pair for pair in pairs}
    assert len(pairs) == 40
    assert set(by_kind) == {"write", "complete", "document"}
    for pair, name in zip(pairs, names, strict=True):
        head = f"def {name}(numbers):"
        documented = f'{head}\n    """{SENTENCE}"""\n{BODY}'.rstrip()
        question, answer = {
            "write": (f"Write a function: {SENTENCE}", documented),
            "complete": (f"Complete this function: {SENTENCE}\n\n{head}", documented),
            "document": (f"Document this function:\n\n{head}\n{BODY}".rstrip(), SENTENCE),
        }[pair.kind]
        assert (pair.question, pair.answer) == (question, answer)


def test_a_decorated_async_method_is_moved_whole(script: ModuleType) -> None:
    """A lost decorator or `async` gives code that means something else."""
    text = '''
class Client:
    @retry(times=3)
    # a comment between
    @traced
    async def fetch(
        self, url: str
    ) -> bytes:
        """Fetch the body of a page from a server.

        Args:
            url: Where it is.
        """

        async with self.session.get(url) as reply:
            if reply.status != 200:
                raise FetchError(url)

            return await reply.read()
'''
    (pair,) = script.pairs_of(text)
    code = _code_in(pair)
    assert pair.kind in ("complete", "document"), "nobody can guess `@traced`"
    assert "method" in pair.question.split("\n")[0]
    assert code.startswith("@retry(times=3)\n# a comment between\n@traced\nasync def fetch(\n")
    assert "Args:" not in pair.question + pair.answer
    assert code.endswith("            raise FetchError(url)\n\n        return await reply.read()")
    (node,) = ast.parse(code).body
    assert isinstance(node, ast.AsyncFunctionDef)


def test_a_nested_function_belongs_to_the_outer_one(script: ModuleType) -> None:
    """Two conversations with one piece of code in both could fall into two splits."""
    inner = "\n".join(f"    {line}" for line in _function("inner").splitlines())
    (pair,) = script.pairs_of(_function("outer", body=f"{inner}\n    return inner(numbers)\n"))
    (node,) = ast.parse(_code_in(pair)).body
    assert isinstance(node, ast.FunctionDef)
    assert node.name == "outer"
    assert '"""' + SENTENCE in _code_in(pair)


def test_a_comment_above_speaks_for_a_function_without_docstring(script: ModuleType) -> None:
    """The comment must be the one directly above, and the docstring goes before it."""
    bare = f"def total(numbers):\n{BODY}"
    (pair,) = script.pairs_of(f"x = 1\n# Return the sum\n#   of all the numbers.\n@cache\n{bare}")
    assert (pair.kind, pair.question) == ("comment", f"# {SENTENCE}")
    assert pair.answer == f"@cache\n{bare}".rstrip()
    assert not list(script.pairs_of(f"# {SENTENCE}\n\n{bare}"))
    (pair,) = script.pairs_of(f"# Count all of the things there are.\n{_function()}")
    assert pair.kind != "comment"


def test_a_function_in_a_branch_is_found(script: ModuleType) -> None:
    """Much of the standard library is defined under `if` and `try`."""
    indented = "\n".join(f"    {line}" for line in _function().splitlines())
    (pair,) = script.pairs_of(f"try:\n    import fast\nexcept ImportError:\n{indented}\n")
    assert pair.question.split("\n")[0].split(":")[0].endswith("function")
    ast.parse(_code_in(pair))


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (SENTENCE, SENTENCE),
        ("Return the sum\n    of all numbers", "Return the sum of all numbers."),
        ("Return the sum of numbers. It is slow.", "Return the sum of numbers."),
        ("Return the sum of numbers, e.g. of two.", "Return the sum of numbers, e.g. of two."),
        ("Return the sum of numbers\n:param x: these", "Return the sum of numbers."),
        ("Return the sum of numbers.\nArgs:\n    x: these", "Return the sum of numbers."),
        ("Close a :class:`~http.client.Reply` for good", "Close a `http.client.Reply` for good."),
        ("Use ``x`` as the first of all.", "Use `x` as the first of all."),
        ("Docstring.", None),
        ("Returns the following of them:", None),
        ("Gibt die Summe aller Zahlen zurueck.", None),
        ("Renvoie la somme des nombres donnés.", None),
        ("total(numbers, start=0, key=None)", None),
        ("Deprecated, use the other one of these.", None),
        ("Copied from the transformers library.", None),
        (r"Compute \alpha of the two numbers.", None),
        ('Return """ and the rest of it.', None),
        ("Return the sum of all of " + "these " * 30 + "numbers.", None),
        ("", None),
    ],
)
def test_only_short_plain_english_is_a_sentence(
    script: ModuleType, told: str, sentence: str | None
) -> None:
    """What a user would not type teaches a tiny model the wrong words."""
    assert script.sentence_of(told) == sentence


@pytest.mark.parametrize(
    "source",
    [
        _function(body="    pass\n"),
        _function(body="    ...\n"),
        _function(body=""),
        _function(body="    return numbers.total\n"),
        _function(body='    raise NotImplementedError("a subclass must do this", numbers, 1, 2)\n'),
        "@overload\n" + _function(),
        "@typing.overload\n" + _function(),
        "@abc.abstractmethod\n" + _function(),
        _function("test_total"),
        _function("__iter__"),
        _function("_"),
        "class TestTotal:\n" + "\n".join(f"    {line}" for line in _function().splitlines()),
        _function(body=BODY.replace("0", "'é'")),
        'def total(numbers): """' + SENTENCE + '"""; return sum(numbers) + len(numbers) + 1',
        "def total(numbers:\n    return 1\n" + _function(),
        "\0",
    ],
)
def test_what_teaches_nothing_is_skipped(script: ModuleType, source: str) -> None:
    """Stubs, tests, boilerplate, what is not ASCII and files with a syntax error."""
    assert not list(script.pairs_of(source))


def test_raw_docstrings_and_bad_escapes_are_read(script: ModuleType) -> None:
    """Python warns of `\\d` in old code, and warnings are errors here."""
    raw = _function(body="    path = '\\d'\n" + BODY).replace('"""Ret', 'r"""Ret')
    (pair,) = script.pairs_of(raw)
    assert SENTENCE in pair.question + pair.answer
    assert 'r"""' not in _code_in(pair)


def test_moving_a_method_must_not_change_its_strings(script: ModuleType) -> None:
    """The lines of a string that stand further right would lose their white space."""
    method = '''
class Page:
    def text(self, name, number):
        """Return the text of a page by its name."""
        rows = [name] * number
        return """
{}end of the page""".join(rows)
'''
    (pair,) = script.pairs_of(method.format(""))
    assert '"""\nend of the page"""' in _code_in(pair)
    assert not list(script.pairs_of(method.format(" " * 8)))


@pytest.mark.parametrize("text", ["import os\n\x0c\n" + _function(), "x = 1\n" + _function()])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_are_counted_as_python_counts_them(
    script: ModuleType, text: str, ending: str
) -> None:
    """`str.splitlines` cuts at form feeds too, and every later function would be off by one."""
    (pair,) = script.pairs_of(text.replace("\n", ending))
    assert _code_in(pair).startswith("def total(numbers):\n    ")
    assert _code_in(pair).endswith("    return total")


@pytest.mark.skipif(
    not (POCKET_MODEL / "config.json").is_file(),
    reason="the default model is not in the tree (src/trimode/assets/pocket)",
)
class TestScript:
    """The whole script, on a folder in place of installed packages."""

    @pytest.fixture
    def corpus(self, tmp_path: Path) -> list[str]:
        """A prepared corpus, and the arguments that name it."""
        folder = tmp_path / "source"
        folder.mkdir()
        words = "apples pears plums grapes lemons quinces cherries figs dates olives".split()
        for number, word in enumerate(words):
            body = "".join(f"    {word}_{n} = numbers[{n}] * {word}({n})\n" for n in range(6))
            functions = [
                _function(word, f"Return the weight of {word}.", f"{body}    return {word}_1\n"),
                _function(f"long_{word}", f"Return all of the {word}.", body * 30),
                f"# Spoil the {word} in a basket.\ndef spoil_{word}(basket):\n    {word} = 1\n"
                f"    for {word} in basket:\n        basket.remove({word}, {number})\n",
            ]
            (folder / f"{word}.py").write_text("\n\n".join(functions), encoding="utf-8")
        (folder / "copy.py").write_text((folder / "figs.py").read_text() + "\n\nx = 1\n")
        (folder / "latin.py").write_bytes(_function("latin").encode() + b"# caf\xe9\n" * 40)
        (folder / "broken.py").write_text(_function("broken") + "def (:\n" * 40)
        config = tmp_path / "data.yaml"
        settings = {"vocab_size": 300, "held_out_share": 0.3, "near_duplicate_threshold": 0.9}
        settings |= {"output_dir": str(tmp_path / "data"), "folders": [str(folder)]}
        config.write_text(json.dumps(settings), encoding="utf-8")
        prepare(PrepareConfig(**settings | {"folders": (str(folder),)}))
        return ["--data", str(tmp_path / "data"), "--config", str(config)]

    def _run(
        self, script: ModuleType, output: Path, corpus: list[str], patch: pytest.MonkeyPatch
    ) -> list[list[dict]]:
        patch.setattr(sys, "argv", ["instruct_pairs.py", str(output), *corpus])
        script.main()
        files = [output, output.with_stem(f"{output.stem}_held_out")]
        return [list(map(json.loads, file.read_text("utf-8").splitlines())) for file in files]

    def test_splits_share_no_code(
        self, script: ModuleType, corpus: list[str], tmp_path: Path, monkeypatch
    ) -> None:
        """Held-out conversations measure nothing if they were trained on."""
        train, held_out = self._run(script, tmp_path / "pairs.jsonl", corpus, monkeypatch)
        files = [
            {record["source"].split("/")[-1].split(":")[0] for record in part}
            for part in (train, held_out)
        ]
        assert len(files[0]) >= 3
        assert len(files[1]) >= 1
        assert not files[0] & files[1]
        assert not {"latin.py", "broken.py"} & (files[0] | files[1])
        assert len({"figs.py", "copy.py"} & (files[0] | files[1])) == 1, "one of two copies"
        assert not any("long_" in json.dumps(record) for record in train + held_out)
        assert {"comment"} < {record["kind"] for record in train}
        for record in train + held_out:
            assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
            question, answer = (message["content"] for message in record["messages"])
            is_asked = record["kind"] == "document"
            (node,) = ast.parse(question.split("\n\n", 1)[1] if is_asked else answer).body
            assert isinstance(node, ast.FunctionDef)

    def test_the_same_packages_give_the_same_bytes(
        self, script: ModuleType, corpus: list[str], tmp_path: Path, monkeypatch
    ) -> None:
        """Otherwise nobody can make the data of a published model again."""
        outputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        for output in outputs:
            self._run(script, output, corpus, monkeypatch)
        assert outputs[0].read_bytes() == outputs[1].read_bytes()

    def test_no_package_drowns_the_rest(
        self, script: ModuleType, corpus: list[str], tmp_path: Path, monkeypatch
    ) -> None:
        """The largest packages have ten times the functions of most others together."""
        monkeypatch.setattr(script, "MAX_PER_PACKAGE", 2)
        train, _ = self._run(script, tmp_path / "pairs.jsonl", corpus, monkeypatch)
        assert len(train) == 2
