"""What requests may hold: OpenAI's fields, and ours beside them, flat and optional.

A field that is not given is as the model's generation_config.json has it. If the file says nothing,
it has OpenAI's default where OpenAI has the field (temperature 1, 16 tokens for a completion), else
that of `TriModeLM.generate`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from trimode.serving.foreign_fields import (
    AS_NULL,
    AS_NULL_IN_CHATS,
    IGNORED,
    NEUTRAL_OF_ALL,
    NEUTRAL_OF_CHATS,
    NEUTRAL_OF_COMPLETIONS,
    NEUTRAL_OF_TOKENS,
    Neutral,
)

Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Text = Annotated[str, Field(min_length=1)]
Filter = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=1e5)]
PARSE_SPECIAL = "control tokens that the prompt spells are these tokens, not text; false"
TopK = Annotated[int, Field(ge=-1)]
CountPenalty = Annotated[float, Field(ge=-2, le=2)]


class _Part(BaseModel):
    """An object within a request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Named(_Part):
    """A request that may name the model."""

    model_config = ConfigDict(allow_inf_nan=False)

    NEUTRAL: ClassVar[Neutral] = NEUTRAL_OF_ALL
    """Fields of other servers that are not supported -> values that ask for nothing."""
    AS_NULL: ClassVar[Neutral] = AS_NULL
    """Supported fields -> values that mean null."""
    IGNORED: ClassVar[tuple[str, ...]] = IGNORED
    """Fields of other servers that are taken and not used."""

    model: str | None = Field(None, description="the name under /v1/models; null: the one served")


class _Request(_Named):
    temperature: Temperature | None = Field(None, description="below 1e-5 is greedy")
    min_p: Share | None = Field(None, description="after the temperature, before top_k; 0 is off")
    top_k: TopK | None = Field(None, description="0 and -1 are off")
    top_p: Filter | None = None
    seed: Seed | None = Field(
        None,
        description="fixes the text; choice i of a prompt has seed + i; drawn where not given",
    )
    threshold: Share | None = None
    steps: Count | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="seconds after which the request ends with 504"
    )
    user: str | None = Field(None, description="taken and not used, as OpenAI's field is for them")


class StreamOptions(_Part):
    """OpenAI's `stream_options`."""

    include_usage: bool = Field(False, description="a last chunk with the usage")
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class _Generating(_Request):
    """What completions and chat have in common."""

    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = Field(
        None, description="a string, or up to 16 of them"
    )
    logit_bias: dict[str, float] | None = Field(None, description="by token id, written as text")
    mode: Literal["ar", "diffusion", "linear", "branching", "quadratic", "auto"] | None = None
    block_length: Count | None = None
    policy: str | None = None
    entropy_bound: Annotated[float, Field(ge=0)] | None = None
    revision: Literal["joint_threshold", "ar_doubt", "remdm"] | None = None
    edit_threshold: Share | None = None
    edit_budget: Count | None = None
    doubt: Share | None = None
    remask_schedule: Literal["cap", "rescale", "conf", "loop"] | None = None
    remask_rate: Share | None = None
    branches: Annotated[int, Field(ge=0)] | None = None
    guesses: bool | None = None
    draft_form: Literal["block", "skip"] | None = None
    skip_masks: Count | None = None
    lookup: bool | None = None
    draft_cutoff: Share | None = None
    min_gain: Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: CountPenalty | None = None
    presence_penalty: CountPenalty | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    json_schema: dict[str, Any] | bool | str | None = Field(
        None, description="a schema, as an object, true, false, or a string of JSON"
    )
    regex: Text | None = None
    grammar: Text | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0)] | None = None
    end_think_token_id: TokenId | None = None
    events: bool | None = Field(None, description="with stream: chunks with a `trimode_event`")


class CompletionRequest(_Generating):
    """`POST /v1/completions`."""

    NEUTRAL: ClassVar[Neutral] = NEUTRAL_OF_COMPLETIONS

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = Field(
        description="a string, token ids, or a list of either"
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="0 only with echo; null: the model's own number, or 16"
    )
    echo: bool | None = Field(
        None, description="the text begins with the prompt, and logprobs with its tokens; false"
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    heal: bool | None = Field(
        None,
        description="choose the prompt's end anew where it ends inside of a token; true, but false"
        " with echo and logprobs",
    )
    parse_special: bool | None = Field(None, description=PARSE_SPECIAL)


class TextPart(_Part):
    """A part of a message's content."""

    type: Literal["text"]
    text: str
    cache_control: Any = Field(None, description="taken and not used")


class CalledFunction(_Part):
    """Of a tool call."""

    name: Text
    arguments: str = Field(description="a JSON object, as a string")


class CalledTool(_Part):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="of a stream's delta; taken and not used")


class Message(_Part):
    """One message of a conversation; `developer` is `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(
        None, description="a string, or a list of text parts; null beside tool_calls"
    )
    name: str | None = Field(None, description="handed to the chat template")
    tool_call_id: str | None = Field(None, description="with role tool")
    tool_calls: list[CalledTool] | None = Field(None, description="an empty list is none")
    cache_control: Any = Field(None, description="taken and not used")
    # An answer may be sent back as it came.
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None


class ToolFunction(_Part):
    """Of a tool."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema")
    strict: bool | None = Field(None, description="true: only of the tool that must be called")


class Tool(_Part):
    """One that the model may call."""

    type: Literal["function"]
    function: ToolFunction
    cache_control: Any = Field(None, description="taken and not used")


class ChosenFunction(_Part):
    """Of the tool that must be called."""

    name: Text


class ChosenTool(_Part):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(_Part):
    """Of `response_format`; always kept to, `strict` or not."""

    name: str
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema", description="an object, true or false")


class ResponseFormat(_Part):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Templated(BaseModel):
    """What a chat template takes beside the messages."""

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = Field(
        None,
        description='"none", "auto", "required" beside one tool, or'
        ' {"type": "function", "function": {"name": ...}}',
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables of the chat template"
    )
    enable_thinking: bool | None = Field(None, description="one of chat_template_kwargs")
    continue_final_message: bool | None = Field(
        None, description="the answer goes on in the last message, an assistant's (default)"
    )
    add_generation_prompt: bool | None = Field(
        None, description="the assistant's turn is opened; not where a message is continued"
    )


class ChatRequest(_Templated, _Generating):
    """`POST /v1/chat/completions`."""

    NEUTRAL: ClassVar[Neutral] = NEUTRAL_OF_CHATS
    AS_NULL: ClassVar[Neutral] = AS_NULL_IN_CHATS

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    heal: bool | None = Field(
        None,
        description="choose the end of a message that is continued anew where it ends inside of a"
        " token; true",
    )


class TokenizeRequest(_Templated, _Named):
    """`POST /tokenize`: a text's tokens, as `/v1/completions` or a chat would feed them."""

    NEUTRAL: ClassVar[Neutral] = NEUTRAL_OF_TOKENS

    prompt: str | None = None
    content: str | None = Field(None, description="as prompt; llama.cpp's name")
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="the tokenizer's own beginning and end; true with prompt, else false"
    )
    parse_special: bool | None = Field(None, description=PARSE_SPECIAL)
    return_token_strs: bool | None = Field(None, description="what the tokenizer calls each; false")


class DetokenizeRequest(_Named):
    """`POST /detokenize`: the text of tokens, special ones included."""

    tokens: list[TokenId]


class InfillRequest(_Request):
    """`POST /v1/infill`: `text` with `<FILL>` for each gap, or `prompt` and `suffix` around one."""

    text: str | None = Field(None, description="with <FILL> for every gap")
    prompt: str | None = Field(None, description="the text before one gap")
    suffix: str | None = Field(None, description="the text behind it")
    lengths: Annotated[list[Count], Field(min_length=1, max_length=48)] | None = None
    language: Literal["python"] | None = None
    context: Count | None = None
    heal: bool | None = Field(None, description="choose the tokens at a gap's ends anew; true")


OURS = (
    *("mode", "block_length", "threshold", "steps", "policy", "entropy_bound", "revision"),
    *("edit_threshold", "edit_budget", "doubt", "remask_schedule", "remask_rate", "branches"),
    *("guesses", "draft_form", "skip_masks", "lookup", "draft_cutoff", "min_gain"),
    *("top_p", "top_k", "seed"),
    *("min_p", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("max_thinking_tokens", "end_think_token_id", "json_schema", "regex"),
    "grammar",
)
"""Fields that are arguments of `TriModeLM.generate` by the same name."""

OURS_OF_CHAT = (
    *("tool_choice", "parallel_tool_calls", "chat_template_kwargs", "enable_thinking"),
    *("continue_final_message", "add_generation_prompt", "heal"),
)
"""Fields that are options of `TriModeLM.chat` by the same name."""

OURS_OF_TEMPLATE = tuple(
    name for name in OURS_OF_CHAT if name not in ("parallel_tool_calls", "heal")
)
"""Those of them that say something of the prompt."""

OURS_OF_INFILL = (
    *("lengths", "language", "context", "threshold", "steps", "top_k", "top_p", "min_p", "seed"),
    "heal",
)
"""Fields that are arguments of `TriModeLM.infill` by the same name."""
