"""LoRA of the whole model through PEFT: the joint objective, and low-rank factors to learn it.

Source: Hu et al. 2021, arXiv 2106.09685. PEFT wraps the linear layers, so both views see the
adapter, as they do once it is merged, and the rest of training does not notice. There is no
dropout: all noise of a run is a function of the sample (design, section 6), and PEFT's is not.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from trimode.checkpoint import whole_folder
from trimode.checkpoint.adapter import save_tensors
from trimode.errors import ConfigError
from trimode.model import TriModeModel
from trimode.training.drafter import weights_checksum
from trimode.training.export import DTYPES
from trimode.training.joint import JointObjective

try:
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
except ImportError:
    raise ConfigError("lora needs PEFT: pip install 'trimode[train]'") from None


class LoraObjective(JointObjective):
    """`JointObjective` with a frozen base and a LoRA on it; see there for the arguments.

    The base is shared out over the ranks, and every rank has the whole adapter.
    """

    def _place(self, model: TriModeModel) -> nn.Module:
        """Freeze the base, wrap its layers and share it out; what is trained are the factors."""
        part = self._config.lora
        assert part is not None
        self.base_checksum = weights_checksum(model)
        torch.manual_seed(self._config.seed)  # of the factors, the same on every rank
        peft_config = LoraConfig(
            r=part.rank,
            lora_alpha=part.alpha,
            target_modules=list(part.targets),
            base_model_name_or_path=self._config.model.init,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
            self._peft: PeftModel = get_peft_model(model, peft_config)
        self._parallel.shard(
            model.train(), gather_dtype=self._precision.gather_dtype, has_adapter=True
        )
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for factor in factors.values():  # whole on every rank, so `shard` has left them alone
            factor.data = factor.data.to(self._parallel.device)
        return nn.ParameterDict({name.replace(".", "_"): p for name, p in factors.items()})

    def finish(self) -> Path:
        """Export the adapter as a PEFT folder, with the tokenizer and its chat template."""
        folder = Path(self._config.output_dir) / "lora"
        with self._parallel.together(), whole_folder.writing(folder, what="adapter"):
            if self._parallel.is_main:
                self._export(folder)
        return folder

    def _export(self, folder: Path) -> None:
        dtype = DTYPES[self._config.export.dtype]
        weights = get_peft_model_state_dict(self._peft, save_embedding_layers=False)
        partial = whole_folder.start(folder)
        self._peft.save_pretrained(
            str(partial),
            state_dict={name: weight.to(dtype) for name, weight in weights.items()},
            save_embedding_layers=False,
        )
        save_tensors(load_file(partial / "adapter_model.safetensors"), partial, use="lora")
        (partial / "README.md").unlink(missing_ok=True)  # a card with nothing filled in
        tokenizer = Path(self._config.data) / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
        whole_folder.publish(folder)
