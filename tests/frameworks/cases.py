"""How each framework is started: the command without this package, and the version of what it starts.

Each command trains DoRA adapters, rank 4, on all linear layers of `inputs`' model, in six steps, on the CPU. A
framework's loss at each step is in its ``trainer_state.json``, or printed as ``LOSS number``.
"""

from __future__ import annotations

import json
import sys
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
    ours: tuple[str, ...] = ()
    """For a framework with DoRA layers of its own: what the command ends in to have this package compute them."""
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


def _torchtune(inputs: Path, out: Path) -> list[str]:
    import sentencepiece

    model = json.loads((inputs / "model" / "config.json").read_text())
    texts = [" ".join(one.values()) for one in json.loads((inputs / "data" / "alpaca.json").read_text())]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(inputs / "pieces"), vocab_size=model["vocab_size"],
        hard_vocab_limit=False, minloglevel=1,
    )  # fmt: skip
    config = {
        "model": {
            "_component_": "torchtune.models.llama2.lora_llama2", "vocab_size": model["vocab_size"],
            "num_layers": model["num_hidden_layers"], "num_heads": model["num_attention_heads"],
            "num_kv_heads": model["num_key_value_heads"], "embed_dim": model["hidden_size"],
            "intermediate_dim": model["intermediate_size"], "max_seq_len": 1024, "lora_rank": 4, "lora_alpha": 8,
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
            "use_dora": True,
        },
        "tokenizer": {"_component_": "torchtune.models.llama2.llama2_tokenizer", "path": f"{inputs}/pieces.model"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": f"{inputs}/model",
            "checkpoint_files": ["model.safetensors"], "output_dir": str(out), "model_type": "LLAMA2",
        },
        "dataset": {
            "_component_": "torchtune.datasets.alpaca_dataset", "source": "json",
            "data_files": f"{inputs}/data/alpaca.json",
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(out)},
        "output_dir": str(out), "resume_from_checkpoint": False, "seed": 0, "shuffle": True, "batch_size": 2,
        "epochs": 1, "max_steps_per_epoch": STEPS, "gradient_accumulation_steps": 1, "device": "cpu", "dtype": "fp32",
        "compile": False, "enable_activation_checkpointing": False,
    }  # fmt: skip
    path = inputs / f"torchtune-{out.name}.yaml"
    path.write_text(json.dumps(config))
    return ["tune", "run", "lora_finetune_single_device", "--config", str(path)]


def _diffusers(inputs: Path, out: Path) -> list[str]:
    if not (inputs / "pipeline").exists():
        from tests.frameworks import pipeline

        pipeline.write(inputs)
    script = Path(sys.prefix) / "source" / "examples" / "dreambooth" / "train_dreambooth_lora_sdxl.py"
    return [
        "accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", str(script), "--pretrained_model_name_or_path", f"{inputs}/pipeline",
        "--instance_data_dir", f"{inputs}/images", "--instance_prompt", "a photo of a cat", "--output_dir", str(out),
        "--resolution", "16", "--train_batch_size", "2", "--max_train_steps", str(STEPS), "--learning_rate", "1e-3",
        "--lr_warmup_steps", "0", "--rank", "4", "--use_dora", "--train_text_encoder", "--seed", "0",
        "--report_to", "tensorboard", "--mixed_precision", "no",
    ]  # fmt: skip


def _script(name: str) -> Callable[[Path, Path], list[str]]:
    return lambda inputs, out: ["python", str(SCRIPTS / f"{name}.py"), str(inputs), str(out)]


BASE = ("torch", "transformers", "peft")
CASES = {
    "trl": Case("TRL", ("trl", *BASE), _trl, started="trl sft ..."),
    "llamafactory": Case(
        "LLaMA-Factory", ("llamafactory", *BASE), _llamafactory, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"},
        "llamafactory-cli train x.yaml", ("stubs/audio",),
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
        "torchtune's recipe, its own DoRA and `dora_linear`", ("torchtune", "torchao", "torch"), _torchtune,
        started="tune run lora_finetune_single_device ... model._component_=...", paths=("scripts",),
        ours=("model._component_=torchtune_ours.lora_llama2",),
    ),
    "diffusers": Case(
        "diffusers' DreamBooth script, SDXL", ("diffusers", *BASE), _diffusers,
        started="accelerate launch train_dreambooth_lora_sdxl.py ... --use_dora --train_text_encoder",
        paths=("stubs/vision",), layers=80,
    ),
    "lightning": Case("Lightning", ("lightning", *BASE), _script("lightning_module"), started="train.py"),
}  # fmt: skip
