"""llmquant: quantize a Hugging Face LLM, prove what it cost, and serve it.

The public API is the names in ``__init__.pyi``. They are loaded on first use, so that ``import
llmquant`` and ``llmquant --help`` do not pay for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
