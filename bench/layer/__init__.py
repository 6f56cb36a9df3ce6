"""The three kernels and the whole layer, timed beside PEFT's and the frozen one: `python -m bench.layer`."""
