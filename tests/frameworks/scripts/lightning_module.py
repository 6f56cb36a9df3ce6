"""A LightningModule around the PEFT model."""

import lightning
import torch
from common import OUT, Tokens, model


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = model()

    def training_step(self, batch, index):
        loss = self.net(**batch).loss
        print("\nLOSS", loss.item(), flush=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=1e-3)


module = Module()
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    default_root_dir=OUT,
)  # fmt: skip
trainer.fit(module, torch.utils.data.DataLoader(Tokens(), batch_size=2))
module.net.save_pretrained(OUT)
