"""In every Python process with this folder on PYTHONPATH: counts calls on dora_kernels, and seeds new adapters.

At exit each process in which layers were called adds a line to the file that `COUNTS` names. Not every framework sets
torch's seed before it makes the adapter, and without the seed no two runs would start alike.
"""

import atexit
import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys

counts = {"fused": 0, "by modules": 0}


def counting(function, name):
    @functools.wraps(function)
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        counts[name] += result is not None
        return result

    return call


def count_calls(module):
    module.whole_layer = counting(module.whole_layer, "fused")
    forward = module.DoraLinearVariant.__dict__["forward"].__func__
    module.DoraLinearVariant.forward = classmethod(counting(forward, "by modules"))


def count_function(module):
    module.dora_linear = counting(module.dora_linear, "fused")


def seed_adapters(module):
    make = module.get_peft_model

    @functools.wraps(make)
    def get_peft_model(*args, **kwargs):
        import torch

        torch.manual_seed(0)
        return make(*args, **kwargs)

    module.get_peft_model = get_peft_model


CHANGES = {
    "dora_kernels.functional": count_function,
    "dora_kernels.peft.linear": count_calls,
    "peft.mapping_func": seed_adapters,
}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_change(module):
                load(module)
                CHANGES[name](module)

            spec.loader.exec_module = load_and_change
        return spec


def write():
    if any(counts.values()):
        with open(os.environ["COUNTS"], "a") as file:
            file.write(json.dumps(counts) + "\n")


if "COUNTS" in os.environ:
    sys.meta_path.insert(0, Finder())
    atexit.register(write)
