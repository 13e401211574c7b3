"""Shapes: configs of every preset, skeletons without weights, and what is no config."""

import pytest
import torch

from config import MODELS
from qlora.cli import UsageError, UserError
from qlora.shapes import SHAPES, model_config, skeleton

PUBLISHED = {  # parameters, as the safetensors files on the hub hold them
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "mistral-7b": 7_248_023_552,
    "phi-3.5-mini": 3_821_079_552,
    "deepseek-coder-1.3b": 1_346_471_936,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_presets_shapes_give_its_published_parameters(name):
    assert skeleton(model_config(name)[0]).num_parameters() == PUBLISHED[name]


def test_a_skeleton_holds_no_weights():
    model = skeleton(model_config("llama-3.1-8b")[0])
    assert {p.device.type for p in model.parameters()} == {"meta"} and {
        p.dtype for p in model.parameters()
    } == {torch.bfloat16}


def test_configs_come_from_presets_hub_ids_of_presets_folders_and_files(tiny_folder):
    assert (
        model_config("llama-3.2-3b")[0].hidden_size
        == model_config(MODELS["llama-3.2-3b"])[0].hidden_size
        == 3072
    )
    assert (
        model_config(str(tiny_folder))[0].hidden_size
        == model_config(str(tiny_folder / "config.json"))[0].hidden_size
        == 64
    )


def test_an_unknown_model_names_the_presets(tmp_path):
    for name in ("nothing", str(tmp_path), str(tmp_path / "config.json")):
        with pytest.raises(UsageError, match="llama-3.2-1b"):
            model_config(name)


@pytest.mark.parametrize(
    "text",
    ["", "[1, 2]", "{}", '{"model_type": "no-such-model"}', '{"model_type": "llama", "hidden_size": "wide"}'],
)
def test_a_file_that_is_no_config_is_told_in_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a config|config.json( is damaged|: hidden_size)"):
        model_config(str(path))


def test_shapes_are_there_for_every_preset():
    assert SHAPES.keys() == MODELS.keys()
