#!/bin/bash
# Runs retrieval-jax on GKE through XPK: the cluster restarts what is preempted, by itself.
#
#   gke.sh create [--dry-run] [--env FILE]            makes a cluster with the TPU slices, and gives it the bucket
#   gke.sh setup  [--dry-run] [--env FILE]            makes an image of the commit that is checked out
#   gke.sh launch [--dry-run] [--env FILE] VERB …     starts `retrieval-jax VERB …` on every host
#   gke.sh watch  [--dry-run] [--env FILE]            until it ends
#   gke.sh logs   [--dry-run] [--env FILE]            gathers every host's log, and what its containers said
#   gke.sh cancel [--dry-run] [--env FILE]            ends the job, which saves; the cluster stays
#   gke.sh stop   [--dry-run] [--env FILE]            deletes the cluster: costs end here only
#
# --dry-run prints every command and runs none. FILE is tpu.env unless given; example.env explains it.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

create() {
  local capacity=--$CAPACITY
  if [[ $CAPACITY == reserved ]]; then
    [[ -n $RESERVATION ]] || refuse "$ENV_FILE: RESERVATION is missing: give the reservation's name"
    capacity=--reservation=$RESERVATION
  fi
  run xpk cluster create "${PLACE[@]}" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" "$capacity" \
    --enable-gcsfuse-csi-driver "${CREATE_FLAGS[@]}"
  # No metadata is kept: a host must see at once what another one wrote.
  run xpk storage attach retrieval-jax "${PLACE[@]}" --type=gcsfuse --bucket="$BUCKET" --size=1 \
    --mount-point=/bucket --readonly=false --auto-mount=true --no-prefetch-metadata \
    --mount-options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
}

setup() {
  refuse_while_a_job_runs
  build_wheel
  upload_code
  run cp "$HERE/Dockerfile" "$BUILD/code/"
  run gcloud builds submit "$BUILD/code" --project="$PROJECT" --tag="$IMAGE:$COMMIT" --timeout=1h
}

launch() {
  local commit
  refuse_while_a_job_runs
  commit=$(ask COMMIT gcloud storage cat "$FOLDER/code/commit") ||
    refuse "$NAME: has no image: \`$SCRIPT setup\` first"
  upload_job "$(hosts 4)"
  # A finished workload keeps its name for hours.
  if has ended; then delete_workload || true; fi
  # The command is in job.sh: nothing of it is quoted once more. Status 2, bad input, is not restarted.
  run xpk workload create "${PLACE[@]}" --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
    --docker-image="$IMAGE:$commit" --command="exec bash /bucket/jobs/$NAME/code/host.sh run $NAME" \
    --max-restarts=1000 --termination-grace-period-seconds=300
  tell "$NAME: started; \`$SCRIPT watch\` follows it"
}

watch() {
  local failed
  while :; do
    exit_if_ended
    failed=$(ask "" xpk workload list "${PLACE[@]}" --filter-by-job="$NAME" --filter-by-status=FAILED) ||
      say "$NAME: cannot be looked up; trying again"
    if grep -q "^$NAME " <<<"$failed"; then
      say "$failed"
      fail "$NAME: failed before it began: \`$SCRIPT logs\` brings what its containers said"
    fi
    if $DRY_RUN; then
      printf '# … every %s s until the job has ended\n' "$POLL"
      return
    fi
    sleep "$POLL"
  done
}

logs() {
  gather_logs
  # Of a job that did not get as far as host.sh, only the cluster knows.
  local filter="resource.type=k8s_container AND resource.labels.cluster_name=$CLUSTER"
  filter+=" AND labels.k8s-pod/jobset_sigs_k8s_io/jobset-name=$NAME"
  run gcloud logging read "$filter" --project="$PROJECT" --freshness=1d --limit=200 \
    '--format=value(timestamp,resource.labels.pod_name,textPayload)'
}

delete_workload() { run xpk workload delete "${PLACE[@]}" --workload="$NAME" --force; }

cancel() {
  mark_cancelled
  delete_workload
}

stop() {
  cancel || say "$NAME: could not be told to save; its last checkpoint stays"
  retry 3 xpk cluster delete "${PLACE[@]}" --force || fail "$CLUSTER: could not be deleted"
  tell "$CLUSTER: deleted; gs://$BUCKET keeps its checkpoints and logs"
}

read_arguments "$@"
[[ -n $CLUSTER ]] || refuse "$ENV_FILE: CLUSTER is missing: see tpu_scripts/example.env"
[[ -n $IMAGE ]] || refuse "$ENV_FILE: IMAGE is missing: see tpu_scripts/example.env"
PLACE=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
[[ $VERB == logs ]] || warn_of_costs "the cluster $CLUSTER"
"$VERB"
