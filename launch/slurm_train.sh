#!/usr/bin/env bash
# Trains under Slurm, one process per GPU. From the project's root:
#   GPUS=16 GPUS_PER_NODE=8 CPUS_PER_TASK=10 SRUN_ARGS="..." sh launch/slurm_train.sh PARTITION JOB_NAME CONFIG [options of train.py]
#   BATCH=1 SBATCH_ARGS="--time=24:00:00" GPUS=16 ... sh launch/slurm_train.sh ...     as a batch job, which goes on by itself after its time limit
# GRES: what a node is asked for (default gpu:GPUS_PER_NODE); GRES= asks for nothing.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -n '2,5s/^# //p' "$0"; exit; fi
if [ $# -lt 3 ]; then sed -n '2,5s/^# //p' "$0" >&2; exit 2; fi

partition=$1 job=$2 config=$3
shift 3
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
GRES=${GRES-gpu:$GPUS_PER_NODE}
read -ra srun_args <<<"${SRUN_ARGS:-}"
read -ra sbatch_args <<<"${SBATCH_ARGS:-}"
wanted=(--partition="$partition" --job-name="$job" --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-10}"
        ${GRES:+--gres="$GRES"})
# a rank that ends takes the others along, but not at once: srun's exit code is the highest, and shall be that of the ranks, not of the signal that ended them
run=(srun "${wanted[@]}" --kill-on-bad-exit=0 --wait=60 "${srun_args[@]}" python -u launch/train.py "$config")

if [ "${BATCH:-}" != 1 ]; then exec "${run[@]}" "$@"; fi

work_dir=work_dirs/$(basename "$config" .py)
for ((i = 1; i <= $#; i++)); do
    case ${!i} in
        --work-dir) next=$((i + 1)); work_dir=${!next:-} ;;
        --work-dir=*) work_dir=${!i#*=} ;;
        --resume*) echo "error: a batch job goes on from the newest checkpoint of its work directory by itself; leave ${!i} out, or BATCH=1" >&2; exit 2 ;;
    esac
done
if [ "${IN_BATCH_JOB:-}" != 1 ]; then  # Slurm warns the ranks 120 s before the time limit
    IN_BATCH_JOB=1 exec sbatch "${wanted[@]}" --requeue --signal=USR1@120 --open-mode=append --output="%x-%j.log" "${sbatch_args[@]}" "$0" "$partition" "$job" "$config" "$@"
fi

code=0
"${run[@]}" --resume auto "$@" || code=$?
if [ $code = 75 ] && [ ! -e "$work_dir/STOP" ]; then  # saved, and stopped because it was asked to
    echo "$(date '+%F %T') saved; job $SLURM_JOB_ID goes back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
