#!/bin/sh
# The figures of one GPU (README.md, "On one GPU"), in under ten minutes: `make bench-gpu`, or SMALL=1 for a dry run on a CPU.
# A part that fails or takes too long is said, and the next one follows. Parts may be named: tests/benchmarks/gpu.sh sampler round
# All of them end within SECONDS_IN_ALL: what does not fit is left out, and said.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
WORK=${WORK:-/tmp/potstill-gpu}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ -n "${SMALL:-}" ]; then
    SHAPE=--small LOSS="--rows 2 --tokens 32 --repeats 1 --times-alone" GENERATE="--rows 4 --prompt 8 --tokens 4 --repeats 1"
    SCORE="--rows 4 --tokens 32 --repeats 1" DRAW="--rows 4 --repeats 2" TRAIN="--rows 4 --length 32 --micro 2 --repeats 1"
    ENGINES="--samples 1 --tokens 4" ROUND="--rounds 1 --prompts 4 --tokens 8 --batch 4" ROUNDS=0 DTYPE=float32 SLOWER=5
else
    SHAPE='' LOSS="--rows 8 --tokens 512 --chunk 1024 --repeats 5" GENERATE="--rows 256 --prompt 128 --tokens 128 --repeats 1"
    SCORE="--rows 64 --tokens 512 --repeats 2" DRAW='' TRAIN="--rows 64 --length 512 --micro 8 --repeats 2"
    ENGINES="--samples 64 --tokens 128" ROUND="--rounds 2 --prompts 256 --tokens 128 --batch 32" ROUNDS=4 DTYPE=bfloat16 SLOWER=1
fi

START=$(date +%s) SECONDS_IN_ALL=${SECONDS_IN_ALL:-$((590 * SLOWER))}

part() {  # part NAME SECONDS COMMAND...
    name=$1 limit=$(($2 * SLOWER)) begun=$(date +%s)
    shift 2
    case " $PARTS " in *" $name "*) ;; *) return ;; esac
    left=$((SECONDS_IN_ALL - (begun - START)))
    printf '\n== %s\n' "$name"
    [ "$left" -gt 0 ] || { echo "$name: left out, no time is left"; return; }
    [ "$left" -gt "$limit" ] || limit=$left
    timeout "$limit" "$@" 2>"$WORK/$name.err" || { echo "$name: ended with status $? (124: after $limit s)"; tail -n 3 "$WORK/$name.err"; }
    echo "$name: $(($(date +%s) - begun)) s"
}

PARTS=${*:-loss_step sampler generation scoring training round vllm versus quickstart}
B=tests/benchmarks
mkdir -p "$WORK"
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", torch.__version__)'
"$PYTHON" $B/shapes.py "$WORK" $SHAPE || exit 1
part loss_step 120 "$PYTHON" $B/loss_step.py --student "$WORK/student" --teacher "$WORK/teacher" $LOSS
part sampler 60 "$PYTHON" $B/sampler.py $DRAW
part generation 90 "$PYTHON" $B/generation.py --models "$WORK/student" --dtype $DTYPE $GENERATE
part scoring 60 "$PYTHON" $B/scoring.py --models "$WORK/teacher" --dtype $DTYPE $SCORE
part training 120 "$PYTHON" $B/training.py --student "$WORK/student" $TRAIN
part round 180 "$PYTHON" $B/round.py --student "$WORK/student" --teacher "$WORK/teacher" $ROUND
[ ! -x .venv-vllm/bin/python ] || part vllm 180 "$PYTHON" $B/engines.py --model "$WORK/student" $ENGINES
[ ! -x .venv-trl/bin/python ] || part versus 180 "$PYTHON" $B/round.py --student "$WORK/student" --teacher "$WORK/teacher" $ROUND --versus trl
part quickstart 240 "$PYTHON" -m flows.cli run configs/quickstart.toml --rounds $ROUNDS --set root="$WORK/runs"
