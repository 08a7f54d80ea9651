#!/usr/bin/env bash
# The studies at laptop size: trains, measures, draws; goes on where it was stopped. What the
# committed CSV files have already is not measured again, nor are tuned runs in them trained again:
# delete them for runs and figures of your own.
#
#     experiments/reproduce.sh laptop|length|protocol|lohelp|kernels|images|large [RUNS] [SLOTS]
#
# laptop: the studies at one setting; length: length_or_difficulty; protocol: beyond, beyond_text and
# muse_results tuned, with the two studies that measure the models of muse_results; lohelp: lohelp
# tuned, in 22 runs of 45 minutes or more; kernels: muse_kernels tuned, in 132 runs of three minutes or more;
# images: coatnet_layouts, coatnet_transfer and vision_comparison tuned; large: beyond_large, in 40 runs
# of ten minutes or more.
# RUNS: a folder for the runs (default: runs, in the repository); SLOTS: runs at a time (default 2).
set -euo pipefail
what=${1:-}
case $what in laptop | length | protocol | lohelp | kernels | images | large) ;; *)
  sed -n '2,14s/^# \{0,1\}//p' "$0"
  exit 2
  ;;
esac
slots=${3:-2}
repository=$(cd "$(dirname "$0")/.." && pwd)
runs=$(realpath -m "${2:-$repository/runs}")
cd "$repository"

prepare() { localglobal prepare --config "$1"; }
# study, file, folder, CSV [, what else the sweep takes]: trains, then collects
sweep() {
  local config=experiments/$1/$2 folder=$runs/$3 csv=experiments/$1/$4
  shift 4
  localglobal sweep --config "$config" --workdir "$folder" --slots "$slots" "$@"
  localglobal sweep --config "$config" --workdir "$folder" --collect "$csv" "$@"
}
# study, folder [, file]
tune() {
  python -m experiments.tune --config "experiments/$1/${3:-sweep.py}" --workdir "$runs/$2" --slots "$slots"
}
pretrained=$runs/coatnet_transfer/pretrain # the second stage of coatnet_transfer starts from the first
pretrain() { sweep coatnet_transfer sweep.py:stage=pretrain coatnet_transfer/pretrain pretrain.csv; }
measure() { python -m "experiments.$1" "${@:2}"; }

if [ "$what" = length ]; then
  prepare configs/muse_lohelp.py
  measure length_or_difficulty.prepare "$runs/length/data"
  config=experiments/length_or_difficulty/sweep.py:files=$runs/length/data
  localglobal sweep --config "$config" --workdir "$runs/length/one" --slots "$slots"
  measure length_or_difficulty.measure "$runs/length/one"
  measure length_or_difficulty.make
  exit
fi
if [ "$what" = lohelp ]; then
  prepare configs/muse_lohelp.py
  tune lohelp lohelp
  measure lohelp.make
  exit
fi
if [ "$what" = kernels ]; then
  prepare configs/muse_lohelp.py
  tune muse_kernels kernels
  # gates at 2,400 steps are of muse_results: none without its final runs
  measure muse_kernels.measure "$runs/kernels/final" "$runs/results/final" final
  measure muse_kernels.make
  exit
fi
if [ "$what" = images ]; then
  prepare configs/coatnet_fashion_mnist.py
  tune coatnet_layouts layouts
  measure coatnet_layouts.make
  prepare configs/coatnet_digits.py
  pretrain
  tune coatnet_transfer transfer "sweep.py:pretrained=$pretrained"
  measure coatnet_transfer.make
  tune vision_comparison vision
  measure vision_comparison.make
  exit
fi
if [ "$what" = large ]; then
  prepare configs/coatnet_fashion_mnist.py
  tune beyond_large large
  measure beyond_large.measure "$runs/large/final" final
  # the costs are measured once
  [ -e experiments/beyond_large/speed.csv ] || measure beyond_large.measure_costs
  measure beyond_large.make
  exit
fi
if [ "$what" = protocol ]; then
  prepare configs/coatnet_fashion_mnist.py
  tune beyond beyond
  measure beyond.measure "$runs/beyond/final" final
  measure beyond.measure_kernels "$runs/beyond/final"
  measure beyond.make
  prepare configs/muse_lohelp.py
  tune beyond_text beyond_text
  measure beyond_text.measure "$runs/beyond_text/final" final
  measure beyond_text.make
  tune muse_results results
  measure bleu_by_length.measure runs "$runs/results/final"
  measure attention_dispersion.measure "$runs/results/final"
  for study in muse_results bleu_by_length attention_dispersion; do
    measure "$study.make"
  done
  exit
fi

prepare configs/coatnet_fashion_mnist.py
prepare configs/coatnet_digits.py
prepare configs/muse_lohelp.py

measure operator_properties.measure
sweep coatnet_layouts sweep.py layouts results.csv
pretrain
sweep coatnet_transfer "sweep.py:pretrained=$pretrained" coatnet_transfer/finetune results.csv
sweep vision_comparison sweep.py vision results.csv
# its speeds decide how long the timed runs are: measured once
[ -e experiments/vision_comparison/speed.csv ] || measure vision_comparison.measure
sweep vision_comparison sweep.py vision_time time_results.csv --sweep time
sweep beyond sweep.py beyond results.csv
measure beyond.measure "$runs/beyond"

sweep muse_results sweep.py results results.csv
sweep muse_kernels sweep.py kernels results.csv
measure muse_kernels.measure "$runs/kernels" "$runs/results"
localglobal sweep --config experiments/beyond_text/sweep.py --workdir "$runs/beyond_text" --slots "$slots"
measure beyond_text.measure "$runs/beyond_text"

# the runs of lohelp at one setting (six of 45 minutes) are not made again
for study in lohelp length_or_difficulty operator_properties attention_dispersion bleu_by_length muse_results muse_kernels \
  coatnet_layouts coatnet_transfer vision_comparison beyond beyond_large beyond_text; do
  measure "$study.make"
done
