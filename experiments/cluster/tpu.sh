#!/usr/bin/env bash
# A job on all workers of a Cloud TPU slice, started again after each preemption until it is done (docs/tpu.md).
#
#   NAME=rlhf ZONE=us-west4-a TYPE=v5litepod-16 MOUNT=10.0.0.2:/share RUN=runs/demo \
#       bash experiments/cluster/tpu.sh ppo_summarize --config=ppo_summarize:gpt2 --config.mesh.fsdp=4
#
# MOUNT is an NFS share, such as Filestore, that all workers see as the workdir's place; RUN is the workdir in it.
# A slice of one worker needs none: with BUCKET=gs://bucket/demo in its place, the workdir is on the worker's own disk,
# is copied to the bucket every EVERY seconds, and comes back from there to the next slice.
# SOURCE is what pip installs; SPOT=0 takes a slice that is not preempted; KEEP=1 leaves it there at the end.
set -uo pipefail

: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${MOUNT=}" "${BUCKET=}" "${RUN:?}" "${EVERY:=300}"
: "${VERSION:=v2-alpha-tpuv5-lite}" "${SOURCE:=rlhf_jax[tpu]}" "${SPOT:=1}" "${KEEP:=0}" "${PAUSE:=60}"
[ $# -gt 0 ] || { echo "tpu.sh: expected a command of rlhf-jax and its flags, got none" >&2; exit 2; }
[ -n "$MOUNT$BUCKET" ] || { echo "tpu.sh: expected MOUNT, or BUCKET for a slice of one worker, got none" >&2; exit 2; }

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --quiet; }
on_all() { tpu ssh "$NAME" --worker=all --command="$1"; }
state() { tpu describe "$NAME" --format='value(state)' 2> /dev/null; }

create() {
    case "$(state)" in
        READY) return ;;
        "") ;;
        *) tpu delete "$NAME" ;; # preempted: it never comes back by itself
    esac
    spot=()
    [ "$SPOT" = 0 ] || spot=(--spot)
    tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" "${spot[@]}" || return 1
    on_all "set -e
        sudo apt-get update -q && sudo apt-get install -yq nfs-common python3-venv
        ${MOUNT:+sudo mkdir -p /mnt/run && sudo mount -t nfs $MOUNT /mnt/run && sudo chmod 777 /mnt/run}
        python3 -m venv ~/venv && ~/venv/bin/pip install --quiet '$SOURCE'"
}

command="~/venv/bin/rlhf-jax $(printf '%q ' "$@") --workdir=$RUN"
if [ -n "$MOUNT" ]; then
    command="cd /mnt/run && $command"
else
    sync="gcloud storage rsync --recursive --quiet"
    # First all but the summaries, which mark a stage as finished. What has been removed is removed at the end.
    copy="$sync --exclude='.*summary\.json' $RUN $BUCKET && $sync --delete-unmatched-destination-objects $RUN $BUCKET"
    RUN=${RUN%/}
    # Only where there is surely no copy, the run begins anew: its next copy replaces all. A workdir here is newer.
    command="if found=\$(gcloud storage ls $BUCKET 2>&1); then
            [ -e $RUN ] || { mkdir -p $RUN.new && $sync $BUCKET $RUN.new && mv $RUN.new $RUN; } || exit 1
        else
            case \$found in *'matched no objects'*) ;; *) echo \"\$found\" >&2 && exit 1 ;; esac
        fi
        mkdir -p $RUN || exit 1
        (trap exit TERM; while sleep $EVERY > /dev/null 2>&1 & wait \$!; do $copy; done) & copies=\$!
        $command
        code=\$?
        kill \$copies
        wait \$copies # for a copy that runs: two at once would remove and copy the same files
        $copy
        exit \$code"
fi
while true; do
    if create; then
        on_all "$command" # the workers find each other
        code=$?
        # 0: done. 2: bad input, 4: a number is not finite, 5: out of memory; to start again would not help.
        case $code in
            0 | 2 | 4 | 5) break ;;
        esac
        echo "tpu.sh: exit code $code, the slice is $(state); again in $PAUSE s" >&2
    fi
    sleep "$PAUSE" # also for the port of the last start
done
[ "$KEEP" = 1 ] || tpu delete "$NAME"
exit "$code"
