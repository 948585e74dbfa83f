#!/bin/bash
# The part that runs on each host of a TPU, and in each container on GKE. tpu.sh and gke.sh bring it there.
#
#   host.sh install BUCKET NAME    mounts the bucket at /bucket, installs the wheel and a service for the job NAME
#   host.sh start                  starts the service; it survives this shell, and starts again with the machine
#   host.sh cancel                 ends it and waits: the running step ends and is saved
#   host.sh run NAME               the service: runs the job until it is done, copying its log to the bucket

set -euo pipefail

MOUNT=${MOUNT:-/bucket}
PAUSE=${PAUSE:-10}         # seconds before the job starts again; twice as long after each further failure …
LONGEST=${LONGEST:-160}    # … up to this: hosts have five minutes to meet
ATTEMPTS=${ATTEMPTS:-10}   # failures in a row, each within …
SOON=${SOON:-600}          # … this many seconds, after which the job is given up
COPY_EVERY=${COPY_EVERY:-60}
GCSFUSE=3.7.2
PYTHON=$HOME/retrieval-jax
ADVICE="--gin.LossSpikeGuard.on_spike=\"'skip'\" leaves such updates out and goes on"

install() {
  local bucket=$1 name=$2 options
  # Where some hosts could not be reached, all are asked again.
  ! systemctl is-active --quiet retrieval-jax || return 0
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL -o /tmp/gcsfuse.deb \
      "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/gcsfuse_${GCSFUSE}_amd64.deb"
    # A machine that just started may still be busy with its own updates.
    sudo apt-get -o DPkg::Lock::Timeout=300 install -y /tmp/gcsfuse.deb
  fi
  # No metadata is kept: a host must see at once what another one wrote.
  options=rw,_netdev,allow_other,implicit_dirs,metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0
  sudo mkdir -p "$MOUNT"
  grep -q " $MOUNT gcsfuse " /etc/fstab ||
    echo "$bucket $MOUNT gcsfuse $options,uid=$(id -u),gid=$(id -g) 0 0" | sudo tee -a /etc/fstab
  mountpoint -q "$MOUNT" || sudo mount "$MOUNT"

  # The machine's own Python may be too old; uv brings one.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --python 3.12 "$PYTHON"
  python3 -m uv pip install --quiet --python "$PYTHON/bin/python" "$(echo "$MOUNT/jobs/$name"/code/*.whl)[tpu,gcs]"

  sudo tee /etc/systemd/system/retrieval-jax.service <<END
[Unit]
Description=retrieval-jax: the job $name
RequiresMountsFor=$MOUNT
After=network-online.target
[Service]
User=$USER
Environment=PATH=$PYTHON/bin:/usr/local/bin:/usr/bin:/bin
ExecStart=/bin/bash $HOME/host.sh run $name
# SIGTERM goes to host.sh, which passes it on and waits.
KillMode=mixed
TimeoutStopSec=600
[Install]
WantedBy=multi-user.target
END
  sudo systemctl daemon-reload
}

start() { sudo systemctl enable --now retrieval-jax; }

cancel() { sudo systemctl disable --now retrieval-jax; }

run() {
  job=$MOUNT/jobs/$1
  log=$HOME/$1.log
  child='' told=''
  trap 'told=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT
  mkdir -p "$job/logs"
  # A container on GKE begins without the log of the one before it.
  [[ -e $log ]] || cp "$job/logs/$HOSTNAME.log" "$log" 2>/dev/null || touch "$log"
  # From here the machine's own journal, or GKE's, has it too.
  tail -n 0 -F "$log" 2>/dev/null &
  local helpers=$!
  while sleep "$COPY_EVERY"; do copy_log; done >/dev/null 2>&1 &
  helpers+=" $!"
  # shellcheck disable=SC2064 # now
  trap "kill $helpers 2>/dev/null; copy_log" EXIT
  cd "$MOUNT"

  local status failures=0 pause=$PAUSE began
  while [[ -z $told && ! -e $job/ended ]]; do
    note "starts"
    began=$SECONDS
    bash "$job/job.sh" >>"$log" 2>&1 &
    child=$!
    heed
    await "$child"
    child=''
    note "ended with status $status after $((SECONDS - began)) s"
    # The same command would meet the same batch again.
    if ((status == 3)); then note "not started again: the numbers of the training went wrong, as told above. $ADVICE"; fi
    if ((status == 0 || status == 3)) || { ((status == 2)) && ! met_nobody; }; then
      end "$status"
      break
    fi
    [[ -z $told ]] || break
    if ((SECONDS - began >= SOON)); then failures=0 pause=$PAUSE; fi
    if ((++failures >= ATTEMPTS)); then
      note "given up after $failures failures in a row"
      end "$status"
      break
    fi
    note "starts again in $pause s"
    sleep "$pause" & # beside, so that SIGTERM is heard at once
    child=$!
    heed
    wait "$child" || true
    child=''
    pause=$((pause * 2 < LONGEST ? pause * 2 : LONGEST))
  done
  [[ -e $job/ended ]] || return 143 # told to end: the job goes on where it starts again
  return "$(<"$job/ended")"
}

# Passes on a signal that came after the child had begun and before its number was known.
heed() {
  [[ -z $told ]] || kill -TERM "$child" 2>/dev/null || true
}

# Sets `status`. A signal ends `wait` before the process has ended.
await() {
  while :; do
    status=0
    wait "$1" || status=$?
    kill -0 "$1" 2>/dev/null || break
  done
}

# The exit status of bad input, but only because another host was not there in time, or met an error that it tells
# itself: if that one is final, its host says so to all.
met_nobody() { tail -n 2 "$log" | grep -qE '^retrieval-jax: (multihost:|process 0 met an error)'; }

end() {
  echo "$1" >"$job/.ended.$HOSTNAME"
  mv "$job/.ended.$HOSTNAME" "$job/ended"
}

note() { echo "host.sh: $(date -u +%FT%TZ) $HOSTNAME: job $*" >>"$log"; }

copy_log() { cp "$log" "$job/logs/$HOSTNAME.log" || true; }

case ${1:-} in
  install | start | cancel | run) "$@" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
