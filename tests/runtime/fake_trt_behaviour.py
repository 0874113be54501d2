"""What the classes of ``fake_trt`` do. Every one may use ``self._trt`` (its module) and ``self._state``.

Messages are those of the real library, so that ``svdprune.runtime.engines.faults`` is tested on what it will meet.
"""

from __future__ import annotations

import fake_trt_building
import fake_trt_common
import fake_trt_running

FUNCTIONS = {
    "nptype": fake_trt_common.nptype,
    "volume": fake_trt_common.volume,
    "init_libnvinfer_plugins": lambda logger, namespace: True,
    "get_nv_onnx_parser_version": lambda: 100300,
}
CLASSES: dict[str, type] = {
    name: kind
    for module in (fake_trt_common, fake_trt_building, fake_trt_running)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and kind.__module__ == module.__name__ and not name.startswith("_")
}
