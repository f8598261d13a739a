"""Which licences a source may have: an allow-list, read from a package's own metadata.

Only what a package declares about itself is looked at; files are never searched for licence texts.
What cannot be read is not permissive: the list allows, it does not forbid.
"""

from __future__ import annotations

import re
from email.message import Message
from importlib.metadata import PackageMetadata

# SPDX identifiers, in lower case. None of them asks for more than attribution.
PERMISSIVE = frozenset(
    """
    0bsd afl-3.0 apache-2.0 blueoak-1.0.0 bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 cnri-python hpnd
    isc mit mit-0 mit-cmu ncsa postgresql psf-2.0 python-2.0 python-2.0.1 unlicense upl-1.0
    x11 zlib zpl-2.1
    """.split()
)

# Free-form names, after lower-casing and dropping filler words, and the SPDX identifier they mean.
_COMMON_NAMES = {
    "apache": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache2": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "academic free": "AFL-3.0",
    "boost": "BSL-1.0",
    "bsd": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "modified bsd": "BSD-3-Clause",
    "simplified bsd": "BSD-2-Clause",
    "bsd 2-clause": "BSD-2-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "2-clause bsd": "BSD-2-Clause",
    "3-clause bsd": "BSD-3-Clause",
    "cc0": "CC0-1.0",
    "cc0 1.0 universal": "CC0-1.0",
    "historical permission notice and disclaimer": "HPND",
    "isc": "ISC",
    "iscl": "ISC",
    "mit": "MIT",
    "mit no attribution": "MIT-0",
    "psf": "PSF-2.0",
    "psfl": "PSF-2.0",
    "python": "PSF-2.0",
    "python foundation": "PSF-2.0",
    "unlicense": "Unlicense",
    "zlib": "Zlib",
    "zlib/libpng": "Zlib",
    "zope public": "ZPL-2.1",
}
_FILLER = re.compile(r"\b(?:the|licen[cs]ed?|software|version|v(?=\d))\b|[,\"'()]", re.IGNORECASE)
_CLASSIFIERS_THAT_NAME_NONE = frozenset({"OSI Approved", "DFSG approved"})
_ABBREVIATION = re.compile(r"\((?:AFL|HPND|ISCL|UPL|Unlicense)\)$")
_DEMANDING = re.compile(r"GPL|General Public|Mozilla|Commercial|Proprietary", re.IGNORECASE)
_TITLE_LEN = 400
_OPERATORS = ("AND", "OR", "WITH")
_EXPRESSION_TOKEN = re.compile(r"\(|\)|[^\s()]+")


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression can be satisfied with licences of the allow-list alone.

    `A OR B` needs one of them, `A AND B` both; `A WITH exception` is judged as `A`, since an
    exception only grants more. What is not a well-formed expression of known names is not
    permissive.
    """
    tokens = _EXPRESSION_TOKEN.findall(expression)
    try:
        verdict, rest = _any_of(tokens)
    except (IndexError, RecursionError):
        return False
    return verdict and not rest


def _any_of(tokens: list[str]) -> tuple[bool, list[str]]:
    verdict, rest = _all_of(tokens)
    while rest and rest[0].upper() == "OR":
        other, rest = _all_of(rest[1:])
        verdict = verdict or other
    return verdict, rest


def _all_of(tokens: list[str]) -> tuple[bool, list[str]]:
    verdict, rest = _one(tokens)
    while rest and rest[0].upper() == "AND":
        other, rest = _one(rest[1:])
        verdict = verdict and other
    return verdict, rest


def _one(tokens: list[str]) -> tuple[bool, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == ")" or first.upper() in _OPERATORS:
        raise IndexError("an operator where a name should be")
    if first == "(":
        verdict, rest = _any_of(rest)
        return verdict and rest[0] == ")", rest[1:]
    if rest and rest[0].upper() == "WITH":
        if rest[1].upper() in (*_OPERATORS, "(", ")"):
            raise IndexError("an operator where an exception should be")
        rest = rest[2:]
    return first.lower() in PERMISSIVE, rest


def declared_licence(metadata: PackageMetadata | Message) -> str:
    """Returns the licence a package declares, as an SPDX expression where it can be read as one.

    `License-Expression` decides where present. Otherwise a one-line `License` field and the licence
    classifiers are joined by AND, so that a package whose statements differ is held to all of them.
    Whole licence texts in `License` say too much to be read, but one that speaks of a licence that
    asks for more than attribution counts as a statement. Without any statement: `unknown`.
    """
    expression = metadata["License-Expression"]
    if expression:
        return str(expression).strip()
    statements = [
        classifier.rsplit("::", 1)[-1].strip()
        for classifier in metadata.get_all("Classifier") or []
        if classifier.startswith("License ::")
    ]
    statements = [name for name in statements if name not in _CLASSIFIERS_THAT_NAME_NONE]
    field = str(metadata["License"] or "").strip()
    if field and "\n" not in field and len(field) <= 80:
        statements.insert(0, field)
    elif _DEMANDING.search(field[:_TITLE_LEN]):  # further down speak the licences of bundled parts
        statements.insert(0, "text of a licence that is not permissive")
    names = list(dict.fromkeys(_spdx_name(statement) for statement in statements))
    if len(names) > 1:
        names = _without_vaguer_twins(names, statements)
    return " AND ".join(names) if names else "unknown"


def _spdx_name(statement: str) -> str:
    plain = " ".join(_FILLER.sub(" ", _ABBREVIATION.sub("", statement)).lower().split())
    return _COMMON_NAMES.get(plain, statement)


def _without_vaguer_twins(names: list[str], statements: list[str]) -> list[str]:
    """`BSD-2-Clause` in one field and `BSD License` in the other are one statement, not two."""
    exact = {name for name in names if name in statements}
    families = {name.split("-")[0] for name in exact}
    return [name for name in names if name in exact or name.split("-")[0] not in families]
