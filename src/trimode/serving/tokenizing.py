"""Texts to tokens and back, as the served model has them."""

from __future__ import annotations

from typing import Any

from trimode.conversation import answering
from trimode.decoding.control import is_unicode
from trimode.errors import RequestError
from trimode.runtime import TriModeLM
from trimode.serving.chat_fields import chat_options, messages_of
from trimode.serving.jobs import Job, ModelCard, Tokenized
from trimode.serving.refusals import bad_request
from trimode.serving.schemas import DetokenizeRequest, TokenizeRequest
from trimode.serving.translate import Caller

TASKS = ("tokenize", "tokenize_chat", "detokenize")


_INPUTS = ("prompt", "content", "messages")


def tokens_job(request: TokenizeRequest | DetokenizeRequest, caller: Caller) -> Job:
    """The job of a request.

    Raises:
        Refusal: 400, naming the field.
    """
    if isinstance(request, DetokenizeRequest):
        inputs, task, options = request.tokens, "detokenize", dict[str, Any]()
        names = {"inputs": "tokens"}
    else:
        given = [name for name in _INPUTS if getattr(request, name) is not None]
        if len(given) != 1:
            shown = " and ".join(given) or "nothing"
            raise bad_request(f"{shown} given; allowed: prompt, or messages", param="prompt")
        name = given[0]
        inputs, task, options = _inputs(request, name)
        names = {"inputs": name}
    return Job(
        request_id=caller.request_id,
        task=task,
        inputs=inputs,
        options=options,
        client=caller.name,
        names=names,
    )


def _inputs(request: TokenizeRequest, name: str) -> tuple[Any, str, dict[str, Any]]:
    """Inputs, task and options of a text's tokens."""
    adds, of_template = request.add_special_tokens, chat_options(request)
    if name == "messages":
        for field in ("add_special_tokens", "parse_special"):
            if getattr(request, field):
                raise bad_request(
                    f"{field} is true; allowed with messages: false",
                    param=field,
                )
        return messages_of(request), "tokenize_chat", of_template
    if of_template:
        field = next(iter(of_template))
        raise bad_request(f"{field} is given; allowed: only with messages", param=field)
    adds = name == "prompt" if adds is None else adds
    options = {"add_special_tokens": adds, "parse_special": bool(request.parse_special)}
    return getattr(request, name), "tokenize", options


def check_chat(card: ModelCard) -> None:
    """Refuse messages where there is no chat template.

    Raises:
        RequestError: there is none.
    """
    if not card.has_chat:
        raise RequestError(
            "messages need a chat template, and this model has none; serve one tuned on"
            " conversations, such as `trimode serve smollm2`"
        )


def tokenized(lm: TriModeLM, card: ModelCard, job: Job) -> Tokenized:
    """Do a job of these tasks.

    Raises:
        RequestError: a token id is none, or the chat template refuses the messages.
    """
    assert lm.vocabulary is not None
    tokenizer, options = lm.vocabulary.tokenizer, dict(job.options)
    num_tokens = lm.model.config.vocab_size
    text = ""
    if job.task == "tokenize_chat":
        check_chat(card)
        prompt = answering(lm.vocabulary, job.inputs, {**options, "heal": False})["prompt"]
        token_ids = [*prompt.token_ids, *prompt.taken_ids]
    elif job.task == "tokenize":
        if not is_unicode(job.inputs):
            raise RequestError("prompt is not valid Unicode; allowed: whole characters")
        token_ids = lm.vocabulary.encode(job.inputs, **options)
    else:
        token_ids = list(job.inputs)
        wrong = [i for i in token_ids if i >= num_tokens]
        if wrong:
            raise RequestError(f"tokens has token id {wrong[0]}; allowed: 0 to {num_tokens - 1}")
        text = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    return Tokenized(
        text=text,
        token_ids=tuple(token_ids),
        names=tuple(str(name) for name in tokenizer.convert_ids_to_tokens(token_ids)),
    )
