"""The record of `bench_drafting.py`: runs by setting and prompt on disk, their totals, the table.

A record is one JSON file. It is written anew after every batch of prompts, so that a benchmark that
was stopped goes on where it was. A run is what one prompt cost under one setting.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Run = dict[str, Any]
REFERENCE = "ar"


def by_place(rounds: list[tuple[int, int]]) -> dict[str, list[int]]:
    """How often the draft's first, second, ... token was checked, reached and accepted.

    Args:
        rounds: Per round, how many tokens of the draft were checked and how many were accepted.

    Returns:
        `checked`; `reached`: of these, all before it were accepted; `accepted`: it was as well.
    """
    places = range(max((checked for checked, _ in rounds), default=0))
    return {
        "checked": [sum(checked > place for checked, _ in rounds) for place in places],
        "reached": [
            sum(checked > place and accepted >= place for checked, accepted in rounds)
            for place in places
        ],
        "accepted": [sum(accepted > place for _, accepted in rounds) for place in places],
    }


def first_difference(reference: list[int], token_ids: list[int]) -> int | None:
    """The first place where two texts differ; the end of the shorter one where it begins the
    other; None for equal ones."""
    for place, (one, other) in enumerate(zip(reference, token_ids, strict=False)):
        if one != other:
            return place
    return None if len(reference) == len(token_ids) else min(len(reference), len(token_ids))


def totals(runs: list[Run]) -> dict[str, Any]:
    """Sums over all prompts, and the ratios of these sums.

    Returns:
        acceptance: Emitted tokens but the prefill's / rounds; accepted drafts plus the bonus token.
        tpf_decode, tpf_total: As everywhere: without and with the prefill and its token.
        fed_per_forward: Tokens fed / forwards, both without the prefill.
        places: For each place of a draft, its share accepted of those checked (`of_checked`) and
            of those reached (`of_reached`).
        margins: The reference's margin at the first difference of each text that differs.
    """
    tokens = sum(run["new_tokens"] for run in runs)
    decoded = tokens - len(runs)  # the prefill gives the first token
    rounds = sum(run["num_rounds"] for run in runs)
    forwards = _sums(run["forwards"] for run in runs)
    fed = _sums(run["tokens_fed"] for run in runs)
    num_prefill, fed_prefill = forwards.get("prefill", 0), fed.get("prefill", 0)
    num_decode = sum(forwards.values()) - num_prefill
    fed_decode = sum(fed.values()) - fed_prefill
    different = [run for run in runs if run["first_difference"] is not None]
    counts = {
        name: _longest_sum([run["places"][name] for run in runs])
        for name in ("checked", "reached", "accepted")
    }
    return {
        "num_prompts": len(runs),
        "new_tokens": tokens,
        "rounds": rounds,
        "forwards": forwards,
        "tokens_fed": fed,
        "acceptance": decoded / rounds if rounds else None,
        "tpf_decode": decoded / num_decode if num_decode else None,
        "tpf_total": tokens / sum(forwards.values()),
        "fed_per_forward": fed_decode / num_decode if num_decode else None,
        "fed_per_new_token": fed_decode / decoded if decoded else None,
        "widest_step": max(run["widest_step"] for run in runs),
        "tokens_per_second": tokens / sum(run["seconds"] for run in runs),
        "num_equal": len(runs) - len(different),
        "margins": [run["margin"] for run in different],
        "places": {
            "of_checked": _shares(counts["accepted"], counts["checked"]),
            "of_reached": _shares(counts["accepted"], counts["reached"]),
        },
        "load": [min(run["load"] for run in runs), max(run["load"] for run in runs)],
        "num_ended": sum(run["finish_reason"] == "stop" for run in runs),
    }


def _sums(counts: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in counts:
        for kind, count in one.items():
            found[kind] = found.get(kind, 0) + count
    return {kind: count for kind, count in found.items() if count}


def _longest_sum(lists: list[list[int]]) -> list[int]:
    length = max(map(len, lists))
    return [sum(one[i] for one in lists if i < len(one)) for i in range(length)]


def _shares(parts: list[int], wholes: list[int]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]


class Record:
    """Runs of settings, kept on disk.

    Args:
        path: The JSON file; opened if it is there, else made at the first `add`.
        identity: What all runs share. A file with another identity is refused.
        environment: Of this session; every run says in which session it was made.

    Raises:
        SystemExit: the file belongs to another model, drafter, length, batch size or seed.
    """

    def __init__(self, path: Path, identity: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"identity": identity, "sessions": [], "cases": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            _refuse_other(path, "identity", self.content["identity"], identity)
        self.content["sessions"].append(environment)

    def case(
        self, prompts: str, temperature: float, setting: str, about: dict[str, Any]
    ) -> dict[str, Run]:
        """The runs of one setting so far, by the prompt's id.

        Args:
            prompts: Name of the prompts.
            temperature: Of the choice.
            setting: Its name.
            about: The setting's options and the digest of the prompts, which may not change.
        """
        name = f"{prompts}, temperature {temperature:g}, {setting}"
        cases = self.content["cases"]
        if name in cases:
            _refuse_other(self.path, name, cases[name]["about"], about)
        else:
            cases[name] = {"about": about, "runs": {}}
        runs = cases[name]["runs"]
        assert isinstance(runs, dict)
        return runs

    def add(self, runs: dict[str, Run], found: dict[str, Run]) -> None:
        """Add runs to one case, and write the file: whole, or not at all."""
        session = len(self.content["sessions"]) - 1
        runs.update({name: {**run, "session": session} for name, run in found.items()})
        self.write()

    def write(self, **more: Any) -> None:
        """Write the file, with the summary or whatever else belongs into it."""
        self.content |= more
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def _refuse_other(path: Path, name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise SystemExit(
                f"{path} has {name} with {key} {old.get(key)!r}, and this is {new.get(key)!r};"
                " give another --output or move the file away"
            )


COLUMNS = (
    "setting",
    "acceptance",
    "TPF decode",
    "fed/forward",
    "widest",
    "fed/new",
    "tokens/s",
    "over ar",
    "equal to ar",
    "accepted by place, % of those reached",
)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One row for each setting of one set of prompts at one temperature."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    base = rows[REFERENCE]["tokens_per_second"]
    for name, row in rows.items():
        speed = row["tokens_per_second"]
        places = [_shown(share, 100) for share in row["places"]["of_reached"]]
        cells = [
            name,
            _shown(row["acceptance"], digits=2),
            _shown(row["tpf_decode"], digits=2),
            _shown(row["fed_per_forward"], digits=1),
            str(row["widest_step"]),
            _shown(row["fed_per_new_token"], digits=1),
            _shown(speed, digits=1),
            f"{speed / base:.2f}x",
            f"{row['num_equal']}/{row['num_prompts']}",
            " ".join(places) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None, factor: float = 1.0, *, digits: int = 0) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"


def margins_line(rows: dict[str, dict[str, Any]]) -> str:
    """One sentence on the texts that differ from the reference's."""
    margins = [margin for row in rows.values() for margin in row["margins"]]
    if not margins:
        return f"All texts equal those of `{REFERENCE}`."
    known = [margin for margin in margins if margin is not None]
    line = f"{len(margins)} texts differ from those of `{REFERENCE}`."
    if known:
        line += (
            f" At the first difference, `{REFERENCE}`'s two best choices are at most"
            f" {max(known):.1e} apart, in logits."
        )
    if len(known) < len(margins):
        line += f" {len(margins) - len(known)} of them go on where `{REFERENCE}` has ended."
    return line
