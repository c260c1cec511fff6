"""Recipes as they stand in public model cards and threads: structure and numbers, rewritten for models of four layers.

Models: base, a, b, c, d of one vocabulary; x and y with tokens of their own; lora1, lora2, lora3, adapters of base. The
source of each recipe stands above it. `float32` replaces other dtypes where the tests compare tensors.
"""

from __future__ import annotations

RECIPES = {
    # mlabonne/NeuralPipe-7B-slerp; the same curves in SJ-Donald/SOLAR-10.7B-slerp and hundreds of others
    "slerp with t curves": """
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: a, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
""",
    # janhq/supermario-slerp-v3: one-element lists, and a filter that no tensor of a Llama has
    "slerp with a filter that matches nothing": """
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: base, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: lm_head, value: [0.55]}
    - {filter: embed_tokens, value: [0.7]}
    - {filter: self_attn, value: [0.65, 0.35]}
    - {filter: mlp, value: [0.35, 0.65]}
    - {filter: layernorm, value: [0.4, 0.6]}
    - {filter: modelnorm, value: [0.6]}
    - value: 0.5
dtype: bfloat16
""",
    # Casual-Autopsy/L3-Super-Nova-RP-8B, its part Egg-and-Bread-RP: curves of 13 points, whole models
    "slerp with long curves": """
models:
  - model: base
  - model: b
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5]
    - filter: mlp
      value: [0.5, 0.7, 0.3, 0.5, 0.3, 0.7, 0.5, 0.7, 0.3, 0.5, 0.3, 0.7, 0.5]
    - value: 0.5
dtype: bfloat16
""",
    # a Vistral and Cydonia merge (exported by its script): union of tokenizers, embed_slerp of early versions
    "slerp with embed_slerp and a union": """
base_model: x
merge_method: slerp
dtype: bfloat16
models:
  - model: x
  - model: y
parameters:
  t:
    - {filter: self_attn, value: [0.2, 0.8]}
    - {filter: mlp, value: [0.8, 0.2]}
    - value: 0.5
  embed_slerp: true
tokenizer_source: union
""",
    # mlabonne/Daredevil-7B: the base without parameters, int8_mask, random_seed of LazyMergekit
    "dare_ties with random_seed": """
models:
  - model: base
    # no parameters necessary for base model
  - model: a
    parameters: {density: 0.53, weight: 0.4}
  - model: b
    parameters: {density: 0.53, weight: 0.3}
  - model: c
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: base
parameters:
  int8_mask: true
dtype: bfloat16
random_seed: 0
""",
    # mergekit-community/mergekit-dare_ties-vnjbera: the base with a weight and a density
    "dare_ties with parameters of the base": """
models:
  - model: base
    parameters: {weight: 0.3, density: 0.35}
  - model: a
    parameters: {weight: 0.25, density: 0.25}
  - model: b
    parameters: {weight: 0.2, density: 0.15}
merge_method: dare_ties
base_model: base
parameters: {normalize: true}
dtype: float16
""",
    # spacematt/Gemma-Moon-2-9B-it: keys in another order, chat_template auto, tokenizer of a model
    "dare_ties with a model's tokenizer": """
base_model: base
models:
  - model: base
  - model: a
    parameters: {density: 0.5, weight: 0.5}
  - model: b
    parameters: {density: 0.5, weight: 0.5}
merge_method: dare_ties
parameters: {int8_mask: true}
chat_template: auto
dtype: bfloat16
tokenizer_source: base
""",
    # ReadyArt/Broken-Tutu-24B: no dtype, density for all, union in the new form
    "dare_ties without dtype": """
merge_method: dare_ties
base_model: base
models:
  - model: base
    parameters: {weight: 0.2}
  - model: x
    parameters: {weight: 0.2}
  - model: y
    parameters: {weight: 0.2}
#  - model: d
  - model: a
    parameters: {weight: 0.2}
parameters: {density: 0.3}
tokenizer: {source: union}
chat_template: auto
""",
    # a German and Portuguese merge of Llama 3.1 (dare_ties, jakob_finetuning): quoted names, lambda, rescale off
    "dare_ties without rescaling": """
models:
  - model: "a"
    parameters: {weight: 1.0, density: 1.0}
  - model: "b"
    parameters: {weight: 0.846, density: 1.0}
base_model: "base"
merge_method: dare_ties
dtype: bfloat16
parameters: {lambda: 1.0, rescale: false}
""",
    # openaccess-ai-collective/DPOpenHermes-11B: a revision beside the model
    "passthrough with revision": """
slices:
  - sources:
    - model: a
      revision: dpo-v0
      layer_range: [0, 3]
  - sources:
    - model: a
      layer_range: [1, 4]
merge_method: passthrough
dtype: bfloat16
""",
    # mlabonne/NeuralPipe-9B-merged
    "passthrough of two models": """
slices:
  - sources:
    - {model: a, layer_range: [0, 4]}
  - sources:
    - {model: b, layer_range: [3, 4]}
merge_method: passthrough
dtype: bfloat16
""",
    # abacusai/bigstral-12b-32k: overlapping ranges of one model
    "passthrough of one model": """
dtype: float16
merge_method: passthrough
slices:
- sources:
  - {layer_range: [0, 2], model: base}
- sources:
  - {layer_range: [1, 3], model: base}
- sources:
  - {layer_range: [2, 4], model: base}
""",
    # shotmisser64's merge of Orca 2 and Mythalion: alternating ranges
    "passthrough of alternating ranges": """
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [1, 3]}]
  - sources: [{model: b, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float16
""",
    # block expansion as in LLaMA-Pro merges (ToastyPigeon, arcee): copied layers whose outputs are scaled to nothing
    "passthrough of scaled copies": """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: a
        layer_range: [1, 2]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - value: 1.0
  - sources: [{model: a, layer_range: [2, 4]}]
merge_method: passthrough
dtype: bfloat16
""",
    # arcee-ai/mergekit issue 198 (jukofyork): query and key matrices of repeated layers, an anchor for the filters
    "passthrough with anchors": """
const_tag: &MODEL a
const_factor: &FACTOR 0.7071067812 # 1/sqrt(2)
attenuated: &ATTENUATED
  parameters:
    scale:
      - {filter: q_proj, value: *FACTOR}
      - {filter: k_proj, value: *FACTOR}
      - value: 1.0
slices:
  - sources:
    - {model: *MODEL, layer_range: [0, 2]}
  - sources:
    - model: *MODEL
      layer_range: [1, 3]
      <<: *ATTENUATED
  - sources:
    - model: *MODEL
      layer_range: [2, 4]
      <<: *ATTENUATED
merge_method: passthrough
dtype: bfloat16
""",
    # abacusai/TheProfessor-155b: linear slices, a second model with weight 0 for the sake of its tokenizer
    "linear slices with a silent model": """
merge_method: linear
parameters: {weight: 1.0}
slices:
  - sources:
      - {model: a, layer_range: [0, 1]}
      - {model: b, layer_range: [0, 1], parameters: {weight: 0}}
  - sources: [{model: a, layer_range: [1, 3]}]
  - sources: [{model: b, layer_range: [1, 3]}]
  - sources: [{model: c, layer_range: [2, 4]}]
  - sources:
      - {model: a, layer_range: [3, 4]}
      - {model: b, layer_range: [3, 4], parameters: {weight: 0}}
dtype: float16
tokenizer_source: base
base_model: a
""",
    # KoboldAI's Tiefighter, Noromaid and Vicuna (linear)
    "linear of three": """
models:
  - model: a
    parameters: {weight: 0.3}
  - model: b
    parameters: {weight: 0.5}
  - model: c
    parameters: {weight: 0.2}
merge_method: linear
dtype: float16
""",
    # five checkpoints of one run (geodesic-research, gpt_neox), the last of them the base; normalize, out_dtype
    "linear of checkpoints": """
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 2}}
  - {model: c, parameters: {weight: 3}}
  - {model: base, parameters: {weight: 5}}
merge_method: linear
base_model: base
parameters: {normalize: true}
dtype: float32
""",
    # flammenai, Barcenas and Einstein on Llama 3: union without a base
    "linear with a union": """
models:
  - {model: x, parameters: {weight: 1.0}}
  - {model: y, parameters: {weight: 1.0}}
  - {model: a, parameters: {weight: 1.0}}
merge_method: linear
tokenizer_source: union
dtype: float16
""",
    # Undi95/KoboldAI task arithmetic on Llama 2 13B
    "task_arithmetic with small weights": """
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.01}}
  - {model: c, parameters: {weight: 0.02}}
dtype: float16
""",
    # Edens-Gate/Holland-Magnum-Merge-R2: as slices, normalize off
    "task_arithmetic as slices": """
base_model: base
dtype: bfloat16
merge_method: task_arithmetic
parameters: {normalize: false}
slices:
- sources:
  - {layer_range: [0, 4], model: base}
  - {layer_range: [0, 4], model: a, parameters: {weight: 0.50}}
  - {layer_range: [0, 4], model: b, parameters: {weight: 0.50}}
""",
    # Nexesenex on L3.1 70b: an adapter baked in by a merge whose only source is the base with the adapter
    "task_arithmetic of the base with an adapter": """
base_model: base+lora1
dtype: bfloat16
merge_method: task_arithmetic
parameters: {normalize: false}
slices:
- sources:
  - layer_range: [0, 4]
    model: base+lora1
    parameters: {weight: 1.0}
""",
    # ThaiLLM IQ and ToolUse: tokenizer of one of the models
    "task_arithmetic with a model's tokenizer": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: x, parameters: {weight: 1.0}}
  - {model: a, parameters: {weight: 0.4}}
parameters: {normalize: false}
dtype: bfloat16
tokenizer: {source: x}
chat_template: auto
""",
    # "vector subtraction" merges (grimjim, abliteration by a negative weight), lambda and normalize as numbers
    "task_arithmetic with a negative weight": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: -0.35}}
parameters: {lambda: 0.5676097213578511, normalize: 0.0}
dtype: bfloat16
""",
    # spacematt/gemma-2-9B-it-blend-rebase: one model, no density
    "ties of one model": """
models:
  - {model: a, parameters: {weight: 1}}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer_source: a
""",
    # rombodawg/Rombos-LLM: the recipe's parameters repeated in each model
    "ties with shared parameters in the models": """
models:
  - model: a
    parameters: {weight: 1, density: 1}
  - model: b
    parameters: {weight: 1, density: 1, lambda: 0.9, normalize: true, int8_mask: true}
merge_method: ties
base_model: base
parameters: {weight: 1, density: 1, normalize: true, int8_mask: true}
dtype: bfloat16
""",
    # brucethemoose's Yi-34B-200K merges: gradients of weights, a label, union
    "ties with gradients and a name": """
models:
  - model: base
  - model: a
    parameters: {weight: [0.22, 0.113, 0.113, 0.113, 0.113, 0.113], density: 0.61}
  - model: b
    parameters: {weight: [0.02, 0.081, 0.081, 0.081, 0.081, 0.081], density: 0.59}
merge_method: ties
tokenizer_source: union
base_model: base
parameters: {int8_mask: true}
dtype: bfloat16
name: 4kmerge-v2
""",
    # Bondds/07viz-07 and the example of mergekit's documentation, with rescale of the merges of 2025
    "ties with rescale": """
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - model: b
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
merge_method: ties
base_model: base
parameters: {normalize: 1.0, rescale: 1, int8_mask: true}
dtype: float16
""",
    # Alelcv27/Llama3.1-8B-Base-DELLA-Math-Code: as mergekit writes a recipe back, flags as 1.0
    "della of modules": """
base_model: base
dtype: float16
merge_method: della
modules:
  default:
    slices:
    - sources:
      - {layer_range: [0, 4], model: a, parameters: {density: 0.8, weight: 0.7}}
      - {layer_range: [0, 4], model: b, parameters: {density: 0.7, weight: 0.5}}
      - {layer_range: [0, 4], model: base}
parameters: {epsilon: 0.1, lambda: 0.9, normalize: 1.0}
""",
    # HyperXR/SapientiaOcculta-12B: a weight of the base, one model
    "della with a weight of the base": """
models:
- {model: base, parameters: {weight: 1.0}}
- model: a
  parameters:
    weight: 1.0
    density: 0.6 # retain top 60% of significant changes
    epsilon: 0.1
merge_method: della
base_model: base
parameters: {normalize: true, lambda: 1.0}
dtype: bfloat16
""",
    # Vortex5, a merge of Karcher and DELLA: gradients of eight weights, `tokenizer: {}`
    "della_linear of modules": """
base_model: base
dtype: bfloat16
merge_method: della_linear
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: a
        parameters: {density: 0.5, epsilon: 0.4, weight: [0.9, 0.2, 0.2, 0.2, 0.95, 0.8, 0.4, 0.2]}
      - layer_range: [0, 4]
        model: b
        parameters: {density: 0.5, epsilon: 0.4, weight: [0.1, 0.9, 1.0, 0.95, 0.4, 0.4, 0.5, 0.3]}
      - {layer_range: [0, 4], model: base}
parameters: {lambda: 1.0, normalize: 1.0}
tokenizer: {}
""",
    # a Nemo merge (UnslopNemo, Mag-Mell, Gutenberg): filters in weights, a template by name
    "della_linear with a template": """
models:
  - model: a
    parameters:
      weight: [{filter: self_attn, value: 0.3}, {filter: mlp, value: 0.15}, {value: 0.2}]
      density: 0.6
  - model: b
    parameters:
      weight: [{filter: mlp, value: 0.35}, {value: 0.25}]
      density: 0.7
base_model: base
merge_method: della_linear
dtype: bfloat16
chat_template: "chatml"
tokenizer_source: union
parameters: {normalize: true, int8_mask: true, epsilon: 0.05, lambda: 1}
""",
    # a merge of Wingless_Imp, Lumimaid and Lunaris: della without dtype, the template llama3 by name
    "della with a template": """
base_model: base
merge_method: della
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {density: 0.5, normalize: true, epsilon: 0.4, lambda: 1}
tokenizer_source: union
chat_template: "llama3"
""",
    # Vortex5 again: a label first, a tolerance that YAML reads as a string
    "karcher with a name": """
name: First
models:
  - model: x
  - model: y
merge_method: karcher
dtype: bfloat16
parameters: {tol: 1e-10, max_iter: 1200}
tokenizer: {source: union}
""",
    # mergekit-community/MN-Hekate (model_stock): weights, which the method does not have
    "model_stock with weights": """
dtype: float32
merge_method: model_stock
base_model: base
models:
    - model: a
      parameters:
        weight: [{filter: mlp, value: [2, 1]}, {value: 1}]
    - model: b
      parameters:
        weight: [{filter: mlp, value: [1, 2]}, {value: 1}]
parameters: {filter_wise: false}
""",
    # ZeroXClem-Llama-3.1-8B-Athena-Apollo-exp
    "model_stock with a name": """
name: Athena-Apollo-exp
base_model: base
dtype: bfloat16
merge_method: model_stock
models:
  - model: a
  - model: b
  - model: c
  - model: d
tokenizer_source: base
""",
    # Youlln/1PARAMMYL-8B-ModelStock: slices with the base among them
    "model_stock as slices": """
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: model_stock
base_model: base
dtype: bfloat16
""",
    # a merge of HuatuoGPT-o1 with six adapters on a base with a seventh
    "model_stock of adapters": """
models:
  - model: base+lora1
  - model: base+lora2
merge_method: model_stock
base_model: base+lora3
dtype: bfloat16
""",
    # Casual-Autopsy/L3-Super-Nova-RP-8B: gamma in the models
    "breadcrumbs_ties with gradients": """
models:
  - model: base
  - {model: a, parameters: {gamma: 0.01, density: 0.9, weight: [0.0825, 0.0825, 0.33, 0.0825]}}
  - {model: b, parameters: {gamma: 0.01, density: 0.9, weight: [0.33, 0.0825, 0.0825, 0.0825]}}
merge_method: breadcrumbs_ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: bfloat16
""",
    # a merge of the Ice series: lambda 0.5, the template alpaca by name
    "breadcrumbs with a template": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.7}}
merge_method: breadcrumbs
base_model: base
parameters: {lambda: 0.5, density: 0.9, gamma: 0.01}
dtype: bfloat16
chat_template: "alpaca"
""",
    # FuseAI/FuseO1-DeepSeekR1-QwQ-SkyT1: sce
    "sce": """
models:
  - model: a
  - model: b
  - model: c
merge_method: sce
base_model: base
parameters: {select_topk: 0.9, normalize: true, int8_mask: true}
tokenizer_source: base
dtype: bfloat16
""",
    # alchemonaut/QuartetAnemoi-70B-t0.0001 in today's method
    "nearswap": """
models:
  - model: base
  - model: a
merge_method: nearswap
base_model: base
parameters: {t: 0.0001}
dtype: bfloat16
""",
    # arcee-ai (Arcee Fusion in the cards of Virtuoso and SuperNova successors)
    "arcee_fusion": """
models:
  - model: base
  - model: a
merge_method: arcee_fusion
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
""",
    # knowledge_core of a mergekit-multi recipe for Nemo 12B
    "nuslerp with a name": """
name: knowledge_core
merge_method: nuslerp
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.6}}
""",
    # yamatazen's multislerp merges
    "multislerp": """
merge_method: multislerp
models:
  - {model: a, parameters: {weight: [0.5, 0.2]}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.2}}
base_model: base
parameters: {normalize_weights: true, eps: 1e-8}
dtype: bfloat16
""",
    # models as mappings, as mergekit writes paths with odd characters
    "models as mappings": """
models:
  - model: {model: {path: a}}
    parameters: {weight: 0.6}
  - model: {model: {path: base, revision: null}, lora: {path: lora2}}
    parameters: {weight: 0.4}
merge_method: task_arithmetic
base_model: {model: {path: base}}
dtype: bfloat16
""",
    # arcee-ai/mergekit issues on multimodal models: a module of which only the base is listed
    "a module with only the base": """
merge_method: ties
base_model: base
modules:
  default:
    models: [{model: base}]
parameters: {weight: 1, density: 0.5}
dtype: bfloat16
""",
    # the RAM paper's setting
    "ramplus_tl": """
models:
  - model: a
  - model: b
merge_method: ramplus_tl
base_model: base
parameters: {r: 0.1, alpha: 0.2}
dtype: bfloat16
""",
}

UPPER_LAYERS = """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
  - sources:
      - {model: base, layer_range: [2, 4]}
      - {model: a, layer_range: [2, 4], parameters: {weight: 0.5, density: 0.6}}
      - {model: b, layer_range: [2, 4], parameters: {weight: 0.5, density: 0.6}}
dtype: bfloat16
"""
"""Slices of which the last has more sources than the first."""

TOKENS = {
    # the example of mergekit's documentation on tokenizers: chat tokens of one model, a token of another, zeros
    "tokens of the documentation": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: x, parameters: {weight: 0.5}}
  - {model: y, parameters: {weight: 0.7}}
dtype: float32
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: x}
    <|im_end|>: {source: y, force: true}
    <|start_header_id|>:
      source: {kind: model_token, model: base, token: w5}
      force: true
    <|pad|>: {source: {kind: zero}}
    w7:
      source: {kind: model_token, model: x, token_id: 9}
      force: true
  pad_to_multiple_of: 8
""",
}
"""Recipes with `tokenizer.tokens`."""

REPEATED = {
    # Tech-Meld/HX-Mistral-1.5B_v0.2: one model in four places
    "linear of one model's layers": (
        """
dtype: float32
merge_method: linear
slices:
- sources:
  - {layer_range: [0, 1], model: a, parameters: {weight: 0.33}}
  - {layer_range: [1, 2], model: a, parameters: {weight: 0.33}}
  - {layer_range: [2, 3], model: a, parameters: {weight: 0.25}}
  - {layer_range: [3, 4], model: a, parameters: {weight: 0.09}}
""",
        ("a", "a2", "a3", "a4"),
    ),
    # arcee-ai/mergekit issue 360: layers condensed by merging a later one into each
    "slerp of one model's layers": (
        """
merge_method: slerp
base_model: a
parameters: {t: 0.5}
dtype: float32
slices:
- sources: [{model: a, layer_range: [0, 1]}, {model: a, layer_range: [3, 4]}]
- sources: [{model: a, layer_range: [1, 2]}, {model: a, layer_range: [3, 4]}]
""",
        ("a", "a2", "a", "a2"),
    ),
    # SakuraLLM with itself (arcee-ai/mergekit issue 96); here task vectors counted twice
    "task_arithmetic of one model twice": (
        """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: a, parameters: {weight: 0.25}}
  - {model: b, parameters: {weight: 0.5}}
merge_method: task_arithmetic
base_model: base
dtype: float32
""",
        ("a", "a2", "b"),
    ),
}
"""Recipes that list a model several times, which mergekit 0.1.5 refuses, with the names of copies that stand for it."""

OTHER_PROGRAMS = {
    # mlabonne/phixtral and others (mergekit-moe)
    "mergekit-moe": """
base_model: base
gate_mode: cheap_embed
experts:
  - source_model: a
    positive_prompts: [math, solve]
  - source_model: b
    positive_prompts: [code]
dtype: bfloat16
""",
    "mergekit-moe ": "merge_method: moe\nbase_model: base\nexperts: [{source_model: a, positive_prompts: [x]}]\n",
    # arcee-ai/mergekit docs/evolve.md
    "mergekit-evolve": """
genome:
  models: [a, b]
  merge_method: dare_ties
  base_model: base
  layer_granularity: 4
tasks:
  - {name: gsm8k, weight: 1.0, metric: "exact_match,strict-match"}
""",
    # arcee-ai/mergekit bakllama
    "bakllama": "model: a\nlayer_slices: [{model: a, start: 0, end: 2, scale: 0.5}]\n",
}
