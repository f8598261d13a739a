"""What a finished run leaves behind: a Hugging Face folder with weights, config and tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from trimode.checkpoint.io import save_checkpoint
from trimode.checkpoint.whole_folder import writing
from trimode.model import TriModeModel
from trimode.model.modeling import MODEL_CLASSES
from trimode.training.config import ExportPart
from trimode.training.dist_checkpoint import full_state_dict
from trimode.training.parallel import Parallel

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_model(
    model: TriModeModel,
    folder: Path,
    *,
    part: ExportPart,
    tokenizer_dir: Path | None,
    parallel: Parallel,
) -> Path:
    """Write `folder` anew; an older one is replaced only once the new one is complete.

    Args:
        model: In any dtype; it is not changed.
        folder: Where to.
        part: Dtype and size of the shards.
        tokenizer_dir: Copied beside the weights if it is there.
        parallel: The ranks that share the model out; all call this, rank 0 writes.

    Raises:
        CapacityError: The disk is full.
        TriModeError: It cannot be written for another reason.
    """
    weights = full_state_dict(model, parallel=parallel)
    with parallel.together(), writing(folder, what="export"):
        if parallel.is_main:
            with torch.device("meta"):
                exported = MODEL_CLASSES[model.config.model_type](model.config)
            exported.load_state_dict(
                {name: weight.to(DTYPES[part.dtype]) for name, weight in weights.items()},
                assign=True,
            )
            exported.tie_weights()
            has_tokenizer = tokenizer_dir is not None and tokenizer_dir.is_dir()
            save_checkpoint(
                exported,
                folder,
                tokenizer=tokenizer_dir if has_tokenizer else None,
                max_shard_size=part.max_shard_size,
            )
    logger.info("exported %s", folder)
    return folder
