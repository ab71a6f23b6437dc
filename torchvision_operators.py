"""Lets timm be imported beside a torchvision that was built for another torch. Import this before timm.

A CPU-only torch beside the package index's torchvision (built for CUDA) fails at `import timm` with "operator
torchvision::nms does not exist": torchvision can't load its compiled operators and then describes them all
the same. timm never calls them, so a declaration without code is enough. Where torchvision imports by itself
nothing is touched.

torchvision also loads torch's compiler, which at once asks for a folder for its cache. Nothing here compiles, so
any folder will do where no temporary folder can be written.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

DECLARATIONS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = torch.library.Library("torchvision", "FRAGMENT")  # the declarations live as long as this object


def declare_where_missing() -> bool:
    """Import torchvision, with its operators declared if needed. Returns whether they were."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return False
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    for declaration in DECLARATIONS:
        _library.define(declaration)
    import torchvision  # noqa: F401, F811

    return True


def name_cache_where_missing() -> None:
    """Name a folder for the compiler's cache where there is none for temporary files; nothing is written there."""
    try:
        tempfile.gettempdir()
    except OSError:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent))


name_cache_where_missing()
DECLARED = declare_where_missing()
