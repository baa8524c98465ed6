#!/usr/bin/env bash
# Makes the pictures of README.md and docs/ again: bash docs/make.sh
# Needs matplotlib and chromium. Runs that are not there are made first: over two hours on two cores, else a minute.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -d smollm2 ] || python -m tools.smollm2 smollm2
[ -d runs/words/model ] || python train.py configs/smollm2_words.yaml run_dir=runs/words resume=true
python -m tools.inspector runs/words --step 10 --html inspector.html
chromium --headless --no-sandbox --hide-scrollbars --window-size=1200,1190 --screenshot=docs/inspector.png \
    "file://$PWD/inspector.html#group=4&view=msa&response=7&token=10"

at() { printf "$1/%s " "${@:2}"; }
ablations() { printf "configs/ablations/%s.yaml " "$@"; }
main=(spro grpo prime prime_released beta_0.2 spro_local spro_history)
second=(spro long lr_3e-4_beta_0.2 lr_3e-5_beta_0.2)
python -m tools.sweep $(ablations "${main[@]}") --seeds 5 --warm-starts 2 --jobs 2 --out runs/main
python -m tools.report $(at runs/main "${main[@]}") --baseline grpo --figures figures/main > /dev/null
python -m tools.sweep $(ablations "${second[@]}") train.diagnose_every=4 --seeds 3 --jobs 2 --out runs/second
python -m tools.report $(at runs/second "${second[@]}") --baseline spro --figures figures/second > /dev/null
cp figures/main/{accuracy-steps,entropy,length}.svg figures/second/gradient-{cosine,norm-ratio}.svg docs/results

python tests/chaos.py --kills 8 --figure docs/resume.svg train.steps=40 eval.every=20 train.save_every=4
