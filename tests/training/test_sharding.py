"""A 4-bit base shared out between processes trains the adapter that a whole one trains (gloo, CPU)."""

import os
import re

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT
from test_processes import difference, finish, report, start

from qlora.memory.plan import on_several
from qlora.memory.step import Job
from qlora.shapes import model_config

CONFIG = ROOT / "configs" / "fsdp_qlora.yaml"
SMALL = ("--samples", 12, "--eval-samples", 5, "--max-length", 96, "--precision", "nf4", "--batch-size", 2)
SMALL += ("--lane", "libraries")  # a sharded base is left to them
# They compute in the dtype that wins a trial of speed; on a busy machine the winners of two runs may differ.
IN_FP32 = """
import runpy, sys
sys.path.insert(0, {root!r})
from qlora.cpu import lanes
lanes.trial = lambda width, between: {{"fp32": 2.0, "bf16": 1.0}}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_sharded_4_bit_base_trains_the_same_adapter(tiny_folder, tmp_path, monkeypatch):
    runs, job = {}, tmp_path / "in_fp32.py"
    job.write_text(IN_FP32.format(root=str(ROOT), script=str(ROOT / "qlora_finetune.py")))
    for name, sharded in (("ddp", "false"), ("fsdp", "true")):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", sharded)
        runs[name] = tmp_path / name
        code, _, err = finish(start(2, "--model", tiny_folder, "--output-dir", runs[name], *SMALL, job=job))
        assert code == 0, err
        assert report(runs[name])["environment"]["dtype"] == "float32"
        sizes = re.search(r"sharded    (\S+) of (\S+) MB of weights on each of 2 GPUs", err)
        assert (sizes is not None) == (name == "fsdp")
        if sizes:  # half of the layers; embeddings and adapters are whole
            own, whole = map(float, sizes.groups())
            assert own < whole
    # Gathered weights are the same bytes, so all that follows is the same too.
    assert difference(runs["ddp"], runs["fsdp"]) == 0
    assert report(runs["fsdp"])["evaluation"] == report(runs["ddp"])["evaluation"]
    assert len(report(runs["fsdp"])["guards"]) == 10


def test_accelerate_reads_the_configuration_as_fsdp(monkeypatch):
    command = ["--config_file", str(CONFIG), "--num_processes", "2", str(ROOT / "qlora_finetune.py")]
    arguments = launch_command_parser().parse_args(command)
    arguments, _, _ = _validate_launch_command(arguments)
    given = prepare_multi_gpu_env(arguments)
    assert given["ACCELERATE_USE_FSDP"] == "true" and given["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name, value in given.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert os.environ["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert not plugin.cpu_ram_efficient_loading and type(plugin.cpu_offload).__name__ == "OffloadPolicy"


@pytest.mark.parametrize("gpus", [2, 4])
def test_a_plan_for_several_gpus(gpus):
    config, job = model_config("llama-3.1-8b")[0], Job(device="cuda", length=256)
    plan = on_several(config, job, gpus)
    # 8B: 6.98e9 weights in linear layers at 4.127 bits; embeddings and head, 2 x 128256 x 4096 x 2 bytes
    layers, outside = 6.979e9 * 4.127 / 8, 2 * 128256 * 4096 * 2
    assert plan["held_by_fsdp"] == pytest.approx(outside + layers / gpus + 2 * layers / 32, rel=0.01)
    assert plan["ddp"] - plan["fsdp"] == pytest.approx(layers * (1 - 1 / gpus - 2 / 32), rel=0.01)
