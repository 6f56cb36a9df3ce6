"""transformers' Trainer."""

from common import OUT, STEPS, Tokens, model
from transformers import Trainer, TrainingArguments

arguments = TrainingArguments(
    str(OUT), max_steps=STEPS, logging_steps=1, save_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-3,
    report_to="none", use_cpu=True, seed=0,
)  # fmt: skip
Trainer(model=model(), args=arguments, train_dataset=Tokens()).train()
