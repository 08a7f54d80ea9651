#!/usr/bin/env bash
# MUSE and the Transformer on LibreOffice Help, three seeds each; resumes where it was stopped.
#     experiments/lohelp/run.sh runs/lohelp
set -euo pipefail
runs=${1:?give a folder for the runs}
configs=$(dirname "$0")/../../configs
for seed in 0 1 2; do
  for model in muse transformer; do
    localglobal train --config "$configs/${model}_lohelp.py" --config.seed=$seed --workdir "$runs/${model}_$seed"
    localglobal evaluate --json --workdir "$runs/${model}_$seed" --config.data.eval_splits=test > "$runs/${model}_$seed.test.json"
  done
done
