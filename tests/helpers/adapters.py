"""LoRA adapters in folders."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from nla.models.lora import save_adapter
from tests.helpers.tiny import make_model

LORA = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")


def lora_folder(folder: Path, seed: int = 1, config: LoraConfig = LORA) -> Path:
    """A random LoRA adapter on the tests' target, and what it is on."""
    torch.manual_seed(seed)
    model = get_peft_model(make_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    save_adapter(folder, model, "default")
    return folder
