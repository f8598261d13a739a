"""Turning an autoregressive checkpoint into a tri-mode one, proved before it is kept.

Read the source's configuration, choose a mask token, map every tensor, copy shard by shard, then
compare logits with transformers' own model of the source. What families there are and what they
call things is in `key_maps`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from trimode.checkpoint import io, key_maps
from trimode.errors import CheckpointError, ConfigError, UnsupportedError
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig
from trimode.model.modeling import MODEL_CLASSES

ROW_MULTIPLE = 64
PROBE_LEN = 48
_LIBRARIES = (torch, transformers, safetensors)


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes:
        folder, model_type: Where it is, and what it calls itself.
        config: transformers' configuration, of the text part if there is vision too.
        is_vision, is_tied: Whether it is a vision layout, and whether the head may be absent.
        stored: What the safetensors headers say.
        tokenizer: transformers' tokenizer, or None; choosing a mask token adds that to it.
        eos_token_id: The generation defaults' if they name any, else the configuration's.
        special_ids: BOS, EOS and PAD of all its files: never a mask token.
    """

    folder: Path
    model_type: str
    config: Any
    is_vision: bool
    is_tied: bool
    stored: dict[str, io.StoredTensor]
    tokenizer: Any
    eos_token_id: int | list[int] | None
    special_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class MaskToken:
    """The mask token and how it was come by; `token` is None without a tokenizer."""

    token: str | None
    token_id: int
    how: str


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    block_length: int = 32,
    mask_token: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    proof_dtype: str = "float32",
    on_plan: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Write a tri-mode checkpoint whose AR view computes what the source computes.

    Args:
        source: A folder or hub id of a Llama, Mistral, Ministral 3, Qwen2 or Qwen3 checkpoint.
        destination: A folder that does not exist or is empty; it appears complete or not at all.
        block_length: Default diffusion block length of the result.
        mask_token: A token or a token id of the vocabulary; None chooses one.
        dtype: Element type to write; None keeps that of each tensor.
        max_shard_size: Such as "5GB"; one shard at most is in memory while copying.
        proof_dtype: Element type of the proof, which holds one network of the source's size.
        on_plan: Called with the record, all but its `proof`, before weights are read.

    Returns:
        The record that is also written to `conversion.json`.

    Raises:
        CheckpointError: the source is damaged, of another kind, or the proof failed.
        ConfigError: an argument is not valid.
        UnsupportedError: the source computes something that our network does not.
    """
    folder, target = io.resolve(source), Path(destination).resolve()
    if target == folder.resolve():
        raise CheckpointError(f"{destination} is the source itself; give another folder")
    proved_in = io.as_dtype(proof_dtype)
    written_in = None if dtype is None else io.as_dtype(dtype)
    with io.fresh_folder(target) as partial:
        opened = open_source(folder)
        mask = choose_mask_token(mask_token, opened)
        config = our_config(opened, mask, block_length=block_length)
        mapping = map_tensors(opened, config)
        record = {"source": str(source)} | make_record(opened, mask, config, mapping, written_in)
        if on_plan is not None:
            on_plan(record)
        write_weights(opened, partial, record["tensors"], max_shard_size=max_shard_size)
        config.dtype = record["tensors"][0]["dtype"]
        config.save_pretrained(partial)
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(partial)
            _prove_tokenizer(opened, partial, mask)
        record["proof"] = prove(opened, partial, written_in=written_in, proved_in=proved_in)
        (partial / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def open_source(folder: Path) -> Source:
    """Read everything but weights, and refuse what our network cannot be."""
    path = folder / io.CONFIG_NAME
    content = io.read_json(path)
    model_type = _known_type(content, path)
    stored = io.read_headers(folder)
    whole = io.read_with(transformers.AutoConfig, folder, "configuration")
    config = whole.get_text_config()
    if config.model_type not in key_maps.FAMILIES:
        raise CheckpointError(
            f"{path}: text_config is of type {config.model_type!r}; "
            f"allowed: {', '.join(key_maps.FAMILIES)}"
        )
    _check_expressible(config, path)
    has_text = any((folder / name).exists() for name in key_maps.TOKENIZER_FILES)
    tokenizer = io.read_with(transformers.AutoTokenizer, folder, "tokenizer") if has_text else None
    has_defaults = (folder / "generation_config.json").exists()
    defaults = io.read_json(folder / "generation_config.json") if has_defaults else {}
    taken = [owner.get(n) for owner in (content, defaults) for n in key_maps.SPECIAL_ID_FIELDS]
    taken += [getattr(config, name) for name in key_maps.SPECIAL_ID_FIELDS]
    return Source(
        folder=folder,
        model_type=model_type,
        config=config,
        is_vision=model_type in key_maps.VISION_FAMILIES,
        is_tied=whole.tie_word_embeddings or config.tie_word_embeddings,
        stored=stored,
        tokenizer=tokenizer,
        eos_token_id=defaults.get("eos_token_id") or config.eos_token_id,
        special_ids=_ids(*taken),
    )


def _known_type(content: dict[str, Any], path: Path) -> str:
    known = key_maps.FAMILIES | key_maps.VISION_FAMILIES
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        what = " (a mixture of experts)" if any(map(content.get, key_maps.EXPERT_FIELDS)) else ""
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}{what}; allowed: {', '.join(known)}"
        )
    architecture = known[model_type].architecture
    found = content.get("architectures")
    if found not in (None, [], [architecture]):
        raise CheckpointError(f"{path}: architectures is {found}; allowed: {architecture}")
    if content.get("quantization_config"):
        raise UnsupportedError(f"{path}: the weights are quantized; give an unquantized checkpoint")
    return model_type


def _check_expressible(config: Any, path: Path) -> None:
    rope = config.rope_parameters or {}
    rope_type, share = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
    if rope_type not in key_maps.ROPE_TYPES:
        allowed = ", ".join(key_maps.ROPE_TYPES)
        raise UnsupportedError(f"{path}: rope_type is {rope_type!r}; supported: {allowed}")
    if share != 1.0:
        raise UnsupportedError(f"{path}: partial_rotary_factor is {share}; supported: 1.0")
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if other := layer_types - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(f"{path}: layer_types has {min(other)!r}; supported: full_attention")
    if "sliding_attention" in layer_types and window is not None and window < context:
        raise UnsupportedError(
            f"{path}: sliding_window is {window}, within the context of {context}; "
            "supported: none, or one as long as the context"
        )


def choose_mask_token(wanted: str | None, source: Source) -> MaskToken:
    """Find a mask token or make one; the source's tokenizer, if there is one, then knows it.

    In order: the wanted one, the tokenizer's own, a reserved slot that nothing uses, a new token,
    which takes a row of the embedding that has no token yet or else grows the vocabulary.
    """
    tokenizer, num_rows = source.tokenizer, source.config.vocab_size
    if tokenizer is None:
        return _mask_without_tokenizer(wanted, source)
    vocab = tokenizer.get_vocab()
    if wanted is not None:
        token, how = _wanted_token(wanted, vocab, source), "named"
    elif tokenizer.mask_token is not None:
        token, how = tokenizer.mask_token, "the tokenizer's own"
    elif (reserved := _reserved_token(vocab, source)) is not None:
        token, how = reserved, "reserved slot"
    else:
        token, how = key_maps.NEW_MASK_TOKEN, "padded row"
    is_new = token not in vocab
    # An added token as the object it is, or it would lose flags such as `lstrip`.
    known = tokenizer.added_tokens_decoder.get(vocab.get(token), token)
    tokenizer.add_special_tokens({"mask_token": known})
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id in source.special_ids or (is_new and token_id in vocab.values()):
        raise CheckpointError(
            f"{source.folder}: {token!r} would be token {token_id}, which is in use; name another"
            " mask token"
        )
    return MaskToken(token, token_id, how if token_id < num_rows else "grown vocabulary")


def _mask_without_tokenizer(wanted: str | None, source: Source) -> MaskToken:
    num_rows = source.config.vocab_size
    if wanted is None:
        return MaskToken(None, num_rows, "grown vocabulary")
    if not wanted.isdecimal() or int(wanted) >= num_rows or int(wanted) in source.special_ids:
        raise ConfigError(
            f"mask token is {wanted!r}; without a tokenizer allowed: an id of 0 to {num_rows - 1}"
            f" that is not special ({sorted(source.special_ids)})"
        )
    return MaskToken(None, int(wanted), "named")


def _wanted_token(wanted: str, vocab: dict[str, int], source: Source) -> str:
    """The token that the user means; digits are an id."""
    by_id = {token_id: token for token, token_id in vocab.items()}
    token = by_id.get(int(wanted)) if wanted.isdecimal() else wanted
    if token is None or token not in vocab:
        raise ConfigError(f"mask token is {wanted!r}; allowed: a token of the vocabulary or its id")
    if vocab[token] in source.special_ids:
        raise ConfigError(f"mask token is {wanted!r}, which ends, begins or pads texts already")
    is_added = vocab[token] in source.tokenizer.added_tokens_decoder
    if not is_added and not (token[0] in "<[|" and token[-1] in ">]|"):
        raise ConfigError(f"mask token is {wanted!r}, an ordinary token of texts; name a reserved")
    return token


def _reserved_token(vocab: dict[str, int], source: Source) -> str | None:
    """The best reserved slot with a row of its own, no role and no place in the chat template."""
    template = str(source.tokenizer.chat_template or "")
    roles = set(source.tokenizer.special_tokens_map.values())
    by_id = sorted(vocab, key=vocab.__getitem__)
    for pattern in key_maps.RESERVED_TOKENS:
        for token in filter(pattern.fullmatch, by_id):
            is_taken = token in roles or token in template or vocab[token] in source.special_ids
            if vocab[token] < source.config.vocab_size and not is_taken:
                return token
    return None


def our_config(source: Source, mask: MaskToken, *, block_length: int) -> TriModeConfig:
    """The result's configuration, of the published type where that can express it.

    Rows beyond the last token are padding and never chosen; new rows fill up to a multiple of 64.
    """
    theirs, family = source.config, key_maps.FAMILIES[source.config.model_type]
    num_rows = theirs.vocab_size
    num_tokens = num_rows
    if source.tokenizer is not None:
        num_tokens = max({*source.tokenizer.get_vocab().values(), *source.special_ids}) + 1
    if mask.token_id >= num_rows:
        num_tokens = max(num_tokens, mask.token_id + 1)
        num_rows = -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    fields = {name: getattr(theirs, name) for name in (*key_maps.SHARED_FIELDS, *family.read)}
    fields |= family.fixed | {
        "vocab_size": num_rows,
        "num_valid_tokens": num_tokens if num_tokens < num_rows else None,
        "head_dim": getattr(theirs, "head_dim", None),
        "rope_parameters": {k: v for k, v in theirs.rope_parameters.items() if k != "type"},
        "eos_token_id": source.eos_token_id,
        "mask_token_id": mask.token_id,
        "block_size": block_length,
    }
    config = TriModeConfig(**fields)
    if config.is_published_shape:
        config = NemotronLabsDiffusionConfig(**fields)
    config.architectures = [MODEL_CLASSES[config.model_type].__name__]
    return config


def map_tensors(source: Source, config: TriModeConfig) -> dict[str, str]:
    """Our name -> the source's, for every tensor of the result; a tied head is the embedding.

    Raises:
        CheckpointError: tensors of the source are missing, extra, misshapen or not floats.
    """
    layouts = key_maps.VISION_LAYOUTS if source.is_vision else key_maps.TEXT_LAYOUTS
    embedding = key_maps.EMBEDDING.removeprefix("encoder.")
    layout = next((it for it in layouts if it.encoder + embedding in source.stored), layouts[0])
    ours = io.expected_shapes(config)
    mapping = {name: layout.encoder + name.removeprefix("encoder.") for name in ours}
    mapping[key_maps.HEAD] = layout.head
    if layout.head not in source.stored and source.is_tied:
        mapping[key_maps.HEAD] = mapping[key_maps.EMBEDDING]
    expected = {theirs: ours[name] for name, theirs in mapping.items()}
    for name in (key_maps.EMBEDDING, key_maps.HEAD):
        expected[mapping[name]] = (source.config.vocab_size, config.hidden_size)
    found = {n: stored.shape for n, stored in source.stored.items() if not is_ignored(n, source)}
    io.compare_shapes(source.folder, found=found, expected=expected)
    for name in found:
        if source.stored[name].dtype not in key_maps.DTYPES:
            raise UnsupportedError(
                f"{source.folder}: {name} is of type {source.stored[name].dtype}; "
                f"allowed: {', '.join(key_maps.DTYPES)}"
            )
    return mapping


def is_ignored(name: str, source: Source) -> bool:
    """Whether a tensor of the source is rightly left behind."""
    is_vision = source.is_vision and key_maps.VISION_TENSORS.match(name)
    return bool(is_vision or key_maps.ROTARY_CONSTANTS.search(name))


def write_weights(
    source: Source, folder: Path, tensors: list[dict[str, Any]], *, max_shard_size: str
) -> None:
    """Copy the tensors of a record, one shard at a time; new rows are the mean of the old ones."""
    plan = {tensor["name"]: tensor for tensor in tensors}

    def load(name: str) -> Tensor:
        theirs, dtype = plan[name]["source"], getattr(torch, plan[name]["dtype"])
        with safe_open(source.stored[theirs].file, framework="pt") as stored:
            tensor = stored.get_tensor(theirs)
        if num_new := plan[name]["shape"][0] - tensor.shape[0]:
            mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
            tensor = torch.cat((tensor, mean.expand(num_new, -1)))
        return tensor.to(dtype, copy=True)  # a tied head must not share the embedding's memory

    sizes = {
        name: math.prod(tensor["shape"]) * getattr(torch, tensor["dtype"]).itemsize
        for name, tensor in plan.items()
    }
    io.save_tensors(folder, sizes, load=load, max_shard_size=max_shard_size)


def prove(
    source: Source, folder: Path, *, written_in: torch.dtype | None, proved_in: torch.dtype
) -> dict[str, Any]:
    """Compare AR logits of the written folder with those of transformers' model of the source.

    The source is rounded to `written_in` first, so that what is compared is the conversion and not
    the rounding that was asked for. One network at a time is in memory.

    Raises:
        CheckpointError: some logits differ by more than `PROOF_BOUNDS` of the largest.
    """
    probes = make_probes(source)
    theirs = _their_logits(source, probes, written_in=written_in or proved_in, proved_in=proved_in)
    ours = _logits(io.load_model(folder, device="cpu", dtype=proved_in), probes)
    largest = max(float(logits.abs().max()) for logits in theirs)
    allowed = key_maps.PROOF_BOUNDS[proved_in] * largest
    differences = []
    for probe, expected, got in zip(probes, theirs, ours, strict=True):
        difference = float((got[:, : expected.shape[1]] - expected).abs().max())
        differences.append(difference)
        if not difference <= allowed:  # NaN fails too
            raise CheckpointError(
                f"the result does not compute what {source.folder} does: logits of {probe.name!r}"
                f" differ by {difference:.3g}, allowed {allowed:.3g}; nothing was written"
            )
    return {
        "dtype": _word(proved_in),
        "max_difference": max(differences),
        "allowed_difference": allowed,
        "largest_logit": largest,
        "probes": [asdict(probe) for probe in probes],
    }


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids fed at consecutive positions from `first_position`."""

    name: str
    ids: list[int]
    first_position: int = 0


def make_probes(source: Source) -> list[Probe]:
    """Random tokens and edge cases, also where YaRN's or Llama 3's original context ends."""
    config = source.config
    num_rows, context = config.vocab_size, config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_LEN, context)
    ids = torch.randint(num_rows, (length,), generator=generator).tolist()
    special = sorted(i for i in source.special_ids if i < num_rows)
    probes = [
        Probe("random tokens", ids),
        Probe("first, last and special tokens", [0, num_rows - 1, *special][:context]),
        Probe("one token", ids[:1]),
        Probe("one token repeated", ids[:1] * length),
        Probe("end of the context", ids, context - length),
    ]
    original = config.rope_parameters.get("original_max_position_embeddings") or context
    if original < context:
        start = max(0, min(original - length // 2, context - length))
        probes.append(Probe("end of the original context", ids, start))
    return probes


def _their_logits(
    source: Source, probes: Iterable[Probe], *, written_in: torch.dtype, proved_in: torch.dtype
) -> list[Tensor]:
    auto = key_maps.AUTO_VISION if source.is_vision else key_maps.AUTO_TEXT
    with io.quiet():
        model = getattr(transformers, auto).from_pretrained(
            source.folder, dtype=written_in, attn_implementation="eager", trust_remote_code=False
        )
    return _logits(model.to(proved_in).eval(), probes)


@torch.inference_mode()
def _logits(model: torch.nn.Module, probes: Iterable[Probe]) -> list[Tensor]:
    """[T, V] float32 for each probe."""
    has_cache_position = "cache_position" in inspect.signature(model.forward).parameters
    found = []
    for probe in probes:
        positions = torch.arange(probe.first_position, probe.first_position + len(probe.ids))[None]
        # Older transformers scale Ministral's queries by these.
        options = {"cache_position": positions[0]} if has_cache_position else {}
        logits = model(torch.tensor([probe.ids]), position_ids=positions, **options).logits
        found.append(logits[0].float())
    return found


def _prove_tokenizer(source: Source, folder: Path, mask: MaskToken) -> None:
    """The saved tokenizer reads as before, knows the mask token and has kept its settings."""
    before = io.read_with(transformers.AutoTokenizer, source.folder, "tokenizer")
    after = io.load_tokenizer(folder)
    assert after is not None
    same = {
        "text": [t(key_maps.PROBE_TEXT)["input_ids"] for t in (before, after)],
        "roles": [t.special_tokens_map | {"mask_token": mask.token} for t in (before, after)],
        "special tokens": [sorted({*t.all_special_tokens, mask.token}) for t in (before, after)],
        "added tokens": [
            {i: repr(t) for i, t in t.added_tokens_decoder.items() if i != mask.token_id}
            for t in (before, after)
        ],
        "chat template": [t.chat_template for t in (before, after)],
        "mask token": [[mask.token_id], after.encode(mask.token, add_special_tokens=False)],
    }
    for what, (expected, got) in same.items():
        if expected != got:
            raise CheckpointError(
                f"{source.folder}: the tokenizer does not survive saving: {what} was {expected!r}"
                f" and is {got!r}; nothing was written"
            )


def make_record(
    source: Source,
    mask: MaskToken,
    config: TriModeConfig,
    mapping: dict[str, str],
    written_in: torch.dtype | None,
) -> dict[str, Any]:
    """What `conversion.json` says, but for the proof and the source's path."""
    shapes = {name: list(shape) for name, shape in io.expected_shapes(config).items()}
    kept = {name: key_maps.DTYPES[source.stored[theirs].dtype] for name, theirs in mapping.items()}
    return {
        "source_model_type": source.model_type,
        "model_type": config.model_type,
        "parameters": sum(map(math.prod, shapes.values())),
        "vocab_size": config.vocab_size,
        "num_valid_tokens": config.num_valid_tokens,
        "num_new_rows": config.vocab_size - source.config.vocab_size,
        "block_size": config.block_size,
        "has_tokenizer": source.tokenizer is not None,
        "mask_token": asdict(mask),
        "tensors": [
            {"source": theirs, "name": name, "shape": shapes[name]}
            | {"dtype": _word(written_in or kept[name])}
            for name, theirs in mapping.items()
        ],
        "ignored": sorted(name for name in source.stored if is_ignored(name, source)),
        "versions": {library.__name__: library.__version__ for library in _LIBRARIES},
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ids(*values: int | list[int] | None) -> frozenset[int]:
    """All token ids among values that are an id, several, or none (null or -1)."""
    flat = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return frozenset(i for i in flat if i is not None and i >= 0)
