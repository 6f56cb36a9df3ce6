"""How each framework is started: the command without this package, and the version of what it starts.

Each command trains DoRA adapters, rank 4, on all linear layers of `inputs`' model, in six steps, on the CPU. A
framework's loss at each step is in its ``trainer_state.json``, or printed as ``LOSS number``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts"
STEPS = 6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One framework, started in one way."""

    framework: str
    packages: tuple[str, ...]
    """Whose versions are recorded."""
    command: Callable[[Path, Path], list[str]]
    """From the folder of inputs and the output folder."""
    environment: dict[str, str] = field(default_factory=dict)
    started: str = ""
    """What a reader types after the launcher's name."""
    paths: tuple[str, ...] = ()
    """More folders on PYTHONPATH."""
    layers: int = 14
    own_layers: bool = False
    """The framework has DoRA layers of its own; the command with "ours" replaces them, on the same weights."""
    fused: int | None = None
    """Calls that run as one function; None: all."""


def _trl(inputs: Path, out: Path) -> list[str]:
    return [
        "trl", "sft", "--model_name_or_path", f"{inputs}/model", "--dataset_name", f"{inputs}/data/chats",
        "--output_dir", str(out), "--use_peft", "--use_dora", "--lora_r", "4", "--lora_dropout", "0",
        "--lora_target_modules", *TARGETS,
        "--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", str(STEPS), "--report_to", "none",
        "--use_cpu", "--per_device_train_batch_size", "2", "--gradient_checkpointing", "false", "--bf16", "false",
        "--dtype", "float32", "--learning_rate", "1e-3",
    ]  # fmt: skip


def _llamafactory(inputs: Path, out: Path) -> list[str]:
    (inputs / "data" / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))
    config = {
        "model_name_or_path": f"{inputs}/model", "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": 4, "lora_target": "all", "use_dora": True, "dataset_dir": f"{inputs}/data", "dataset": "tiny",
        "template": "default", "cutoff_len": 128, "output_dir": str(out), "logging_steps": 1, "max_steps": STEPS,
        "save_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
        "overwrite_output_dir": True, "preprocessing_num_workers": 1, "plot_loss": False,
        "disable_gradient_checkpointing": True,
    }  # fmt: skip
    path = inputs / "llamafactory.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return ["llamafactory-cli", "train", str(path)]


def _swift(inputs: Path, out: Path) -> list[str]:
    return [
        "swift", "sft", "--model", f"{inputs}/model", "--model_type", "llama", "--template", "chatml",
        "--tuner_type", "lora", "--use_dora", "true", "--lora_rank", "4", "--target_modules", "all-linear",
        "--dataset", f"{inputs}/data/chats/train.jsonl", "--torch_dtype", "float32", "--max_steps", str(STEPS),
        "--logging_steps", "1", "--save_steps", str(STEPS), "--per_device_train_batch_size", "2",
        "--learning_rate", "1e-3", "--output_dir", str(out), "--report_to", "none", "--lora_dropout", "0",
        "--max_length", "128", "--check_model", "false", "--split_dataset_ratio", "0",
        "--gradient_checkpointing", "false",
    ]  # fmt: skip


def _axolotl(kernels: bool) -> Callable[[Path, Path], list[str]]:
    def command(inputs: Path, out: Path) -> list[str]:
        config = {
            "base_model": f"{inputs}/model", "adapter": "lora", "peft_use_dora": True, "lora_r": 4, "lora_alpha": 8,
            "lora_dropout": 0.0, "lora_target_linear": True, "sequence_len": 1024, "micro_batch_size": 2,
            "gradient_accumulation_steps": 1, "max_steps": STEPS, "learning_rate": 1e-3, "optimizer": "adamw_torch",
            "lr_scheduler": "constant", "output_dir": str(out), "logging_steps": 1, "save_steps": STEPS,
            "datasets": [{"path": f"{inputs}/data/alpaca.json", "type": "alpaca", "ds_type": "json"}],
            "dataset_prepared_path": f"{inputs}/prepared-{out.name}", "val_set_size": 0, "bf16": False, "fp16": False,
            "tf32": False, "flash_attention": False, "seed": 1, "device": "cpu", "dataset_num_proc": 1,
            "dataset_processes": 1, "lora_mlp_kernel": False, "lora_qkv_kernel": kernels, "lora_o_kernel": kernels,
            "lora_embedding_kernel": False, "special_tokens": {"pad_token": "<pad>"},
        }  # fmt: skip
        path = inputs / f"axolotl-{out.name}.yml"
        path.write_text(json.dumps(config))
        return ["axolotl", "train", str(path), "--launcher", "python"]

    return command


def _script(name: str) -> Callable[[Path, Path], list[str]]:
    return lambda inputs, out: ["python", str(SCRIPTS / f"{name}.py"), str(inputs), str(out)]


BASE = ("torch", "transformers", "peft")
CASES = {
    "trl": Case("TRL", ("trl", *BASE), _trl, started="trl sft ..."),
    "llamafactory": Case(
        "LLaMA-Factory", ("llamafactory", *BASE), _llamafactory, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"},
        "llamafactory-cli train x.yaml", ("stubs",),
    ),
    "swift": Case("ms-swift", ("ms-swift", *BASE), _swift, {"USE_HF": "1"}, started="swift sft ... --use_dora true"),
    "axolotl": Case("axolotl, its kernels off", ("axolotl", *BASE), _axolotl(False), started="axolotl train x.yml"),
    "axolotl-kernels": Case(
        "axolotl, its qkv and o kernels on", ("axolotl", *BASE), _axolotl(True), {}, "axolotl train x.yml", fused=36
    ),
    "unsloth": Case("Unsloth", ("unsloth", *BASE), _script("unsloth_sft"), started="train.py"),
    "trainer": Case("transformers' Trainer", BASE, _script("trainer"), started="train.py"),
    "accelerate": Case("Accelerate", ("accelerate", *BASE), _script("accelerate_loop"), started="train.py"),
    "torchtune": Case(
        "torchtune's own DoRA and `DoRALinear`", ("torchtune", "torch"), _script("torchtune_model"),
        started="scripts/torchtune_model.py", own_layers=True,
    ),
    "lightning": Case("Lightning", ("lightning", *BASE), _script("lightning_module"), started="train.py"),
}  # fmt: skip
