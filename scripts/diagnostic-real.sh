#!/usr/bin/env bash
# The fixed-context diagnostic and the one-step test on SmolLM2-135M, on the two pairs that `make real` leaves.
# Run from the repository after `make real`:  bash scripts/diagnostic-real.sh [FOLDER]
# A part whose files are there is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
taopd=.venv/bin/taopd
out=${1:-runs/diagnostic-real}
pair=runs/smollm2
for student in student instruct; do
  here=$out/$student
  mkdir -p "$here"
  # Full distillation, so that every token had its chance; the settings are those of the study, in bfloat16 as
  # the bank: twice as fast on a CPU with instructions for it, slow on others.
  test -e "$here/run/checkpoint-24" || $taopd train --config recipes/smollm2.yaml --overwrite --skip-check \
    --output_dir "$here/run" --model_name_or_path "$pair/$student" --selector full --anchor_coef 0 --bf16 true \
    --max_steps 24 --save_steps 12
  test -e "$here/bank/manifest.json" || $taopd diagnose freeze --student "$pair/$student" --teacher "$pair/teacher" \
    --prompts "$pair/prompts.parquet" --split train --num-completions 150 --max-tokens 48 --k 16 \
    --dtype bfloat16 --output "$here/bank" --overwrite
  test -e "$here/gain/manifest.json" || $taopd diagnose gain "$here/bank" --overwrite --output "$here/gain" \
    --after "$here/run/checkpoint-12" "$here/run/checkpoint-24"
  $taopd diagnose report "$here/gain" --k 16 --output "$here/report"
  test -e "$here/one-step/manifest.json" || $taopd diagnose one-step --student "$pair/$student" \
    --teacher "$pair/teacher" --prompts "$pair/prompts.parquet" --budget 0.1 --k 16 --max-tokens 48 \
    --selectors full random teachability divergence --completions 8 --batches 2 --learning-rate 5e-5 --output "$here/one-step" --overwrite
done
