"""The main job on a real model and real text: `python -m bench.demo --help`."""
