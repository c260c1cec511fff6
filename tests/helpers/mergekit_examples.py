"""Recipes in mergekit's form, one for each kind in its documentation, for models of four layers in the folders base,
a, b and c beside the recipe."""

from __future__ import annotations

import re
from pathlib import Path


def placed(text: str, folder: Path) -> str:
    """The example with its models named by their whole paths."""
    return re.sub(r"model: (base|a|b|c)\b", lambda found: f"model: {folder / found[1]}", text)


EXAMPLES = {
    "linear": """
models:
  - model: a
    parameters: {weight: 1.0}
  - model: b
    parameters: {weight: 0.3}
  - model: c
    parameters:
      weight:
        - filter: mlp
          value: [0.1, 0.9]
        - value: 0.5
merge_method: linear
dtype: float32
""",
    "linear of the base too": """
models:
  - model: base
    parameters: {weight: 0.5}
  - model: a
    parameters: {weight: 1}
merge_method: linear
base_model: base
parameters: {normalize: false}
dtype: float32
""",
    "linear of a base that is not listed": """
models:
  - model: a
  - model: b
merge_method: linear
base_model: base
parameters: {weight: 0.25}
dtype: float32
""",
    "slerp": """
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: a
        layer_range: [0, 4]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float32
""",
    "slerp of whole models": """
models:
  - model: a
  - model: base
merge_method: slerp
base_model: base
parameters: {t: 0.35}
dtype: float32
""",
    "ties": """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "ties with parameters of the base": """
models:
  - model: a
    parameters: {density: 0.5, weight: 0.5}
  - model: base
    parameters: {density: 0.2, weight: 0.1}
  - model: b
    parameters: {density: 0.5, weight: -0.5}
merge_method: ties
base_model: base
parameters: {normalize: false, lambda: 0.8}
dtype: float32
""",
    "dare_ties": """
models:
  - model: base
    # no parameters necessary for base model
  - model: a
    parameters: {density: 0.53, weight: 0.4}
  - model: b
    parameters: {density: 0.6, weight: 0.3}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true, rescale: true}
dtype: float32
""",
    "dare_linear": """
models:
  - model: a
    parameters: {weight: 0.4}
  - model: b
    parameters: {weight: [0.1, 1]}
merge_method: dare_linear
base_model: base
parameters: {density: 0.5, rescale: false, normalize: true}
dtype: float32
""",
    "task_arithmetic": """
models:
  - model: a
    parameters: {weight: 0.4, density: 0.9}
  - model: b
    parameters: {weight: -0.3}
merge_method: task_arithmetic
base_model: base
parameters: {lambda: [0.5, 1.5], rescale: true}
dtype: float32
""",
    "passthrough": """
slices:
  - sources:
      - model: a
        layer_range: [0, 3]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters:
          scale:
            - filter: o_proj
              value: 0.5
            - filter: layers.2.mlp.down_proj
              value: [0.25, 0.75]
            - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "passthrough of a base": """
slices:
  - sources:
      - model: b
        layer_range: [0, 2]
  - sources:
      - model: base
        layer_range: [1, 4]
merge_method: passthrough
base_model: base
parameters: {scale: [0.5, 2]}
dtype: float32
""",
    "model_stock": """
models:
  - model: base
  - model: a
  - model: b
  - model: c
merge_method: model_stock
base_model: base
parameters: {filter_wise: [true, false]}
dtype: float32
""",
    "karcher": """
models:
  - model: a
  - model: b
merge_method: karcher
parameters: {max_iter: 1000, tol: 1e-9}
dtype: float32
""",
    "karcher of the base too": """
models:
  - model: a
  - model: b
merge_method: karcher
base_model: base
dtype: float32
""",
    "multislerp": """
models:
  - model: a
    parameters: {weight: 0.2}
  - model: b
    parameters: {weight: [0.9, 0.1]}
  - model: c
    parameters: {weight: 1}
merge_method: multislerp
base_model: base
parameters: {normalize_weights: true, eps: 1e-9}
dtype: float32
""",
    "nuslerp": """
models:
  - model: a
    parameters: {weight: 0.2}
  - model: b
    parameters:
      weight:
        filter: attn
        value: [0.5, 0.8]
merge_method: nuslerp
parameters: {weight: 0.6, nuslerp_flatten: false, nuslerp_row_wise: true}
dtype: float32
""",
    "nuslerp of task vectors": """
models:
  - model: b
    parameters: {weight: 0.2}
  - model: base
  - model: a
    parameters: {weight: 0.6}
merge_method: nuslerp
base_model: base
dtype: float32
""",
    "della": """
models:
  - model: a
    parameters: {density: 0.7, weight: 0.5}
  - model: b
    parameters: {density: [0.5, 0.7], weight: 0.3, epsilon: 0.1}
merge_method: della
base_model: base
parameters: {epsilon: 0.05, lambda: 1.2, normalize: false, rescale: true, int8_mask: true}
dtype: float32
""",
    "della_linear": """
models:
  - model: a
    parameters: {density: 0.7, weight: 0.5}
merge_method: della_linear
base_model: base
parameters: {rescale: false}
dtype: float32
""",
    "breadcrumbs": """
models:
  - model: a
    parameters: {density: 0.9, weight: 0.5, gamma: [0.02, 0.05]}
  - model: b
    parameters: {density: 0.8, weight: 0.5}
merge_method: breadcrumbs
base_model: base
parameters: {gamma: 0.01, rescale: true}
dtype: float32
""",
    "breadcrumbs_ties": """
models:
  - model: a
    parameters: {density: 0.6, weight: 0.5, gamma: 0.03}
  - model: b
    parameters: {density: 0.8, weight: 0.5}
merge_method: breadcrumbs_ties
base_model: base
parameters:
  normalize:
    - filter: mlp
      value: true
    - value: [false, true, false]
dtype: float32
""",
    "sce": """
models:
  - model: a
  - model: b
  - model: c
merge_method: sce
base_model: base
parameters: {select_topk: [0.4, 1.0], int8_mask: false}
dtype: float32
""",
    "nearswap": """
models:
  - model: base
  - model: b
merge_method: nearswap
base_model: base
parameters: {t: [0.001, 0.01]}
dtype: float32
""",
    "arcee_fusion": """
models:
  - model: base
  - model: b
merge_method: arcee_fusion
base_model: base
dtype: float32
""",
    "ram": """
models:
  - model: a
  - model: b
merge_method: ram
base_model: base
parameters: {epsilon: 1e-3}
dtype: float32
""",
    "ramplus_tl": """
models:
  - model: a
  - model: b
merge_method: ramplus_tl
base_model: base
parameters: {r: 0.5, alpha: [0.1, 0.4]}
dtype: float32
""",
    "every level": """
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
        parameters:
          weight:
            - filter: q_proj
              value: 0.1
      - model: b
        layer_range: [2, 4]
        parameters:
          density: {filter: layers.3, value: 0.9}
      - model: base
        layer_range: [1, 3]
    parameters:
      weight:
        - filter: k_proj
          value: [0.2, 0.4]
        - filter: "*"
          value: 0.5
      density:
        - filter: mlp
          value: 0.6
  - sources:
      - model: base
        layer_range: [3, 4]
      - model: c
        layer_range: [3, 4]
      - model: a
        layer_range: [0, 1]
        parameters: {weight: [0.3, 0.7]}
    parameters: {normalize: false}
merge_method: ties
base_model: base
parameters: {density: [0.3, 0.8], weight: 2, normalize: true}
dtype: float32
""",
    "slices with a base of their own": """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2]}
    base_model: base
    parameters: {t: [0, 1]}
  - sources:
      - {model: b, layer_range: [1, 4]}
      - {model: base, layer_range: [1, 4]}
    base_model: base
merge_method: slerp
base_model: base
parameters: {t: 0.25}
dtype: float32
""",
    "linear slices": """
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: b, layer_range: [1, 3], parameters: {weight: 1.5}}
  - sources:
      - {model: c, layer_range: [2, 4]}
merge_method: linear
parameters: {weight: 1}
dtype: float32
""",
}

MODULES = """
modules:
  default:
    models:
      - model: a
        parameters: {weight: 0.5}
      - model: b
    parameters: {weight: 0.7, density: 0.3}
merge_method: ties
base_model: base
parameters: {density: 0.9, normalize: false}
dtype: float32
"""

MODULES_OF_SLICES = """
modules:
  default:
    slices:
      - sources:
          - {model: a, layer_range: [0, 1]}
        parameters: {scale: 0.5}
      - sources:
          - {model: b, layer_range: [0, 3]}
    parameters: {scale: [1, 2]}
merge_method: passthrough
dtype: float32
"""

TOKENIZERS = {
    "a padded vocabulary": """
models:
  - model: a
    parameters: {weight: 1.0}
  - model: b
    parameters: {weight: 0.3}
merge_method: task_arithmetic
base_model: base
tokenizer: {source: base, pad_to_multiple_of: 96}
dtype: float32
""",
}
"""Those that change the vocabulary."""
