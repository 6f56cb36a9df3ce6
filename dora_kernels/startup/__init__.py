"""What `python -m dora_kernels.run` puts on PYTHONPATH: this folder, and with it `sitecustomize`."""
