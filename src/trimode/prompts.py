"""What a caller gives as a prompt, as the tokens that are fed."""

from __future__ import annotations

from collections.abc import Sequence

from trimode.arguments import Prompt, check_unicode, plain
from trimode.errors import RequestError
from trimode.heal import EncodedPrompt, healed
from trimode.model import TriModeConfig
from trimode.vocabulary import Vocabulary


def encode_prompt(
    vocabulary: Vocabulary | None,
    config: TriModeConfig,
    prompt: Prompt,
    *,
    heal: bool = True,
    at_character: bool = False,
    parse_special: bool = False,
) -> EncodedPrompt:
    """A prompt as it is fed; an empty one becomes BOS.

    Args:
        vocabulary: Of the model's tokenizer; None without one.
        config: Of the model.
        prompt: A string, or token ids; one that is encoded already stays as it is.
        heal: Whether the end of a string may be chosen anew, see `trimode.heal`.
        at_character: Whether only whole characters are taken back.
        parse_special: Whether control tokens that a string spells become these tokens.

    Raises:
        RequestError: it is not valid.
    """
    if isinstance(prompt, EncodedPrompt):
        _check_ids([*prompt.token_ids, *prompt.taken_ids], config.vocab_size)
        return prompt
    if isinstance(prompt, str):
        return _of_text(
            *(vocabulary, config, prompt),
            heal=heal,
            at_character=at_character,
            parse_special=parse_special,
        )
    ids = [plain(token_id) for token_id in prompt]
    _check_ids(ids, config.num_real_tokens)
    return EncodedPrompt(_not_empty(ids, config))


def _of_text(
    vocabulary: Vocabulary | None,
    config: TriModeConfig,
    prompt: str,
    *,
    heal: bool,
    at_character: bool,
    parse_special: bool,
) -> EncodedPrompt:
    if vocabulary is None:
        raise RequestError("a text prompt needs a tokenizer, and this checkpoint has none")
    check_unicode("prompt", prompt)
    try:
        ids = vocabulary.encode(prompt, add_special_tokens=True, parse_special=parse_special)
    except ValueError as error:
        raise RequestError(f"the prompt spells a control token as text, and {error}") from None
    wrong = [i for i in ids if i >= config.vocab_size]
    if wrong:
        raise RequestError(
            f"the tokenizer gives token id {wrong[0]} for the prompt; the model has 0 to"
            f" {config.vocab_size - 1}"
        )
    found = EncodedPrompt(_not_empty(ids, config))
    if heal:
        found = healed(vocabulary, found.token_ids, prompt, at_character=at_character)
    spelled = [] if parse_special else vocabulary.spelled_control(prompt)
    if spelled:
        found.remarks.append(
            f"the prompt spells the control token {spelled[0]}, which is text here; with"
            " parse_special it is that token"
        )
    return found


def _check_ids(ids: Sequence[int], most: int) -> None:
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < most]
    if wrong:
        raise RequestError(f"prompt has token id {wrong[0]!r}; allowed: 0 to {most - 1}")


def _not_empty(ids: Sequence[int], config: TriModeConfig) -> list[int]:
    if ids:
        return list(ids)
    if config.bos_token_id is None:
        raise RequestError("the prompt is empty and the model has no BOS token to start from")
    return [config.bos_token_id]
