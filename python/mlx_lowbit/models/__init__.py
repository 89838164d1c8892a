"""The models of this package by the ``model_type`` of their configuration, and mlx-lm's beside them.

Each file here defines one model in mlx-lm's protocol: ``ModelArgs``, ``Model``, and in ``Model``
``sanitize``, ``layers``, ``quant_predicate``. A model that reads more than text has a function
``load_processor(directory, config)`` as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

# model_type of config.json -> file beside this one.
_FILES = {
    "glm4_moe": "glm4_moe",
    "mistral": "mistral",
    "moxin_vlm": "moxin_vlm",
    "prismatic": "moxin_vlm",
    "qwen3": "qwen3",
    "qwen3_asr": "qwen3_asr",
}
# Of the same families, but other models.
_REFUSED = {
    "qwen3_forced_aligner": "the aligner of Qwen3-ASR has another head; only the recognizer is here"
}


def model_type(config: dict[str, Any]) -> str:
    """The type of the model that ``config`` describes; Qwen3-ASR may nest it.

    Raises:
        ValueError: none is there, or one that is known and not supported.
    """
    nested = config.get("thinker_config")
    nested = nested.get("model_type") if isinstance(nested, dict) else None
    name = config.get("model_type") or nested
    if isinstance(config.get("thinker_config"), dict) and name is None:
        name = "qwen3_asr"
    if not isinstance(name, str) or not name:
        raise ValueError(f"config.json: expected a model_type, got {name!r}; {_known()}")
    for each in (name, nested):
        if isinstance(each, str) and each in _REFUSED:
            raise ValueError(f"config.json: model_type {each!r}: {_REFUSED[each]}")
    return name


def module_for(config: dict[str, Any]) -> Any:
    """The module with ``Model`` and ``ModelArgs`` for ``config``: ours, else mlx-lm's.

    Raises:
        ValueError: a model_type that neither has; the message lists those that are known.
    """
    name = model_type(config)
    own = _own(name)
    return _of_mlx_lm(name, config) if own is None else own


def get_classes(config: dict[str, Any]) -> tuple[type, type]:
    """(Model, ModelArgs) of :func:`module_for`, as mlx-lm's ``get_model_classes`` returns them."""
    module = module_for(config)
    return module.Model, module.ModelArgs


def _own(name: str) -> Any:
    """The module of this package, or None; some files define only a part of a model."""
    file = _FILES.get(name)
    if file is None or importlib.util.find_spec(f"{__name__}.{file}") is None:
        return None
    module = importlib.import_module(f"{__name__}.{file}")
    return module if hasattr(module, "Model") and hasattr(module, "ModelArgs") else None


def _of_mlx_lm(name: str, config: dict[str, Any]) -> Any:
    # The name becomes part of a module's name.
    if re.fullmatch(r"[A-Za-z0-9_.-]+", name) and ".." not in name:
        from mlx_lm import utils

        try:
            cls, _ = utils._get_classes({**config, "model_type": name})
        except ValueError:
            pass
        else:
            return importlib.import_module(cls.__module__)
    raise ValueError(f"config.json: unknown model_type {name!r}; {_known()}")


def _known() -> str:
    own = [n for n, f in _FILES.items() if importlib.util.find_spec(f"{__name__}.{f}") is not None]
    return f"known are {', '.join(own)} and the types of mlx-lm"
