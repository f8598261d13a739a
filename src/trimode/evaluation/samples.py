"""Sample continuations of a finished run in every mode, from the starts of held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimode.checkpoint.names import NO_DRAFTER
from trimode.evaluation.run_folder import RunFolder
from trimode.loading import load
from trimode.runtime import Generation, TriModeLM
from trimode.training.shards import TokenShards

NUM_PROMPTS = 3
PROMPT_LEN = 32
MAX_NEW_TOKENS = 64
MODES = ("ar", "diffusion", "linear")


@dataclass(frozen=True, slots=True)
class Continuation:
    """How one mode goes on, greedily.

    Args:
        label: The mode, and the drafter if the run trained one.
        text: The new text; token ids where there is no tokenizer.
        num_forwards: Model calls, the prefill included.
        tpf_decode: Tokens per forward other than the prefill; None without any.
    """

    label: str
    text: str
    num_forwards: int
    tpf_decode: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt.

    Args:
        prompt: As text.
        true_text: How the document goes on; None for a prompt that is in none.
        continuations: One for each mode.
    """

    prompt: str
    true_text: str | None
    continuations: tuple[Continuation, ...]


def make_samples(
    run: RunFolder, *, prompts: Sequence[str] = (), device: str | None = None
) -> list[Sample]:
    """Continue some prompts in every mode with what the run exported.

    A drafter is shown beside its bare base.

    Args:
        run: A finished run.
        prompts: Texts to continue; none takes the starts of held-out documents.
        device: As for `trimode.load`.

    Raises:
        TriModeError: The result or the data cannot be opened, or a prompt fills the context.
    """
    lm = _load(run, device=device)
    starts: list[tuple[list[int], list[int] | None]] = [(lm.encode(text), None) for text in prompts]
    if not starts:
        starts += _document_starts(run, context=lm.model.config.max_position_embeddings)
    return [
        Sample(
            prompt=_as_text(lm, prompt_ids),
            true_text=None if true_ids is None else _as_text(lm, true_ids),
            continuations=tuple(_continuations(lm, prompt_ids)),
        )
        for prompt_ids, true_ids in starts
    ]


def _load(run: RunFolder, *, device: str | None) -> TriModeLM:
    if run.is_drafter:
        drafter = run.folder / ("drafter" if run.has_anchors else "linear_spec_lora")
        return load(run.config["model"]["init"], device=device, drafter=drafter)
    if run.config.get("lora") is not None:
        lora = run.folder / "lora"
        return load(run.config["model"]["init"], device=device, lora=lora, drafter=NO_DRAFTER)
    return load(run.folder / "final", device=device)


def _document_starts(run: RunFolder, *, context: int) -> list[tuple[list[int], list[int]]]:
    """Starts of held-out documents spread over the split, each with what follows it there.

    Of a conversation the start is all that comes before the first token that is learned.
    """
    split = run.config.get("evaluation", {}).get("split", "held_out")
    data = TokenShards.open(Path(run.config["data"]), split)
    starts = []
    for index in range(min(NUM_PROMPTS, data.num_documents)):
        document = (2 * index + 1) * data.num_documents // (2 * NUM_PROMPTS)
        begin = int(data.document_ends[document - 1]) if document else 0
        stop = min(int(data.document_ends[document]), begin + context)
        prompt_len = min(PROMPT_LEN, (stop - begin + 1) // 2)
        if data.kind == "chat":
            prompt_len = int(data.supervised(begin, stop).argmax()) or prompt_len
        ids = data.tokens(begin, stop).tolist()
        starts.append((ids[:prompt_len], ids[prompt_len : prompt_len + MAX_NEW_TOKENS]))
    return starts


def _continuations(lm: TriModeLM, prompt_ids: list[int]) -> list[Continuation]:
    room = max(1, lm.model.config.max_position_embeddings - len(prompt_ids))
    variants = [(mode, lm, mode) for mode in MODES]
    if lm.adapter is not None:
        bare = TriModeLM(lm.model, lm.tokenizer)
        variants[-1:] = [("linear, no drafter", bare, "linear"), ("linear, drafter", lm, "linear")]
    found = []
    for label, decoder, mode in variants:
        made = decoder.generate(
            prompt_ids, mode=mode, max_new_tokens=min(MAX_NEW_TOKENS, room), seed=0
        )
        assert isinstance(made, Generation)
        text = made.text if lm.tokenizer is not None else _as_text(lm, made.token_ids)
        stats = made.stats
        found.append(Continuation(label, text, stats.num_forwards, stats.tpf_decode))
    return found


def _as_text(lm: TriModeLM, token_ids: list[int]) -> str:
    if lm.tokenizer is None:
        return " ".join(map(str, token_ids))
    return lm.decode(token_ids)
