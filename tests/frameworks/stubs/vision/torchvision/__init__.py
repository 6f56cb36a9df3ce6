"""The installed torchvision without its operators, which load with no CPU build of torch: its transforms are Python."""

import importlib.metadata

_installed = importlib.metadata.distribution("torchvision")
__version__ = _installed.version
__path__.append(str(_installed.locate_file("torchvision")))
