"""Write the conversations that `pocket-instruct` is tuned on, from the default model's own corpus.

    trimode prepare configs/pocket_data.yaml
    python benchmarks/instruct_pairs.py data/pocket_instruct.jsonl

Every function of the corpus that says in an English sentence what it does gives at most one
conversation; a hash of its source decides which, so both directions never meet in two splits:

* `write`: `Write a function: SENTENCE`, answered by the function, if words can ask for it: its name
  is public, and it has no decorator of the package's own, which nobody could guess;
* `complete`: `Complete this function: SENTENCE` and its `def` line, answered by the function;
* `comment`: `# SENTENCE` from the comment above a function without docstring, answered by it;
* `document`: `Document this function:` and its source, answered by the sentence.

One of a class is called a method, so that a request for a function is not answered with `self`. The
model is tiny, hence: wordings are few and fixed; code stands bare, as in the base's corpus; the
docstring in an answer is the sentence that the user gave, which can be copied, while the rest of it
would have to be made up; `document` is answered by that sentence alone, for lists of arguments come
in four styles.

The packages are those in the manifest of `--data`, so those of the model's card. Pairs of held-out
ones go to a second file, NAME_held_out.jsonl, for measuring only; a training pair that overlaps
held-out text as no document of the corpus may is left out. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress, count
from pathlib import Path

import numpy as np

from trimode.checkpoint.io import POCKET_MODEL
from trimode.cli.config_file import read_config
from trimode.training.chat import ChatFormat
from trimode.training.documents import Document
from trimode.training.manifest import Manifest
from trimode.training.near_duplicates import OVERLAP_WORDS as RUN
from trimode.training.near_duplicates import first_of_each, overlap, signature, word_runs
from trimode.training.prepare_config import PrepareConfig
from trimode.training.sources import open_sources, plain_text_of

MAX_TOKENS = 384  # of a conversation, markers included
MAX_PER_PACKAGE = 1000
MIN_NODES = 12  # of a body's syntax; with fewer it returns an attribute or hands a call on

SENTENCE_CHARS = range(20, 141)
MIN_WORDS = 4
_PLAIN = re.compile(r"[A-Z`'][ -\[\]-~]*[\w)`'\]]\.", re.ASCII)  # no backslash
_ENGLISH = frozenset(
    "a an the of to is are for and in from with if or by on this that as be not at into it".split()
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`*:(])")
_SECTION = re.compile(r"\s*(?:[:@]\w|>>>|\.\. |[-=~*]{3}|\w[\w ]*:$|[-*] )")
_ROLE = re.compile(r"(?::\w+)+:`[~!.]*([^`<]+?)(?:\s*<[^`]*>)?`")
_ABOUT_THE_SOURCE = re.compile(
    r"copied from|adapted from|taken from|borrowed|see also|deprecat|to-?do\b|fixme|xxx|hack\b"
    r"|noqa|type: ignore|pragma|pylint|mypy|workaround|monkey|pull/|issues?/|https?:|www\."
    r"|backward|no longer|auto-?generated|same as|overrid|not implemented|inherit|internal",
    re.IGNORECASE,
)
_PYTHONS_OWN = re.compile(
    r"property|staticmethod|classmethod|(?:contextlib\.)?(?:async)?contextmanager"
    r"|(?:functools\.)?(?:cached_property|cache|lru_cache|wraps)(?:\(.*\))?|\w+\.setter"
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversation of one question and one answer.

    Attributes:
        kind: `write`, `complete`, `comment` or `document`.
        line: Of the function in its document.
        code: The function as Python writes it, without comments: equal code is one function.
        question: What the user says.
        answer: What the assistant says.
        package: What the document belongs to.
        document: Its name.
    """

    kind: str
    line: int
    code: str
    question: str
    answer: str
    package: str = ""
    document: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        contents = {"user": self.question, "assistant": self.answer}
        return [{"role": role, "content": content} for role, content in contents.items()]


def pairs_of(text: str, *, package: str = "", document: str = "") -> Iterator[Pair]:
    """The conversations of a module, none if it has a syntax error.

    Functions within functions are parts of these.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in other people's strings
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        lines = re.split(r"\r\n|\r|\n", text)
        found = [_pair(node, lines, noun, (package, document)) for node, noun in _nodes(tree)]
    yield from filter(None, found)


def _nodes(parent: ast.AST, noun: str = "function") -> Iterator[tuple[Definition, str]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            yield node, noun
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("Test"):
                yield from _nodes(node, "method")
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _nodes(node, noun)


def _pair(node: Definition, lines: list[str], noun: str, place: tuple[str, str]) -> Pair | None:
    docstring = ast.get_docstring(node)
    if _is_boilerplate(node, node.body if docstring is None else node.body[1:]):
        return None
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    sentence = sentence_of(_comment_above(lines, start) if docstring is None else docstring)
    first = node.body[0]
    begin = first.lineno - 1 if docstring is None else first.end_lineno
    head = _dedented(lines[start : first.lineno - 1], node.col_offset)
    body = _dedented(lines[begin : node.end_lineno], node.col_offset).lstrip("\n")
    if sentence is None or not head or not body:
        return None
    indent = body[: len(body) - len(body.lstrip())]
    source, documented = f"{head}\n{body}", f'{head}\n{indent}"""{sentence}"""\n{body}'
    code = _code(node)
    if not source.isascii() or any(_code_of(text) != code for text in (source, documented)):
        return None
    if docstring is None:
        return Pair("comment", node.lineno, code, f"# {sentence}", source, *place)
    number = hashlib.sha256(source.encode()).digest()[0]
    is_tellable = node.name[0] != "_" and all(map(_PYTHONS_OWN.fullmatch, _decorators(node)))
    kind = ("complete", "document", "write", "write")[number % (4 if is_tellable else 2)]
    question, answer = {
        "write": (f"Write a {noun}: {sentence}", documented),
        "complete": (f"Complete this {noun}: {sentence}\n\n{head}", documented),
        "document": (f"Document this {noun}:\n\n{source}", sentence),
    }[kind]
    return Pair(kind, node.lineno, code, question, answer, *place)


def _is_boilerplate(node: Definition, statements: list[ast.stmt]) -> bool:
    if node.name.startswith(("test", "__")) or not node.name.strip("_"):
        return True
    is_stub = any("overload" in name or "abstract" in name for name in _decorators(node))
    if is_stub or all(isinstance(statement, ast.Pass | ast.Raise) for statement in statements):
        return True
    return sum(1 for statement in statements for _ in ast.walk(statement)) < MIN_NODES


def _decorators(node: Definition) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def _comment_above(lines: list[str], start: int) -> str:
    indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    first = start
    while first > 0 and lines[first - 1].startswith(f"{indent}#"):
        first -= 1
    return "\n".join(line.strip().lstrip("#!:").strip() for line in lines[first:start])


def _dedented(lines: list[str], columns: int) -> str:
    """The lines moved to column 0; what stands further left, in strings, stays."""
    moved = [line if line[:columns].strip() else line[columns:] for line in lines]
    return "\n".join(moved).rstrip()


def _code(node: Definition) -> str:
    """The code as Python writes it, without comments and docstring."""
    body = node.body if ast.get_docstring(node) is None else node.body[1:]
    fields = {name: value for name, value in ast.iter_fields(node) if name != "body"}
    return ast.unparse(ast.fix_missing_locations(type(node)(**fields, body=body)))


def _code_of(text: str) -> str | None:
    """`_code` of a text that is one function; tells whether moving it has changed its strings."""
    try:
        (node,) = ast.parse(text).body
    except (SyntaxError, ValueError):
        return None
    return _code(node) if isinstance(node, Definition) else None


def sentence_of(told: str) -> str | None:
    """The first sentence of a docstring or comment in one line, or None if it is of no use.

    Of no use are those that are too short or long, not English or not ASCII, introduce a list, or
    speak of the source's history and not of what it does.
    """
    paragraph = []
    for line in inspect.cleandoc(told).split("\n"):
        if not line.strip() or _SECTION.match(line):
            break
        paragraph.append(line)
    text = _ROLE.sub(r"`\1`", " ".join(" ".join(paragraph).split())).replace("``", "`")
    sentence = _SENTENCE_END.split(text)[0]
    if sentence and sentence[-1] not in ".:,;":
        sentence += "."
    words = re.findall(r"[a-z]+", sentence.lower())
    is_useful = (
        len(sentence) in SENTENCE_CHARS
        and _PLAIN.fullmatch(sentence)
        and '""' not in sentence
        and len(words) >= MIN_WORDS
        and not _ENGLISH.isdisjoint(words)
        and not _ABOUT_THE_SOURCE.search(sentence)
    )
    return sentence if is_useful else None


def chosen(
    pairs: list[Pair], *, known: np.ndarray, config: PrepareConfig, chat: ChatFormat
) -> list[Pair]:
    """The pairs of a split to keep, in an order that depends on their code alone.

    Args:
        pairs: All of them.
        known: Sorted word runs of the text that they must not overlap.
        config: What counts as overlap and as a near duplicate.
        chat: Measures a conversation.
    """
    filters = config.filters
    by_code = sorted(pairs, key=lambda p: (hashlib.sha256(p.code.encode()).digest(), p.document))
    kept = list({pair.question: pair for pair in reversed(by_code)}.values())[::-1]
    runs = [word_runs(f"{pair.question}\n{pair.answer}", length=RUN) for pair in kept]
    kept = list(compress(kept, [overlap(r, known) <= filters.max_held_out_overlap for r in runs]))
    texts = [chat.text_of({"messages": pair.messages}) for pair in kept]
    kept = list(compress(kept, [len(chat.encode(text).ids) <= MAX_TOKENS for text in texts]))
    signatures = (signature(pair.code) for pair in kept)
    is_new = first_of_each(signatures, threshold=filters.near_duplicate_threshold)
    kept = list(compress(kept, list(is_new)))
    seen: defaultdict[str, count[int]] = defaultdict(count)
    return [pair for pair in kept if next(seen[pair.package]) < MAX_PER_PACKAGE]


def read_pairs(data: Path, config: PrepareConfig) -> tuple[dict[bool, list[Pair]], np.ndarray]:
    """All pairs, by whether they are held out, and the sorted word runs of the held-out text."""
    corpus = {(package.kind, package.name) for package in Manifest.read(data).packages}
    pairs: dict[bool, list[Pair]] = {False: [], True: []}
    runs = [np.zeros(0, dtype=np.uint32)]
    for source in open_sources(config, text_of=plain_text_of(config.text_field)):
        for item in source.items(0, None):
            if isinstance(item, Document) and (item.package.kind, item.package.name) in corpus:
                found = pairs_of(item.text, package=item.package.name, document=item.name)
                pairs[item.is_held_out] += found
                if item.is_held_out:
                    runs.append(word_runs(item.text, length=RUN))
    return pairs, np.unique(np.concatenate(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("data/pocket_instruct.jsonl"))
    parser.add_argument("--data", type=Path, default=Path("data/pocket"))
    parser.add_argument("--config", type=Path, default=Path("configs/pocket_data.yaml"))
    arguments = parser.parse_args()
    config, output = read_config(PrepareConfig, arguments.config), arguments.output
    chat_config = PrepareConfig("", "chat", jsonl=(str(output),), tokenizer=str(POCKET_MODEL))
    chat = ChatFormat.load(chat_config)
    pairs, held_out = read_pairs(arguments.data, config)
    files = {True: output.with_stem(output.stem + "_held_out"), False: output}
    for is_held_out, file in files.items():
        known = held_out[:0] if is_held_out else held_out
        kept = chosen(pairs[is_held_out], known=known, config=config, chat=chat)
        with file.open("w", encoding="utf-8", newline="\n") as lines:
            for pair in kept:
                source = f"{pair.document}:{pair.line}"
                record = {"messages": pair.messages, "kind": pair.kind, "source": source}
                lines.write(json.dumps(record) + "\n")
        print(f"{file}: {len(kept)} conversations, {dict(Counter(p.kind for p in kept))}")


if __name__ == "__main__":
    main()
