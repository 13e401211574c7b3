"""Weights are read as the values they stand for, and LoRA's size is told as PEFT counts it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora.hardware import detect
from qlora.loading import load_base
from qlora.lora import show_trainable
from qlora.measures import relative_error
from qlora.shapes import model_config, skeleton
from qlora.weights import dequantized


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantized_weights_are_read_as_the_values_they_stand_for(tiny_folder, precision):
    model = load_base(str(tiny_folder), precision, detect()).model
    plain = load_base(str(tiny_folder), "fp32", detect("fp32")).model
    model(input_ids=torch.tensor([[1, 2, 3]]))  # int8 moves its scales in the first pass
    name = "model.layers.1.mlp.up_proj"
    stored = dequantized(model.get_submodule(name)).float()
    error = relative_error(plain.get_submodule(name).weight, stored)
    assert error < {"nf4": 0.12, "int8": 0.02}[precision]  # 4 bits err by about 9%, 8 bits by under 1%


def test_what_lora_adds_is_told_with_its_share_by_module(tiny_folder, capsys):
    frame = skeleton(model_config(str(tiny_folder))[0])
    model = get_peft_model(
        frame, LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), low_cpu_mem_usage=True
    )
    show_trainable(model)
    shown = capsys.readouterr().err
    # two layers: q 4 (64+64) = 512, k 4 (64+32) = 384, so 57.1% and 42.9% of 1,792
    assert "1,792 trainable of" in shown and "q_proj 57.1%, k_proj 42.9%" in shown
