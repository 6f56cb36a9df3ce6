"""The norm, compose, scale_reduce and the whole layer, beside PEFT's layers and the frozen one: `python -m bench.layer`."""
