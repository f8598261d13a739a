"""A loaded model in Python: `.generate(...)`, `.stream(...)`, `.chat(...)` and the others."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from trimode.arguments import as_prompts, as_seeds, as_strings, as_tuple, plain
from trimode.checkpoint.generation_defaults import GenerationDefaults
from trimode.conversation import answering
from trimode.decoding import Event, GenerationParams, Sequence
from trimode.decoding.control import CONTROL_NAMES, Control
from trimode.decoding.grammar import Grammars
from trimode.decoding.healing import Healing
from trimode.decoding.params import DEFAULT_MODE
from trimode.decoding.reveal import degenerate_reason
from trimode.decoding.scoring import check_number
from trimode.detokenize import GrowingText, decode, text_before
from trimode.dialogue import Dialogue
from trimode.engine import Engine
from trimode.engine.costs import find_costs
from trimode.engine.engine import cells_needed
from trimode.engine.planner import Planner
from trimode.engine.ranks import Ranks
from trimode.errors import RequestError
from trimode.generation import Generation
from trimode.heal import EncodedPrompt
from trimode.infill import Infilling, infill_text
from trimode.messages import Messages, ToolCall
from trimode.model import DrafterAdapter, TriModeModel
from trimode.model.adapter import PUBLISHED_FORM, AdapterForm
from trimode.prompts import Prompt, encode_prompt
from trimode.revision import Revision, revise_text
from trimode.stream import Stream
from trimode.tool_calls import split_answer
from trimode.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

MAX_BATCH = 32
"""Prompts of one `generate` call that run together; the rest wait."""


class TriModeLM:
    """A loaded model with its tokenizer, decodable in every mode.

    Attributes:
        model: The network.
        tokenizer: transformers tokenizer; None for a checkpoint without one, which takes prompts of
            token ids only.
        adapter: The drafter adapter, or None.
        vocabulary: The tokenizer as this project needs it; None without one.
        generation_defaults: Of the model's makers; `chat` uses them, `generate` does not.
        ranks: That share the network, if it was loaded so: those other than the first only follow.
    """

    def __init__(
        self,
        model: TriModeModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        adapter: DrafterAdapter | None = None,
        ranks: Ranks | None = None,
        generation_defaults: GenerationDefaults | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.ranks = ranks
        self.generation_defaults = generation_defaults or GenerationDefaults()
        self.vocabulary: Vocabulary | None = None
        if tokenizer is not None:
            self.vocabulary = Vocabulary(
                tokenizer,
                mask_token_id=model.config.mask_token_id,
                num_tokens=model.config.num_real_tokens,
            )
        self._grammars = Grammars(tokenizer, num_tokens=model.config.vocab_size)
        self._said: set[str] = set()  # warnings that are given once

    def generate(
        self,
        prompt: Prompt | Items[Prompt],
        *,
        mode: str = DEFAULT_MODE,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float | None = None,
        steps: int | None = None,
        policy: str | None = None,
        entropy_bound: float | None = None,
        revision: str | None = None,
        edit_threshold: float | None = None,
        edit_budget: int | None = None,
        doubt: float | None = None,
        remask_schedule: str | None = None,
        remask_rate: float | None = None,
        branches: int | None = None,
        guesses: bool | None = None,
        draft_form: str | None = None,
        skip_masks: int | None = None,
        lookup: bool | None = None,
        draft_cutoff: float | None = None,
        min_gain: float | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | Items[int] | None = None,
        stop: str | Items[str] | None = None,
        stop_token_ids: Items[int] | None = None,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        logit_bias: Mapping[int, float] | None = None,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        json_schema: str | bool | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        heal: bool | None = None,
        parse_special: bool = False,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several together.

        Args:
            prompt: A string or token ids; or a list of either, which need not be equally long.
            mode: `ar`, `diffusion`, `linear`, `branching`, `quadratic`, or `auto`, which picks for
                every round. For one seed all but `diffusion` give the same text.
            max_new_tokens, block_length, threshold, steps, policy, entropy_bound, revision,
            edit_threshold, edit_budget, doubt, remask_schedule, remask_rate, branches, guesses,
            draft_form, skip_masks, lookup, draft_cutoff, min_gain, temperature, top_p, top_k,
            min_p, stop_token_ids, ignore_eos, min_tokens, prompt_logprobs: See
                `trimode.decoding.params.GenerationParams`. `block_length` is by default the model's
                own; it means nothing in mode `ar` and is refused there.
            seed: One for all prompts, one each, or None to draw (see `Generation.seed`).
            stop: String or strings that end the text.
            logit_bias, repetition_penalty, frequency_penalty, presence_penalty, logprobs,
            max_thinking_tokens, end_think_token_id, json_schema, regex, grammar: See
                `trimode.decoding.control.Control`.
            heal: Whether the end of a string may be chosen anew in other tokens, so that the text
                goes on where the string ended, be it inside of a token. Ids are left alone. None is
                True, but False with `prompt_logprobs`, which are of the prompt as it is.
            parse_special: Whether control tokens that a string spells become these tokens; else
                they are text. The mask token never does.
            on_event: Called with (index of the prompt, event) as things happen.

        Returns:
            A `Generation`, or a list of them in the order of the prompts.

        Raises:
            RequestError: an argument is not valid, or a prompt does not fit the context.
            CapacityError: it does not fit into memory.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        is_single, sequences = self._sequences(**arguments)
        self.engine(sequences).run()
        generations = [self.generation(seq) for seq in sequences]
        return generations[0] if is_single else generations

    def chat(self, messages: Messages, **options: Any) -> Generation:
        """The assistant's answer to a conversation, by the tokenizer's chat template.

        Args:
            messages: `{"role": "user", "content": ...}` and so on; an answer of the assistant that
                comes last is continued.
            options: Of `generate`; what is left open is as `generation_config.json` of the model
                has it. The end of the assistant's turn ends the answer as well. And those of
                `trimode.conversation.CHAT_OPTIONS`.

        Raises:
            RequestError: as `generate`; or there is no template, or it refuses the conversation.
        """
        generation = self.generate(**self.answering(messages, options))
        assert isinstance(generation, Generation)
        return generation

    def answering(self, messages: Messages, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` and `stream` that answer a conversation; see `chat`."""
        defaults = self.generation_defaults
        arguments = answering(self.vocabulary, messages, defaults.fill(options))
        if defaults.max_new_tokens is not None:
            room = self.model.config.max_position_embeddings - arguments["prompt"].most_tokens
            arguments.setdefault("max_new_tokens", max(1, min(defaults.max_new_tokens, room)))
        return arguments

    def tool_calls(
        self, answer: Generation, tools: Items[Mapping[str, Any]]
    ) -> tuple[str, list[ToolCall]]:
        """The text of an answer before its first call of a tool, and its calls."""
        seen = {"text": answer.text, "token_ids": answer.token_ids, "prompt_ids": answer.prompt_ids}
        return split_answer(self.vocabulary, tools, seen)

    def revise(self, text: str, **options: Any) -> Revision:
        """Replace the least likely tokens of a text; see `trimode.revision.revise_text`."""
        return revise_text(self.model, self.vocabulary, text, adapter=self.adapter, **options)

    def infill(self, text: str, **options: Any) -> Infilling:
        """Fill the gaps of a text, each marked `<FILL>`; see `trimode.infill.infill_text`."""
        return infill_text(self, text, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Continue one prompt, yielding text as it is made; the pieces join to `Generation.text`.

        Takes what `generate` takes, for one prompt, and refuses what it refuses at once. A piece
        never ends in half a character; with stop strings, text that may yet turn out to be one is
        held back.
        """
        if self.tokenizer is None:
            raise RequestError("streaming text needs a tokenizer, and this checkpoint has none")
        return Stream(self, self.prepare(prompt, **options))

    def dialogue(self, *, system: str | None = None, **options: Any) -> Dialogue:
        """A conversation whose K/V stay from one answer to the next; see
        `trimode.dialogue.Dialogue`."""
        return Dialogue(self, system=system, **options)

    def prepare(self, prompt: Prompt, **options: Any) -> Sequence:
        """One prompt and options of `generate`, checked: a sequence for an `Engine`."""
        arguments = inspect.signature(self.generate).bind(prompt, **options)
        arguments.apply_defaults()
        is_single, sequences = self._sequences(**arguments.arguments)
        if not is_single:
            raise RequestError(f"this takes one prompt, and got a list of {len(sequences)}")
        return sequences[0]

    def _sequences(
        self,
        prompt: Prompt | Items[Prompt],
        *,
        mode: str,
        block_length: int | None,
        seed: int | Items[int] | None,
        stop: str | Items[str] | None,
        stop_token_ids: Items[int] | None,
        heal: bool | None,
        parse_special: bool,
        on_event: Callable[[int, Event], None] | None,
        **params: Any,
    ) -> tuple[bool, list[Sequence]]:
        """Whether one prompt was given, and a checked sequence for each."""
        if mode == "ar" and block_length is not None:
            raise RequestError(f"block_length is {block_length}; mode 'ar' has no blocks")
        is_scored = params["prompt_logprobs"] is not None
        heal = not is_scored if heal is None else heal
        for name, value in (("heal", heal), ("parse_special", parse_special)):
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; allowed: True or False")
        if heal and is_scored:
            raise RequestError("heal is True; allowed with prompt_logprobs: False")
        is_single, prompts = as_prompts(prompt)
        control = Control.of({name: plain(params.pop(name)) for name in CONTROL_NAMES})
        if block_length is None:
            block_length = self.model.config.block_size
        sequences = []
        for index, one_seed in enumerate(as_seeds(seed, len(prompts))):
            checked = GenerationParams(
                mode=mode,
                block_length=plain(block_length),
                seed=plain(one_seed),
                stop=as_strings("stop", stop),
                stop_token_ids=as_tuple("stop_token_ids", stop_token_ids),
                control=control,
                **{name: plain(value) for name, value in params.items()},
            )
            encoded = self.encode_prompt(
                prompts[index],
                heal=heal,
                at_character=control.source is not None,
                parse_special=parse_special,
            )
            on_own_event = _bind(on_event, index)
            sequences.append(self.sequence(encoded, checked, on_event=on_own_event))
        reason = degenerate_reason(sequences[0].params)  # the same for all
        if reason is not None:
            logger.warning("%s", reason)
        return is_single, sequences

    def sequence(
        self,
        prompt: Prompt,
        params: GenerationParams,
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> Sequence:
        """A sequence for an `Engine`, its prompt encoded and checked against the context."""
        has_grammar = params.control.source is not None
        prompt = self.encode_prompt(prompt, at_character=has_grammar)
        if params.prompt_logprobs is not None:
            prompt = prompt.whole()
        config = self.model.config
        context = config.max_position_embeddings
        if params.block_length > context:
            raise RequestError(
                f"block_length is {params.block_length}, beyond the context of {context}"
            )
        num_tokens = prompt.num_tokens
        if num_tokens + params.max_new_tokens > context:
            raise RequestError(
                f"prompt of {num_tokens} tokens + max_new_tokens={params.max_new_tokens} ="
                f" {num_tokens + params.max_new_tokens}, beyond the context of {context}"
            )
        prompt = prompt.fitting(context - params.max_new_tokens)
        if params.control.source is not None:
            prompt = prompt.at_character()
        foreign = [i for i in params.stop_token_ids if i >= config.num_real_tokens]
        if foreign:
            raise RequestError(
                f"stop_token_ids has {foreign[0]}; allowed: 0 to {config.num_real_tokens - 1}"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this checkpoint has none")
        num_choosable = config.vocab_size - len(config.banned_token_ids)
        check_number(params.prompt_logprobs, num_choosable=num_choosable)
        control = params.control.settled(
            tokenizer=self.tokenizer, num_tokens=config.vocab_size, banned=config.banned_token_ids
        )
        matcher = None
        if control.source is not None:
            matcher = self._grammars.matcher(
                control.source,
                eos_token_ids=config.eos_token_ids,
                stop_token_ids=params.stop_token_ids,
                owed=prompt.healed_bytes.decode(),
            )
        healing = None
        if prompt.healed_bytes:
            assert self.vocabulary is not None
            tokens = self.vocabulary.token_bytes
            healing = Healing(prompt.taken_ids, tokens, num_tokens=config.vocab_size)
        return Sequence(
            prompt.token_ids,
            replace(params, control=control),
            matcher=matcher,
            eos_token_ids=config.eos_token_ids,
            mask_token_id=config.mask_token_id,
            text=self._growing(prompt.token_ids, prompt.taken_ids) if params.stop else None,
            form=self.form,
            healing=healing,
            on_event=on_event,
        )

    @property
    def form(self) -> AdapterForm:
        """How the drafter adapter is to be used; without one, as the published one."""
        return PUBLISHED_FORM if self.adapter is None else self.adapter.form

    @cached_property
    def planner(self) -> Planner:
        """Of mode `auto`: learns from all that this model decodes. Made when first wanted, which
        takes a few seconds where forwards were not measured before."""
        return Planner(find_costs(self.model, adapter=self.adapter), self.form)

    def engine(self, sequences: Items[Sequence]) -> Engine:
        """An engine just large enough for these sequences, with them submitted."""
        engine = Engine(
            self.model,
            num_rows=min(len(sequences), MAX_BATCH),
            num_cells=max(map(cells_needed, sequences)),
            adapter=self.adapter,
            planner=self.planner if any(seq.mode == "auto" for seq in sequences) else None,
        )
        for seq in sequences:
            engine.submit(seq)
        return engine

    def generation(self, seq: Sequence) -> Generation:
        """The result of a finished sequence."""
        assert seq.finish_reason is not None
        text = ""
        if self.tokenizer is not None:
            text = self.growing_text(seq).whole(seq.new_ids)
        return Generation(
            text=text if seq.stop_text_len is None else text[: seq.stop_text_len],
            token_ids=seq.new_ids,
            prompt_ids=seq.prompt_ids,
            prompt_tokens=seq.num_prompt,
            finish_reason=seq.finish_reason,
            seed=seq.params.seed,
            stats=seq.stats,
            logprobs=None if seq.params.control.logprobs is None else seq.logprobs,
            healed_bytes=b"" if seq.healing is None else seq.healing.owed,
            prompt_logprobs=None if seq.scores is None else seq.scores.found,
        )

    def encode_prompt(
        self,
        prompt: Prompt,
        *,
        heal: bool = True,
        at_character: bool = False,
        parse_special: bool = False,
    ) -> EncodedPrompt:
        """A prompt as it is fed; see `trimode.prompts.encode_prompt`."""
        found = encode_prompt(
            self.vocabulary,
            self.model.config,
            prompt,
            heal=heal,
            at_character=at_character,
            parse_special=parse_special,
        )
        for remark in found.remarks:
            if remark not in self._said:
                self._said.add(remark)
                logger.warning("%s", remark)
        return found

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as they are; an empty one becomes BOS."""
        return self.encode_prompt(prompt, heal=False).token_ids

    def decode(self, token_ids: Items[int]) -> str:
        """Text of token ids that begin a text, without special tokens."""
        assert self.tokenizer is not None
        return decode(self.tokenizer, token_ids)

    def growing_text(self, seq: Sequence) -> GrowingText:
        """The new text of a sequence, to be pushed token by token."""
        return self._growing(seq.prompt_ids, () if seq.healing is None else seq.healing.taken_ids)

    def _growing(self, prompt_ids: Items[int], taken_ids: Items[int]) -> GrowingText:
        assert self.vocabulary is not None
        before = text_before(self.vocabulary, prompt_ids, taken_ids)
        return GrowingText(self.vocabulary.tokenizer, before)


def _bind(
    on_event: Callable[[int, Event], None] | None, index: int
) -> Callable[[Event], None] | None:
    return None if on_event is None else lambda event: on_event(index, event)
