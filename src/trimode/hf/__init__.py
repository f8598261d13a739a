"""For transformers users: registration of our model types, and two classes over one network.

After `import trimode.hf`, the `Auto...` classes open a published (`nemotron_labs_diffusion`) or an
exported (`trimode`) checkpoint without `trust_remote_code`:

* `AutoModelForCausalLM` gives transformers' own manners (`trimode.hf.causal_lm`): `generate(**enc)`
  returns ids in any mode, `labels` give the AR loss; `pipeline`, PEFT and TRL work.
* `AutoModel` gives the published methods with their signatures (`trimode.hf.published`):
  `ar_generate`, `generate` (block diffusion) and `linear_spec_generate` return ids and `nfe`.

Both are thin over the engine. What they share:

* Rows of a batch may end at different times. Row b of the result is the prompt as given, padding
  included, then its new tokens, then the pad token up to the longest row. The mask token is never
  emitted. No row has more than `max_new_tokens` new tokens.
* `attention_mask` says which tokens of the prompt are real; padding on either side changes nothing.
* When a call samples, every row draws a seed from torch's global generator, so `torch.manual_seed`
  and `transformers.set_seed` reproduce the call. Greedy decoding draws nothing.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from trimode.hf.causal_lm import NemotronLabsDiffusionForCausalLM, TriModeForCausalLM
from trimode.hf.network import load_drafter
from trimode.hf.published import NemotronLabsDiffusionModel, TriModeModel
from trimode.model import NemotronLabsDiffusionConfig, TriModeConfig

__all__ = [
    "NemotronLabsDiffusionConfig",
    "NemotronLabsDiffusionForCausalLM",
    "NemotronLabsDiffusionModel",
    "TriModeConfig",
    "TriModeForCausalLM",
    "TriModeModel",
    "load_drafter",
    "preset",
]

preset = NemotronLabsDiffusionConfig.preset
"""`preset("3b")`, `"8b"`, `"14b"`: configuration of the published text models."""


def _register(
    config_class: type[TriModeConfig],
    model_class: type[TriModeModel],
    causal_lm_class: type[TriModeForCausalLM],
) -> None:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_lm_class, exist_ok=True)
    AutoTokenizer.register(
        config_class, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True
    )


_register(TriModeConfig, TriModeModel, TriModeForCausalLM)
_register(NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel, NemotronLabsDiffusionForCausalLM)
