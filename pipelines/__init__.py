"""WHAT FOR: the applications, ready recipes, the command line.

The public names are those of `__init__.pyi`; importing one loads the file that defines it, and no other.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
