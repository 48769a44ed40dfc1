#!/usr/bin/env bash
# Evaluates under Slurm, one process per GPU. From the project's root:
#   GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=10 SRUN_ARGS="..." sh launch/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
# GRES: what a node is asked for (default gpu:GPUS_PER_NODE); GRES= asks for nothing.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,4s/^# //p' "$0"; exit; fi
if [ $# -lt 4 ]; then sed -n '2,4s/^# //p' "$0" >&2; exit 2; fi

partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
GRES=${GRES-gpu:$GPUS_PER_NODE}
read -ra srun_args <<<"${SRUN_ARGS:-}"
exec srun --partition="$partition" --job-name="$job" --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-10}" \
          ${GRES:+--gres="$GRES"} --kill-on-bad-exit=0 --wait=60 "${srun_args[@]}" python -u launch/test.py "$config" "$checkpoint" "$@"
