"""What passes between the HTTP side and the side that runs the model: a job in, updates back.

Data only and picklable, for the two may be processes on different machines. An update is never an
exception: what goes wrong is a `Failed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimode.checkpoint.generation_defaults import GenerationDefaults
from trimode.decoding.params import DEFAULT_MODE
from trimode.decoding.stats import Stats
from trimode.messages import ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One text to be made.

    Attributes:
        request_id: Of the HTTP request it belongs to, for the logs.
        task: `generate`, `chat`, `infill`, or one of `trimode.serving.tokenizing.TASKS`.
        inputs: The prompt (str or token ids), the messages, or the text with its gaps.
        options: Further arguments of `TriModeLM.generate` or `.infill`.
        usual_new_tokens: Without `max_new_tokens` in `options` so many as fit, at most these; None
            means the backend's own number.
        client: Whose job it is; clients share the engine fairly.
        timeout_s: Seconds from submission after which it is aborted; None for no deadline.
        wants_events: Whether `Happening`s are sent, beside the text.
        wants_word: Whether `Accepted` is sent.
        wants_prompt: Whether the text begins with the prompt; its log-probabilities come with it,
            where the options ask for them.
        wants_logprobs: Whether log-probabilities are shown.
        names: What the request calls an option, or `inputs`, so that errors speak of its fields.
    """

    request_id: str
    task: str
    inputs: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    usual_new_tokens: int | None = None
    client: str = ""
    timeout_s: float | None = None
    wants_events: bool = False
    wants_word: bool = False
    wants_prompt: bool = False
    wants_logprobs: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job is valid and there is room for it; the first update, of jobs that want to know."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """What one token says.

    Attributes:
        text: Of it alone, a control token's name; U+FFFD stands for parts of characters.
        octets: Its bytes, which no two tokens have in common.
    """

    text: str
    octets: bytes

    @classmethod
    def of(cls, octets: bytes) -> TokenText:
        """Of an ordinary token."""
        return cls(octets.decode(errors="replace"), octets)


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """How likely a token was, for a reader: `trimode.decoding.step.TokenLogprobs` as text.

    Attributes:
        token: What it says; of a new one, what it says beyond the prompt.
        start: Where in the answer's text it begins, in characters.
        logprob: Of it, in nats; None for the first of a prompt.
        top: The likeliest tokens and their log-probabilities, the best first.
    """

    token: TokenText
    start: int
    logprob: float | None
    top: tuple[tuple[TokenText, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that stands: no half characters, nothing that a stop string may yet take back.

    Attributes:
        text: The new text; pieces join to `Done.text`.
        token_ids: The new tokens; text may lag behind them. None in the piece that is the prompt.
        logprobs: Of each, if they were asked for; of the prompt's tokens in its piece.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TextLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """A `trimode.decoding.Event` as a watcher wants it: with the text of every token.

    Attributes:
        kind: `draft`, `denoise`, `verify`, `revise` or `emit`.
        position: Of the first token, counted from the first new one (0), -1 for `last` of the
            prompt.
        token_ids: As the event has them.
        texts: Text of each alone; U+FFFD stands for parts of characters; "" where masked.
        is_masked, num_accepted, old_texts, reason: As the event has them.
        num_forwards: Forwards of this text so far.
        new_tokens: Tokens emitted so far.
        elapsed_s: Seconds since the job was submitted.
    """

    kind: str
    position: int
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    is_masked: tuple[bool, ...] = ()
    num_accepted: int = 0
    old_texts: tuple[str, ...] = ()
    reason: str = ""
    num_forwards: int = 0
    new_tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The end of a job that gave a text; the last update.

    Attributes:
        text: All of it.
        token_ids: All new tokens.
        prompt_tokens: Tokens of the prompt, before its end was healed.
        finish_reason: `stop`, `length` or `tool_calls`.
        seed: That reproduces it.
        mode: It was decoded in.
        stats: What it cost.
        remarks: What the client should know of its prompt.
        gaps: `infill`: of each gap, where its fill starts in `text` and the candidates, the best
            first, each as an object of JSON.
        tool_calls: Of the tools that were offered; they are not part of `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    seed: int
    mode: str
    stats: Stats
    remarks: tuple[str, ...] = ()
    gaps: tuple[Mapping[str, Any], ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The end of a job that gave none, or not all; the last update.

    Attributes:
        status: As HTTP has it: 400 not valid, 413 never fits, 429 not now, 500 broke down, 503
            shutting down or its machine was lost, 504 its time was up.
        code: The same in a word: `invalid_request`, `too_large`, `overloaded`, `internal_error`,
            `unavailable`, `deadline`.
        message: One line.
        param: The request's field that is wrong, if it is one.
        retry_after_s: 429, 503: when to try again.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """The end of a job that turns text into tokens or back; its only update.

    Attributes:
        text: Of the tokens, special ones included, where they were given.
        token_ids: All of them.
        names: What the tokenizer calls each.
    """

    text: str
    token_ids: tuple[int, ...]
    names: tuple[str, ...]


Output = Piece | Happening | Done | Failed
Update = Accepted | Tokenized | Output


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What there is to know of the model that is served.

    Attributes:
        name: Under which requests ask for it.
        modes: Modes it decodes in.
        block_length: Its own, used where a request gives none.
        context_len: Prompt and new tokens at most.
        has_chat: Whether its tokenizer has a chat template.
        has_drafter: Whether it has an adapter of the diffusion view.
        num_parameters: Of the network.
        generation_defaults: For what a request leaves open.
    """

    name: str
    modes: tuple[str, ...]
    block_length: int
    context_len: int
    has_chat: bool
    has_drafter: bool
    num_parameters: int
    generation_defaults: GenerationDefaults = GenerationDefaults()

    @property
    def default_mode(self) -> str:
        """Of a request that names none."""
        return DEFAULT_MODE if DEFAULT_MODE in self.modes else "linear"


class Backend(Protocol):
    """Who runs jobs: an engine in a thread of this process, or replicas elsewhere."""

    card: ModelCard

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken now."""
        ...

    @property
    def refusal(self) -> Failed | None:
        """Why none are; None if they are."""
        ...

    def run(self, job: Job) -> AsyncIterator[Update]:
        """Updates of one job, the last a `Done`, a `Tokenized` or a `Failed`. Closing it (`aclose`)
        aborts the job and frees what it holds at once."""
        ...

    def metrics(self) -> str:
        """What is measured on the model's side, in Prometheus' text format."""
        ...

    async def close(self, *, timeout_s: float) -> None:
        """Take no more jobs, finish those that run until the time is up, abort the rest."""
        ...
