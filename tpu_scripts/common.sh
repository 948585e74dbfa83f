# shellcheck shell=bash
# What tpu.sh and gke.sh share: the env file, dry runs, retries, the code's wheel, the job and its logs.
# It is sourced, not run.
#
# Everything of a job lies in gs://BUCKET/jobs/NAME/, which every host sees as /bucket/jobs/NAME/:
#   code/    the wheel, its commit, host.sh     written by `setup`
#   job.sh   the command                        written by `launch`
#   logs/    a file a host                      copied there each minute by the hosts
#   ended    the exit status                    written by the hosts when there is nothing more to do

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")
SCRIPT=$(basename "$0")
POLL=${POLL:-30}   # seconds between two looks at a state
PAUSE=${PAUSE:-10} # seconds before a second try; each further pause is twice as long
# Verbs that run on several hosts; the others run in one process.
SEVERAL_HOSTS=(train generate-queries mine sets score index search)

say() { printf '%s\n' "$*" >&2; }

# What is so after the commands before it; a dry run has not run them.
tell() { $DRY_RUN || say "$*"; }

# What the person can mend: one line and status 2, as retrieval-jax has it.
refuse() {
  say "$SCRIPT: $*"
  exit 2
}

fail() {
  say "$SCRIPT: $*"
  exit 1
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# Sets VERB, DRY_RUN, ENV_FILE and ARGS (what is for retrieval-jax), and reads the env file.
read_arguments() {
  VERB=${1:-help} DRY_RUN=false ENV_FILE=tpu.env
  shift || true
  while (($#)); do
    case $1 in
      --dry-run) DRY_RUN=true ;;
      --env)
        (($# > 1)) || refuse "--env: give the file after it"
        ENV_FILE=$2
        shift
        ;;
      *) break ;;
    esac
    shift
  done
  ARGS=("$@")
  case $VERB in
    help | -h | --help)
      usage
      exit
      ;;
    create | setup | launch | watch | logs | cancel | stop) ;;
    *) refuse "$VERB: no such verb: $SCRIPT help lists them" ;;
  esac
  [[ $VERB == launch ]] || ((!${#ARGS[@]})) || refuse "${ARGS[0]}: $VERB takes --dry-run and --env FILE only"
  read_env
  # What is printed in a dry run, also by commands whose output is asked for.
  exec 3>&1
}

read_env() {
  [[ -f $ENV_FILE ]] ||
    refuse "$ENV_FILE: no such file: copy tpu_scripts/example.env there, or give --env FILE"
  # shellcheck disable=SC2034 # tpu.sh and gke.sh read them
  SLICES=1 CAPACITY=on-demand RUNTIME='' VALID_UNTIL='' CLUSTER='' IMAGE='' RESERVATION='' CREATE_FLAGS=()
  # shellcheck source=example.env
  . "$ENV_FILE" || refuse "$ENV_FILE: not bash: it holds lines NAME=value"
  local name
  for name in NAME PROJECT ZONE ACCELERATOR BUCKET; do
    [[ -n ${!name:-} ]] || refuse "$ENV_FILE: $name is missing: see tpu_scripts/example.env"
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    refuse "$ENV_FILE: NAME=$NAME: take at most 40 small letters, digits and hyphens, a letter first"
  [[ $BUCKET =~ ^[a-z0-9][-_.a-z0-9]+$ ]] ||
    refuse "$ENV_FILE: BUCKET=$BUCKET: give its name only, without gs://"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || refuse "$ENV_FILE: SLICES=$SLICES: give a number of slices"
  [[ $CAPACITY =~ ^(on-demand|spot|reserved)$ ]] ||
    refuse "$ENV_FILE: CAPACITY=$CAPACITY: take on-demand, spot or reserved"
  [[ $ACCELERATOR =~ ^(v4|v5p|v5litepod|v6e)-[1-9][0-9]*$ ]] ||
    refuse "$ENV_FILE: ACCELERATOR=$ACCELERATOR: take one of the table in tpu_scripts/README.md"
  FOLDER=gs://$BUCKET/jobs/$NAME
}

# --- Running commands ---

# A command as it can be pasted into a shell.
quoted() {
  local word line=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] && line+=("$word") || line+=("${word@Q}")
  done
  printf '%s' "${line[*]}"
}

# Tells a command and runs it; in a dry run prints it only.
run() {
  if $DRY_RUN; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    say "+ $(quoted "$@")"
    "$@"
  fi
}

# The output of a command that changes nothing; in a dry run its first argument, as if it had said so.
ask() {
  local pretended=$1
  shift
  if $DRY_RUN; then
    printf '%s\n' "$(quoted "$@")" >&3
    printf '%s' "$pretended"
  else
    "$@"
  fi
}

# retry TIMES COMMAND…
retry() {
  local times=$1 pause=$PAUSE try
  shift
  for ((try = 1; ; try++)); do
    if run "$@"; then return; fi
    ((try < times)) || return 1
    say "$SCRIPT: try $try of $times failed; again in $pause s"
    sleep "$pause"
    pause=$((pause * 2))
  done
}

# with_input TEXT COMMAND…
with_input() {
  local text=$1
  shift
  if $DRY_RUN; then
    printf "%s <<'END'\n%s\nEND\n" "$(quoted "$@")" "$text" >&3
  else
    run "$@" <<<"$text"
  fi
}

put() { with_input "$1" gcloud storage cp - "$2"; }

write() { with_input "$1" dd status=none of="$2"; }

# From here on, whatever ends the script other than well tells what may cost money, and how to end that.
warn_of_costs() {
  COSTS=$1
  $DRY_RUN || trap tell_costs EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

tell_costs() {
  local status=$?
  ((status == 0)) || say "$SCRIPT: $COSTS may exist and cost money; to end that: $(quoted "$0" stop --env "$ENV_FILE")"
}

# --- The code and the job ---

# Builds the wheel of the commit that is checked out, in BUILD. Its version ends in +gCOMMIT.
build_wheel() {
  local code=(retrieval_jax gin_configs setup.py pyproject.toml) changed
  local pages=(MANIFEST.in README.md LICENSE CITATION.cff CHANGELOG.md) # which setup.py reads
  changed=$(git -C "$ROOT" status --porcelain -- "${code[@]}")
  changed=$(head -n 1 <<<"$changed" | cut -c 4-)
  [[ -z $changed ]] || refuse "$changed: not committed: commit what shall run, or stash it"
  COMMIT=$(git -C "$ROOT" rev-parse --short=12 HEAD)
  BUILD=$ROOT/build/tpu/$COMMIT
  run rm -rf "$BUILD"
  run mkdir -p "$BUILD/source" "$BUILD/code"
  run git -C "$ROOT" archive "--output=$BUILD/source.tar" "$COMMIT" "${code[@]}" "${pages[@]}"
  run tar -x -C "$BUILD/source" -f "$BUILD/source.tar"
  write "[egg_info]
tag_build = +g$COMMIT" "$BUILD/source/setup.cfg"
  run python3 -m pip wheel --quiet --no-deps --wheel-dir "$BUILD/code" "$BUILD/source"
  run cp "$HERE/host.sh" "$BUILD/code/"
  write "$COMMIT" "$BUILD/code/commit"
}

upload_code() {
  run gcloud storage rsync --recursive --delete-unmatched-destination-objects "$BUILD/code" "$FOLDER/code"
}

# hosts CHIPS: how many hosts the run has, where up to CHIPS v5e or v6e chips sit in one.
hosts() {
  local one_host=$1 size=${ACCELERATOR##*-} chips
  case $ACCELERATOR in
    v4-* | v5p-*) chips=$((size / 2)) one_host=4 ;; # named after their cores, two a chip
    *) chips=$size ;;
  esac
  echo $(((chips <= one_host ? 1 : chips / 4) * SLICES))
}

# The status that the job ended with; nothing where it has not.
ended() { ask "" gcloud storage cat "$FOLDER/ended" 2>/dev/null || true; }

# Whether the bucket has a file of the job.
has() { grep -qxF "$FOLDER/$1" <<<"$FILES"; }

refuse_while_a_job_runs() {
  FILES=$(ask "$FOLDER/ended" gcloud storage ls "$FOLDER/" 2>/dev/null) || FILES=''
  if has job.sh && ! has ended; then
    refuse "$FOLDER/job.sh: under way: \`$SCRIPT watch\` follows it, \`$SCRIPT cancel\` ends it"
  fi
}

# upload_job HOSTS: the command line of ARGS, as a script that every host runs. A gin file that is not in the
# wheel goes along.
upload_job() {
  local verb=${ARGS[0]:-} argument file words=(retrieval-jax) line
  [[ -n $verb ]] || refuse "launch: give retrieval-jax's verb and options after it: train --gin_file=…"
  for argument in "${ARGS[@]}"; do
    file=${argument#--gin_file=}
    if [[ $argument == --gin_file=* && -f $file ]]; then
      run gcloud storage cp "$file" "$FOLDER/gin/$file"
      argument=--gin_file=jobs/$NAME/gin/$file
    fi
    words+=("$argument")
  done
  line=$(quoted "${words[@]}")
  if (($1 > 1)); then
    [[ " ${SEVERAL_HOSTS[*]} " == *" $verb "* ]] ||
      refuse "$verb: runs in one process, and $ACCELERATOR × $SLICES has $1 hosts: take a slice of one host"
    [[ $line == *--gin.multihost.enabled=* ]] || line+=' --gin.multihost.enabled=True'
  fi
  put "#!/bin/bash
exec $line" "$FOLDER/job.sh"
  if has ended; then run gcloud storage rm "$FOLDER/ended"; fi # of an earlier job
}

# Ends the script with the job's status once it has one; before, tells the newest line of progress, which the
# first process writes once a minute.
exit_if_ended() {
  local status line
  status=$(ended)
  if [[ -z $status ]]; then
    line=$( (ask "" gcloud storage cat --range=-2000 "$FOLDER/logs/*.log" 2>/dev/null || true) |
      grep -a ' left' | tail -n 1 || true)
    [[ -z $line ]] || say "$line"
    return
  fi
  case $status in
    0) say "$NAME: done" ;;
    3) say "$NAME: the numbers of the training went wrong: \`$SCRIPT logs\` brings where, and what helps" ;;
    143) say "$NAME: cancelled; the same command goes on from its last checkpoint" ;;
    *) say "$NAME: ended with status $status: \`$SCRIPT logs\` brings what it said" ;;
  esac
  say "$NAME: what it ran on goes on costing money until \`$SCRIPT stop\`"
  trap - EXIT
  exit "$status"
}

# Tells whoever watches that the job is to stay ended.
mark_cancelled() { [[ -n $(ended) ]] || put 143 "$FOLDER/ended"; }

gather_logs() {
  local here=work/jobs/$NAME/logs
  run mkdir -p "$here"
  run gcloud storage rsync --recursive "$FOLDER/logs" "$here"
  tell "$here/ has a log a host, of every host that ever ran the job"
}
