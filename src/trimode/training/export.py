"""What a finished run leaves behind: a Hugging Face folder with weights, config and tokenizer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from trimode.model import TriModeModel
from trimode.training.config import ExportPart

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_model(
    model: TriModeModel, folder: Path, *, part: ExportPart, tokenizer_dir: Path | None
) -> Path:
    """Write `folder` anew; an older one is replaced only once the new one is complete.

    Args:
        model: In any dtype; it is not changed.
        folder: Where to.
        part: Dtype and size of the shards.
        tokenizer_dir: Copied beside the weights if it is there.
    """
    temporary = folder.parent / f".{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    if tokenizer_dir is not None and tokenizer_dir.is_dir():
        shutil.copytree(tokenizer_dir, temporary)
    exported = type(model)(model.config)
    exported.load_state_dict(model.state_dict())
    exported.to(DTYPES[part.dtype]).save_pretrained(temporary, max_shard_size=part.max_shard_size)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    logger.info("exported %s", folder)
    return folder
