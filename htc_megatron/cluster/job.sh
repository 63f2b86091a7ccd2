#!/usr/bin/env bash
# A run of HTC-Megatron as a SLURM job, written by tools/launch.py. It may be read, changed and submitted again with sbatch.
#
# Watch it:   squeue --me;  tail -f @{logs}/*.log;  python tools/status.py @{output_dir}
# Stop it:    scancel JOBID                                  (it saves first if that takes less than SLURM's KillWait)
# Pause it:   scancel --batch --signal=USR1 JOBID            (it saves, and is queued again)
# Go on:      sbatch @{script}   (from the last complete checkpoint, on as many nodes as it gets)

@{directives}

# nodes to itself, with all their memory
#SBATCH --exclusive
#SBATCH --mem=0
# this script's own messages; what the ranks say lies beside it, a file for each node
#SBATCH --output=@{logs}/%x-%j.log
# the same job may start again: after a time limit, a fault or a lost node
#SBATCH --requeue
#SBATCH --open-mode=append
# so many seconds before the time limit (SLURM may be a minute early) this script, not the ranks, gets USR1
#SBATCH --signal=B:USR1@@{signal_before}

set -uo pipefail
say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID}, life $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }
end() {
    say "$1"
    exit "$2"
}

output_dir=@{quoted_output_dir}
logs=$output_dir/logs
ranks_per_node=@{ranks_per_node}
cd @{workdir} || end "@{workdir} is not there on $(hostname)" 2
@{setup}

# The job goes on with fewer nodes than it was submitted for, as many as the layout can use; the batch size stays what the YAML says.
nodes=0
for count in @{node_counts}; do
    if [ "$count" -le "$SLURM_JOB_NUM_NODES" ]; then
        nodes=$count
        break
    fi
done
[ "$nodes" -gt 0 ] || end "the layout cannot run on $SLURM_JOB_NUM_NODES nodes; wanted one of: @{node_counts}" 2
[ "$nodes" -eq "$SLURM_JOB_NUM_NODES" ] || say "the layout uses $nodes of $SLURM_JOB_NUM_NODES nodes"

# Where the ranks meet: the first host. A port of this job and life, so that nothing left of another is met.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + (7 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

cpus=$((SLURM_CPUS_ON_NODE / ranks_per_node)) # of each rank: SLURM would bind it to one
step=(srun --nodes="$nodes" --ntasks="$((nodes * ranks_per_node))" --ntasks-per-node="$ranks_per_node"
    --cpus-per-task="$((cpus > 0 ? cpus : 1))" --mpi=none --label
    --open-mode=append --output="$logs/%x-%j-node%n-%N.log")

# A step runs in the background, for bash handles a signal only between commands or in wait.
running='' asked='' terminated=''
trap 'asked=1; say "asked to save and stop"; [ -z "$running" ] || kill -USR1 "$running" 2>/dev/null' USR1 # srun passes it on to the ranks
trap 'terminated=1' TERM # SLURM ends the job, and the ranks got the same signal: a cancelled job must not be queued again
run() { # $1: whether a rank that ends badly ends the others
    "${step[@]}" --kill-on-bad-exit="$1" "${@:2}" &
    running=$!
    local status
    while :; do
        wait "$running"
        status=$?
        kill -0 "$running" 2>/dev/null || break # else it was a signal that ended wait
    done
    running=''
    return "$status"
}

# Queue the job again, unless it has come to nothing too often: $1 is why.
again() {
    [ -z "$terminated" ] || end "$1; SLURM ends this life" 0
    say "$1; the job is queued again"
    scontrol requeue "$SLURM_JOB_ID" || end "scontrol requeue failed: submit @{script} again" 1
    sleep 60 # SLURM ends this script
    exit 0
}
# The same after a life that ended before training did: a node that is broken, a path that went away. $1 is why.
again_after_false_start() {
    local count=$(($(cat "$logs/false_starts" 2>/dev/null || echo 0) + 1))
    [ -n "$terminated$asked" ] || echo "$count" >"$logs/false_starts"
    [ "$count" -le @{max_false_starts} ] || end "$1, for the $count. time in a row: given up; see $logs" 70
    again "$1 (false start $count of at most @{max_false_starts})"
}

say "$nodes nodes of $SLURM_JOB_NODELIST, $ranks_per_node ranks each, meeting at $MASTER_ADDR:$MASTER_PORT"
python=@{python}
@{preflight}
rm -f "$output_dir/exit_status"
run 1 "$python" @{entry} --config @{config}
shown=$?
# srun's status is no measure: it is that of the ranks it killed. The first rank that ends badly writes its own into this file.
if [ ! -s "$output_dir/exit_status" ]; then
    again_after_false_start "training ended without saying why (srun: $shown)"
fi
rm -f "$logs/false_starts"
status=$(cat "$output_dir/exit_status")
case $status in
0) end "the run is finished" 0 ;;
75) again "stopped on request, with a checkpoint" ;;
70) again "a fault: see $logs" ;;
*) end "training failed with status $status, which repeating will not mend: see $logs" "$status" ;;
esac
