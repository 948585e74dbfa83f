#!/bin/bash
# Runs retrieval-jax on Cloud TPU VMs, which a queued resource brings: one host or many, one slice or many.
#
#   tpu.sh create [--dry-run] [--env FILE]            asks for the TPU, and waits until it is there
#   tpu.sh setup  [--dry-run] [--env FILE]            installs the commit that is checked out on every host
#   tpu.sh launch [--dry-run] [--env FILE] VERB …     starts `retrieval-jax VERB …` on every host
#   tpu.sh watch  [--dry-run] [--env FILE]            until it ends; after a preemption asks anew and goes on
#   tpu.sh logs   [--dry-run] [--env FILE]            gathers every host's log
#   tpu.sh cancel [--dry-run] [--env FILE]            ends the job, which saves; the TPU stays
#   tpu.sh stop   [--dry-run] [--env FILE]            ends the job and deletes the TPU: costs end here only
#
# --dry-run prints every command and runs none. FILE is tpu.env unless given; example.env explains it.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LAST_STATE=''
CHECK_EVERY=${CHECK_EVERY:-20} # looks of `watch` at the state, between two at the hosts

runtime() {
  case $ACCELERATOR in
    v4-*) echo "${RUNTIME:-tpu-ubuntu2204-base}" ;;
    v5litepod-*) echo "${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
    v5p-*) echo "${RUNTIME:-v2-alpha-tpuv5}" ;;
    v6e-*) echo "${RUNTIME:-v2-alpha-tpuv6e}" ;;
  esac
}

# state PRETENDED: the queued resource's state (in a dry run, that one); ABSENT where there is none, UNKNOWN where
# nobody could be asked. The list is asked, since a failed `describe` would not tell these two apart.
state() {
  local found
  if found=$(ask "$1" gcloud compute tpus queued-resources list "${PLACE[@]}" \
    "--filter=name~/queuedResources/$NAME\$" '--format=value(state.state)'); then
    echo "${found:-ABSENT}"
  else
    echo UNKNOWN
  fi
}

tell_state() {
  [[ $1 == "$LAST_STATE" ]] || tell "$(date +%H:%M:%S) $NAME: $1"
  LAST_STATE=$1
}

# on_every_host TRIES COMMAND. At first sshd may not be up yet, or the keys not known yet.
on_every_host() {
  retry "$1" gcloud alpha compute tpus queued-resources ssh "$NAME" "${PLACE[@]}" --quiet \
    --node=all --worker=all "--command=$2"
}

delete() { retry 3 gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet; }

ask_for_tpu() {
  local flags=(--accelerator-type="$ACCELERATOR" --runtime-version="$(runtime)")
  if ((SLICES > 1)); then
    flags+=(--node-count="$SLICES" --node-prefix="$NAME")
  else
    flags+=(--node-id="$NAME")
  fi
  [[ $CAPACITY == on-demand ]] || flags+=(--"$CAPACITY")
  [[ -z $VALID_UNTIL ]] || flags+=(--valid-until-duration="$VALID_UNTIL")
  run gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "${flags[@]}" "${CREATE_FLAGS[@]}"
}

# Waits for a TPU; fails where this one will never come.
await_tpu() {
  local now
  while :; do
    now=$(state ACTIVE)
    tell_state "$now"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | ABSENT)
        run gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=yaml(state)' >&2 || true
        return 1
        ;;
    esac
    sleep "$POLL"
  done
}

# One that was preempted or refused stays in the list, and has to go before its name can be used again.
create() {
  local now
  now=$(state "${1:-ABSENT}")
  case $now in
    UNKNOWN) fail "$NAME: cannot be looked up; is gcloud logged in, and the zone right?" ;;
    ABSENT) ask_for_tpu ;;
    FAILED | SUSPENDED) delete && ask_for_tpu ;;
    *) say "$NAME: was asked for before ($now)" ;;
  esac && await_tpu
}

install() {
  on_every_host 5 "gcloud storage cp $FOLDER/code/host.sh . && bash host.sh install $BUCKET $NAME"
}

start() { on_every_host 5 "bash host.sh start"; }

watch() {
  local now started=true failures=0 looks
  for ((looks = 1; ; looks++)); do
    exit_if_ended
    now=$(state ACTIVE)
    tell_state "$now"
    case $now in
      ACTIVE)
        # Maintenance may have brought other machines, without the service; where it runs, this does nothing.
        if ((looks % CHECK_EVERY == 0)) && ! on_every_host 1 "bash host.sh start"; then started=false; fi
        if ! $started; then
          if install && start; then
            started=true failures=0
          else
            ((++failures < 5)) || fail "$NAME: the job could not be started anew"
          fi
        fi
        ;;
      SUSPENDED | FAILED | ABSENT)
        # Only a person deletes what runs, and is not to be contradicted.
        if [[ $now == ABSENT ]] && $started; then
          fail "$NAME: deleted before its job ended: create, setup and launch again to go on"
        fi
        say "$NAME: preempted; asking for another"
        started=false
        create || ((++failures < 5)) || fail "$NAME: no other came"
        ;;
    esac
    if $DRY_RUN; then
      printf '# … every %s s until the job has ended. Where the state is SUSPENDED or FAILED:\n' "$POLL"
      create SUSPENDED && install && start
      return
    fi
    sleep "$POLL"
  done
}

stop() {
  local now
  now=$(state ACTIVE)
  if [[ $now == ABSENT ]]; then
    say "$NAME: there is no such TPU, and it costs nothing"
    return
  fi
  if [[ $now == ACTIVE ]]; then cancel || say "$NAME: could not be told to save; its last checkpoint stays"; fi
  delete || fail "$NAME: could not be deleted"
  now=$(state ABSENT)
  [[ $now == ABSENT ]] || fail "$NAME: still there ($now)"
  tell "$NAME: deleted; gs://$BUCKET keeps its checkpoints and logs"
}

cancel() {
  mark_cancelled
  on_every_host 2 "bash host.sh cancel"
}

read_arguments "$@"
PLACE=(--project="$PROJECT" --zone="$ZONE")
[[ $VERB == logs ]] || warn_of_costs "the TPU $NAME"

case $VERB in
  create)
    create || fail "$NAME: did not come"
    tell "$NAME: is there, and costs money until \`$SCRIPT stop\`"
    ;;
  setup)
    refuse_while_a_job_runs
    build_wheel
    upload_code
    install
    ;;
  launch)
    refuse_while_a_job_runs
    upload_job "$(hosts 8)"
    start
    tell "$NAME: started; \`$SCRIPT watch\` follows it, and starts it anew after a preemption"
    ;;
  logs) gather_logs ;;
  *) "$VERB" ;; # watch, cancel, stop
esac
