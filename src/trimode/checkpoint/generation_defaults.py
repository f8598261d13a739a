"""How a model's makers sample: the part of `generation_config.json` that answers a conversation.

The file speaks transformers' language. What is asked for wins over it, field by field.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimode.checkpoint.io import read_json
from trimode.errors import CheckpointError
from trimode.model import TriModeConfig

logger = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
}
"""Fields that change a text and that we do not have -> values that change nothing, beside null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Arguments of `TriModeLM.generate` for where nothing is asked; None: the file has none.

    Attributes:
        temperature: 0 where the file has `do_sample: false`; then it has none of the three filters.
        min_p, top_p, top_k, repetition_penalty, max_new_tokens: As in the file.
        stop_token_ids: Ends of text that the model's configuration does not have.
        stop: Strings that end the text.
        unread: Fields of the file that would change a text and that we do not have.
    """

    temperature: float | None = None
    min_p: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def fill(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a user, and the defaults of what they leave open, but `max_new_tokens`.

        Ends of text add up; `ignore_eos` leaves out those of the model.
        """
        names = ("temperature", "min_p", "top_p", "top_k", "repetition_penalty")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        options = own | dict(given)
        if self.stop_token_ids and not given.get("ignore_eos"):
            options["stop_token_ids"] = _joined(given.get("stop_token_ids"), self.stop_token_ids)
        if self.stop:
            options["stop"] = _joined(given.get("stop"), self.stop)
        return options

    def as_record(self) -> dict[str, Any]:
        """What the file says, ready for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.__slots__
            if (value := getattr(self, name)) not in (None, ())
        }

    def ended_also_by(self, token_id: int | None, config: TriModeConfig) -> GenerationDefaults:
        """The same, where a turn also ends with the end of text of an adapter's tokenizer."""
        if token_id is None or token_id in (*self.stop_token_ids, *config.eos_token_ids):
            return self
        return replace(self, stop_token_ids=(*self.stop_token_ids, token_id))


def read_generation_defaults(
    place: Path, config: TriModeConfig, *, is_needed: bool = False
) -> GenerationDefaults:
    """The defaults of a model.

    Args:
        place: The file, or a folder that may have it.
        config: Of the model.
        is_needed: Whether a folder without it is refused.

    Raises:
        CheckpointError: The file is damaged or missing, or holds a value that cannot be.
    """
    path = place / FILE_NAME if place.is_dir() else place
    if place.is_dir() and not is_needed and not path.exists():
        return GenerationDefaults()
    content = {name: value for name, value in read_json(path).items() if value is not None}

    def read(name: str, low: float, high: float, *, off: tuple[float, ...] = ()) -> Any:
        value = content.get(name)
        if value is None or value in off:
            return None
        kinds = (int,) if isinstance(low, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            what = "an integer" if isinstance(low, int) else "a number"
            raise CheckpointError(
                f"{path}: {name} is {value!r}; allowed: {what} of {low} to {high}"
            )
        return value

    temperature = read("temperature", 0.0, 1e5)
    if content.get("do_sample") is False or (temperature is not None and temperature < 1e-5):
        temperature = 0.0
    elif temperature is None and content.get("do_sample") is True:
        temperature = 1.0
    is_greedy = temperature == 0
    min_p = read("min_p", 0.0, 1.0, off=(0,))
    top_p = read("top_p", 1e-9, 1.0, off=(1,))
    top_k = read("top_k", 1, 2**31, off=(0, -1))
    unread = tuple(
        name for name, off in NEUTRAL.items() if name in content and content[name] not in off
    )
    if unread:
        logger.warning("%s: not used here: %s", path, ", ".join(unread))
    return GenerationDefaults(
        temperature=temperature,
        min_p=None if is_greedy else min_p,
        top_p=None if is_greedy else top_p,
        top_k=None if is_greedy else top_k,
        repetition_penalty=read("repetition_penalty", 0.01, 100.0, off=(1,)),
        max_new_tokens=read("max_new_tokens", 1, 2**31),
        stop_token_ids=_ends(path, content.get("eos_token_id", []), config),
        stop=_strings(path, content.get("stop_strings", [])),
        unread=unread,
    )


def _ends(path: Path, value: Any, config: TriModeConfig) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < config.vocab_size:
            raise CheckpointError(
                f"{path}: eos_token_id has {token_id!r}; allowed: 0 to {config.vocab_size - 1}"
            )
    return tuple(i for i in ids if i not in config.eos_token_ids)


def _strings(path: Path, value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise CheckpointError(f"{path}: stop_strings is {value!r}; allowed: a list of strings")
    return tuple(strings)


def _joined(given: Any, more: tuple[Any, ...]) -> Any:
    """A user's list with more; what is no list stays as it is, for `generate` to refuse."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if given is None or isinstance(given, str):
        return [*([] if given is None else [given]), *more]
    return [*given, *more] if isinstance(given, (list, tuple)) else given
