#!/usr/bin/env bash
# DVC 3.67.1: a stage with one `persist: true` output never enters the run cache, so going back to old values runs it again.
#
# Guess: `persist` only says that the output stays in place while its stage runs; when a parameter goes back to a value
#   that was run before, `dvc repro` restores the result from the run cache as it does for any stage.
# Seen: without `persist` the third of three runs (values 1, 2, 1) is restored, with it the command runs a third time,
#   nothing says why, and `dvc push --run-cache` sends nothing.
# Met by: who marks a store that grows, or a folder of checkpoints, as persistent, and then sweeps a parameter, compares
#   two branches or clones elsewhere: the training of hours that has been done is done again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q dvc==3.67.1
export PATH="$folder/venv/bin:$PATH" DVC_NO_ANALYTICS=1

runs() { # PERSIST: how often the command runs over the values 1, 2, 1
    mkdir "$folder/$1" && cd "$folder/$1"
    dvc init -q --no-scm
    cat > dvc.yaml <<YAML
stages:
  train:
    cmd: cp params.yaml weights && echo ran >> times
    params: [rate]
    deps: [data]
    outs:
      - weights:
          persist: $1
YAML
    echo rows > data
    for rate in 1 2 1; do
        echo "rate: $rate" > params.yaml
        dvc repro -q
    done
    grep -c ran times
}

without=$(runs false)
with=$(runs true)
echo "DVC $(dvc --version): values 1, 2, 1 ran the command $without times without persist, $with times with it"
python3 -c "assert ($without, $with) == (2, 3)"
