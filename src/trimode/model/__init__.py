"""What the network is: configuration, modules, attention, K/V cells, the drafter adapter.

Nothing here knows about tokens being chosen, requests, files or training.
"""

from trimode.model.adapter import AdapterSwitch, DrafterAdapter
from trimode.model.attention import Attend, DenseAttention, RowAttention
from trimode.model.cache import KVCache
from trimode.model.configuration import NemotronLabsDiffusionConfig, TriModeConfig
from trimode.model.masks import dense_mask, fed_mask
from trimode.model.modeling import Checkpointing, TriModeModel

__all__ = [
    "AdapterSwitch",
    "Attend",
    "Checkpointing",
    "DenseAttention",
    "DrafterAdapter",
    "KVCache",
    "NemotronLabsDiffusionConfig",
    "RowAttention",
    "TriModeConfig",
    "TriModeModel",
    "dense_mask",
    "fed_mask",
]
