#!/usr/bin/env bash
# The fixed-context diagnostic on the tiny lab's three variants: bank, training, gain, analyses, pictures.
# Run from the repository after `make demo` has set up `.venv`:  bash scripts/diagnostic-lab.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
taopd=.venv/bin/taopd
out=${1:-runs/diagnostic}
for variant in dialect bilingual reversal; do
  lab=$(.venv/bin/python -c "from taopd.experiments.lab import build_lab; print(build_lab('$variant').prompts.parent)")
  here=$out/$variant
  mkdir -p "$here"
  # Full distillation, so that every token had its chance to be learned; the exact loss, as the bank is exact.
  $taopd train --config recipes/tiny.yaml --overwrite --output_dir "$here/run" \
    --lab "$variant" --selector full --loss reverse_kl --anchor_coef 0 \
    --max_steps 100 --save_steps 25
  $taopd diagnose freeze --student "$lab/student" --teacher "$lab/teacher" --prompts "$lab/prompts.parquet" \
    --split train --num-completions 1000 --max-tokens 9 --k 4 8 16 --output "$here/bank" --overwrite
  $taopd diagnose gain "$here/bank" --overwrite --output "$here/gain" \
    --after "$here"/run/checkpoint-25 "$here"/run/checkpoint-50 "$here"/run/checkpoint-75 "$here"/run/checkpoint-100
  $taopd diagnose report "$here/gain" --k 4 --output "$here/report"
done
