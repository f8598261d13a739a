"""Runs an engine column by column, as streamers and stopping criteria of transformers expect.

Rows advance by whole rounds and at different speeds. A column is shown when every row has its
token, so that a criterion sees what it would see token by token, and cuts the text exactly there.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList

from trimode.decoding import Sequence
from trimode.engine import Engine
from trimode.hf.network import refuse_aborted


def run_columns(
    engine: Engine,
    sequences: Items[Sequence],
    prompt_ids: Tensor,
    *,
    pad_id: int,
    criteria: StoppingCriteriaList,
    streamer: Any = None,
) -> Tensor:
    """Run rows to their end, or to where a criterion ends them.

    Args:
        engine: With the sequences submitted.
        sequences: B.
        prompt_ids: [B, T] int64, padding included.
        pad_id: Stands behind the end of a row.
        criteria: Called after every column with ids [B, T + n] and no scores; True ends a row.
        streamer: Gets the prompt, then every column [B], then `end()`.

    Returns:
        [B, T + new] int64.

    Raises:
        TriModeError: a row broke down.
    """
    ids, num_columns = prompt_ids, 0
    is_over = [False] * len(sequences)
    if streamer is not None:
        streamer.put(prompt_ids.cpu())
    while not all(is_over):
        for seq in engine.step():
            if seq.error is not None:
                raise seq.error
        rows = list(zip(sequences, is_over, strict=True))
        refuse_aborted([seq for seq, over in rows if not over])
        while not all(is_over) and all(
            over or len(seq.new_ids) > num_columns for seq, over in rows
        ):
            tokens = [pad_id if over else seq.new_ids[num_columns] for seq, over in rows]
            column = torch.tensor(tokens, device=ids.device)
            ids = torch.cat((ids, column[:, None]), dim=1)
            num_columns += 1
            if streamer is not None:
                streamer.put(column.cpu())
            is_cut = criteria(ids, None).tolist() if criteria else [False] * len(sequences)
            for b, (seq, over) in enumerate(rows):
                if is_cut[b] and not over:
                    engine.abort(seq)
                is_last = seq.is_finished and len(seq.new_ids) == num_columns
                is_over[b] = over or is_cut[b] or is_last
            rows = list(zip(sequences, is_over, strict=True))
    if streamer is not None:
        streamer.end()
    return ids
