"""A loop on Accelerate."""

import torch
from accelerate import Accelerator
from common import OUT, Tokens, model

accelerator = Accelerator(cpu=True)
net = model()
optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
net, optimizer, loader = accelerator.prepare(net, optimizer, torch.utils.data.DataLoader(Tokens(), batch_size=2))
for batch in loader:
    loss = net(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    print("LOSS", loss.item())
accelerator.unwrap_model(net).save_pretrained(OUT)
